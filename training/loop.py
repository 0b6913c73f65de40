"""The training loop: it knows no system, only the contract in docs/adding_a_system.md.

At step s the loop first does what is due at s (status line, preview, checkpoint, metrics) and then takes one training
step, so it runs one time more than there are steps and the end needs no code of its own. All randomness of a step
follows from the options and the step number; a checkpoint therefore holds no generator state, and a run that was
interrupted goes on as if nothing had happened.
"""

import contextlib
import dataclasses
import itertools
import json
import os
import signal
import time
from collections.abc import Callable, Generator, Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import psutil
import torch

from dnnlib.util import atomic_path, format_time, format_time_brief
from torch_utils import distributed, misc, training_stats
from training import checkpoint, registry
from training.config import TrainOptions, check_keys, find_run, new_run_dir, to_dict
from training.dataset import BatchSpec, BatchStream, ClipDataset, size_name
from training.logger import (
    RunLogger,
    SilentLogger,
    continue_command,
    environment_text,
    metric_values,
    read_lines,
)
from training.preview import RealClips, to_float, write_preview

MetricFunction = Callable[[str, Any], Mapping[str, Any]]


@dataclasses.dataclass
class TrainResult:
    """Where a run is and how far it came; `finished` is False if a signal ended it early."""

    run_dir: Path
    step: int
    finished: bool


@dataclasses.dataclass
class Clock:
    """Where the time went: seconds in training steps and in all since the last tick, and in all since the run began."""

    past_sec: float  # of the run, before this process
    train_sec: float = 0.0
    num_steps: int = 0
    begin: float = dataclasses.field(default_factory=time.monotonic)
    tick: float = dataclasses.field(default_factory=time.monotonic)

    @property
    def total_sec(self) -> float:
        return self.past_sec + time.monotonic() - self.begin

    def restart_tick(self) -> None:
        self.train_sec, self.num_steps, self.tick = 0.0, 0, time.monotonic()


def train(
    system: str | Callable[[dict[str, Any], torch.device], Any],
    options: TrainOptions,
    metric_fn: MetricFunction | None = None,
) -> TrainResult:
    """Train a system, given by its registered name or its class, until `options.steps` or a signal.

    `metric_fn(name, system)` evaluates one of `options.metrics` on all ranks and returns what goes into
    metric-<name>.jsonl. SIGTERM, SIGUSR1 and SIGINT end the run after a last checkpoint; the call then returns with
    `finished` False. Ranks are joined here if need be; leaving them is up to the caller.

    Raises `ValueError` for options, datasets and run directories that do not fit, and when a loss has not been finite
    for a whole tick.
    """
    # ---- What to train, on what -------------------------------------------------------------------------------------
    device = distributed.init(options.device)
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False  # as published: float32 throughout
    rank, world_size = distributed.get_rank(), distributed.get_world_size()
    options.check_ranks(world_size)
    found_dir = find_run(options) if distributed.is_main() else None
    dataset, model = build(system, options, device)
    stream = BatchStream(dataset, options.seed, options.batch, rank, world_size, options.workers, options.x_flip)

    # ---- Where to go on ---------------------------------------------------------------------------------------------
    run_dir, state = open_run(options, found_dir)
    loop_state = {"step": 0, "num_batches": 0, "total_sec": 0.0, "wandb_id": None}
    collector = training_stats.Collector()
    if state is not None:
        loop_state = state["loop"]
        restore(model, state)
        collector.load_state_dict(loop_state["stats"])
    for module in model.modules.values():
        distributed.broadcast_module(module)
    step = first_step = loop_state["step"]
    num_batches = loop_state["num_batches"]
    seen = state is not None  # what is due at this step was done before the checkpoint was written
    logger = SilentLogger()
    if distributed.is_main():
        write_run_files(run_dir, options, device, step)
        logger = RunLogger(run_dir, to_dict(options), step if seen else -1, loop_state["wandb_id"])
    describe(logger, run_dir, model, dataset, options, step)
    clips = preview_clips(model, dataset, options)
    del state

    # ---- The loop ---------------------------------------------------------------------------------------------------
    clock = Clock(past_sec=loop_state["total_sec"])
    plan = plan_batches(model, step, options.steps, num_batches)
    batches = cast(Generator[dict[str, torch.Tensor]], stream.prefetch(plan))
    with contextlib.closing(logger), contextlib.closing(batches), StopSignals() as signals:
        while True:
            last = step >= options.steps
            stop = any_rank(signals.received, device)
            if not seen:
                if is_due(step, options.tick_steps, last):
                    tick(logger, collector, clock, options, device, step, run_dir)
                if is_due(step, options.sample_steps, last):
                    write_previews(logger, model, clips, run_dir, device, step)
                if is_due(step, options.checkpoint_steps, last) or stop:
                    loop_state = {"step": step, "num_batches": num_batches, "total_sec": clock.total_sec}
                    loop_state |= {"wandb_id": logger.wandb_id, "stats": collector.state_dict()}
                    save(run_dir, model, options, loop_state)
            if is_due(step, options.checkpoint_steps, last) and metric_fn is not None and not stop:
                evaluate(logger, model, metric_fn, options.metrics, run_dir, step)
            if last or stop:
                break

            begin = time.monotonic()
            num_taken = len(model.batch_spec(step))
            taken = (
                {name: to_float(part, device) for name, part in batch.items()}
                for batch in itertools.islice(batches, num_taken)
            )
            for name, value in model.step(taken, step).items():
                training_stats.report(name, value)
            assert next(taken, None) is None, f"step {step} left some of its {num_taken} batches"
            num_batches += num_taken
            step += 1
            seen = False
            clock.train_sec += time.monotonic() - begin
            clock.num_steps += 1
            if step == first_step + 1:
                distributed.shorten_timeout()

        # ---- The end ------------------------------------------------------------------------------------------------
        if last:
            logger.text(f"Finished {step} steps in {run_dir}")
        else:
            command = continue_command() + (f" --resume={run_dir}" if options.resume == "never" else "")
            logger.text(f"Stopped at step {step}, everything is saved; to continue: {command}")
    return TrainResult(run_dir, step, finished=last)


