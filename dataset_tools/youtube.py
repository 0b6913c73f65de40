"""Read lists of intervals of web videos, and download each video once into a cache folder."""

import hashlib
import importlib
import io
import itertools
import json
import os
import re
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from dnnlib.json_file import anything, read_json
from dnnlib.locks import locked

CONFIGS = Path(__file__).parent / "youtube_configs"
WHOLE = "all"

_DOWNLOADS_AT_ONCE = 4
_SHOW_EVERY_SEC = 10.0
_LONGEST_DELAY_SEC = 30.0
_SLUG_LETTERS = 80


@dataclass(frozen=True)
class Interval:
    """A clip to extract: seconds `start_sec` to `end_sec` of a video, both included; None is the video's end."""

    video: str  # a YouTube id, or a URL
    text: str  # as in the config
    start_sec: float = 0.0
    end_sec: float | None = None

    @property
    def name(self) -> str:
        """Return the path of the clip in the dataset, such as dQw4w9WgXcQ/0_26-6_30."""
        return f"{video_name(self.video)}/{self.text.replace(':', '_').replace(' ', '-')}"


def patterns() -> dict[str, str]:
    """Return the regular expressions of schema.json: videoId, url and interval, which has a group for each time."""
    definitions = json.loads((CONFIGS / "schema.json").read_text())["$defs"]
    return {name: entry["pattern"] for name, entry in definitions.items() if "pattern" in entry}


def read_config(path: Path) -> list[Interval]:
    """Return all intervals of a config, in order; raise ValueError with the reason if it does not match schema.json."""
    expected = patterns()
    config = read_json(path, anything, unique=True)
    if not isinstance(config, dict) or not config:
        raise ValueError(f'{path} must hold an object of videos, as {{"aqz-KE-bpKQ": ["0:26 1:10"]}}')
    intervals = []
    for video, texts in config.items():
        if not any(_matches(expected[name], video) for name in ("videoId", "url")):
            raise ValueError(f"{path}: {video!r} is neither the 11 characters that YouTube names a video by nor a URL")
        if not isinstance(texts, list) or not texts or not all(isinstance(text, str) for text in texts):
            raise ValueError(f'{path}: {video} must have a list of intervals as ["0:26 1:10"], or ["{WHOLE}"]')
        if WHOLE in texts and len(texts) > 1:
            raise ValueError(f'{path}: {video} has intervals beside "{WHOLE}", which is the whole video; keep one')
        if repeated := sorted({text for text in texts if texts.count(text) > 1}):
            raise ValueError(f"{path}: {video} has the interval {repeated[0]!r} more than once; keep one")
        for text in texts:
            try:
                intervals.append(_parse_interval(video, text, expected["interval"]))
            except ValueError as error:
                raise ValueError(f"{path}: {video} has the interval {text!r}, {error}") from None
    return intervals


def _matches(pattern: str, text: str) -> re.Match[str] | None:
    # Without the anchors of the schema, because here $ would also match before a line break.
    return re.fullmatch(pattern.removeprefix("^").removesuffix("$"), text)


def _parse_interval(video: str, text: str, pattern: str) -> Interval:
    if text == WHOLE:
        return Interval(video, text)
    match = _matches(pattern, text)
    if match is None:
        raise ValueError(f'which is neither two times as "0:26 1:02:03.5" nor "{WHOLE}"')
    start, end = (
        sum(float(part) * 60**place for place, part in enumerate(reversed(time_text.split(":"))))
        for time_text in match.groups()
    )
    if end <= start:
        raise ValueError("which does not end after its start")
    return Interval(video, text, start, end)


def overlaps(intervals: Sequence[Interval]) -> list[str]:
    """Return one sentence for each two overlapping intervals of a video, whose frames would have twice the weight."""
    ordered = sorted(intervals, key=lambda interval: interval.start_sec)
    return [
        f"{one.video}: {one.text!r} and {other.text!r} overlap, so the shared part will be stored twice"
        for one, other in itertools.combinations(ordered, 2)
        if one.video == other.video and one.end_sec is not None and other.start_sec < one.end_sec
    ]


def video_name(video: str) -> str:
    """Return the name of a video in paths: its id, or a readable form of its URL that ends in a hash of the URL."""
    if "://" not in video:
        return video
    readable = re.sub(r"[^A-Za-z0-9]+", "-", re.sub(r"^https?://([^/@]*@)?", "", video))
    digest = hashlib.blake2b(video.encode(), digest_size=6).hexdigest()  # 12 digits: longer than an id
    return f"{readable[:_SLUG_LETTERS]}-{digest}".replace("--", "-").strip("-")


def load_yt_dlp() -> Any:
    """Return the package yt-dlp; raise ValueError with the install command if it is missing."""
    try:
        return importlib.import_module("yt_dlp")
    except ModuleNotFoundError:
        raise ValueError("downloading needs the package yt-dlp: run pip install -e '.[youtube]'") from None


