"""Evaluate the checkpoints of a run against held-out videos: a line per checkpoint and metric, for a curve.

# Low-resolution stage by itself, over its steps
python -m runs.curve runs/labdoom/lres/00000-* --dataset=data/labdoom/val -m fvd256_16f --out=outputs/lres.jsonl

# The same frames at full size: by the super-resolution stage, and by bicubic interpolation
python -m runs.curve LRES.pkl --sres=SRES.pkl --dataset=data/labdoom/val -m fvd256_16f --out=outputs/pair.jsonl
python -m runs.curve LRES.pkl --bicubic=72x128 --dataset=data/labdoom/val -m fvd256_16f --out=outputs/bicubic.jsonl

# Draw
python -m metrics.report outputs/lres.jsonl --out=outputs/lres.png

NETWORKS are networks or run directories, of which every checkpoint is evaluated, or each `--every` steps. If a run was
initialised by a training state of another one (`--init-from`), its steps are counted from there. Results that the file
already has are not computed again.
"""

import json
import re
from collections.abc import Sequence
from pathlib import Path

import click
import torch

from dnnlib.text import quote
from metrics import inputs, metric_main
from torch_utils import host_memory
from training.checkpoint import STATE_NAME, list_networks
from training.network_file import ModelPath
from training.sampling import Resized, open_sampler
from training.side_files import read_lines, read_object

COUNT = click.IntRange(min=1)


def parse_size(context: click.Context, option: click.Parameter, text: str | None) -> tuple[int, int] | None:
    """Parse a size such as 72x128: (height, width)."""
    if text is None:
        return None
    match = re.fullmatch(r"(\d+)x(\d+)", text)
    if match is None:
        raise click.BadParameter(f"{text!r} is not a size; give height x width, such as 72x128")
    return int(match[1]), int(match[2])


def find_networks(paths: Sequence[Path], every: int = 1) -> list[tuple[int | None, Path]]:
    """Return networks with their steps, if their names contain them; of a run directory the EMA generators."""
    found: list[tuple[int | None, Path]] = []
    for path in paths:
        if path.is_dir():
            checkpoints = list_networks(path)
            if not checkpoints:
                raise ValueError(f"{path} has no checkpoints: give a run directory, such as runs/lres/00000-...")
            first = first_step(path)
            # At step 0 such a run has its initial network, which belongs to the other run.
            checkpoints = [(step, network) for step, network in checkpoints if step or not first]
            found += [(first + step, network) for step, network in checkpoints if step % every == 0]
        else:
            named = re.fullmatch(r"ckpt-(\d+)-G-ema\..*", path.name)
            found.append((int(named[1]) if named else None, path))
    return found


def first_step(run_dir: Path) -> int:
    """Return the first step of a run: 0, or that of the training state named by `--init-from`."""
    init_from = read_object(run_dir / "options.json").get("init_from")
    named = re.fullmatch(STATE_NAME, str(init_from).rpartition("/")[2])
    return int(named[1]) if named else 0


def best(metric: str, *files: Path) -> str | None:
    """Return the low-resolution network of the lowest value in result files; None if a metric has several."""
    lines = [line for path in files for line in read_lines(path, results=dict)]
    values = [(line["results"][metric], line["lres"]) for line in lines if metric in line["results"]]
    return min(values)[1] if values else None


@click.command(help=str(__doc__).replace("\n# ", "\n\b\n# "))
@click.argument("networks", nargs=-1, required=True, type=click.Path(exists=True, path_type=Path))
@click.option("--dataset", help="Videos to compare with", required=True)
@click.option("--every", help="Evaluate only the checkpoints at multiples of this step", default=1, type=COUNT)
@click.option("--sres", help="Enlarge frames with this super-resolution network; path, URL or name")
@click.option(
    "--bicubic", help="Enlarge frames to this size by bicubic interpolation", callback=parse_size, metavar="HxW"
)
@click.option("--metric", "-m", "metrics", help="Metric; repeatable", multiple=True, required=True)
@click.option(
    "--num-videos", help="Videos per side, for metrics of long videos", default=64, show_default=True, type=COUNT
)
@click.option("--num-frames", help="Their frames", default=300, show_default=True, type=COUNT)
@click.option("--seed", help="Chooses the clips, real and generated", default=0, show_default=True)
@click.option("--device", help="[default: cuda if there is a GPU]", type=click.Choice(["cpu", "cuda"]))
@click.option("--out", help="JSON lines are added to this file", required=True, type=click.Path(path_type=Path))
def main(
    networks: Sequence[Path],
    dataset: str,
    every: int,
    sres: str | None,
    bicubic: tuple[int, int] | None,
    metrics: Sequence[str],
    num_videos: int,
    num_frames: int,
    seed: int,
    device: str | None,
    out: Path,
) -> None:
    """See the module's docstring."""
    if sres and bicubic:
        raise click.UsageError("--sres and --bicubic are two ways to enlarge the same frames: give one of them.")
    where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    host_memory.keep_freed(where)
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    out.parent.mkdir(parents=True, exist_ok=True)
    try:
        for step, path in find_networks(networks, every):
            name = {"lres": str(path), "sres": sres, "bicubic": bicubic and f"{bicubic[0]}x{bicubic[1]}"}
            known = [line["metric"] for line in read_lines(out, metric=str) if name.items() <= line.items()]
            missing = [metric for metric in metrics if metric not in known]
            if not missing:
                continue
            models = [ModelPath(str(path), "lres"), *([ModelPath(sres, "sres")] if sres else [])]
            sampler = open_sampler(models, device=where)
            sampler = Resized(sampler, bicubic) if bicubic else sampler
            real = inputs.open_videos(dataset, sampler.size)
            fake = metric_main.prompted(sampler, real, str(path))
            options = {"seed": seed, "device": where, "num_videos": num_videos, "num_frames": num_frames}
            for result in metric_main.calc_metrics(missing, real, fake, **options):
                line = {**({} if step is None else {"step": step}), **result, **name}
                with out.open("a") as file:
                    file.write(json.dumps(line) + "\n")
                values = ", ".join(f"{key} {value:.5g}" for key, value in result["results"].items())
                click.echo(f"{path}: {values}")
    except (ValueError, OSError) as error:
        raise click.ClickException(str(error)) from error
    for metric in metrics:
        if lowest := best(metric, out):
            click.echo(f"Lowest {metric}: {lowest}")
    click.echo(f"Next: python -m metrics.report {quote(out)} --out={quote(out.with_suffix('.png'))}")


if __name__ == "__main__":
    main()
