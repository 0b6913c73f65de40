"""The training loop, which uses a system only through `training.contract.System`.

At step s the loop first runs the tasks due at s (status line, preview, checkpoint, metrics) and then takes one training
step, so it iterates once more than there are steps and the end needs no separate code. All randomness of a step is a
function of the options and the step number; a checkpoint therefore holds no generator state, and an interrupted run
continues exactly as an uninterrupted one.
"""

import contextlib
import dataclasses
import errno
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

from dnnlib import locks
from dnnlib.text import one_line
from dnnlib.util import atomic_path
from torch_utils import distributed, host_memory, misc, sharding, training_stats
from training import checkpoint
from training.config import TrainOptions, make_system, options_of_system, settle, system_class, to_dict
from training.contract import Batch, BatchSpec, System
from training.curves import update_curves
from training.data.dataset import BatchStream, ClipDataset, size_name, to_device
from training.data.parts import has_size
from training.evaluation import MetricFunction, best_steps, evaluate, mark_best, validate
from training.logger import RunLogger, SilentLogger, continue_command, environment_text, listener_names
from training.network_file import content_hash, save_bundle
from training.preview import RealClips, write_preview
from training.resume import begin_with, compare_footage, footage_of, resume
from training.run_dirs import LOCK, Beginning, RunLock, find_run, new_run_dir
from training.sampling import Request
from training.status import Clock, last_good, tick

WAIT_SEC = 1.0  # between looks whether another process has left the run
RETRY_SEC = 60.0  # until the next attempt after a failed checkpoint
SECOND_INTERRUPT_SEC = 1.0  # torchrun forwards signals that the terminal has sent already: one Ctrl-C arrives twice


@dataclasses.dataclass
class TrainResult:
    """The run directory and the last step of a run; `finished` is False if `signal` stopped it early."""

    run_dir: Path
    step: int
    finished: bool
    signal: int = 0


def train(system: str | type[System], options: TrainOptions, metric_fn: MetricFunction | None = None) -> TrainResult:
    """Train a system, given as a registered name or a class, until `options.steps` or a signal.

    `metric_fn(names, system)` evaluates some of `options.metrics` on all ranks and returns for each the values for
    metric-<name>.jsonl. The signals of `StopSignals` stop the run after a last checkpoint; the call then returns with
    `finished` False. One process at a time trains in a run directory: another is refused, or waits (`options.wait`).
    The process group is initialised here if needed; destroying it is left to the caller.

    Raises `ValueError` for options, datasets and run directories that do not fit, when a loss has not been finite for
    a whole tick, and when the last checkpoint could not be written. Errors of other ranks are raised here, too.
    """
    with RunLock() as lock:
        result = _train(system, options, metric_fn, lock)
    # Another process began the same run at the same moment: it is that one's now, or is continued after it.
    return result or train(system, options, metric_fn)