class VideoCache:
    """A folder of downloaded videos, `<name>.<suffix>`, that any number of threads and processes may share.

    A download has another file name until it is complete; an interrupted one is resumed. If two callers need the same
    video at once, one waits for the other's download. `max_height` limits the shorter edge, if there is a choice;
    `cookies` is a file in Netscape format.
    """

    def __init__(self, folder: Path, max_height: int = 1080, cookies: Path | None = None) -> None:
        self.folder = folder
        self.max_height = max_height
        self.cookies = cookies.read_text() if cookies is not None else None
        self._slots = threading.BoundedSemaphore(_DOWNLOADS_AT_ONCE)
        self._failed: dict[str, str] = {}
        self._warnings: set[str] = set()

    def find(self, video: str) -> Path | None:
        """Return the file of a video if its download is complete."""
        name = video_name(video)
        # A single suffix: names of interrupted downloads, name.f137.mp4.part, have more.
        found = (path for path in sorted(self.folder.glob(f"{name}.*")) if path.stem == name and path.suffix != ".part")
        return next(found, None)

    def fetch(self, video: str) -> Path:
        """Return the file of a video, downloaded if necessary; raise ValueError naming the video and the cause of a
        failure.
        """
        if path := self.find(video):
            return path
        self.folder.mkdir(parents=True, exist_ok=True)
        with locked(self.folder / f".{video_name(video)}.lock"):
            # The previous holder of the lock may have downloaded the video, or found that it is unavailable.
            if path := self.find(video):
                return path
            if video in self._failed:
                raise ValueError(self._failed[video])
            try:
                with self._slots:
                    return self._download(video)
            except ValueError as error:
                self._failed[video] = str(error)
                raise

    def _download(self, video: str) -> Path:
        yt_dlp = load_yt_dlp()
        name = video_name(video)
        address = video if video != name else f"https://www.youtube.com/watch?v={video}"
        start_sec = time.monotonic()
        click.echo(f"Downloading {video} ...", err=True)
        try:
            with yt_dlp.YoutubeDL(self.options(video)) as downloader:
                # In two steps: a channel or a live stream would be downloaded without end.
                info = downloader.extract_info(address, download=False)
                if info.get("_type", "video") != "video":
                    raise ValueError(f"{video} names a list of videos, not one; give the URL of each video itself")
                if info.get("is_live"):
                    raise ValueError(f"{video} is being streamed live; wait until it has ended")
                info = downloader.process_ie_result(info, download=True)
        except yt_dlp.utils.YoutubeDLError as error:
            raise ValueError(f"{video} cannot be downloaded: {_brief(str(error))}") from None
        partial = Path(info["requested_downloads"][0]["filepath"])
        path = self.folder / f"{name}{partial.suffix}"
        os.replace(partial, path)
        num_mib = path.stat().st_size / 2**20
        click.echo(f"Downloaded {video}: {num_mib:.1f} MiB in {time.monotonic() - start_sec:.0f} s", err=True)
        return path

    def options(self, video: str) -> dict[str, Any]:
        """Return the options of yt-dlp for a download."""
        folder = str(self.folder.resolve()).replace("%", "%%")
        return {
            # The format is part of the name, so that a download never resumes a file of another format.
            "outtmpl": {"default": f"{folder}/{video_name(video)}.f%(format_id)s.%(ext)s"},
            "format": "bv*",
            # The largest resolution within bounds, or else the smallest; then one of standard range, and without sound.
            "format_sort": [f"res:{self.max_height}", "+hdr", "fps", "+hasaud"],
            "retries": 10,
            "fragment_retries": 10,
            "extractor_retries": 3,
            "retry_sleep_functions": dict.fromkeys(("http", "fragment", "extractor"), _delay_sec),
            "socket_timeout": 30,
            "noplaylist": True,
            "extract_flat": True,
            "fixup": "never",  # needs another program, and ffmpeg decodes the files without it
            "cachedir": False,
            "updatetime": False,
            "noprogress": True,
            "color": "no_color",
            "logger": _Logger(video, self._warnings),
            "progress_hooks": [_Progress(video)],
            **({"cookiefile": io.StringIO(self.cookies)} if self.cookies is not None else {}),
        }


def _delay_sec(n: int) -> float:
    return min(0.25 * 2.0**n, _LONGEST_DELAY_SEC)


def _brief(message: str) -> str:
    """Return a message of yt-dlp in one line, without its request to report bugs."""
    line = re.sub(r"\x1b\[[0-9;]*m", "", message).strip().partition("\n")[0].removeprefix("ERROR: ")
    return re.sub(r" \(caused by .*|[;.]? (If you believe this is an error, )?please report this issue .*", "", line)


class _Logger:
    """The logger of yt-dlp: shows each warning once; errors are raised as exceptions, other messages are dropped."""

    def __init__(self, video: str, shown: set[str]) -> None:
        self._video = video
        self._shown = shown

    def debug(self, message: str) -> None: ...

    def error(self, message: str) -> None: ...

    def warning(self, message: str) -> None:
        text = _brief(message)
        if text not in self._shown:
            self._shown.add(text)
            click.echo(f"{self._video}: {text}", err=True)


class _Progress:
    """Prints the progress of a download from time to time."""

    def __init__(self, video: str) -> None:
        self._video = video
        self._next_sec = time.monotonic() + _SHOW_EVERY_SEC

    def __call__(self, state: dict[str, Any]) -> None:
        if state["status"] != "downloading" or time.monotonic() < self._next_sec:
            return
        self._next_sec = time.monotonic() + _SHOW_EVERY_SEC
        num_bytes = state.get("downloaded_bytes") or 0
        total = state.get("total_bytes") or state.get("total_bytes_estimate")
        share = f", {num_bytes / total:.0%} of {total / 2**20:.1f} MiB" if total else ""
        click.echo(f"Downloading {self._video}: {num_bytes / 2**20:.1f} MiB{share}", err=True)
