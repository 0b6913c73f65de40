"""Options of systems that train one network on a frozen tokenizer. Imports no torch, so that `--help` is quick."""

import dataclasses

from training.flags import SCHEDULES, option


@dataclasses.dataclass
class PriorOptions:
    """Options of a run; a system's own options are a subclass, which may change the defaults."""

    tokenizer: str = option("", "File of the tokenizer whose codes the dataset has", needed=True)
    lr: float = option(1e-4, "Peak of the learning rate", low=0)
    schedule: str = option("constant", "Course of the learning rate", kind=SCHEDULES)
    warmup_steps: int = option(0, "Steps over which the learning rate rises from 0", low=0)
    weight_decay: float = option(0.0, "Weight decay of AdamW on matrices", low=0)
    clip_norm: float = option(0.0, "Largest norm of the gradient; 0: any", low=0)
    ema_beta: float = option(0.0, "Decay of the moving average of the weights, a step; 0: no average", low=0)
