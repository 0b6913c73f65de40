"""Evaluation protocols of MeBT's release: random clips of both sides, several times. Imports no torch."""

from metrics.protocols import EvalProtocol


def released(name: str, num_clips: int, num_frames: int, runs: int) -> EvalProtocol:
    """Return a protocol of unconditional videos, whose distances have the scale of TATS's."""
    metrics = tuple(f"{kind}{num_clips}_{num_frames}f" for kind in ("fvd", "kvd"))
    return EvalProtocol(
        name, "passes", has_phase=False, has_weights=False, is_unbiased=True, runs=runs, metrics=metrics
    )


PROTOCOLS = {"mebt-16": released("mebt-16", 2048, 16, 10), "mebt-128": released("mebt-128", 512, 128, 5)}
