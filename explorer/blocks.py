"""Numbered blocks of frames: how they are computed from the stages of a sampler, and the cache that keeps them.

Block k of a stage holds frames [k * size, (k + 1) * size) of its video. Where a stage has random access, each block is
computed alone and always in the same way. Where it has not, blocks are cut from one rollout, which begins at frame 0
with the same request each time. So a frame has the same bits whenever, and in whatever order, it is asked for.

A stage after the first reads the frames of the stage before it from the same cache.
"""

import collections
import dataclasses
import threading
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from explorer.worker import Steps
from training.contract import Size
from training.sampling import Prompt, Request, Sampler, Start, quantize

FLOATS = ""  # in place of the name of an output: the "video" of a stage as floats, which the next stage reads
MAX_ROLLOUTS = 36  # kept to be continued, for each model
MAX_SAMPLERS = 8  # of other options, kept for each model

Options = tuple[tuple[str, Any], ...]  # names and values of the live options


class BlockName(NamedTuple):
    """Identifies a block: uint8 (T, H, W, 3) of an output of a stage, or for FLOATS float32 (T, 3, h, w)."""

    model: str
    options: Options
    seed: int
    stage: int
    output: str
    number: int


class Progress(NamedTuple):
    """States how far a rollout is: frames that are computed, and how many there must be."""

    done: int
    goal: int


class Cache:
    """Keeps the blocks used last, up to a number of bytes; for many threads."""

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes, self.num_bytes = max_bytes, 0
        self._blocks: collections.OrderedDict[BlockName, Any] = collections.OrderedDict()
        self._lock = threading.Lock()

    def get(self, name: BlockName) -> Any:
        """Return the block, or None."""
        with self._lock:
            if name in self._blocks:
                self._blocks.move_to_end(name)
            return self._blocks.get(name)

    def put(self, name: BlockName, block: np.ndarray | Tensor) -> None:
        """Keep a block in place of those not used for longest."""
        with self._lock:
            if name in self._blocks:
                self.num_bytes -= self._blocks.pop(name).nbytes
            self._blocks[name] = block
            self.num_bytes += block.nbytes
            while self.num_bytes > self.max_bytes and self._blocks:
                _, oldest = self._blocks.popitem(last=False)
                self.num_bytes -= oldest.nbytes

    def drop_model(self, model: str) -> None:
        """Remove all blocks of a model."""
        with self._lock:
            for name in [name for name in self._blocks if name.model == model]:
                self.num_bytes -= self._blocks.pop(name).nbytes


class StagePrompt(Prompt):
    """Gives a stage the frames of the stage before it, and whatever else the user's prompt holds.

    `window` is float32 (1, 3, T, h, w), whose first frame has the number `first`.
    """

    def __init__(self, window: Tensor, first: int, given: Prompt) -> None:
        self.window, self.first, self.given = window, first, given
        self.label, self.text, self.fps = given.label, given.text, given.fps

    def frames(self, start: Start, count: int, size: Size) -> Tensor:
        """See `Prompt.frames`."""
        (number,) = [start] if isinstance(start, int) else start
        assert self.window.shape[-2:] == size and number >= self.first
        return self.window[:, :, number - self.first :][:, :, :count]

    def stream(self, name: str, start: Start, count: int) -> Tensor:
        """See `Prompt.stream`."""
        return self.given.stream(name, start, count)


class Rollout:
    """A video that is computed from frame 0 on and cut into blocks of `size` frames."""

    def __init__(self, chunks: Iterator[dict[str, Tensor]], size: int) -> None:
        self.size, self.number, self.num_frames = size, 0, 0  # the next block; frames computed so far
        self._chunks = chunks
        self._held: dict[str, list[Any]] = {}  # frames that no block has had yet
        self._has_ended = False
        self._error: ValueError | None = None

    @property
    def num_held(self) -> int:
        """Return how many frames no block has had yet."""
        return self.num_frames - min(self.number * self.size, self.num_frames)

    def advance(self) -> dict[str, Any] | None:
        """Compute the next chunk; return the next block once it is complete, else None.

        Raises `ValueError` where the video has ended.
        """
        if self.num_held < self.size and not self._has_ended:
            self._compute()
        if self.num_held < self.size and not self._has_ended:
            return None
        if not self.num_held:
            raise self._error or ValueError(f"the video ends at frame {self.num_frames}: use a frame before it")
        block = {}
        for output, pieces in self._held.items():
            frames = join(pieces)
            block[output] = join([frames[: self.size]])  # a copy, for a part would keep the whole in memory
            self._held[output] = [frames[self.size :]]
        self.number += 1
        return block

    def _compute(self) -> None:
        """Add the next chunk to the held frames. A prompt that ends early ends the video."""
        try:
            with torch.no_grad():
                chunk = blocks_of(next(self._chunks))
        except StopIteration:
            self._has_ended = True
        except ValueError as error:
            self._has_ended, self._error = True, error
        else:
            for output, frames in chunk.items():
                self._held.setdefault(output, []).append(frames)
            self.num_frames += len(chunk["video"])


def blocks_of(chunk: dict[str, Tensor]) -> dict[str, Any]:
    """Return every output of a chunk (1, 3, T, H, W) as uint8 (T, H, W, 3), and for FLOATS the video (T, 3, h, w)."""
    blocks: dict[str, Any] = {output: quantize(frames)[0].cpu().numpy() for output, frames in chunk.items()}
    return {**blocks, FLOATS: chunk["video"][0].float().cpu().transpose(0, 1)}


def join(blocks: list[Any]) -> Any:
    """Return blocks, all arrays or all tensors, as one along their first axis."""
    return np.concatenate(blocks) if isinstance(blocks[0], np.ndarray) else torch.cat(blocks)