def _train(
    system: str | type[System], options: TrainOptions, metric_fn: MetricFunction | None, lock: RunLock
) -> TrainResult | None:
    # ---- System and data --------------------------------------------------------------------------------------------
    device = distributed.init(options.device)
    host_memory.keep_freed(device)
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False  # as published: float32 throughout
    beginning = Beginning()
    with distributed.together():
        cls = system_class(system)
        options.check_ranks(distributed.get_world_size(), cls.tensor_parallel(options_of_system(cls, options)))
        listener_names(options.log)
        options = settle(options, cls)
        if distributed.is_main():
            find_run(options)  # fail before anything is built
        model = make_system(system, options, device)
        for network in model.frozen.values():
            network.to(device).eval().requires_grad_(False)
        frozen = {name: content_hash(network) for name, network in model.frozen.items()}
        options = dataclasses.replace(options, frozen=frozen)
        if distributed.is_main():
            beginning = find_run(options)
    if distributed.broadcast_object(beginning.run_dir) is not None:
        take_lock(lock, beginning, options)
    with distributed.together():
        dataset = open_dataset(model, options)
        model.use_facts(dataset.facts())
        footage = footage_of(model, dataset) if distributed.is_main() else {}
        stream = BatchStream(
            dataset,
            options.seed,
            options.batch,
            model.run.reader,
            model.run.num_readers,
            options.workers,
            bool(options.x_flip),
            options.weighting,
        )
        held_out = open_held_out(model, dataset, options)

    # ---- State to resume from ---------------------------------------------------------------------------------------
    collector = training_stats.Collector()
    found = resume(model, collector, options, beginning)
    beginning = distributed.broadcast_object(beginning)
    options = dataclasses.replace(options, origin=beginning.origin)
    changes: list[str] = []
    loop_state: dict[str, Any] = {"step": 0, "num_batches": 0, "total_sec": 0.0, "clean_step": 0, "wandb_id": None}
    with distributed.together():
        if found is not None:
            loop_state = found[1]["loop"]
            changes = compare_footage(found[1], footage, options) if distributed.is_main() else []
        elif options.init_from is not None:
            begin_with(model, options.init_from)
    for module in model.modules.values():
        distributed.broadcast_module(module)
    step = first_step = loop_state["step"]
    num_batches = loop_state["num_batches"]
    seen = found is not None  # the tasks due at this step were done before the checkpoint was written
    branches = found is not None and found[0].parent.parent != beginning.run_dir
    del found
    run_dir, logger = beginning.run_dir, SilentLogger()
    with distributed.together():
        if distributed.is_main():
            run_dir = run_dir or make_run_dir(options, model.info().suffix, lock)
    run_dir = distributed.broadcast_object(run_dir)
    if run_dir is None:
        return None
    with distributed.together():
        if distributed.is_main():
            (run_dir / "checkpoints").mkdir(exist_ok=True)
            wandb_id = None if branches else loop_state["wandb_id"]
            logger = RunLogger(run_dir, to_dict(options), step if seen else -1, wandb_id)
            write_run_files(logger, run_dir, options, device, step)
            with logger.optional("best.json"):
                mark_best(run_dir, options.metrics)
    describe(logger, run_dir, model, dataset, options, step, beginning)
    for change in changes:
        logger.text(f"dataset  {change}")
    clips = None
    with logger.optional("previews"):
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
            stop, late = distributed.any_rank([bool(signals.received), late])
            measured = metric_fn is not None and bool(options.metrics) and is_due(step, options.metric_steps, last)
            ticks, samples = (not seen and is_due(step, n, last) for n in (options.tick_steps, options.sample_steps))
            due = stop or late or measured or is_due(step, options.checkpoint_steps, last)
            if ticks or samples or due:
                clock.settle(device)
            if samples or due or branches:
                model.gather()
            if held_out is not None and not seen and is_due(step, options.metric_steps, last):
                clock.validated_step = step if validate(logger, model, held_out, device) else clock.validated_step
            if ticks:
                tick(logger, collector, clock, options, model.info(), device, step, run_dir)
            if samples:
                write_previews(logger, model, clips, run_dir, step)
            if branches or (due and not seen):
                loop_state = {"step": step, "num_batches": num_batches, "total_sec": clock.total_sec}
                loop_state |= {"clean_step": clock.clean_step, "wandb_id": logger.wandb_id}
                loop_state["stats"] = collector.state_dict()
                problem = save(logger, run_dir, model, dataset, options, clock, loop_state, footage)
                clock.save_in(RETRY_SEC if problem else 60 * options.checkpoint_minutes)
                branches = False
                if problem and (last or stop):
                    raise distributed.SharedError(problem)
                if problem:
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
        if last:
            logger.text(f"Finished {step} steps in {run_dir}")
            return TrainResult(run_dir, step, finished=True)
        command = continue_command() + (f" --resume={run_dir}" if options.resume == "never" else "")
        logger.text(f"Stopped at step {step}, everything is saved; to continue: {command}")
        received = distributed.any_rank([signals.received == number for number in StopSignals.NUMBERS])
    return TrainResult(run_dir, step, finished=False, signal=StopSignals.NUMBERS[received.index(True)])


# ----------------------------------------------------------------------------
# Start of a run.


def open_dataset(model: System, options: TrainOptions) -> ClipDataset:
    """Return the dataset with all parts that the system needs, and the frames of its previews if there are any."""
    inputs, sampler = model.inputs(), model.sampler()
    wanted = [*inputs.sizes, *sampler.outputs.values(), *([sampler.needs.size] if sampler.needs.size else [])]
    there = [size for size in wanted if size in inputs.sizes or has_size(options.dataset, size)]
    sizes, parts = list(dict.fromkeys(there)), (inputs.codes, inputs.streams, None, inputs.latents, inputs.text_ids)
    dataset = ClipDataset(options.dataset, sizes, options.cache, *parts)
    for spec in model.batch_spec(0):
        dataset.eligible(spec.num_frames)
    return dataset


