"""The evaluation protocols of TECO: whole clips with their context in groups of 256, and predictions frame by frame."""

from metrics.protocols import paired, prediction

GROUP = 256
PROTOCOLS = {
    "teco-36to264": prediction("teco-36to264", 36, 264, ("fvd1024_300f_context36",), group_size=GROUP),
    "teco-20to80": prediction("teco-20to80", 20, 80, ("fvd1024_100f_context20",), group_size=GROUP),
    "teco-144to156": prediction("teco-144to156", 144, 156, paired(1024, 156)),
}
