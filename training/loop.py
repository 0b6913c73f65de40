"""The training loop, which uses a system only through `training.contract.System`.

At step s the loop first runs the tasks due at s (status line, preview, checkpoint, metrics) and then takes one training
step, so it iterates once more than there are steps and the end needs no separate code. All randomness of a step is a
function of the options and the step number; a checkpoint therefore holds no generator state, and an interrupted run
continues exactly as an uninterrupted one.
"""

import contextlib
import dataclasses
import itertools
import json
import math
import os
import signal
import time
from collections.abc import Generator, Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import torch

from dnnlib.util import atomic_path, open_url
from torch_utils import distributed, host_memory, misc, training_stats
from training import checkpoint
from training.config import (
    Beginning,
    TrainOptions,
    check_changes,
    find_run,
    make_system,
    new_run_dir,
    settle,
    system_class,
    to_dict,
)
from training.contract import Batch, BatchSpec, Bundle, System
from training.curves import update_curves
from training.data.dataset import BatchStream, ClipDataset, size_name, to_device
from training.evaluation import MetricFunction, best_steps, evaluate, mark_best, validate
from training.logger import RunLogger, SilentLogger, continue_command, environment_text, listener_names
from training.network_file import content_hash, load_bundle, save_bundle
from training.preview import RealClips, write_preview
from training.sampling import Request
from training.status import Clock, disk_may_be_full, last_good, tick

RETRY_SEC = 60.0  # until the next attempt after a failed checkpoint
SECOND_INTERRUPT_SEC = 1.0  # torchrun forwards signals that the terminal has sent already: one Ctrl-C arrives twice


@dataclasses.dataclass
class TrainResult:
    """The run directory and the last step of a run; `finished` is False if a signal stopped it early."""

    run_dir: Path
    step: int
    finished: bool