# ----------------------------------------------------------------------------
# Beginning.


def build(
    system: str | Callable[[dict[str, Any], torch.device], Any], options: TrainOptions, device: torch.device
) -> tuple[ClipDataset, Any]:
    """The dataset at the sizes that the system asks for, and the system."""
    if isinstance(system, str):
        check_keys([system], registry.SYSTEMS, "the registry of systems")
        system = registry.resolve(registry.SYSTEMS[system])
    assert not isinstance(system, str)
    for name in ("batch", "grad_accum", "seed"):
        assert options.model.get(name, getattr(options, name)) == getattr(options, name), f"two values of {name}"
    model = system(options.model, device)
    dataset = ClipDataset(options.dataset, model.dataset_sizes)
    for spec in model.batch_spec(0):
        dataset.eligible(spec.num_frames)
    return dataset, model


def open_run(options: TrainOptions, found_dir: Path | None) -> tuple[Path, dict[str, Any] | None]:
    """The run directory, made if there is none to continue, and the newest whole training state in it.

    Rank 0 decides, all ranks read the same file.
    """
    run_dir, path, state = found_dir or new_run_dir(options), None, None
    if distributed.is_main():
        (run_dir / "checkpoints").mkdir(parents=True, exist_ok=True)
        newest = checkpoint.latest_whole_checkpoint(run_dir)
        if newest is not None:
            _, path, state = newest
    run_dir, path = distributed.broadcast_object((run_dir, path))
    return run_dir, checkpoint.load_train_state(path) if path and state is None else state


def restore(model: Any, state: Mapping[str, Any]) -> None:
    """Put a training state into a system; optimisers move their part to the device of their parameters."""
    for name, module in model.modules.items():
        module.load_state_dict(state["modules"][name])
    for name, optimizer in model.optimizers.items():
        optimizer.load_state_dict(state["optimizers"][name])
    model.load_state_dict(state["system"])


def write_run_files(run_dir: Path, options: TrainOptions, device: torch.device, step: int) -> None:
    """options.json, and in environment.txt one section for each time that the run was begun or continued."""
    with atomic_path(run_dir / "options.json") as path:
        path.write_text(json.dumps(to_dict(options), indent=2) + "\n")
    log = run_dir / "environment.txt"
    sections = [log.read_text()] if log.is_file() else []
    sections.append(f"step      {step}\n{environment_text(device, distributed.get_world_size())}")
    with atomic_path(log) as path:
        path.write_text("\n".join(sections))


