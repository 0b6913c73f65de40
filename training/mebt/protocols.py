"""The evaluation protocols of MeBT: those of TATS at 16 frames; fewer clips of 128, and windows along these."""

from metrics.protocols import EvalProtocol

RULES = {"windows": "passes", "has_phase": False, "has_weights": False, "is_unbiased": True, "has_bound": True}
PROTOCOLS = {
    "mebt-16": EvalProtocol("mebt-16", **RULES, runs=10, metrics=("fvd2048_16f", "kvd2048_16f")),
    "mebt-128": EvalProtocol("mebt-128", **RULES, runs=5, metrics=("fvd512_128f", "kvd512_128f")),
    "mebt-sliding": EvalProtocol(
        "mebt-sliding", **RULES, num_videos=512, num_frames=128, metrics=("fvd_drift", "kvd_drift")
    ),
}