def block_size(stages: Any, index: int) -> int:
    """Return how many frames of a stage are computed together."""
    stage = stages[index]
    return (stage.live_block if index else None) or stage.block


class Model:
    """A model in memory and the blocks of its stages; for one thread."""

    def __init__(self, name: str, sampler: Sampler, prompt: Prompt, cache: Cache) -> None:
        self.name, self.sampler, self.prompt, self.cache = name, sampler, prompt, cache
        self._samplers: collections.OrderedDict[Options, Sampler] = collections.OrderedDict()
        self._rollouts: collections.OrderedDict[BlockName, Rollout] = collections.OrderedDict()

    def stages(self, options: Options) -> Any:
        """Return the stages of the sampler with these live options."""
        if options not in self._samplers:
            changed = dataclasses.replace(self.sampler.options, **dict(options))
            is_own = changed == self.sampler.options
            self._samplers[options] = self.sampler if is_own else self.sampler.with_options(changed)
            if len(self._samplers) > MAX_SAMPLERS:
                self._samplers.popitem(last=False)
        self._samplers.move_to_end(options)
        return self._samplers[options].stages

    def blocks(self, name: BlockName, start: int, count: int) -> Steps[list[Any]]:
        """Return the blocks that hold frames [start, start + count), fewer where the video ends; ignore `name.number`.

        Raises `ValueError` where the video ends before the first of them.
        """
        size, found = block_size(self.stages(name.options), name.stage), []
        for number in range(start // size, -(-(start + count) // size)):
            try:
                found.append((yield from self.block(name._replace(number=number))))
            except ValueError:
                if not found:
                    raise
                break
            if len(found[-1]) < size:
                break
        return found

    def block(self, name: BlockName) -> Steps[Any]:
        """Return a block, from the cache or computed now."""
        found = self.cache.get(name)
        if found is not None:
            return found
        stage = self.stages(name.options)[name.stage]
        if not stage.random_access:
            return (yield from self._roll(stage, name))
        size = block_size(self.stages(name.options), name.stage)
        prompt = yield from self._prompt(stage, name, size)
        request = Request([name.seed], name.number * size, size, prompt)
        with torch.no_grad():
            chunks = [blocks_of(chunk) for chunk in stage.frames(request)]
        if not chunks:
            raise ValueError(f"the video ends before frame {name.number * size}: use a frame before it")
        made = self._keep(name, {output: join([chunk[output] for chunk in chunks]) for output in chunks[0]})
        yield
        return made[name.output]

    def _prompt(self, stage: Sampler, name: BlockName, size: int) -> Steps[Prompt]:
        """Return what a stage of random access needs for one block of `size` frames.

        Where the stage before it is a rollout, its first frame stands in for those before it.
        """
        given = self.prompt.of([name.seed])
        if name.stage == 0:
            return given
        stages, previous = self.stages(name.options), name._replace(stage=name.stage - 1, output=FLOATS)
        step, first = block_size(stages, previous.stage), name.number * size - stage.needs.past
        num_missing = 0 if stages[previous.stage].random_access else max(0, -first)
        count = size + stage.needs.past + stage.needs.future - num_missing
        blocks = yield from self.blocks(previous, first + num_missing, count)
        window = torch.cat([*[blocks[0][:1]] * num_missing, *blocks]).transpose(0, 1).contiguous()[None]
        return StagePrompt(window, (first + num_missing) // step * step - num_missing, given)

    def _roll(self, stage: Sampler, name: BlockName) -> Steps[Any]:
        """Return a block of a rollout, which is continued from where it is, or else begun again.

        Blocks on the way are kept too. Yields a `Progress` after each chunk. Another task may advance the same
        rollout in between.
        """
        assert name.stage == 0 and name.number >= 0, "only the first stage may be a rollout, from frame 0 on"
        key, goal = name._replace(output=FLOATS, number=0), (name.number + 1) * stage.block
        prompt = self.prompt.of([name.seed])
        if prompt.limit is not None:
            if name.number * stage.block >= prompt.limit:
                raise ValueError(f"the video ends at frame {prompt.limit}: use a frame before it")
            goal = min(goal, prompt.limit)
        rollout: Rollout | None = None
        while True:
            found = self.cache.get(name)
            if found is not None:
                return found
            if rollout is None or rollout.number > name.number:
                rollout = self._rollouts.get(key)
            if rollout is None or rollout.number > name.number:
                rollout = Rollout(stage.frames(Request([name.seed], 0, prompt.limit, prompt)), stage.block)
            self._remember(key, rollout)
            try:
                made = rollout.advance()
            except Exception as error:
                if not isinstance(error, ValueError):
                    self._rollouts.pop(key, None)
                raise
            if made is not None:
                self._keep(name._replace(number=rollout.number - 1), made)
                if rollout.number - 1 == name.number:
                    yield
                    return made[name.output]
            yield Progress(rollout.num_frames, goal)

    def _remember(self, key: BlockName, rollout: Rollout) -> None:
        """Keep a rollout to be continued, in place of the one not used for longest."""
        self._rollouts[key] = rollout
        self._rollouts.move_to_end(key)
        if len(self._rollouts) > MAX_ROLLOUTS:
            self._rollouts.popitem(last=False)

    def _keep(self, name: BlockName, blocks: dict[str, Any]) -> dict[str, Any]:
        """Put the outputs of one block of a stage into the cache, floats only where a stage follows."""
        for output, block in blocks.items():
            if output != FLOATS or name.stage + 1 < len(self.stages(name.options)):
                self.cache.put(name._replace(output=output), block)
        return blocks
