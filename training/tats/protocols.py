"""The evaluation protocols of TATS: random clips against samples from their first frame on; means of ten runs."""

from metrics.protocols import EvalProtocol

RULES = {"windows": "passes", "has_phase": False, "has_weights": False, "is_unbiased": True, "has_bound": True}
PROTOCOLS = {
    "tats": EvalProtocol("tats", **RULES, runs=10, metrics=("fvd2048_16f", "kvd2048_16f")),
    # How quality changes along long videos: windows of 16 frames, 8 apart, against the same real clips.
    "tats-sliding": EvalProtocol(
        "tats-sliding", **RULES, num_videos=512, num_frames=1024, metrics=("fvd_drift", "kvd_drift")
    ),
}
