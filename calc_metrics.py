"""Measure videos against videos: networks, datasets, folders of videos or pictures, npz arrays, any against any.

# Smallest commands
python -m metrics.detectors.registry fetch && \\
python calc_metrics.py --dataset=datasets/labdoom --lres=models/lres.pkl -m fvd16_16f --device=cpu

python calc_metrics.py --real=datasets/labdoom --fake=outputs/samples -m fvd256_16f -m kvd256_16f -m fmd256_16f

A super-resolution network alone is conditioned on real low-resolution clips; the pair is the whole generator, whose
numbers papers report. All metrics share one pass over each side. Each gives one JSON line, printed, and appended to
--path. Under torchrun the ranks share the clips and the values stay the same.
"""

import json
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch

from dnnlib.util import format_time
from metrics import inputs, long_video, metric_main
from metrics.families import parse
from metrics.inputs import Videos
from metrics.plan import PROTOCOLS, Generated, Side
from torch_utils import distributed, host_memory
from training.checkpoint import load_network
from training.data.dataset import ClipDataset
from training.longvideogan.lres.generator import LowResGenerator
from training.longvideogan.sampling import SuperResSource, make_source, open_source
from training.longvideogan.sres.generator import SuperResGenerator

DEFAULT_METRICS = ("fvd2048_128f", "fvd2048_16f")
NETWORK_SUFFIXES = (".pkl", ".safetensors", ".pt")


def _check_names(context: click.Context, option: click.Parameter, names: Sequence[str]) -> Sequence[str]:
    for name in names:
        try:
            if name not in long_video.MEASURES:
                parse(name, long_video.MEASURES)
        except ValueError as error:
            raise click.BadParameter(str(error)) from error
    return names


def _parse_size(context: click.Context, option: click.Parameter, text: str | None) -> tuple[int, int] | None:
    match = re.fullmatch(r"(\d+)x(\d+)", text or "")
    if text and match is None:
        raise click.BadParameter(f"{text!r} is not a size; give height x width, such as 144x256")
    return (int(match[1]), int(match[2])) if match else None


def _parse_paths(context: click.Context, option: click.Parameter, pairs: Sequence[str]) -> dict[str, str]:
    for pair in pairs:
        if "=" not in pair:
            raise click.BadParameter(f"{pair!r} does not name a detector; give NAME=FILE")
    return dict(pair.split("=", 1) for pair in pairs)