def open_held_out(model: System, dataset: ClipDataset, options: TrainOptions) -> BatchStream | None:
    """Return the batches of the validation split, never mirrored, with the vocabularies of the training dataset."""
    if options.val_dataset is None:
        return None
    inputs, ranks = model.inputs(), (model.run.reader, model.run.num_readers)
    parts = inputs.codes, inputs.streams, dataset.vocabularies(), inputs.latents, inputs.text_ids
    held_out = ClipDataset(options.val_dataset, list(inputs.sizes), "none", *parts)
    for spec in model.batch_spec(0):
        held_out.eligible(spec.num_frames)
    return BatchStream(held_out, options.seed, options.batch, *ranks, options.workers, x_flip=False)


def take_lock(lock: RunLock, beginning: Beginning, options: TrainOptions) -> None:
    """Take the lock of the run that is continued, on rank 0; raise `ValueError` if another process holds it.

    With `options.wait`, wait until that process ends. All ranks wait together, as a collective has a time-out.
    """
    for attempt in itertools.count():
        holder = None
        with distributed.together():
            if distributed.is_main():
                assert beginning.run_dir is not None
                holder = lock.take(beginning.run_dir)
        holder = distributed.broadcast_object(holder)
        if holder is None:
            return
        if not options.wait:
            raise distributed.SharedError(
                f"{beginning.run_dir} is in use by {holder}, and two processes would mix up its files; stop that one, "
                "add --wait to go on when it has ended, or use --resume=never to begin another run"
            )
        if attempt == 0:
            distributed.print0(f"Waiting for {holder}, which trains in {beginning.run_dir}.")
        time.sleep(WAIT_SEC)


def make_run_dir(options: TrainOptions, suffix: str, lock: RunLock) -> Path | None:
    """Create a new run directory with its options, and take its lock; None if another process has begun this run."""
    outdir = Path(options.outdir)
    outdir.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError):  # a file system without locks
            stack.enter_context(locks.locked(outdir / LOCK))
        if find_run(options).run_dir is not None:
            return None
        run_dir = new_run_dir(options, suffix)
        run_dir.mkdir()
        holder = lock.take(run_dir)
        assert holder is None
        with contextlib.suppress(OSError):  # a full disk, which `write_run_files` tells
            write_options(run_dir, options)
    return run_dir


def write_options(run_dir: Path, options: TrainOptions) -> None:
    with atomic_path(run_dir / "options.json") as path:
        path.write_text(json.dumps(to_dict(options), indent=2) + "\n")


def write_run_files(
    logger: SilentLogger, run_dir: Path, options: TrainOptions, device: torch.device, step: int
) -> None:
    """Write options.json, and append a section to environment.txt each time that the run is started or resumed."""
    with logger.optional("options.json"):
        write_options(run_dir, options)
    log = run_dir / "environment.txt"
    with logger.optional(log.name), open(log, "ab") as file:
        separator = "\n" if file.tell() else ""
        text = f"{separator}step      {step}\n{environment_text(device, distributed.get_world_size())}"
        file.write(text.encode("utf-8", "backslashreplace"))


