"""Charts of the statistics of a GAN; docs/training.md explains how to read them."""

import math

from training.charts import ChartSpec

CHARTS = (
    # The guide is the loss of a discriminator that cannot distinguish real from fake.
    ChartSpec("Loss", {"loss/G_loss": "G", "loss/D_loss": "D"}, guide=2 * math.log(2)),
    ChartSpec("R1", {"loss/r1_loss": "loss", "loss/r1_penalty": "penalty"}, log=True),
    ChartSpec(
        "Logits of D",
        {"loss/D_score_real": "real", "loss/D_score_fake": "fake", "loss/G_score": "fake in G's step"},
        guide=0.0,
    ),
    ChartSpec(
        "Signs of D's logits",
        {"loss/D_sign_real": "real", "loss/D_sign_fake": "fake", "loss/G_sign": "fake in G's step"},
        guide=0.0,
        limits=(-1.0, 1.0),
    ),
    ChartSpec("Strength of augmentation", {"progress/augment_p": "p"}),
    ChartSpec(
        "Norm of gradients",
        {"progress/G_grad_norm": "G", "progress/D_grad_norm": "D", "progress/R1_grad_norm": "R1"},
        log=True,
    ),
)
