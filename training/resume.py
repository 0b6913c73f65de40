"""Restore a system from the newest good training state of a run, and tell whether its footage is still the same."""

import hashlib
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from dnnlib.util import open_url
from torch_utils import distributed, sharding, training_stats
from training import checkpoint
from training.config import TrainOptions, check_changes
from training.contract import Bundle, System
from training.data.dataset import ClipDataset, size_name
from training.network_file import load_bundle
from training.network_format import reason_of
from training.run_dirs import Beginning

Found = tuple[Path, dict[str, Any]]  # a training state: its path and its contents


def resume(
    model: System, collector: training_stats.Collector, options: TrainOptions, beginning: Beginning
) -> Found | None:
    """Restore the newest good training state that a run goes on from, on all ranks; return it, None if there is none.

    It is that of the run, else the one that the run branches from. One that cannot be read or does not fit the system
    is passed over with a warning. Raises `ValueError` if none of those that can be read fits.
    """
    states = _find_states(options, beginning) if distributed.is_main() else iter(())
    problem = None
    while True:
        found = None
        with distributed.together():
            found = next(states, None)
        path = distributed.broadcast_object(found and found[0])
        if path is None and problem is not None:
            raise distributed.SharedError(problem)
        if path is None:
            return None
        error = None
        try:  # on all ranks, as systems restore statistics of all together
            found = found or (path, checkpoint.load_run_state(path))
            restore(model, found[1], path, collector)
        except ValueError as caught:
            error = caught
        error = next((error for error in distributed.gather_errors(error) if error is not None), None)
        if error is None:
            return found
        problem = problem or str(error)
        distributed.print0(f"Warning: {error}.")


def _find_states(options: TrainOptions, beginning: Beginning) -> Iterator[Found]:
    """Yield the training states to go on from, the best first."""
    if beginning.run_dir is not None:
        yield from ((path, state) for _, path, state in checkpoint.whole_checkpoints(beginning.run_dir))
    if beginning.origin is not None:
        state = checkpoint.load_run_state(beginning.origin)
        beginning.changes = check_changes(state["options"], options, beginning.origin)
        yield Path(beginning.origin), state


def restore(
    model: System, state: Mapping[str, Any], path: Path, collector: training_stats.Collector | None = None
) -> None:
    """Load a training state into a system; optimisers move their state to the device of their parameters."""
    try:
        for name, module in model.modules.items():
            sharding.load_state(module, state["modules"][name])
        for name, optimizer in model.optimizers.items():
            # Learning rates and the like are options, which may have changed since. Whether the kernel is fused decides
            # on which device the optimiser keeps its step count, so it must be set before the state is loaded.
            saved = state["optimizers"][name]
            groups = [
                {**group, "params": then["params"]}
                for group, then in zip(optimizer.param_groups, saved["param_groups"], strict=True)
            ]
            sharding.load_optimizer_state(optimizer, {**saved, "param_groups": groups})
        model.load_state_dict(state["system"])
        if collector is not None:
            wrong = checkpoint.find_wrong(state["loop"], checkpoint.RUN_STATE["loop"], "loop")
            if wrong is not None:
                raise ValueError(wrong)
            collector.load_state_dict(state["loop"]["stats"])
    except Exception as error:  # whatever a file of another version, or of modified code, may cause
        raise ValueError(
            f"{path} does not fit the system that these options make ({reason_of(error)}); repeat the options it was "
            "trained with"
        ) from error


def begin_with(model: System, path_or_url: str) -> None:
    """Give a new run the weights that `init_from` names: of an exported file, or of a training state.

    Raises `ValueError` if they cannot be read or do not fit.
    """
    weights: Bundle | Mapping[str, Any]
    if path_or_url.endswith(".pt"):
        weights = checkpoint.load_run_state(open_url(path_or_url, return_filename=True))["modules"]
    else:
        weights = load_bundle(path_or_url)
    try:
        model.init_from(weights)
    except ValueError:
        raise
    except Exception as error:  # as above
        raise ValueError(f"the weights in {path_or_url} do not fit the system ({reason_of(error)})") from error


# ----------------------------------------------------------------------------
# The footage of a run.


def footage_of(model: System, dataset: ClipDataset) -> dict[str, str]:
    """Return a line for each clip that a system reads, by frame size, "codes" or "latents"; no frame is read.

    It is a digest of the clip's name and of the checksums of its files, and does not depend on the dataset's place.
    """
    footage = {}
    for size in model.inputs().sizes:
        store = dataset.store(size)
        parts = ((clip.path, store.fingerprint(number)) for number, clip in enumerate(store.clips))
        footage[size_name(size)] = _digests(parts)
    for store in (dataset.codes, dataset.latents):
        members = []
        for shard in [] if store is None else store.shards:
            with zipfile.ZipFile(shard) as archive:
                members += [(info.filename, b"%d %d" % (info.file_size, info.CRC)) for info in archive.infolist()]
        if store is not None:
            footage[store.kind.name] = _digests(members)
    return footage


def _digests(parts: Iterable[tuple[str, bytes]]) -> str:
    found = (hashlib.blake2b(f"{name}\n".encode() + content, digest_size=8) for name, content in parts)
    return "\n".join(digest.hexdigest() for digest in found)


def compare_footage(state: Mapping[str, Any], footage: Mapping[str, str], options: TrainOptions) -> list[str]:
    """Return what has changed of the clips since a training state was written; older states do not tell.

    Raises `ValueError` if clips of then are gone or have other frames, unless `options.override`; more may be added.
    """
    changes = []
    for name, then in state.get("footage", {}).items():
        clips, now = set(then.split()), set(footage.get(name, then).split())
        gone, new = len(clips - now), len(now - clips)
        if gone and not options.override:
            raise ValueError(
                f"{options.dataset} is other footage than the run was trained on: of its {len(clips)} clips at {name}, "
                f"{gone} are gone or have other frames. Put the dataset back, add --resume=latest --override to go on "
                "with what is there, or use --resume=never to begin a new run."
            )
        if gone or new:
            changes.append(f"footage at {name}: {gone} clips are gone or have other frames, {new} are new")
    return changes
