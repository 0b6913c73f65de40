"""Collect what the metrics need of one side, in as few passes as possible: every clip is made or decoded once.

Items are shared among the ranks; features of an item depend on neither ranks nor batches. Features of existing footage
are cached.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from metrics import cache, extraction, footage_streams, paired, samplers
from metrics.detectors import registry
from metrics.extraction import Extractor, FeatureRequest, Features, Progress, at_once
from metrics.families import ClipShape
from metrics.footage_streams import ACTIONS
from metrics.inputs import Videos
from metrics.long_video_base import Measure, ProbeOptions, ReadStreams, Rows, SideProbes
from metrics.protocols import EvalProtocol
from metrics.samplers import ItemBatch, Window
from torch_utils import distributed
from training.contract import Size
from training.data.footage import Footage
from training.data.prompts import ClipPrompt
from training.sampling import Prompt, Sampler

Value = TypeVar("Value")


@dataclass(frozen=True)
class Generated:
    """A side that a sampler makes; where it needs frames or streams, windows of `prompts` are given to it.

    `reals` are the same videos as `prompts`, at the size of the output; None: `prompts`, if they have that size.
    """

    sampler: Sampler
    prompts: Videos | None = None
    reals: Videos | None = None
    # Replaces the actions of prompts: (prompt, numbers of the videos, names of actions) -> prompt.
    steer: Callable[[Prompt, Sequence[int], Sequence[str]], Prompt] | None = None

    @property
    def size(self) -> Size:
        """Return height and width of the frames."""
        return self.sampler.size

    @property
    def continues(self) -> bool:
        """Return whether the videos are continuations of real ones, and not transformations."""
        return self.prompts is not None and not self.sampler.needs.follows

    @property
    def reconstructs(self) -> bool:
        """Return whether the videos are the real ones again, as of a tokenizer."""
        return self.prompts is not None and self.sampler.needs.follows and self.prompts.size == self.size

    @property
    def originals(self) -> Videos | None:
        """Return the real videos that the generated ones should equal, if there are any."""
        return self.reals or (self.prompts if self.prompts is not None and self.prompts.size == self.size else None)

    def margins(self, shape: ClipShape, protocol: EvalProtocol) -> tuple[int, int]:
        """Return how many frames of a window come before and after the new frames of a clip of this shape.

        Raises `ValueError` if the sampler or the metric need more context than the protocol gives, or the metric a
        longer horizon.
        """
        if self.prompts is None:
            return 0, 0
        needs, span = self.sampler.needs, shape.new_span
        past = needs.past if protocol.context is None else protocol.context
        horizon = span if protocol.horizon is None else protocol.horizon
        if past < needs.past:
            raise ValueError(f"the model needs {needs.past} context frames, and {past} are given: give more")
        if past < shape.context:
            raise ValueError(f"{shape.context} context frames are compared, and {past} are given: give more")
        if horizon < span:
            raise ValueError(f"{span} generated frames are compared, and the horizon is {horizon}: use a longer one")
        return past, horizon - span + needs.future


Side = Videos | Generated


@dataclass(frozen=True)
class Work:
    """How to measure. Only the protocol, the seed and the weights of detectors change values."""

    protocol: EvalProtocol
    seed: int
    device: torch.device
    batch: int | None = None
    replace_cache: bool = False
    progress: Progress | None = None
    detector_paths: Mapping[str, str] = field(default_factory=dict)
    measures: Sequence[Measure] = ()  # of long videos

    def open(self, detector: str) -> Any:
        """Return a detector, or the comparison of pairs, by its name."""
        if detector in paired.TITLES:
            return paired.open_comparison(detector, self.device, self.detector_paths.get(detector))
        return registry.open_detector(detector, self.device, self.detector_paths.get(detector))

    @property
    def probe_options(self) -> ProbeOptions:
        """Return the options of the measures."""
        paths = self.detector_paths
        return ProbeOptions(device=self.device, detector_paths=paths, is_unbiased=self.protocol.is_unbiased)


def check_streams(measures: Sequence[Measure], real: Side, fake: Side, num_frames: int) -> None:
    """Raise `ValueError` unless both sides have the actions and poses that measures of long videos need."""
    for measure in measures:
        for side in (real, fake) if measure.streams else ():
            footage = side.footage if isinstance(side, Videos) else side.prompts and side.prompts.footage
            follows = isinstance(side, Videos) or ACTIONS in side.sampler.needs.streams
            if footage is None or not follows:
                raise ValueError(
                    f"{measure.name} is of models that follow actions, and this one takes none: leave it out, or "
                    "measure a model with actions against a dataset with actions"
                )
            for name in measure.streams:
                footage_streams.open_stream(footage, name)
        if measure.steer is None:
            continue
        if not isinstance(fake, Generated) or fake.prompts is None:
            raise ValueError(f"{measure.name} steers a model, and {_name_of(fake)} is existing video: measure a model")
        names = footage_streams.names_of(fake.prompts.footage, ACTIONS, fake.sampler.vocabularies)
        measure.steer(Prompt(), [], names, num_frames)


def by_steering(measures: Sequence[Measure], fake: Side, num_frames: int) -> list[tuple[Side, list[Measure]]]:
    """Return groups of measures with the generated side of each: first those without steering, then a side a way."""
    groups: dict[Any, list[Measure]] = {None: []}
    for measure in measures:
        groups.setdefault(measure.steer, []).append(measure)
    found: list[tuple[Side, list[Measure]]] = []
    for group in groups.values():
        steer = group[0].steer if group else None
        if steer is None:
            found.append((fake, group))
            continue
        assert isinstance(fake, Generated), "existing video is not steered"

        def bound(prompt: Prompt, items: Sequence[int], names: Sequence[str], steer: Any = steer) -> Prompt:
            return steer(prompt, items, names, num_frames)

        found.append((dataclasses.replace(fake, steer=bound), group))
    return found


def _name_of(side: Side) -> str:
    return side.footage.name if isinstance(side, Videos) else "the model"


def on_main(compute: Callable[[], Value]) -> Value:
    """Return on every rank what rank 0 computes; an error there is raised on all."""
    value: Any = None
    with distributed.together():
        if distributed.is_main():
            value = compute()
    return distributed.broadcast_object(value)


def collect(
    requests: Sequence[FeatureRequest],
    side: Side,
    label: str,
    work: Work,
    whole: Collection[FeatureRequest] = (),
    long: FeatureRequest | None = None,
) -> tuple[dict[FeatureRequest, Features], list[Rows]]:
    """Return the features of one side, `label` "real" or "generated", by request, and the rows of its long videos.

    A sampler makes each video once for all requests of the same prompts. Footage is read once for each set of frames.
    Requests in `whole` have their features kept, however many they are. `long` says which long videos are probed.
    """
    passes: dict[Any, list[FeatureRequest]] = {}
    different: list[FeatureRequest] = list(dict.fromkeys([*requests, *([long] if long else [])]))
    for request in different:
        key: Any = None  # one pass for all
        if isinstance(side, Videos):
            key = (request is long, request.frames, request.shape, request.past, request.future)
        elif side.prompts is not None:
            key = (request.window_span, request.is_frame)
        passes.setdefault(key, []).append(request)
    found: list[Features] = []
    rows: list[Rows] = []
    for group in passes.values():
        shorts = [request for request in group if request is not long]
        probed = long if long in group else None
        if isinstance(side, Generated):
            features, seen = _generate(shorts, side, label, work, whole, probed)
        elif probed is None:
            features, seen = _read(shorts, side, label, work, whole), []
        else:
            features, seen = [], _read_long(side, label, work, probed)
        found, rows = [*found, *features], rows or seen
    return {features.request: features for features in found}, rows


# ----------------------------------------------------------------------------
# Generated sides.


def _generate(
    requests: Sequence[FeatureRequest],
    side: Generated,
    label: str,
    work: Work,
    whole: Collection[FeatureRequest],
    long: FeatureRequest | None,
) -> tuple[list[Features], list[Rows]]:
    """Make one pass over the videos of a sampler; with prompts, all requests have the same windows."""
    counts: dict[ClipShape, int] = {}
    for request in requests:
        counts[request.shape] = max(request.num_items, counts.get(request.shape, 0))
    num_long = long.num_items if long else 0
    num_items = max(num_long, *counts.values(), 0)
    windows, weights, make_prompt = [Window(item, 0) for item in range(num_items)], None, None
    if side.prompts is not None:
        samples = work.protocol.samples if side.continues else 1
        windows, weights = _prompt_windows(side.prompts.footage, (*requests, long)[0], num_items // samples, work)
        windows = [window for window in windows for _ in range(samples)]
        weights = None if weights is None else weights.repeat(samples)
        make_prompt = _prompt_maker(side, side.prompts.footage, windows)
        num_long = min(num_long, len(windows))
    videos = [window.clip for window in windows]
    counts = {shape: min(count, len(windows)) for shape, count in counts.items()}
    batches = samplers.generated_batches(
        side.sampler,
        counts,
        range(distributed.get_rank(), len(windows), distributed.get_world_size()),
        work.seed,
        work.batch or side.sampler.good_batch or at_once(max([shape.num_frames for shape in counts], default=1)),
        {"real": "metric-real", "generated": "metric-fake"}[label],
        work.protocol.has_phase,
        make_prompt,
        (num_long, long.shape.num_frames if long else 0),
        _real_reader(side.originals, windows),
        {request.shape for request in requests if request.output == "pairs"},
    )
    found = []
    for request in requests:
        count = min(request.num_items, counts[request.shape])
        weighted = None if weights is None else weights[:count]
        found.append(Features(request, videos[:count], weighted, request in whole))
    probes = None
    if long is not None:
        given = None if side.prompts is None else side.prompts.footage
        probes = SideProbes(
            work.measures, label, work.probe_options, _stream_reader(work.measures, given, windows, long, side.sampler)
        )
    _run(found, probes, batches, range(len(windows)), label, work, num_long)
    return found, probes.merge(videos[:num_long], work.device) if probes else []


def _prompt_windows(
    footage: Footage, request: FeatureRequest | None, num_items: int, work: Work
) -> tuple[list[Window], np.ndarray | None]:
    """Return the place of each item's prompt in the footage, and for single frames the weight of each.

    As published, prompts of clips are chosen as real clips are, and those of single frames are all windows, each once,
    weighted 1 / windows of its video. The published code took the windows of the first videos where there are more
    than items; here they are random ones.
    """
    assert request is not None, "a pass has a request"
    span, past = request.window_span, request.past
    if not request.is_frame:
        is_first = work.protocol.windows == "first"
        return samplers.shuffled_windows(footage, "metric-condition", work.seed, num_items, span, past, is_first), None
    windows = samplers.some_windows(footage, "metric-condition", work.seed, num_items, span, past)
    counts = np.array([samplers.num_windows(clip, span) for clip in footage.clips])
    return windows, 1 / counts[[window.clip for window in windows]] if work.protocol.has_weights else None


def _prompt_maker(side: Generated, footage: Footage, windows: Sequence[Window]) -> Callable[[Sequence[int]], Prompt]:
    """Return the function that makes the prompt of items."""
    streams = {name: getattr(footage, "streams", {})[name].read for name in side.sampler.needs.streams}

    def make(items: Sequence[int]) -> Prompt:
        prompt = ClipPrompt(footage, [windows[item] for item in items], streams)
        if side.steer is None:
            return prompt
        return side.steer(prompt, items, footage_streams.names_of(footage, ACTIONS, side.sampler.vocabularies))

    return make


def _stream_reader(
    measures: Sequence[Measure],
    footage: Footage | None,
    windows: Sequence[Window],
    long: FeatureRequest,
    sampler: Sampler | None = None,
) -> ReadStreams | None:
    """Return the function that reads the streams that measures need, None if they need none or there are none."""
    names = sorted({name for measure in measures for name in measure.streams})
    if not names or footage is None:
        return None
    vocabularies = {} if sampler is None else sampler.vocabularies
    return footage_streams.reader(footage, names, windows, long.shape.num_frames, vocabularies)


def _real_reader(
    originals: Videos | None, windows: Sequence[Window]
) -> Callable[[Sequence[int], int, int], Tensor] | None:
    """Return the function that reads frames [first, first + count) of the windows of items."""
    if originals is None:
        return None

    def read(items: Sequence[int], first: int, count: int) -> Tensor:
        starts = [(windows[item].clip, windows[item].start + first) for item in items]
        frames = {at: originals.footage.read(at[0], originals.size, range(at[1], at[1] + count)) for at in set(starts)}
        return samplers.channels_first(np.stack([frames[at] for at in starts]))

    return read


# ----------------------------------------------------------------------------
# Existing sides.


def _read(
    requests: Sequence[FeatureRequest], side: Videos, label: str, work: Work, whole: Collection[FeatureRequest]
) -> list[Features]:
    """Make one pass over the same frames of footage for requests that differ in number, detector or output."""
    frames, shape = requests[0].frames, requests[0].shape
    most = max(request.num_items for request in requests)
    originals = windows = _windows(side, requests[0], most, label, work)
    if frames == "others":
        windows = samplers.partners(_windows(side, requests[0], most + 2, label, work))[: len(windows)]
    videos = [window.clip for window in windows]
    weights = None
    if frames == "all" and work.protocol.has_weights:
        lengths = np.array([clip.num_frames for clip in side.footage.clips])
        weights = 1 / lengths[videos]
    found = []
    for request in requests:
        count = len(windows) if frames == "all" else min(request.num_items, len(windows))
        found.append(Features(request, videos[:count], weights, request in whole))
    with _cached(found, side, label, work) as missing:
        if missing:
            first = min(features.num_stored for features in missing)
            last = max(len(features) for features in missing)
            batch = work.batch or at_once(shape.num_frames)
            own = _own_blocks(first, last, batch if shape.num_frames == 1 else 1)
            is_still, place = frames == "copies", (side.footage, side.size, shape)
            clips = samplers.read_windows(*place, windows, own, batch, is_still)
            batches = (ItemBatch(numbers, {shape: clip}) for numbers, clip in clips)
            if any(request.output == "pairs" for request in requests):
                reals = samplers.read_windows(*place, originals, own, batch)
                both = zip(clips, reals, strict=True)
                batches = (ItemBatch(numbers, {shape: clip}, {shape: real}) for (numbers, clip), (_, real) in both)
            _run(missing, None, batches, range(first, last), label, work)
    for features in found:
        features.num_different = samplers.num_different(side.footage, requests[0].window_span)
    return found


@contextlib.contextmanager
def _cached(found: Sequence[Features], side: Videos, label: str, work: Work) -> Iterator[list[Features]]:
    """Restore features from the cache, yield those that are incomplete, and store these at the end."""
    content = on_main(lambda: side.content)
    descriptions = [_description(features.request, side, content, label, work) for features in found]
    with contextlib.ExitStack() as locks:

        def restore() -> list[int]:
            for i in sorted(range(len(found)), key=lambda i: str(descriptions[i])):
                locks.enter_context(cache.locked(descriptions[i]))
                if not work.replace_cache:
                    cache.restore(descriptions[i], found[i].restore)
            return [features.num_stored for features in found]

        def store() -> None:
            for features, description in zip(found, descriptions, strict=True):
                if features in missing:
                    cache.save(description, features.arrays())

        for features, num_stored in zip(found, on_main(restore), strict=True):
            features.num_stored = num_stored
        missing = [features for features in found if features.num_stored < len(features)]
        yield missing
        if missing:
            on_main(store)


def _windows(side: Videos, request: FeatureRequest, num_items: int, label: str, work: Work) -> list[Window]:
    """Return the window of each item."""
    purpose = {"real": "metric-real", "generated": "metric-fake-clip"}[label]
    footage, span = side.footage, request.shape.span
    if request.frames == "all":
        return samplers.all_frames(footage)
    if request.frames == "some":
        return samplers.some_windows(footage, purpose, work.seed, num_items)
    if request.frames in ("continuations", "others", "copies"):
        return _prompt_windows(footage, request, num_items, work)[0]
    if work.protocol.windows == "sorted":
        return samplers.sorted_windows(footage, purpose, work.seed, num_items, span, label == "generated")
    return samplers.shuffled_windows(footage, purpose, work.seed, num_items, span)


def _description(request: FeatureRequest, side: Videos, content: str, label: str, work: Work) -> dict[str, Any]:
    """Return what determines stored features besides their number."""
    identity = work.open(request.detector).identity
    return {
        "content": content,
        "size": list(side.size),
        "frames": request.frames,
        "windows": work.protocol.windows,
        "weights": request.frames == "all" and work.protocol.has_weights,
        "side": label,
        "seed": None if request.frames == "all" else work.seed,
        "num_frames": request.shape.num_frames,
        "frame_spacing": request.shape.spacing,
        "detector": {key: identity[key] for key in ("name", "sha256")},
        "output": request.output,
        **({} if request.frames in ("clips", "all", "some") else {"margins": [request.past, request.future]}),
        **({"context": request.shape.context} if request.shape.context else {}),
    }


def _own_blocks(first: int, last: int, block: int) -> list[int]:
    """Return this rank's items, in blocks of neighbouring frames."""
    world, rank = distributed.get_world_size(), distributed.get_rank()
    return [item for item in range(first, last) if (item - first) // block % world == rank]


def _read_long(side: Videos, label: str, work: Work, long: FeatureRequest) -> list[Rows]:
    """Probe long windows of footage, or clips of real footage for measures that need no more."""
    is_free = label == "real" and long.frames == "clips"
    found: dict[Any, Rows] = {}
    for is_short in (False, True):
        measures = [measure for measure in work.measures if (is_free and measure.needs_real_clips) == is_short]
        if measures:
            num_frames = work.probe_options.window if is_short else long.shape.num_frames
            found |= zip(*_probe(side, label, work, long, num_frames, measures), strict=True)
    return [found[maker] for maker in dict.fromkeys(measure.probe for measure in work.measures)]


def _probe(
    side: Videos, label: str, work: Work, long: FeatureRequest, num_frames: int, measures: Sequence[Measure]
) -> tuple[list[Any], list[Rows]]:
    """Return the makers of the probes of measures, and the rows of each."""
    if long.frames == "continuations":
        windows = _windows(side, long, long.num_items, label, work)
    else:
        purpose = {"real": "long-real", "generated": "long-fake"}[label]
        windows = samplers.shuffled_windows(side.footage, purpose, work.seed, long.num_items, num_frames)
    num_videos = len(windows)
    own = range(distributed.get_rank(), num_videos, distributed.get_world_size())
    batch = min(work.batch or samplers.MAX_GENERATED, num_videos)
    streams = _stream_reader(measures, side.footage, windows, long)
    probes = SideProbes(measures, label, work.probe_options, streams)
    batches = samplers.read_long(side.footage, side.size, num_frames, windows, own, batch)
    _run([], probes, batches, range(num_videos), label, work, num_videos)
    return probes.makers, probes.merge([window.clip for window in windows], work.device)


# ----------------------------------------------------------------------------
# One pass.


def _run(
    wanted: Sequence[Features],
    probes: SideProbes | None,
    batches: Iterator[ItemBatch],
    items: range,
    label: str,
    work: Work,
    num_long: int = 0,
) -> None:
    """Extract the features of all batches and merge those of the ranks.

    Of all `items`, the first `num_long` come with long videos, and are reported separately since they take longer.
    """
    extractor = Extractor(wanted, {name: work.open(name) for name in {f.request.detector for f in wanted}}, work.device)
    phases = {f"long {label}": range(items.start, num_long), label: range(max(items.start, num_long), items.stop)}
    phases = {name: phase for name, phase in phases.items() if len(phase)}
    done = dict.fromkeys(phases, 0)

    def report(name: str, num_done: int) -> None:
        if work.progress and done[name] < num_done:
            done[name] = num_done
            work.progress(name, num_done, len(phases[name]))

    def take(batch: ItemBatch) -> None:
        if probes is not None:
            probes.add_batch(batch)
        extractor.add(batch)
        for name, phase in phases.items():
            if batch.items[-1] in phase and (batch.is_end or batch.clips):
                report(name, min(batch.items[-1] - phase.start + distributed.get_world_size(), len(phase)))

    extraction.run(batches, take, work.device)
    for features in wanted:
        features.merge(work.device)
    for name, phase in phases.items():
        report(name, len(phase))