def describe(
    logger: RunLogger | SilentLogger, run_dir: Path, model: Any, dataset: ClipDataset, options: TrainOptions, step: int
) -> None:
    """Say what is trained, and how large it is."""
    for name, module in model.modules.items():
        num_params, num_buffers = (sum(t.numel() for t in ts) for ts in (module.parameters(), module.buffers()))
        logger.text(f"{name:8s} {type(module).__name__:24s} {num_params:>12,} parameters {num_buffers:>10,} in buffers")
    sizes = ", ".join(size_name(size) for size in model.dataset_sizes)
    logger.text(f"dataset  {options.dataset}: {len(dataset.clips)} clips at {sizes}, {dataset.fps:g} frames a second")
    ranks = distributed.get_world_size()
    logger.text(f"batch    {options.batch} clips: {ranks} ranks x {options.grad_accum} rounds of accumulation")
    verb = "goes on" if step else "begins"
    logger.text(f"run      {run_dir} {verb} at step {step} of {options.steps}")


def plan_batches(model: Any, step: int, num_steps: int, num_batches: int) -> Iterator[tuple[int, BatchSpec]]:
    """Numbers and contents of the global batches of steps [step, num_steps), `num_batches` having been taken before."""
    specs = itertools.chain.from_iterable(model.batch_spec(s) for s in range(step, num_steps))
    return zip(itertools.count(num_batches), specs)


# ----------------------------------------------------------------------------
# What is due now and then. All ranks take part, rank 0 writes.


def is_due(step: int, interval: int, last: bool) -> bool:
    return last or (interval > 0 and step % interval == 0)


def any_rank(value: bool, device: torch.device) -> bool:
    """True if `value` is true on any rank: all must leave the loop at the same step."""
    if distributed.get_world_size() == 1:
        return value
    return bool(distributed.all_reduce_sum(torch.tensor(int(value), device=device)))


