"""Train a system: one command a system, whose options are those of its `Options`.

# All systems
python train.py --help

# Smallest command (a CPU, minutes)
python train.py longvideogan-lres --dataset=datasets/labdoom --preset=toy

# On 8 GPUs
torchrun --standalone --nproc_per_node=8 train.py longvideogan-lres --dataset=datasets/horseback --batch=64

Run the same command again and training continues where it stopped. --dry-run prints every option of a run.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import sys
from typing import Any

import click

from dnnlib import threads
from dnnlib.text import quote
from training import registry
from training.command_line import (
    PRECISIONS,
    as_help,
    combine,
    field_options,
    merge_fields,
    on_ranks,
    take_fields,
)
from training.registry import Spec

COUNT = click.IntRange(min=1)
INTERVAL = click.IntRange(min=0)
WEIGHT = click.FloatRange(min=0)


def run_options(spec: Spec) -> list[Any]:
    """Return the options of every system; those left out take the preset's value."""
    presets = ", ".join(registry.resolve(spec.presets))
    outdir = spec.outdir or f"runs/{spec.name}"
    loggers: dict[str, Any] = {"multiple": True, "type": click.Choice(["none", "wandb", "tensorboard"])}
    return [
        click.option("--outdir", help="Where the run directory is made", default=outdir, show_default=True),
        click.option("--dataset", help="Root of the dataset, which holds a directory HHHHxWWWW a size"),
        click.option("--val-dataset", help="Held-out clips, on which losses are measured at metric steps"),
        click.option("--preset", help=f"Recipe to begin with: {presets}", default="default", show_default=True),
        # Hyperparameters of every system.
        click.option("--batch", help="Clips in a step, over all ranks and rounds", type=COUNT),
        click.option("--grad-accum", help="Rounds of gradient accumulation", type=COUNT),
        click.option("--steps", help="Train this many steps in all", type=INTERVAL),
        click.option("--seed", help="Seed of weights, data order and every draw", default=0, show_default=True),
        click.option("--x-flip", help="Mirror half of the clips  [default: where the system allows it]", type=bool),
        click.option("--weighting", help="What is drawn equally often", type=click.Choice(["clip", "frame"])),
        click.option("--init-from", help="Begin with the weights of this network or ckpt-...-train.pt; path or URL"),
        # Performance.
        click.option("--device", help="[default: cuda if there is a GPU]", type=click.Choice(["cpu", "cuda"])),
        click.option("--precision", help="Arithmetic of a step  [default: the system's own, as published]",
                     type=click.Choice(PRECISIONS)),
        click.option("--compile", help="Compile parts of the networks first: minutes, once, for faster steps on a GPU",
                     is_flag=True),
        click.option("--workers", help="Threads that decode frames", type=INTERVAL),
        click.option("--cache", help="Where decoded frames are kept", type=click.Choice(["none", "ram", "memmap"])),
        # Watching and keeping.
        click.option("--metric", "-m", "metrics", help="Measure this while training; repeatable", multiple=True),
        click.option("--tick-steps", help="Steps between status lines", type=COUNT),
        click.option("--sample-steps", help="Steps between previews; 0: only the last", type=INTERVAL),
        click.option("--metric-steps", help="Steps between metrics; 0: only the last", type=INTERVAL),
        click.option("--checkpoint-steps", help="Steps between checkpoints; 0: only by time", type=INTERVAL),
        click.option("--checkpoint-minutes", help="Longest time between checkpoints; 0: only by steps", type=WEIGHT),
        click.option("--keep", help="Newest checkpoints kept, besides the best", type=COUNT),
        click.option("--logger", "log", help="Where statistics go besides stats.jsonl; repeatable", **loggers),
        click.option("--log", "old_log", help="Old name of --logger, which torchrun takes for one of its own options",
                     hidden=True, **loggers),
        click.option(
            "--resume",
            help="auto (newest run of the same options), latest, never, a run directory, or one ckpt-...-train.pt to "
            "branch from, and to continue that branch",
            default="auto",
            show_default=True,
        ),
        click.option("--wait", help="Wait for another process that trains in the run, then continue", is_flag=True),
        click.option("--override", help="Continue the run of --resume although options changed", is_flag=True),
        click.option("--dry-run", help="Print the options as JSON and stop", is_flag=True),
    ]  # fmt: skip


def training_command(name: str, help: str | None = None) -> click.Command:
    """Return the command that trains a registered system; `help` is the docstring of a script of its own."""
    spec = registry.spec(name)
    own = field_options(registry.options(spec))

    @combine([*run_options(spec), *own])
    def train(**given: Any) -> None:
        run(spec, **given)

    example = "# Options of the smallest run\n--dataset=datasets/labdoom --preset=toy"
    text = help or f"{spec.title}.\n\n{example}\n\nRun the same command again and training continues."
    return click.command(name, help=as_help(text), short_help=spec.title)(train)


