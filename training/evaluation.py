"""Evaluate metrics during training, and select the best checkpoint."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from dnnlib.util import atomic_path
from torch_utils import distributed, training_stats
from training import checkpoint
from training.contract import System
from training.data.dataset import BatchStream, to_device
from training.logger import SilentLogger
from training.side_files import metric_values, read_lines, read_object

BEST = "best.json"

MetricFunction = Callable[[Sequence[str], Any], Sequence[Mapping[str, Any]]]


VAL_BATCHES = 8  # batches of the validation split per evaluation


@torch.no_grad()
def validate(logger: SilentLogger, model: System, held_out: BatchStream, device: torch.device) -> bool:
    """Report the losses of the system on the first batches of the validation split, as "validation/<name>".

    Return whether they were measured: a rank that fails, such as at a damaged frame, costs those of all ranks.
    """
    specs = model.batch_spec(0)
    losses, error = [], None
    try:
        for first in range(0, VAL_BATCHES * len(specs), len(specs)):
            batches = (to_device(held_out.batch(first + index, spec), device) for index, spec in enumerate(specs))
            losses += model.validate(batches).items()
    except Exception as caught:
        error = caught
    error = next((error for error in distributed.gather_errors(error) if error is not None), None)
    if error is not None:
        logger.failed("validation", error)
        return False
    for name, value in losses:
        training_stats.report(f"validation/{name.removeprefix('loss/')}", value)
    return True


def evaluate(
    logger: SilentLogger,
    model: Any,
    metric_fn: MetricFunction,
    metrics: tuple[str, ...],
    run_dir: Path,
    step: int,
) -> None:
    """Evaluate the metrics without a result for this step; a run may have stopped between saving and evaluation.

    All metrics share one pass over the videos; if that fails, each is evaluated alone. A metric that fails then is
    logged and training continues, except after a failure of one rank inside a collective operation: the other ranks
    then wait until the timeout of the process group ends it.
    """

    def known(name: str) -> bool:
        return any(line["step"] == step and "error" not in line for line in results_of(run_dir, name))

    unknown = [name for name in metrics if not known(name)] if distributed.is_main() else []
    names = distributed.broadcast_object(unknown)
    if not names:
        return
    for name, result, error in _measured(metric_fn, names, model):
        with logger.optional(f"metric/{name}"):
            _log_metric(logger, name, result, error, metrics, run_dir, step)


def _measured(
    metric_fn: MetricFunction, names: Sequence[str], model: Any
) -> Iterator[tuple[str, Mapping[str, Any], Exception | None]]:
    """Yield each name with its result, or with the first error of any rank; all together, else one by one."""
    results, error = [], None
    try:
        results = metric_fn(names, model)
    except Exception as caught:
        error = caught
    error = next((error for error in distributed.gather_errors(error) if error is not None), None)
    if error is None:
        yield from ((name, result, None) for name, result in zip(names, results, strict=True))
    elif len(names) == 1:
        yield names[0], {}, error
    else:
        for name in names:
            yield from _measured(metric_fn, [name], model)


def _log_metric(
    logger: SilentLogger,
    name: str,
    result: Mapping[str, Any],
    error: Exception | None,
    metrics: tuple[str, ...],
    run_dir: Path,
    step: int,
) -> None:
    """Log the result of a metric, and update the best checkpoint."""
    if error is not None:
        result = {"error": f"{type(error).__name__}: {error}"}
        logger.text(f"step {step}  metric/{name} failed ({result['error']}); training goes on")
    logger.metric(step, name, {**result, "checkpoint": checkpoint.network_path(run_dir, step).name})
    if distributed.is_main() and name == metrics[0]:
        mark_best(run_dir, metrics)
    if error is None:
        values = "  ".join(f"metric/{key} {value:.6g}" for key, value in metric_values(result).items())
        best = distributed.is_main() and best_steps(run_dir, metrics) == [step] and name == metrics[0]
        logger.text(f"step {step}  {values}{'  best so far, kept' if best else ''}")


def results_of(run_dir: Path, metric: str) -> list[dict[str, Any]]:
    """Return the results of a metric, as they were logged."""
    return read_lines(run_dir / f"metric-{metric}.jsonl", step=int)


def best_steps(run_dir: Path, metrics: tuple[str, ...]) -> list[int]:
    """Return the step of the best checkpoint by the first metric; empty if it has not been evaluated.

    Lower is better, unless the result has `"higher_is_better": true`. If `metrics` is empty, the metric that was first
    before still decides; where best.json does not tell which, that is the best step of each.
    """
    if not metrics:
        known = sorted(path.stem.removeprefix("metric-") for path in run_dir.glob("metric-*.jsonl"))
        first = read_object(run_dir / BEST).get("metric")
        return [step for name in known if first not in known or name == first for step in best_steps(run_dir, (name,))]
    scores = []
    for line in results_of(run_dir, metrics[0]):
        value = next(iter(metric_values(line).values()), None)
        if value is not None:
            scores.append((-value if line.get("higher_is_better") else value, line["step"]))
    return [min(scores)[1]] if scores else []


def mark_best(run_dir: Path, metrics: tuple[str, ...]) -> None:
    """Write the best checkpoint by the first metric to best.json, if that metric has been evaluated."""
    for step in best_steps(run_dir, metrics) if metrics else []:
        (line,) = [line for line in results_of(run_dir, metrics[0]) if line["step"] == step][-1:]
        path = checkpoint.network_path(run_dir, step).relative_to(run_dir)
        best = {"metric": metrics[0], "step": step, "checkpoint": str(path), "results": metric_values(line)}
        with atomic_path(run_dir / BEST) as temporary:
            temporary.write_text(json.dumps(best, indent=2) + "\n")