def train(system: str | type[System], options: TrainOptions, metric_fn: MetricFunction | None = None) -> TrainResult:
    """Train a system, given as a registered name or a class, until `options.steps` or a signal.

    `metric_fn(names, system)` evaluates some of `options.metrics` on all ranks and returns for each the values for
    metric-<name>.jsonl. SIGTERM, SIGUSR1 and SIGINT stop the run after a last checkpoint; the call then returns with
    `finished` False. The process group is initialised here if needed; destroying it is left to the caller.

    Raises `ValueError` for options, datasets and run directories that do not fit, when a loss has not been finite for
    a whole tick, and when the last checkpoint could not be written. Errors of other ranks are raised here, too.
    """
    # ---- System and data --------------------------------------------------------------------------------------------
    device = distributed.init(options.device)
    host_memory.keep_freed(device)
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False  # as published: float32 throughout
    rank, world_size = distributed.get_rank(), distributed.get_world_size()
    beginning = Beginning()
    with distributed.together():
        options.check_ranks(world_size)
        listener_names(options.log)
        options = settle(options, system_class(system))
        if distributed.is_main():
            find_run(options)  # fail before anything is built
        model = make_system(system, options, device)
        for network in model.frozen.values():
            network.to(device).eval().requires_grad_(False)
        frozen = {name: content_hash(network) for name, network in model.frozen.items()}
        options = dataclasses.replace(options, frozen=frozen)
        if distributed.is_main():
            beginning = find_run(options)
        dataset = open_dataset(model, options)
        stream = BatchStream(
            dataset,
            options.seed,
            options.batch,
            rank,
            world_size,
            options.workers,
            bool(options.x_flip),
            options.weighting,
        )
        held_out = open_held_out(model, dataset, options)

    # ---- State to resume from ---------------------------------------------------------------------------------------
    path = state = None
    with distributed.together():
        if distributed.is_main():
            path, state = find_state(options, beginning)
    path, beginning = distributed.broadcast_object((path, beginning))
    options = dataclasses.replace(options, origin=beginning.origin)
    loop_state = {"step": 0, "num_batches": 0, "total_sec": 0.0, "clean_step": 0, "wandb_id": None}
    with distributed.together():
        if path is not None:
            state = state or checkpoint.load_run_state(path)
            restore(model, state, path)
            loop_state = state["loop"]
        elif options.init_from is not None:
            model.init_from(load_weights(options.init_from))
    for module in model.modules.values():
        distributed.broadcast_module(module)
    collector = training_stats.Collector()
    if state is not None:
        collector.load_state_dict(loop_state["stats"])
    step = first_step = loop_state["step"]
    num_batches = loop_state["num_batches"]
    seen = state is not None  # the tasks due at this step were done before the checkpoint was written
    branches = path is not None and path.parent.parent != beginning.run_dir
    del state
    run_dir, logger = Path(), SilentLogger()
    with distributed.together():
        if distributed.is_main():
            run_dir = beginning.run_dir or make_run_dir(options, model.info().suffix)
            write_run_files(run_dir, options, device, step)
            wandb_id = None if branches else loop_state["wandb_id"]
            logger = RunLogger(run_dir, to_dict(options), step if seen else -1, wandb_id)
            mark_best(run_dir, options.metrics)
    run_dir = distributed.broadcast_object(run_dir)
    describe(logger, run_dir, model, dataset, options, step, beginning)
    clips = preview_clips(model, dataset, options)

    # ---- The loop ---------------------------------------------------------------------------------------------------
    clock = Clock(past_sec=loop_state["total_sec"], clean_step=loop_state["clean_step"])
    clock.save_in(60 * options.checkpoint_minutes)
    plan = plan_batches(model, step, options.steps, num_batches)
    batches = cast(Generator[Batch], stream.prefetch(plan))
    with contextlib.closing(logger), contextlib.closing(batches), StopSignals() as signals:
        while True:
            last = step >= options.steps
            late = distributed.is_main() and clock.save_is_due()
            stop, late = distributed.any_rank([signals.received, late])
            measured = metric_fn is not None and bool(options.metrics) and is_due(step, options.metric_steps, last)
            ticks, samples = (not seen and is_due(step, n, last) for n in (options.tick_steps, options.sample_steps))
            due = stop or late or measured or is_due(step, options.checkpoint_steps, last)
            if ticks or samples or due:
                clock.settle(device)
            if held_out is not None and not seen and is_due(step, options.metric_steps, last):
                validate(model, held_out, device)
                clock.validated_step = step
            if ticks:
                tick(logger, collector, clock, options, model.info(), device, step, run_dir)
            if samples:
                write_previews(logger, model, clips, run_dir, step)
            if branches or (due and not seen):
                loop_state = {"step": step, "num_batches": num_batches, "total_sec": clock.total_sec}
                loop_state |= {"clean_step": clock.clean_step, "wandb_id": logger.wandb_id}
                problem = save(run_dir, model, dataset, options, clock, loop_state | {"stats": collector.state_dict()})
                clock.save_in(RETRY_SEC if problem else 60 * options.checkpoint_minutes)
                branches = False
                if problem and (last or stop):
                    raise distributed.SharedError(problem)
                if problem:
                    with disk_may_be_full():
                        logger.text(f"{problem} Training goes on, and the next attempt is soon.")
            if measured and metric_fn is not None and not stop:
                evaluate(logger, model, metric_fn, options.metrics, run_dir, step)
            if last or stop:
                break

            begin = time.monotonic()
            taken = take(batches, len(model.batch_spec(step)), clock, device)
            for name, value in model.step(taken, step).items():
                training_stats.report(name, value)
            assert next(taken, None) is None, f"step {step} left some of its batches"
            num_batches += len(model.batch_spec(step))
            step += 1
            seen = False
            clock.train_sec += time.monotonic() - begin
            clock.num_steps += 1
            if step == first_step + 1:
                distributed.shorten_timeout()

        # ---- The end ------------------------------------------------------------------------------------------------
        with disk_may_be_full():
            if last:
                logger.text(f"Finished {step} steps in {run_dir}")
            else:
                command = continue_command() + (f" --resume={run_dir}" if options.resume == "never" else "")
                logger.text(f"Stopped at step {step}, everything is saved; to continue: {command}")
    return TrainResult(run_dir, step, finished=last)