class Systems(click.Group):
    """A group with one command a registered system, which is imported when it is asked for."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """See click."""
        return list(registry.SYSTEMS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """See click."""
        return training_command(cmd_name) if cmd_name in registry.SYSTEMS else None

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """List the systems without importing them."""
        with formatter.section("Systems"):
            formatter.write_dl([(name, registry.spec(name).title) for name in registry.SYSTEMS])

    def resolve_command(self, ctx: click.Context, args: list[str]) -> Any:
        """Refuse an unknown system with the nearest one."""
        from training.config import check_keys

        try:
            check_keys(args[:1], registry.SYSTEMS, "the systems")
        except ValueError as error:
            raise click.UsageError(str(error)) from None
        return super().resolve_command(ctx, args)


def make_options(name: str, preset: str, given: dict[str, Any]) -> Any:
    """Return the options of a run of a registered system: the preset's row, changed by what was given.

    None or an empty tuple means not given. What is given of a dictionary changes the preset's.
    """
    from training.config import TrainOptions, resolve, settle

    spec = registry.spec(name)
    presets, system = registry.resolve(spec.presets), registry.resolve(spec.system)
    if preset not in presets:
        raise click.BadParameter(f"{preset!r} is unknown; there are {', '.join(presets)}", param_hint="--preset")
    own = take_fields(system.Options, given)
    row = system.read_preset(presets[preset], own)
    model = merge_fields(row["model"], own)
    given = {name: value for name, value in given.items() if value not in (None, ())}
    options = TrainOptions(system=name, **{"dataset": "", **row, **given, "model": {}})
    resolved = resolve(system.Options, model, f"the preset {preset}")
    system.check(resolved, options)
    return settle(dataclasses.replace(options, model=dataclasses.asdict(resolved)), system)


def check_precision(options: Any) -> None:
    """Refuse a precision that the device lacks, before anything is built."""
    from torch_utils.precision import why_not

    reason = why_not(options.precision or "fp32", options.device)
    if reason is not None:
        raise click.BadParameter(f"{options.precision} {reason}", param_hint="--precision")


def check_given(spec: Spec, dataset: str | None, options: Any) -> None:
    """Refuse a run without its dataset, or without an option that its system needs."""
    if not dataset:
        raise click.UsageError("Missing option '--dataset'.")
    for field in dataclasses.fields(registry.options(spec)):
        for flag in field.metadata.get("flags", ()):
            if flag.needed and not options.model[field.name]:
                name = flag.name or f"--{field.name.replace('_', '-')}"
                raise click.UsageError(f"{name} is missing: give the {flag.help[0].lower()}{flag.help[1:]}")


def run(spec: Spec, preset: str, dry_run: bool, **given: Any) -> None:
    """Train a system and print the command that comes next; errors of the user become one sentence.

    A run that a signal has stopped ends with 128 + its number.
    """
    threads.share_cores()
    import torch

    from metrics import metric_main
    from torch_utils import distributed
    from training import checkpoint, loop
    from training.config import to_dict

    given["log"] += given.pop("old_log")
    given["device"] = given["device"] or ("cuda" if torch.cuda.is_available() else "cpu")
    with on_ranks() as rank:
        options = make_options(spec.name, preset, given)
        metric_main.check_names(options.metrics)
        check_precision(options)
        if dry_run:
            if rank == 0:
                click.echo(json.dumps(to_dict(options), indent=2))
            return
        check_given(spec, given["dataset"], options)
        metric_fn = metric_main.training_metrics(options.dataset, options.seed, options.device)
        result = loop.train(spec.name, options, metric_fn)
        if result.finished:
            network = checkpoint.network_path(result.run_dir, result.step)
            with contextlib.suppress(OSError):  # the terminal may be gone
                distributed.print0(f"Next: {next_command(spec, preset, str(network), given['dataset'])}")
    if not result.finished:
        sys.exit(128 + result.signal)


def next_command(spec: Spec, preset: str, network: str, dataset: str) -> str:
    """Return the command that comes after training; it names the preset where all parts of the model have it."""
    parts = [other for other in registry.specs() if other.open_sampler == spec.open_sampler]
    shared = preset != "default" and all(preset in registry.resolve(other.presets) for other in parts)
    words = {"network": quote(network), "dataset": quote(dataset), "preset": f" --preset={preset}" if shared else ""}
    return spec.next_command.format(**words)


@click.command(cls=Systems, help=as_help(__doc__))
def main() -> None:
    """See the module's docstring."""


if __name__ == "__main__":
    main()
