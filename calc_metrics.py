"""Measure videos against videos: models, datasets, folders of videos or pictures, npz arrays, any against any.

# Smallest commands
python -m metrics.detectors.registry fetch && \\
python calc_metrics.py --dataset=datasets/labdoom --model=MODEL.pkl -m fvd16_16f --device=cpu

python calc_metrics.py --real=datasets/labdoom --fake=outputs/samples -m fvd256_16f -m kvd256_16f -m fmd256_16f

A model that needs context frames is given real ones of the dataset that it is measured against. All metrics share one
pass over each side. Each gives one JSON line, printed, and appended to --path. Under torchrun the ranks share the clips
and the values stay the same.
"""

import dataclasses
import difflib
import json
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import numpy as np

from dnnlib import threads
from dnnlib.util import format_time
from metrics import families
from metrics.protocols import EvalProtocol, protocols
from training import registry
from training.command_line import AUTO, SIZE, Given, check_device, combine, model_options, on_ranks, take_model

if TYPE_CHECKING:  # torch is imported by `main`, so that --help is fast
    import torch

    from metrics.inputs import Videos
    from metrics.plan import Side
    from training.sampling import Sampler

DEFAULT_METRICS = ("fvd2048_128f", "fvd2048_16f")
NETWORK_SUFFIXES = (".pkl", ".safetensors", ".pt")
PRECISIONS = ("fp32", "fp16", "bf16", AUTO)  # of generation
COUNT = click.IntRange(min=1)
SEVERAL = click.IntRange(min=2)


# ----------------------------------------------------------------------------
# Options.


def _check_names(context: click.Context, option: click.Parameter, names: Sequence[str]) -> Sequence[str]:
    try:
        families.check_names(names)
    except ValueError as error:
        raise click.BadParameter(str(error)) from error
    return names


def _find_protocol(context: click.Context, option: click.Parameter, name: str) -> EvalProtocol:
    found = protocols()
    if name not in found:
        near = difflib.get_close_matches(name, found, n=1)
        guess = f"; did you mean {near[0]}?" if near else ""
        raise click.BadParameter(f"there is no protocol {name!r}, but {', '.join(found)}{guess}")
    return found[name]


def _parse_pairs(context: click.Context, option: click.Parameter, pairs: Sequence[str]) -> dict[str, str]:
    for pair in pairs:
        if "=" not in pair:
            raise click.BadParameter(f"{pair!r} has no value; give {option.metavar}")
    return dict(pair.split("=", 1) for pair in pairs)


