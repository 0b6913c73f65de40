"""Remember what was found out about the videos of a folder, so that a large one opens at once the next time."""

import contextlib
import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from dnnlib import util
from dnnlib.json_file import JsonError, listed, mapped, number, read_json

_MIN_VIDEOS = 32  # fewer are looked at each time
_VERSION = 1


class VideoFacts(NamedTuple):
    """What a video has: frames, frames per second, and how often each pixel is repeated (`dnnlib.video`)."""

    num_frames: int
    fps: float
    factor: int


class VideoIndex:
    """The facts of the videos below a folder, kept in the cache folder; threads may use it at once.

    A video whose size or time has changed is looked at again. An index that is damaged or cannot be written is passed
    over.
    """

    def __init__(self, folder: Path) -> None:
        digest = hashlib.blake2b(os.fsencode(os.path.abspath(folder)), digest_size=12).hexdigest()
        self.path = Path(util.make_cache_dir_path("videos", f"{digest}.json"))
        self._known: dict[str, list[float]] = {}
        self._found: dict[str, list[float]] = {}
        self._is_new = False
        with contextlib.suppress(OSError, JsonError):
            content = read_json(self.path, mapped(listed(number(0, 1e30))))
            if content.get("version") == [_VERSION]:
                self._known = content

    def look(self, video: Path, find: Callable[[], VideoFacts]) -> VideoFacts:
        """Return the facts of a video, which `find` finds out if they are not known."""
        status = os.stat(video)
        # In milliseconds, which a float holds exactly.
        key, stamp = os.path.abspath(video), [float(status.st_size), float(status.st_mtime_ns // 1_000_000)]
        known = self._known.get(key)
        if known is None or len(known) != 5 or known[:2] != stamp:
            known, self._is_new = [*stamp, *map(float, find())], True
        self._found[key] = known
        return VideoFacts(int(known[2]), known[3], int(known[4]))

    def save(self) -> None:
        """Keep what was found, if it is new and worth it."""
        if not self._is_new or len(self._found) < _MIN_VIDEOS:
            return
        with contextlib.suppress(OSError):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with util.atomic_path(self.path) as temporary:
                temporary.write_text(json.dumps({"version": [_VERSION], **self._found}))