@click.command(help=str(__doc__).replace("# Smallest", "\b\nSmallest").replace("\n\npython", "\n\n\b\npython"))
@click.option("--dataset", "dataset_path", help="Dataset folder, with frames of every size in use")
@click.option("--lres", "lres_path", help="Low-resolution network: path or URL", metavar="PATH|URL")
@click.option("--sres", "sres_path", help="Super-resolution network: path or URL", metavar="PATH|URL")
@click.option("--real", "real_path", help="Instead of --dataset: what is measured against", metavar="VIDEOS|NETWORKS")
@click.option("--fake", "fake_path", help="Instead of --lres and --sres: what is measured", metavar="VIDEOS|NETWORKS")
@click.option(
    "--metric",
    "-m",
    "metrics",
    multiple=True,
    default=DEFAULT_METRICS,
    show_default=True,
    callback=_check_names,
    metavar="NAME",
    help=f"Repeatable: {', '.join(metric_main.list_valid_metrics())}, or with other numbers; of long videos: "
    f"{', '.join(long_video.MEASURES)}",
)
@click.option(
    "--protocol",
    help="How clips are chosen and Gaussians fitted: as published for LongVideoGAN, or as others do",
    default="lvg",
    show_default=True,
    type=click.Choice(list(PROTOCOLS)),
)
@click.option("--size", help="Height and width, where a dataset has several", callback=_parse_size, metavar="HxW")
@click.option("--fps", help="Read video files at this rate, and refuse what has another", type=click.FloatRange(min=1))
@click.option(
    "--num-videos",
    help="Videos a side, for measures of long videos",
    default=256,
    show_default=True,
    type=click.IntRange(min=2),
)
@click.option(
    "--num-frames",
    help="Frames of each, for measures of long videos",
    default=300,
    show_default=True,
    type=click.IntRange(min=2),
)
@click.option(
    "--num-runs",
    help="Measure this often, with other clips each time",
    default=1,
    show_default=True,
    type=click.IntRange(min=1),
)
@click.option("--batch", help="Clips at a time  [default: 64 frames]", type=click.IntRange(min=1))
@click.option(
    "--detector-path",
    "detector_paths",
    help="Weights of a detector, in place of those in the cache; repeatable",
    metavar="NAME=FILE|URL",
    multiple=True,
    callback=_parse_paths,
)
@click.option("--replace-cache", help="Compute features of videos anew", type=bool, default=False, show_default=True)
@click.option("--verbose", help="Print progress on stderr", type=bool, default=True, show_default=True)
@click.option(
    "--path",
    "output_path",
    help="Append the results to this file, a JSON line a metric",
    type=click.Path(path_type=Path, dir_okay=False),
)
@click.option("--device", help="[default: cuda if there is a GPU]", type=click.Choice(["cpu", "cuda"]))
@click.option("--seed", help="Chooses the clips, real and generated", default=0, show_default=True)
def main(
    dataset_path: str | None,
    lres_path: str | None,
    sres_path: str | None,
    real_path: str | None,
    fake_path: str | None,
    metrics: Sequence[str],
    size: tuple[int, int] | None,
    fps: float | None,
    num_runs: int,
    output_path: Path | None,
    device: str | None,
    seed: int,
    **options: Any,
) -> None:
    if (fake_path is None) == (lres_path is None and sres_path is None):
        raise click.UsageError("There is nothing to measure, or too much: give --lres, --sres or both, or --fake.")
    if (real_path is None) == (dataset_path is None):
        raise click.UsageError("There is nothing to measure against, or too much: give --dataset or --real.")
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    real_text = str(real_path or dataset_path)
    fake_text = fake_path or ",".join(path for path in (lres_path, sres_path) if path)
    named = {"real_path": real_text, "fake_path": fake_text, "lres_path": lres_path, "sres_path": sres_path}
    rank = int(os.environ.get("RANK", "0"))
    try:
        where = distributed.init(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        host_memory.keep_freed(where)
        with distributed.together():
            real, fake = _open_sides(real_text, fake_path, lres_path, sres_path, size, fps, where)
        runs = [
            metric_main.calc_metrics(metrics, real, fake, seed=seed + run, device=where, **options)
            for run in range(num_runs)
        ]
        if distributed.is_main():
            for results in zip(*runs, strict=True):
                _report({**_combine(list(results)), **named}, output_path)
        distributed.print0(f"Next: {_next_command(real_text, fake_path, lres_path, sres_path)}")
    except distributed.SharedError as error:
        if rank:
            sys.exit(1)
        raise click.ClickException(str(error)) from error
    except (ValueError, OSError) as error:
        raise click.ClickException(f"rank {rank}: {error}" if rank else str(error)) from error
    finally:
        distributed.shutdown()


# ----------------------------------------------------------------------------
# Sides.


def _open_sides(
    real_text: str,
    fake_path: str | None,
    lres_path: str | None,
    sres_path: str | None,
    size: tuple[int, int] | None,
    fps: float | None,
    device: torch.device,
) -> tuple[Side, Side]:
    """Both sides; a dataset that has several sizes is read at that of the other side."""
    if fake_path is None:
        fake: Side = Generated(open_source(lres_path, sres_path, device))
    else:
        fake = _open_side(fake_path, size, fps, device)
    if size is None:
        size = fake.size if isinstance(fake, Videos) else (fake.source.height, fake.source.width)  # pyright: ignore
        size = size if inputs.is_dataset(real_text) else None
    real = _open_side(real_text, size, fps, device)
    return _conditioned(real, real_text), _conditioned(fake, real_text)


def _open_side(text: str, size: tuple[int, int] | None, fps: float | None, device: torch.device) -> Side:
    """Videos at a path, or the source of one network or of two with a comma between them."""
    paths = text.split(",")
    if not all(path.endswith(NETWORK_SUFFIXES) for path in paths):
        return inputs.open_videos(text, size, fps)
    networks: dict[type, Any] = {}
    for path in paths:
        network = load_network(path, device)
        networks[type(network)] = network
    if len(networks) < len(paths) or not networks.keys() <= {LowResGenerator, SuperResGenerator}:
        kinds = " and ".join(kind.__name__ for kind in networks)
        raise ValueError(f"{text} holds {kinds}: give a low-resolution network, a super-resolution network, or both")
    return Generated(make_source(networks.get(LowResGenerator), networks.get(SuperResGenerator)))


def _conditioned(side: Side, real_text: str) -> Side:
    """A super-resolution network alone gets the low-resolution frames of the dataset that it is measured against."""
    if not isinstance(side, Generated) or not isinstance(side.source, SuperResSource):
        return side
    low = (side.source.network.lres_height, side.source.network.lres_width)
    if not inputs.is_dataset(real_text):
        raise ValueError(
            f"a super-resolution network alone needs real frames of {low[0]}x{low[1]} to enlarge, which {real_text} "
            "does not have: measure against a dataset of both sizes, or give the low-resolution network too"
        )
    both = ClipDataset(real_text, [(side.source.height, side.source.width), low])  # refuses sizes of different clips
    return Generated(side.source, Videos(both, low, "dataset"))


# ----------------------------------------------------------------------------
# Results.


def _combine(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """One result of several runs: each value under <key>_run01, <key>_run02 ..., and their mean and population std;
    errors and floors of each run likewise."""
    if len(runs) == 1:
        return runs[0]
    combined: dict[str, dict[str, float]] = {}
    for part in ("results", "errors", "floors"):
        combined[part] = {}
        for key in runs[0].get(part, {}):
            values = [run[part][key] for run in runs]
            combined[part] |= {f"{key}_run{number:02d}": value for number, value in enumerate(values, start=1)}
            if part == "results":
                combined[part] |= {f"{key}_mean": float(np.mean(values)), f"{key}_std": float(np.std(values))}
    total_time = sum(run["total_time"] for run in runs)
    times = {"total_time": total_time, "total_time_str": format_time(total_time)}
    return {**runs[0], **combined, **times, "num_runs": len(runs)}


def _report(result: dict[str, Any], output_path: Path | None) -> None:
    line = json.dumps(result)
    click.echo(line)
    if output_path is not None:
        output_path.parent.mkdir(parents=True, exist_ok=True)
        with open(output_path, "a") as file:
            file.write(line + "\n")


def _next_command(real_text: str, fake_path: str | None, lres_path: str | None, sres_path: str | None) -> str:
    if fake_path is not None:
        return f"python calc_metrics.py --real={real_text} --fake={fake_path} -m color_similarity -m loop_rate"
    if lres_path is None:
        return f"python calc_metrics.py --dataset={real_text} --lres=LRES.pkl --sres={sres_path}"
    networks = f"--lres={lres_path}" + (f" --sres={sres_path}" if sres_path else "")
    return f"python generate.py --outdir=outputs --seed=0 {networks}"


if __name__ == "__main__":
    main()