def tick(
    logger: RunLogger | SilentLogger,
    collector: training_stats.Collector,
    clock: Clock,
    options: TrainOptions,
    device: torch.device,
    step: int,
    run_dir: Path,
) -> None:
    """Collect what was reported since the last tick, log it, and stop if a loss was not finite all the time."""
    values = {
        "progress/step": step,
        "progress/tick": -(-step // options.tick_steps),
        "timing/total_sec": clock.total_sec,
        "timing/sec_per_step": clock.train_sec / max(clock.num_steps, 1),
        "timing/maintenance_sec": time.monotonic() - clock.tick - clock.train_sec,
        "resources/cpu_mem_gb": psutil.Process().memory_info().rss / 2**30,
        "resources/peak_gpu_mem_gb": 0.0,
        "resources/peak_gpu_mem_reserved_gb": 0.0,
    }
    if device.type == "cuda":
        values["resources/peak_gpu_mem_gb"] = torch.cuda.max_memory_allocated(device) / 2**30
        values["resources/peak_gpu_mem_reserved_gb"] = torch.cuda.max_memory_reserved(device) / 2**30
        torch.cuda.reset_peak_memory_stats(device)
    for name, value in values.items():
        training_stats.report0(name, value)
    collector.update()
    stats = {name: entry for name, entry in collector.as_dict().items() if entry.num or "nonfinite" in entry}
    logger.scalars(step, stats)
    losses = {name: entry for name, entry in stats.items() if name.startswith("loss/")}
    eta = format_time_brief(values["timing/sec_per_step"] * (options.steps - step)) if clock.num_steps else "-"
    fields = [
        f"step {step}",
        f"time {format_time(clock.total_sec)}",
        f"sec/step {values['timing/sec_per_step']:.2f}",
        f"eta {eta}",
        f"maintenance {values['timing/maintenance_sec']:.1f}",
        f"cpumem {values['resources/cpu_mem_gb']:.2f}",
        f"gpumem {values['resources/peak_gpu_mem_gb']:.2f}",
        f"reserved {values['resources/peak_gpu_mem_reserved_gb']:.2f}",
        *(f"{name} {entry.mean:.4g}" for name, entry in losses.items() if name.endswith("_loss")),
    ]
    logger.text("  ".join(fields))
    spoilt = [name for name, entry in losses.items() if entry.num == 0]
    if spoilt:
        good = [path for saved, path in checkpoint.list_checkpoints(run_dir) if saved <= step - clock.num_steps]
        raise ValueError(
            f"{', '.join(spoilt)} has not been finite since step {step - clock.num_steps}, so training stops. The last "
            f"good checkpoint is {good[-1] if good else 'the beginning'}. Begin again with a lower learning rate or "
            "another R1 weight, and look at stats.jsonl for when the losses left their usual range."
        )
    clock.restart_tick()


def preview_clips(model: Any, dataset: ClipDataset, options: TrainOptions) -> RealClips:
    """The real clips that stand beside the previews, and under them in super-resolution."""
    spec = model.preview_spec()
    context = model.context if model.needs_condition else 0
    return RealClips(dataset, spec["num_videos"], spec["num_frames"], context, options.seed)


def write_previews(
    logger: RunLogger | SilentLogger, model: Any, clips: RealClips, run_dir: Path, device: torch.device, step: int
) -> None:
    """The videos of the first seeds at this step, and once the real clips."""
    if distributed.is_main():
        samples, fps = run_dir / "samples", clips.dataset.fps
        for size in model.dataset_sizes:
            real = samples / f"real-{size_name(size)}"
            if not real.with_suffix(".png").is_file():
                write_preview(real, clips.chunks(size), clips.num_frames, fps)
        condition = None
        num_frames = model.preview_spec()["num_frames"]
        if model.needs_condition:
            condition = clips.condition(min(model.dataset_sizes), device)
            num_frames = clips.num_frames
        fake = samples / f"fake-{step:08d}"
        seeds = list(range(len(clips.clips)))
        write_preview(fake, model.sample(seeds, 0, num_frames, condition=condition), num_frames, fps)
        logger.video(step, "samples/fake", fake.with_suffix(".mp4"))
    distributed.barrier()


def save(run_dir: Path, model: Any, options: TrainOptions, loop_state: Mapping[str, Any]) -> None:
    """Write both files of a checkpoint, then prune older ones; the best by the first metric stays."""
    if distributed.get_world_size() > 1:
        for module in model.modules.values():
            misc.check_ddp_consistency(module)
    state = {
        "modules": {name: module.state_dict() for name, module in model.modules.items()},
        "optimizers": {name: optimizer.state_dict() for name, optimizer in model.optimizers.items()},
        "system": model.state_dict(),  # may sum over ranks, so all of them ask
        "loop": dict(loop_state),
        "options": to_dict(options),
    }
    if distributed.is_main():
        checkpoint.save_network(model.export(), checkpoint.network_path(run_dir, loop_state["step"]))
        checkpoint.save_train_state(checkpoint.train_state_path(run_dir, loop_state["step"]), state)
        checkpoint.prune_checkpoints(run_dir, options.keep, protect=best_steps(run_dir, options.metrics))
    distributed.barrier()


def evaluate(
    logger: RunLogger | SilentLogger,
    model: Any,
    metric_fn: MetricFunction,
    metrics: tuple[str, ...],
    run_dir: Path,
    step: int,
) -> None:
    """Evaluate the metrics that this step has no result of yet: a run may have ended between saving and measuring."""
    for name in metrics:
        lines = read_lines(run_dir / f"metric-{name}.jsonl") if distributed.is_main() else []
        if not distributed.broadcast_object(any(line["step"] == step for line in lines)):
            result = metric_fn(name, model)
            logger.metric(step, name, {**result, "checkpoint": checkpoint.network_path(run_dir, step).name})
            values = "  ".join(f"metric/{key} {value:.6g}" for key, value in metric_values(result).items())
            logger.text(f"step {step}  {values}")


def best_steps(run_dir: Path, metrics: tuple[str, ...]) -> list[int]:
    """The step of the best checkpoint by the first metric; none if it has not been measured.

    Less is better, unless the result says `"higher_is_better": true`.
    """
    lines = read_lines(run_dir / f"metric-{metrics[0]}.jsonl") if metrics else []
    scores = []
    for line in lines:
        value = next(iter(metric_values(line).values()))
        scores.append((-value if line.get("higher_is_better") else value, line["step"]))
    return [min(scores)[1]] if scores else []


class StopSignals:
    """While open, SIGTERM, SIGUSR1 and SIGINT only set `received`; a second SIGINT interrupts at once, as ever."""

    NAMES = ("SIGTERM", "SIGUSR1", "SIGINT")

    def __init__(self):
        self.received = False
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> "StopSignals":
        for number in [getattr(signal, name) for name in self.NAMES if hasattr(signal, name)]:
            self._previous[number] = signal.signal(number, self._receive)
        return self

    def _receive(self, number: int, frame: Any) -> None:
        self.received = True
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        if distributed.is_main():
            os.write(2, b"Stopping after this step and a checkpoint; Ctrl-C twice stops at once.\n")

    def __exit__(self, *exception: Any) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