# ----------------------------------------------------------------------------
# Start of a run.


def open_dataset(model: System, options: TrainOptions) -> ClipDataset:
    """Return the dataset with all parts that the system needs, and the frames of its previews if there are any."""
    inputs, sampler = model.inputs(), model.sampler()
    wanted = [*inputs.sizes, *sampler.outputs.values(), *([sampler.needs.size] if sampler.needs.size else [])]
    there = [size for size in wanted if size in inputs.sizes or (Path(options.dataset) / size_name(size)).is_dir()]
    dataset = ClipDataset(options.dataset, list(dict.fromkeys(there)), options.cache, inputs.codes, inputs.streams)
    for spec in model.batch_spec(0):
        dataset.eligible(spec.num_frames)
    return dataset


def open_held_out(model: System, dataset: ClipDataset, options: TrainOptions) -> BatchStream | None:
    """Return the batches of the validation split, never mirrored, with the vocabularies of the training dataset."""
    if options.val_dataset is None:
        return None
    inputs, ranks = model.inputs(), (distributed.get_rank(), distributed.get_world_size())
    parts = list(inputs.sizes), "none", inputs.codes, inputs.streams, dataset.vocabularies()
    held_out = ClipDataset(options.val_dataset, *parts)
    for spec in model.batch_spec(0):
        held_out.eligible(spec.num_frames)
    return BatchStream(held_out, options.seed, options.batch, *ranks, options.workers, x_flip=False)


def find_state(options: TrainOptions, beginning: Beginning) -> tuple[Path | None, dict[str, Any] | None]:
    """Return the path and the contents of the training state to resume from.

    It is the newest readable one of the run, else the one that the run branches from, if any.
    """
    if beginning.run_dir is not None:
        found = checkpoint.latest_whole_checkpoint(beginning.run_dir)
        if found is not None:
            return found[1], found[2]
    if beginning.origin is None:
        return None, None
    state = checkpoint.load_run_state(beginning.origin)
    beginning.changes = check_changes(state["options"], options, beginning.origin)
    return Path(beginning.origin), state


