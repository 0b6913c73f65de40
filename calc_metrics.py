"""Measure trained networks against a dataset: a low-resolution one, a super-resolution one, or the pair.

# Smallest command
python -m metrics.detectors.registry fetch && \\
python calc_metrics.py --dataset=datasets/labdoom --lres=models/lres.pkl -m fvd16_16f --device=cpu

A super-resolution network alone is conditioned on real low-resolution clips; the pair is the whole generator, whose
numbers papers report. Each metric gives one JSON line, printed, and appended to --path. Under torchrun the ranks share
the clips and the value stays the same.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch

from dnnlib.util import format_time
from metrics import metric_main
from torch_utils import distributed
from training.dataset import ClipDataset
from training.longvideogan.sampling import Source, SuperResSource, open_source

DEFAULT_METRICS = ("fvd2048_128f", "fvd2048_16f")


def _check_names(context: click.Context, option: click.Parameter, names: Sequence[str]) -> Sequence[str]:
    for name in names:
        try:
            metric_main.parse(name)
        except ValueError as error:
            raise click.BadParameter(str(error)) from error
    return names


@click.command(help=str(__doc__).replace("# Smallest", "\b\nSmallest"))
@click.option("--dataset", "dataset_path", help="Dataset folder, with frames of every size in use", required=True)
@click.option("--lres", "lres_path", help="Low-resolution network: path or URL", metavar="PATH|URL")
@click.option("--sres", "sres_path", help="Super-resolution network: path or URL", metavar="PATH|URL")
@click.option(
    "--metric",
    "-m",
    "metrics",
    multiple=True,
    default=DEFAULT_METRICS,
    show_default=True,
    callback=_check_names,
    metavar="NAME",
    help=f"Repeatable: {', '.join(metric_main.list_valid_metrics())}, or with other numbers",
)
@click.option(
    "--num-runs",
    help="Measure this often, with other clips each time",
    default=1,
    show_default=True,
    type=click.IntRange(min=1),
)
@click.option(
    "--replace-cache", help="Compute features of real clips anew", type=bool, default=False, show_default=True
)
@click.option("--verbose", help="Print progress", type=bool, default=False, show_default=True)
@click.option(
    "--path",
    "output_path",
    help="Append the results to this file, a JSON line a metric",
    type=click.Path(path_type=Path, dir_okay=False),
)
@click.option("--device", help="[default: cuda if there is a GPU]", type=click.Choice(["cpu", "cuda"]))
@click.option("--seed", help="Chooses the clips, real and generated", default=0, show_default=True)
def main(
    dataset_path: str,
    lres_path: str | None,
    sres_path: str | None,
    metrics: Sequence[str],
    num_runs: int,
    replace_cache: bool,
    verbose: bool,
    output_path: Path | None,
    device: str | None,
    seed: int,
) -> None:
    if lres_path is None and sres_path is None:
        raise click.UsageError("There is nothing to measure: give --lres, --sres or both.")
    try:
        where = distributed.init(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        source, subject = _open(dataset_path, lres_path, sres_path, where)
        for name in metrics:
            runs = [
                metric_main.calc_metric(
                    name,
                    fake_source=source,
                    seed=seed + run,
                    device=where,
                    replace_cache=replace_cache,
                    verbose=verbose,
                    **subject,
                )
                for run in range(num_runs)
            ]
            result = {**_combine(runs), "lres_path": lres_path, "sres_path": sres_path}
            if distributed.is_main():
                _report(result, output_path)
        distributed.print0(f"Next: {_next_command(dataset_path, lres_path, sres_path)}")
    except ValueError as error:
        raise click.ClickException(str(error)) from error
    finally:
        distributed.shutdown()


def _open(
    dataset_path: str, lres_path: str | None, sres_path: str | None, device: torch.device
) -> tuple[Source, dict[str, Any]]:
    """The source of generated video, and what `calc_metric` needs to know of the real ones."""
    source = open_source(lres_path, sres_path, device)
    size = (source.height, source.width)
    condition_size = None
    if isinstance(source, SuperResSource):
        condition_size = (source.network.lres_height, source.network.lres_width)
    real = ClipDataset(dataset_path, [size, condition_size] if condition_size else [size])
    return source, {"real": real, "size": size, "condition_size": condition_size}


def _combine(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """One result of several runs: each value under <key>_run01, <key>_run02 ..., and their mean and population std."""
    if len(runs) == 1:
        return runs[0]
    results = {}
    for key in runs[0]["results"]:
        values = [run["results"][key] for run in runs]
        results |= {f"{key}_run{number:02d}": value for number, value in enumerate(values, start=1)}
        results |= {f"{key}_mean": float(np.mean(values)), f"{key}_std": float(np.std(values))}
    total_time = sum(run["total_time"] for run in runs)
    times = {"total_time": total_time, "total_time_str": format_time(total_time)}
    return {**runs[0], "results": results, **times, "num_runs": len(runs)}


def _report(result: dict[str, Any], output_path: Path | None) -> None:
    line = json.dumps(result)
    click.echo(line)
    if output_path is not None:
        output_path.parent.mkdir(parents=True, exist_ok=True)
        with open(output_path, "a") as file:
            file.write(line + "\n")


def _next_command(dataset_path: str, lres_path: str | None, sres_path: str | None) -> str:
    if lres_path is None:
        return f"python calc_metrics.py --dataset={dataset_path} --lres=LRES.pkl --sres={sres_path}"
    networks = f"--lres={lres_path}" + (f" --sres={sres_path}" if sres_path else "")
    return f"python generate.py --outdir=outputs --seed=0 {networks}"


if __name__ == "__main__":
    main()