@click.command(help=str(__doc__).replace("# Smallest", "\b\nSmallest").replace("\n\npython", "\n\n\b\npython"))
@click.option("--dataset", "dataset_path", help="Dataset folder, with frames of every size in use")
@model_options("model")
@combine([
    click.option("--real", "real_path", help="Instead of --dataset: what is measured against",
                 metavar="VIDEOS|NETWORKS"),
    click.option("--fake", "fake_path", help="Instead of a model: what is measured", metavar="VIDEOS|NETWORKS"),
    click.option("--metric", "-m", "metrics", multiple=True,
                 callback=_check_names, metavar="NAME",
                 help=f"Repeatable: {', '.join(families.list_valid_metrics())}, or with other numbers; of long videos: "
                 f"{', '.join(families.LONG_MEASURES)}  [default: those of the protocol, else "
                 f"{', '.join(DEFAULT_METRICS)}]"),
    click.option("--protocol", default="lvg", show_default=True, callback=_find_protocol, metavar="NAME",
                 help=f"How clips are chosen, predicted and compared: {', '.join(protocols())}"),
    click.option("--context-frames", "context", type=click.IntRange(min=0),
                 help="Real frames before each prediction  [default: those that the model needs]"),
    click.option("--horizon", type=COUNT, help="Frames of each prediction  [default: those that a metric needs]"),
    click.option("--samples", type=COUNT, help="Predictions of each context  [default: 1, or as the protocol says]"),
    click.option("--size", help="Height and width, where a dataset has several", type=SIZE),
    click.option("--fps", help="Read video files at this rate, and refuse others", type=click.FloatRange(min=1)),
    click.option("--num-videos", help="Videos a side, for measures of long videos  [default: 256, or as the protocol "
                 "says]", type=SEVERAL),
    click.option("--num-frames", help="Frames of each, for measures of long videos  [default: 300, or as the protocol "
                 "says]", type=SEVERAL),
    click.option("--num-runs", help="Measure this often, with other clips each time  [default: 1, or as the protocol "
                 "says]", type=COUNT),
    click.option("--bound", type=bool, help="Measure first what the tokenizer of the model reconstructs, which bounds "
                 "its distances  [default: no, or as the protocol says]"),
    click.option("--batch", help="Clips at a time  [default: 64 frames, or what suits the model]", type=COUNT),
    click.option("--detector-path", "detector_paths", multiple=True, callback=_parse_pairs, metavar="NAME=FILE|URL",
                 help="Weights of a detector, in place of those in the cache; repeatable"),
    click.option("--replace-cache", help="Compute features of videos anew", type=bool, default=False,
                 show_default=True),
    click.option("--verbose", help="Print progress on stderr", type=bool, default=True, show_default=True),
    click.option("--path", "output_path", help="Append the results to this file, a JSON line a metric",
                 type=click.Path(path_type=Path, dir_okay=False)),
    click.option("--device", help="[default: cuda if there is a GPU]", type=click.Choice(["cpu", "cuda"])),
    click.option("--precision", help="Of the model that generates, as for generate.py; detectors compute in fp32",
                 default="fp32", show_default=True, type=click.Choice(PRECISIONS)),
    click.option("--seed", help="Chooses the clips, real and generated", default=0, show_default=True),
])  # fmt: skip
def main(
    dataset_path: str | None,
    real_path: str | None,
    fake_path: str | None,
    metrics: Sequence[str],
    size: tuple[int, int] | None,
    fps: float | None,
    num_runs: int | None,
    bound: bool | None,
    output_path: Path | None,
    device: str | None,
    precision: str,
    seed: int,
    **values: Any,
) -> None:
    """See the module's docstring."""
    threads.share_cores()
    import torch

    from metrics.inputs import Videos
    from torch_utils import distributed, host_memory

    given = take_model(values)
    real_text = _check_given(given, dataset_path, real_path, fake_path)
    names = ("context", "horizon", "samples", "num_videos", "num_frames")
    changes = {name: value for name in names if (value := values.pop(name)) is not None}
    rules = values["protocol"] = dataclasses.replace(values["protocol"], **changes)
    values |= {"num_videos": rules.num_videos, "num_frames": rules.num_frames}
    metrics = metrics or rules.metrics or DEFAULT_METRICS
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    with on_ranks():
        where = distributed.init(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        host_memory.keep_freed(where)
        with distributed.together():
            check_device(where.type, precision)
            sides = real, fake = _open_sides(real_text, fake_path or "", given, size, fps, where)
            named = {**_named(given, real_text, fake_path), **_set_precision(fake, precision)}
            is_wanted = rules.has_bound if bound is None else bound
            reconstructed = _open_bound(given, sides, bool(bound), where) if is_wanted else None
        if distributed.is_main():
            _say_left_out(sides)
        repeats = {"device": where, "seeds": range(seed, seed + (num_runs or rules.runs))}
        if reconstructed is not None:
            alone = dataclasses.replace(rules, context=None, horizon=None, samples=1)
            bounds = _measure(_distances(metrics), (real, reconstructed), **{**values, "protocol": alone, **repeats})
            for result in bounds:
                _report({**result, **named, "bounds": True}, output_path)
        for result in _measure(metrics, sides, **values, **repeats):
            _report({**result, **named}, output_path)
        words = ["generate.py", "--outdir=outputs", "--seed=0", *given.flags]
        if not isinstance(fake, Videos) and fake.prompts is not None and fake.sampler.needs.frames:
            words.append(f"--context={real_text}")
        if fake_path:
            measures = ("-m", "color_similarity", "-m", "loop_rate")
            words = ["calc_metrics.py", f"--real={real_text}", f"--fake={fake_path}", *measures]
        distributed.print0(f"Next: python {shlex.join(words)}")


def _check_given(given: Given, dataset_path: str | None, real_path: str | None, fake_path: str | None) -> str:
    """Return the path of what is measured against; raise a usage error unless both sides are given once."""
    if bool(fake_path) == bool(given.models):
        several = ", ".join(["--model", *(alias.flag for alias in registry.aliases() if alias.target == "model")])
        raise click.UsageError(f"There is nothing to measure, or too much: give {several} or --fake.")
    if (real_path is None) == (dataset_path is None):
        raise click.UsageError("There is nothing to measure against, or too much: give --dataset or --real.")
    return str(real_path or dataset_path)


def _named(given: Given, real_text: str, fake_path: str | None) -> dict[str, Any]:
    """Return the entries of a result that name both sides and the options of the sampler."""
    paths = [model.path for model in given.models]
    roles = {f"{a.role}_path": given.roles.get(a.role) for a in registry.aliases() if a.target == "model"}
    named = {**roles, "real_path": real_text, "fake_path": fake_path or ",".join(paths), "model_path": paths}
    return {**named, "options": given.options} if given.options else named


# ----------------------------------------------------------------------------
# Sides.


def _open_sides(
    real_text: str,
    fake_text: str,
    given: Given,
    size: tuple[int, int] | None,
    fps: float | None,
    device: "torch.device",
) -> "tuple[Side, Side]":
    """Open both sides; a dataset that has several sizes is read at that of the other side."""
    from metrics import inputs, metric_main
    from training.sampling import open_sampler

    def open_side(text: str, options: Mapping[str, Any]) -> "Videos | Sampler":
        paths = text.split(",")
        if all(path.endswith(NETWORK_SUFFIXES) for path in paths):
            return open_sampler(paths, options, device)
        if options:
            raise ValueError(f"-o is for the sampler of a model, and {text} holds videos: leave out -o")
        return inputs.open_videos(text, size, fps)

    if given.models:
        fake, fake_text = open_sampler(given.models, given.options, device), given.models[-1].path
    else:
        fake = open_side(fake_text, given.options)
    if size is None and inputs.is_dataset(real_text):
        size = fake.size
    real = open_side(real_text, {})
    return metric_main.prompted(real, fake, real_text), metric_main.prompted(fake, real, fake_text)


def _set_precision(fake: "Side", precision: str) -> dict[str, str]:
    """Let a model generate in this precision; return the entry of a result that names it, none for fp32."""
    from metrics import inputs
    from torch_utils.precision import set_precision

    if precision == "fp32":
        return {}
    if isinstance(fake, inputs.Videos):
        raise ValueError("--precision is for a model that generates: leave it out for --fake")
    chosen = set_precision(fake.sampler.networks, precision)
    return {} if chosen == "fp32" else {"precision": chosen}


def _open_bound(given: Given, sides: "tuple[Side, Side]", is_asked: bool, device: "torch.device") -> "Side | None":
    """Return the side that the tokenizer of the model reconstructs, None if there is none and it was not asked for."""
    from metrics import inputs, metric_main
    from training.sampling import open_reconstruction

    real, fake = sides
    sampler = None
    if isinstance(real, inputs.Videos) and not isinstance(fake, inputs.Videos) and not fake.reconstructs:
        sampler = open_reconstruction(given.models, device)
    if sampler is not None and isinstance(real, inputs.Videos):
        return metric_main.prompted(sampler, real, given.models[-1].path)
    if is_asked:
        raise ValueError("--bound is for models whose file holds a tokenizer, against footage: leave it out")
    return None


def _say_left_out(sides: "tuple[Side, Side]") -> None:
    from dnnlib.text import escape
    from metrics import inputs

    for side in sides:
        if isinstance(side, inputs.Videos):
            for line in side.remarks:
                click.echo(f"{escape(side.footage.name)}: {line}", err=True)


# ----------------------------------------------------------------------------
# Results.


def _distances(metrics: Sequence[str]) -> list[str]:
    """Return the distances among some metrics that reconstructions have, too."""
    parsed = [families.parse(name) for name in metrics if name not in families.LONG_MEASURES]
    return [metric.name for metric in parsed if metric.family.is_distance and not metric.shape.context]


def _measure(
    metrics: Sequence[str], sides: "tuple[Side, Side]", seeds: Sequence[int], **options: Any
) -> list[dict[str, Any]]:
    """Return the result of each metric, over runs with these seeds."""
    from metrics import metric_main

    if not metrics:
        return []
    runs = [metric_main.calc_metrics(metrics, *sides, seed=seed, **options) for seed in seeds]
    return [_combine(list(results)) for results in zip(*runs, strict=True)]


def _combine(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Return one result of several runs: each value under <key>_run01, <key>_run02 ..., and their mean and population
    standard deviation; errors and floors of each run likewise, of floors and baselines the mean."""
    if len(runs) == 1:
        return runs[0]
    combined: dict[str, dict[str, Any]] = {}
    for part in ("results", "errors", "floors"):
        combined[part] = {}
        for key in runs[0].get(part, {}):
            values = [run[part][key] for run in runs]
            combined[part] |= {f"{key}_run{number:02d}": value for number, value in enumerate(values, start=1)}
            if part != "errors":
                combined[part][f"{key}_mean"] = float(np.mean(values))
            if part == "results":
                combined[part][f"{key}_std"] = float(np.std(values))
    for what, found in runs[0].get("baselines", {}).items():
        means = {f"{key}_mean": float(np.mean([run["baselines"][what][key] for run in runs])) for key in found}
        combined.setdefault("baselines", {})[what] = means
    total_time = sum(run["total_time"] for run in runs)
    times = {"total_time": total_time, "total_time_str": format_time(total_time)}
    return {**runs[0], **combined, **times, "num_runs": len(runs)}


def _report(result: dict[str, Any], output_path: Path | None) -> None:
    from torch_utils import distributed

    if not distributed.is_main():
        return
    line = json.dumps(result)
    click.echo(line)
    if output_path is not None:
        output_path.parent.mkdir(parents=True, exist_ok=True)
        with open(output_path, "a") as file:
            file.write(line + "\n")


if __name__ == "__main__":
    main()