def describe(
    logger: SilentLogger,
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
    grids = ["codes"] * bool(inputs.codes) + ["latents"] * bool(inputs.latents)
    read = ", ".join([size_name(size) for size in inputs.sizes] + grids + list(inputs.streams))
    logger.text(f"dataset  {options.dataset}: {len(dataset.clips)} clips at {read}, {dataset.fps:g} frames a second")
    for name, digest in options.frozen.items():
        logger.text(f"frozen   {name} {digest[:12]}")
    groups, size = model.run.num_readers, model.run.tensor_parallel
    ranks = f"{groups} ranks" if size == 1 else f"{groups} groups of {size} ranks"
    logger.text(f"batch    {options.batch} clips: {ranks} x {options.grad_accum} rounds of accumulation")
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
    if missing or not (dataset.sizes or needs.streams):
        distributed.print0(
            f"Warning: {options.dataset} has no frames of {size_name(needs.size or sampler.size)}, so there are no "
            "previews."
        )
        return None
    return RealClips(dataset, sizes, info.preview_videos, info.preview_frames, needs, options.seed)


def write_previews(logger: SilentLogger, model: System, clips: RealClips | None, run_dir: Path, step: int) -> None:
    """Write the videos of the first seeds at this step, the real clips once, and the curves."""
    if not distributed.is_main():
        return
    if clips is not None:
        samples, fps = run_dir / "samples", clips.dataset.fps
        with logger.optional("the preview of real clips"):
            for size in clips.sizes:
                real = samples / f"real-{size_name(size)}"
                if not real.with_suffix(".png").is_file():
                    write_preview(real, clips.chunks(size), clips.num_frames, fps)
        with logger.optional("the preview"):
            fake = samples / f"fake-{step:08d}"
            request = Request(range(len(clips.clips)), 0, clips.generated_frames, clips.prompt())
            write_preview(fake, model.sampler().video(request), clips.generated_frames, fps)
            logger.video(step, "samples/fake", fake.with_suffix(".mp4"))
    with logger.optional("curves.png"):
        update_curves(run_dir, logger.text)


def save(
    logger: SilentLogger,
    run_dir: Path,
    model: System,
    dataset: ClipDataset,
    options: TrainOptions,
    clock: Clock,
    loop_state: Mapping[str, Any],
    footage: Mapping[str, str],
) -> str | None:
    """Write both files of a checkpoint, then prune older ones; on all ranks, return an error message if that failed.

    Kept besides the newest are the best by the first metric, and the last one before a loss was not finite.
    """
    if distributed.get_world_size() > 1:
        for module in model.modules.values():
            misc.check_ddp_consistency(module)
    state = {
        "modules": {name: sharding.whole_state(module) for name, module in model.modules.items()},
        "optimizers": {name: sharding.whole_optimizer_state(opt) for name, opt in model.optimizers.items()},
        "system": model.state_dict(),  # may reduce over ranks, so all ranks call it
        "loop": dict(loop_state),
        "options": to_dict(options),
        "footage": dict(footage),
    }
    problem = None
    if distributed.is_main():
        step = loop_state["step"]
        path, network = checkpoint.train_state_path(run_dir, step), checkpoint.network_path(run_dir, step)
        is_exported = False
        try:
            bundle = model.export()
            tokenizer = bundle.tokenizer or options.frozen.get("tokenizer")
            facts = {"tokenizer": tokenizer, "fps": dataset.fps, "vocabularies": dataset.vocabularies()}
            save_bundle(dataclasses.replace(bundle, **facts), network)
            is_exported = True
            checkpoint.save_train_state(path, state)
        except Exception as error:
            with contextlib.suppress(OSError):
                if is_exported:  # a partial checkpoint takes the disk space that the next one needs
                    network.unlink()
            older = [found for found in checkpoint.list_checkpoints(run_dir) if found[1] != path]
            instead = f"the newest checkpoint is {older[-1][1]}" if older else "there is no checkpoint yet"
            remedy = "Please report this."
            if isinstance(error, OSError):
                is_full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
                remedy = "Free disk space." if is_full else "Make sure that it can be written there."
            problem = f"Step {step} was not saved in {path} ({one_line(error)}); {instead}. {remedy}"
        else:
            with logger.optional("deleting older checkpoints"):
                good = [step for step, _ in last_good(run_dir, clock)]
                kept = [*best_steps(run_dir, options.metrics), *good]
                checkpoint.prune_checkpoints(run_dir, options.keep, kept, newest=step)
    return distributed.broadcast_object(problem)


class StopSignals:
    """A context in which signals only set `received`, to the first one; a later second SIGINT interrupts at once.

    A SIGHUP that the process was started to ignore, as nohup does, stays ignored.
    """

    NUMBERS = tuple(signal.Signals[name] for name in ("SIGTERM", "SIGHUP", "SIGUSR1", "SIGINT"))

    def __init__(self):
        self.received = 0
        self._interrupted = math.inf  # time of the first SIGINT
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> "StopSignals":
        for number in self.NUMBERS:
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
                self._previous[number] = signal.signal(number, self._receive)
        return self

    def _receive(self, number: int, frame: Any) -> None:
        now = time.monotonic()
        if number == signal.SIGINT and now > self._interrupted + SECOND_INTERRUPT_SEC:
            raise KeyboardInterrupt
        if number == signal.SIGINT:
            self._interrupted = min(self._interrupted, now)
        self.received = self.received or number
        if distributed.is_main():
            with contextlib.suppress(OSError):  # the terminal may be gone
                os.write(2, b"Stopping after this step and a checkpoint; Ctrl-C twice stops at once.\n")

    def __exit__(self, *exception: Any) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