def restore(model: System, state: Mapping[str, Any], path: Path) -> None:
    """Load a training state into a system; optimisers move their state to the device of their parameters."""
    try:
        for name, module in model.modules.items():
            module.load_state_dict(state["modules"][name])
        for name, optimizer in model.optimizers.items():
            # Learning rates and the like are options, which may have changed since. Whether the kernel is fused decides
            # on which device the optimiser keeps its step count, so it must be set before the state is loaded.
            saved = state["optimizers"][name]
            groups = [
                {**group, "params": then["params"]}
                for group, then in zip(optimizer.param_groups, saved["param_groups"], strict=True)
            ]
            optimizer.load_state_dict({**saved, "param_groups": groups})
        model.load_state_dict(state["system"])
    except (RuntimeError, ValueError, KeyError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(
            f"{path} does not fit the system that these options make ({reason}); repeat the options it was trained "
            "with, or remove the file to continue from the one before it."
        ) from error


def load_weights(path_or_url: str) -> Bundle | Mapping[str, Any]:
    """Return the weights that `init_from` names: an exported file, or the state dicts of a training state by module."""
    if path_or_url.endswith(".pt"):
        return checkpoint.load_run_state(open_url(path_or_url, return_filename=True))["modules"]
    return load_bundle(path_or_url)


def make_run_dir(options: TrainOptions, suffix: str) -> Path:
    """Create a new run directory, also if another process creates one at the same time."""
    while True:
        run_dir = new_run_dir(options, suffix)
        try:
            run_dir.mkdir(parents=True)
        except FileExistsError:
            continue
        return run_dir


def write_run_files(run_dir: Path, options: TrainOptions, device: torch.device, step: int) -> None:
    """Write options.json, and append a section to environment.txt each time that the run is started or resumed."""
    (run_dir / "checkpoints").mkdir(exist_ok=True)
    with atomic_path(run_dir / "options.json") as path:
        path.write_text(json.dumps(to_dict(options), indent=2) + "\n")
    log = run_dir / "environment.txt"
    sections = [log.read_text()] if log.is_file() else []
    sections.append(f"step      {step}\n{environment_text(device, distributed.get_world_size())}")
    with atomic_path(log) as path:
        path.write_text("\n".join(sections))


def describe(
    logger: RunLogger | SilentLogger,
    run_dir: Path,
    model: System,
    dataset: ClipDataset,
    options: TrainOptions,
    step: int,
    beginning: Beginning,
) -> None:
    """Log the networks, the dataset, the batch and the start of the run."""
    for name, module in model.modules.items():
        num_params, num_buffers = (sum(t.numel() for t in ts) for ts in (module.parameters(), module.buffers()))
        logger.text(f"{name:8s} {type(module).__name__:24s} {num_params:>12,} parameters {num_buffers:>10,} in buffers")
    inputs = model.inputs()
    parts = [size_name(size) for size in inputs.sizes] + ["codes"] * bool(inputs.codes) + list(inputs.streams)
    read = ", ".join(parts)
    logger.text(f"dataset  {options.dataset}: {len(dataset.clips)} clips at {read}, {dataset.fps:g} frames a second")
    for name, digest in options.frozen.items():
        logger.text(f"frozen   {name} {digest[:12]}")
    ranks = distributed.get_world_size()
    logger.text(f"batch    {options.batch} clips: {ranks} ranks x {options.grad_accum} rounds of accumulation")
    for change in beginning.changes:
        logger.text(f"override {change}")
    if options.init_from is not None:
        logger.text(f"weights  begin with those of {options.init_from}")
    if options.origin is not None:
        logger.text(f"branch   of {options.origin}")
    verb = "goes on" if step else "begins"
    logger.text(f"run      {run_dir} {verb} at step {step} of {options.steps}")


def plan_batches(model: System, step: int, num_steps: int, num_batches: int) -> Iterator[tuple[int, BatchSpec]]:
    """Yield numbers and contents of the global batches of steps [step, num_steps), after `num_batches` earlier ones."""
    specs = itertools.chain.from_iterable(model.batch_spec(s) for s in range(step, num_steps))
    return zip(itertools.count(num_batches), specs)


# ----------------------------------------------------------------------------
# Periodic tasks. All ranks take part, rank 0 writes.


def is_due(step: int, interval: int, last: bool) -> bool:
    return last or (interval > 0 and step % interval == 0)


def take(batches: Iterator[Batch], num_batches: int, clock: Clock, device: torch.device) -> Iterator[Batch]:
    """Yield the next batches on the device, and add the time that training waits for them to the clock."""
    for _ in range(num_batches):
        begin = time.monotonic()
        batch = next(batches)
        clock.wait_sec += time.monotonic() - begin
        yield to_device(batch, device)


def preview_clips(model: System, dataset: ClipDataset, options: TrainOptions) -> RealClips | None:
    """Return the real clips beside the previews, which also prompt them; None without frames of the preview's size."""
    info, sampler = model.info(), model.sampler()
    needs = sampler.needs
    sizes = [size for size in dict.fromkeys(sampler.outputs.values()) if size in dataset.sizes]
    missing = needs.frames and needs.size not in dataset.sizes
    if missing or not dataset.sizes:
        distributed.print0(
            f"Warning: {options.dataset} has no frames of {size_name(needs.size or sampler.size)}, so there are no "
            "previews."
        )
        return None
    return RealClips(dataset, sizes, info.preview_videos, info.preview_frames, needs, options.seed)


def write_previews(
    logger: RunLogger | SilentLogger, model: System, clips: RealClips | None, run_dir: Path, step: int
) -> None:
    """Write the videos of the first seeds at this step, the real clips once, and the curves."""
    if not distributed.is_main():
        return
    with disk_may_be_full():
        if clips is not None:
            samples, fps = run_dir / "samples", clips.dataset.fps
            for size in clips.sizes:
                real = samples / f"real-{size_name(size)}"
                if not real.with_suffix(".png").is_file():
                    write_preview(real, clips.chunks(size), clips.num_frames, fps)
            fake = samples / f"fake-{step:08d}"
            request = Request(range(len(clips.clips)), 0, clips.generated_frames, clips.prompt())
            write_preview(fake, model.sampler().video(request), clips.generated_frames, fps)
            logger.video(step, "samples/fake", fake.with_suffix(".mp4"))
        update_curves(run_dir, logger.text)


def save(
    run_dir: Path,
    model: System,
    dataset: ClipDataset,
    options: TrainOptions,
    clock: Clock,
    loop_state: Mapping[str, Any],
) -> str | None:
    """Write both files of a checkpoint, then prune older ones; on all ranks, return an error message if that failed.

    Kept besides the newest are the best by the first metric, and the last one before a loss was not finite.
    """
    if distributed.get_world_size() > 1:
        for module in model.modules.values():
            misc.check_ddp_consistency(module)
    state = {
        "modules": {name: module.state_dict() for name, module in model.modules.items()},
        "optimizers": {name: optimizer.state_dict() for name, optimizer in model.optimizers.items()},
        "system": model.state_dict(),  # may reduce over ranks, so all ranks call it
        "loop": dict(loop_state),
        "options": to_dict(options),
    }
    problem = None
    if distributed.is_main():
        path = checkpoint.train_state_path(run_dir, loop_state["step"])
        network = checkpoint.network_path(run_dir, loop_state["step"])
        try:
            bundle = model.export()
            tokenizer = bundle.tokenizer or options.frozen.get("tokenizer")
            facts = {"tokenizer": tokenizer, "fps": dataset.fps, "vocabularies": dataset.vocabularies()}
            save_bundle(dataclasses.replace(bundle, **facts), network)
            checkpoint.save_train_state(path, state)
            good = [step for step, _ in last_good(run_dir, clock)]
            checkpoint.prune_checkpoints(run_dir, options.keep, [*best_steps(run_dir, options.metrics), *good])
        except OSError as error:
            network.unlink(missing_ok=True)  # a partial checkpoint takes the disk space that the next one needs
            newest = checkpoint.list_checkpoints(run_dir)[-1:]
            instead = f"the newest checkpoint is {newest[0][1]}" if newest else "there is no checkpoint yet"
            problem = f"Step {loop_state['step']} was not saved in {path} ({error}); {instead}. Free disk space."
    return distributed.broadcast_object(problem)


class StopSignals:
    """A context in which SIGTERM, SIGUSR1 and SIGINT only set `received`; a later second SIGINT interrupts at once."""

    NAMES = ("SIGTERM", "SIGUSR1", "SIGINT")

    def __init__(self):
        self.received = False
        self._interrupted = math.inf  # time of the first SIGINT
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> "StopSignals":
        for number in [getattr(signal, name) for name in self.NAMES if hasattr(signal, name)]:
            self._previous[number] = signal.signal(number, self._receive)
        return self

    def _receive(self, number: int, frame: Any) -> None:
        now = time.monotonic()
        if number == signal.SIGINT and now > self._interrupted + SECOND_INTERRUPT_SEC:
            raise KeyboardInterrupt
        if number == signal.SIGINT:
            self._interrupted = min(self._interrupted, now)
        self.received = True
        if distributed.is_main():
            os.write(2, b"Stopping after this step and a checkpoint; Ctrl-C twice stops at once.\n")

    def __exit__(self, *exception: Any) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
