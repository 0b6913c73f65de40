"""The evaluation protocol of Recall."""

from metrics.protocols import paired, prediction

PROTOCOLS = {"recall-36to8": prediction("recall-36to8", 36, 8, ("fmd4_9f_context1", *paired(4, 8)), samples=2)}
