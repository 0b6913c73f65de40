"""Intervals of web videos, here from a local server, become a dataset; downloads survive errors and kills."""

import concurrent.futures
import http.server
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import iscc_samples
import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from dataset_tools import youtube
from dataset_tools.make_dataset_from_youtube import main
from dnnlib import video
from training.data.dataset import ClipDataset

DEMO = Path(iscc_samples.__file__).parent / "files" / "video" / "demo.mp4"  # 60 s of 144 x 176 at 24 frames a second
ID = "dQw4w9WgXcQ"


class Site:
    """Files on a server at this machine, and what was asked of it; `broken` answers stop after a quarter of the file.

    With `hold`, a broken answer leaves the connection open until the event is set.
    """

    def __init__(self):
        self.files: dict[str, bytes] = {}
        self.requests: list[tuple[str, str | None]] = []  # path and Range
        self.cookies: set[str | None] = set()
        self.broken = 0
        self.hold: threading.Event | None = None
        self.url = ""

    def answer(self, request: http.server.BaseHTTPRequestHandler) -> None:
        asked = request.headers.get("Range")
        self.requests.append((request.path, asked))
        self.cookies.add(request.headers.get("Cookie"))
        data = self.files.get(request.path)
        if data is None:
            request.send_error(404)
            return
        start = int(asked.removeprefix("bytes=").partition("-")[0]) if asked else 0
        request.send_response(206 if asked else 200)
        request.send_header("Content-Type", "text/html" if request.path.endswith(".html") else "video/mp4")
        request.send_header("Content-Length", str(len(data) - start))
        if asked:
            request.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        request.end_headers()
        if is_broken := self.broken > 0:
            self.broken -= 1
        try:
            request.wfile.write(data[start : start + len(data) // 4] if is_broken else data[start:])
            if is_broken and self.hold is not None:
                self.hold.wait()
        except OSError:
            pass


@pytest.fixture
def site():
    site = Site()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            site.answer(self)

        def log_message(self, format, *args):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    site.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    yield site
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture(autouse=True)
def only_this_machine(tmp_path_factory, monkeypatch):
    """Allow no connection elsewhere, no proxy, and nothing written to the user's home."""
    home = tmp_path_factory.mktemp("home")
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("no_proxy", "*")
    for name in ("XDG_CACHE_HOME", "XDG_CONFIG_HOME"):
        monkeypatch.delenv(name, raising=False)
    connect = socket.socket.connect

    def guarded(self, address):
        assert self.family == socket.AF_UNIX or address[0] == "127.0.0.1", f"a connection to {address}"
        return connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", guarded)
    yield
    assert not list(home.iterdir())


def counting_video(path, num_frames=60, fps=10):
    """Frame t is all 8 + 4 t."""
    levels = 8 + 4 * np.arange(num_frames, dtype=np.uint8)
    with video.VideoWriter(path, 32, 48, fps=fps) as writer:
        writer.write(np.broadcast_to(levels[:, None, None, None], (num_frames, 32, 48, 3)))
    return path.read_bytes()


def run(config, *arguments):
    path = arguments[0].parent / "clips.json"
    path.write_text(json.dumps(config))
    return CliRunner().invoke(main, [str(argument) for argument in (path, *arguments)])


def contents(root):
    return {path.relative_to(root): path.read_bytes() for path in root.rglob("*") if path.is_file()}


# ----------------------------------------------------------------------------
# The config.


def accepted_by_schema(config):
    """Return what schema.json says of keys, types and texts, with patterns found anywhere as validators do."""
    schema = json.loads((youtube.CONFIGS / "schema.json").read_text())
    defs = schema["$defs"]

    def is_one_of(text, options):
        entries = [defs[option["$ref"].removeprefix("#/$defs/")] for option in options]
        return isinstance(text, str) and any(
            re.search(entry["pattern"], text) if "pattern" in entry else text == entry["const"] for entry in entries
        )

    if not isinstance(config, dict) or len(config) < schema["minProperties"]:
        return False
    lists = schema["additionalProperties"]
    return all(
        is_one_of(key, schema["propertyNames"]["anyOf"])
        and isinstance(texts, list)
        and len(texts) >= lists["minItems"]
        and all(is_one_of(text, lists["items"]["anyOf"]) for text in texts)
        and len(set(texts)) == len(texts)
        for key, texts in config.items()
    )


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({}, "must hold an object of videos"),
        (["0:26 6:30"], "must hold an object of videos"),
        ({"dQw4w9WgXc": ["0:26 6:30"]}, "'dQw4w9WgXc' is neither the 11 characters"),
        ({"dQw4w9WgX/Q": ["0:26 6:30"]}, "is neither the 11 characters"),
        ({"ftp://host/a.mp4": ["0:26 6:30"]}, "is neither the 11 characters"),
        ({"http://host/a b.mp4": ["0:26 6:30"]}, "is neither the 11 characters"),
        ({ID: "0:26 6:30"}, f"{ID} must have a list of intervals"),
        ({ID: []}, f"{ID} must have a list of intervals"),
        ({ID: [26]}, f"{ID} must have a list of intervals"),
        ({ID: ["0:26-6:30"]}, "'0:26-6:30', which is neither two times"),
        ({ID: ["0:26  6:30"]}, "which is neither two times"),
        ({ID: ["0:26 6:60"]}, "which is neither two times"),
        ({ID: ["0:26 1:2:03"]}, "which is neither two times"),
        ({ID: ["-1 5"]}, "which is neither two times"),
        ({ID: ["1. 5"]}, "which is neither two times"),
        ({ID: ["1 2 3"]}, "which is neither two times"),
        ({ID: ["0:26 6:30", "0:26 6:30"]}, "the interval '0:26 6:30' more than once"),
    ],
)
def test_what_schema_and_parser_refuse(tmp_path, config, message):
    assert not accepted_by_schema(config)
    result = run(config, tmp_path / "out", tmp_path / "cache", "--dry-run")
    assert result.exit_code == 1 and message in result.output
    assert "Traceback" not in result.output


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (f'{{"{ID}": ["0:26 6:30"', r"clips.json is damaged (no JSON: Expecting"),
        (f'{{"{ID}": ["0:26 6:30"], "{ID}": ["7:00 8:00"]}}', f"'{ID}' more than once; join the entries"),
        (f'{{"{ID}": ["6:30 0:26"]}}', "'6:30 0:26', which does not end after its start"),
        (f'{{"{ID}": ["1:00 60"]}}', "which does not end after its start"),
        (f'{{"{ID}": ["all", "0:26 6:30"]}}', 'has intervals beside "all"'),
        (f'{{"{ID}\\n": ["0:26 6:30"]}}', "is neither the 11 characters"),
        (f'{{"{ID}": ["0:26 6:30\\n"]}}', "which is neither two times"),
    ],
)
def test_what_a_schema_cannot_say(tmp_path, text, message):
    (tmp_path / "clips.json").write_text(text)
    with pytest.raises(ValueError, match=re.escape(message)):
        youtube.read_config(tmp_path / "clips.json")


def test_good_configs(tmp_path):
    config = {
        ID: ["0:26 6:30", "7:00.25 1:02:03", "390.5 400"],
        "-_aaaaaaaaa": ["all"],
        "https://host:80/watch?v=1": ["0 75:00"],
        "http://host": ["0 1"],
    }
    (tmp_path / "clips.json").write_text(json.dumps(config))
    found = youtube.read_config(tmp_path / "clips.json")
    assert accepted_by_schema(config)
    assert [(interval.start_sec, interval.end_sec) for interval in found] == [
        (26, 390),
        (420.25, 3723),
        (390.5, 400),
        (0, None),
        (0, 4500),
        (0, 1),
    ]
    assert [interval.name for interval in found[:4]] == [
        f"{ID}/0_26-6_30",
        f"{ID}/7_00.25-1_02_03",
        f"{ID}/390.5-400",
        "-_aaaaaaaaa/all",
    ]
    example = youtube.CONFIGS / "example.json"
    assert accepted_by_schema(json.loads(example.read_text())) and youtube.read_config(example)


def test_overlaps_are_found_also_around_others(tmp_path):
    config = {ID: ["0:30 0:40", "0:00 1:00", "0:10 0:20", "1:00 2:00"], "-_aaaaaaaaa": ["0:00 1:00"]}
    (tmp_path / "clips.json").write_text(json.dumps(config))
    found = youtube.overlaps(youtube.read_config(tmp_path / "clips.json"))
    assert [re.findall(r"'(.*?)'", warning) for warning in found] == [
        ["0:00 1:00", "0:10 0:20"],
        ["0:00 1:00", "0:30 0:40"],
    ]


@given(st.lists(st.from_regex(youtube.patterns()["url"], fullmatch=True), unique=True, max_size=5))
def test_names_of_urls_are_safe_and_differ(urls):
    names = [youtube.video_name(url) for url in urls]
    assert len(set(names)) == len(urls)
    for name in names:
        assert re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9-]{0,98}", name) and len(name) != 11


# ----------------------------------------------------------------------------
# Downloads.


def test_a_broken_connection_is_taken_up_and_a_download_is_kept(tmp_path, site):
    site.files["/a.mp4"] = data = DEMO.read_bytes()
    site.broken = 3  # the look at what is there, and twice the download
    cache = youtube.VideoCache(tmp_path / "50%(title)s cache")
    path = cache.fetch(f"{site.url}/a.mp4")
    assert path.read_bytes() == data and path.parent == cache.folder
    starts = [int(asked[6:-1]) for _, asked in site.requests if asked]
    assert len(site.requests) == 4 and 0 < starts[0] <= len(data) // 4 < starts[1] <= len(data) // 2
    assert cache.fetch(f"{site.url}/a.mp4") == path and len(site.requests) == 4
    assert list(cache.folder.iterdir()) == [path] and list(tmp_path.iterdir()) == [cache.folder]


def test_a_killed_download_goes_on(tmp_path, site):
    site.files["/a.mp4"] = data = DEMO.read_bytes()
    site.broken, site.hold = 2, threading.Event()
    script = "import sys; from pathlib import Path; from dataset_tools.youtube import VideoCache as Cache\n"
    script += "Cache(Path(sys.argv[1])).fetch(sys.argv[2])"
    url = f"{site.url}/a.mp4"
    process = subprocess.Popen([sys.executable, "-c", script, tmp_path, url], cwd=os.getcwd(), start_new_session=True)
    deadline = time.monotonic() + 60
    while not (parts := [path for path in tmp_path.glob("*.part") if path.stat().st_size]):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    site.hold.set()
    size = parts[0].stat().st_size
    assert youtube.VideoCache(tmp_path).find(url) is None
    assert youtube.VideoCache(tmp_path).fetch(url).read_bytes() == data
    assert site.requests[-1] == ("/a.mp4", f"bytes={size}-") and 0 < size <= len(data) // 4


def test_two_callers_of_the_same_video_download_it_once(tmp_path, site):
    site.files["/a.mp4"] = DEMO.read_bytes()
    site.broken, site.hold = 2, threading.Event()
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        # Each has a cache of its own, as two processes would.
        paths = [pool.submit(youtube.VideoCache(tmp_path).fetch, f"{site.url}/a.mp4") for _ in range(2)]
        time.sleep(1)
        site.hold.set()
        assert paths[0].result() == paths[1].result()
    assert [asked is None for _, asked in site.requests] == [True, True, False]


def test_what_cannot_be_had_is_named_and_tried_once(tmp_path, site):
    site.files["/page.html"] = b"<html><head><title>nothing to see</title></head></html>"
    cache = youtube.VideoCache(tmp_path)
    for name, cause in [("gone.mp4", "HTTP Error 404: Not Found"), ("page.html", "cannot be downloaded: ")]:
        url = f"{site.url}/{name}"
        for _ in range(2):
            with pytest.raises(ValueError, match=re.escape(cause)) as caught:
                cache.fetch(url)
            assert str(caught.value).startswith(url) and "\n" not in str(caught.value)
    assert [path for path, _ in site.requests] == ["/gone.mp4", "/page.html"]


def test_a_feed_of_videos_is_refused(tmp_path, site):
    item = f"<item><title>a</title><link>{site.url}/a.mp4</link></item>"
    site.files["/feed.html"] = f"<rss><channel><title>all</title>{item}{item}</channel></rss>".encode()
    with pytest.raises(ValueError, match="names a list of videos, not one"):
        youtube.VideoCache(tmp_path).fetch(f"{site.url}/feed.html")
    assert not list(tmp_path.glob("*.*.part"))


def test_cookies_are_sent_and_their_file_is_only_read(tmp_path, site):
    site.files["/a.mp4"] = DEMO.read_bytes()
    cookies = tmp_path / "cookies.txt"
    cookies.write_text("# Netscape HTTP Cookie File\n127.0.0.1\tFALSE\t/\tFALSE\t0\tkey\tvalue\n")
    before = cookies.stat()
    youtube.VideoCache(tmp_path / "cache", cookies=cookies).fetch(f"{site.url}/a.mp4")
    assert site.cookies == {"key=value"}
    assert cookies.stat().st_mtime_ns == before.st_mtime_ns and cookies.stat().st_size == before.st_size


@pytest.mark.parametrize(
    ("max_height", "chosen"), [(100, "v360"), (360, "v360"), (700, "tall"), (1080, "v1080"), (2160, "v2160")]
)
def test_the_largest_format_within_bounds_is_chosen_without_sound(tmp_path, max_height, chosen):
    def stream(name, height, width, acodec="none", dynamic_range="SDR"):
        return {
            "format_id": name,
            "url": f"http://127.0.0.1/{name}.mp4",
            "ext": "mp4",
            "height": height,
            "width": width,
            "vcodec": "avc1",
            "acodec": acodec,
            "dynamic_range": dynamic_range,
        }

    formats = [
        {"format_id": "sound", "url": "http://127.0.0.1/s", "ext": "m4a", "vcodec": "none", "acodec": "mp4a"},
        stream("v360", 360, 640),
        stream("both", 360, 640, acodec="mp4a"),
        stream("tall", 1080, 608),
        stream("v1080", 1080, 1920),
        stream("hdr", 1080, 1920, dynamic_range="HDR10"),
        stream("v2160", 2160, 3840),
    ]
    info = {"id": ID, "title": "", "extractor": "made", "extractor_key": "Made", "formats": formats}
    with youtube.load_yt_dlp().YoutubeDL(youtube.VideoCache(tmp_path, max_height).options(ID)) as downloader:
        assert downloader.process_ie_result(info, download=False)["format_id"] == chosen
        assert not downloader.cache.enabled


# ----------------------------------------------------------------------------
# From the config to the dataset.


def test_intervals_hold_the_frames_that_the_config_says(tmp_path, site):
    site.files["/a.mp4"] = site.files["/c.mp4"] = counting_video(tmp_path / "a.mp4")
    site.files["/b.mp4"] = DEMO.read_bytes()
    one, two, three = (f"{site.url}/{name}.mp4" for name in "abc")
    # The video is 6 s long: an end at 0:06 is its end, and 0:06.9 is taken for it.
    config = {one: ["0:01 0:03", "0:02.5 4", "0:05 0:06.9"], two: ["20 21.5"], three: ["all"]}
    result = run(config, tmp_path / "out", tmp_path / "cache", "--sizes", "16x24,36x64")
    assert result.exit_code == 0, result.output
    dataset = ClipDataset(tmp_path / "out", [(16, 24), (36, 64)])
    names = {interval.text: interval.name for interval in youtube.read_config(tmp_path / "clips.json")}
    indices = {clip.path: index for index, clip in enumerate(dataset.clips)}
    assert set(indices) == set(names.values()) and dataset.fps == 10
    for text, frames in [
        ("0:01 0:03", range(10, 31)),
        ("0:02.5 4", range(25, 41)),
        ("0:05 0:06.9", range(50, 60)),
        ("all", range(60)),
    ]:
        index = indices[names[text]]
        assert dataset.clips[index].num_frames == len(frames)
        levels = dataset.read(index, (16, 24), range(len(frames))).mean(axis=(1, 2, 3))
        assert np.abs(levels - (8 + 4 * np.array(frames))).max() < 2
    index = indices[names["20 21.5"]]
    assert dataset.clips[index].num_frames == 37  # 1.5 s at 24 a second, and the one at the end
    source = list(video.iter_video_frames(DEMO, start_sec=20, end_sec=21.52))
    assert len(source) == 37
    stored = dataset.read(index, (36, 64), range(37)).mean(axis=(1, 2))
    # 176 columns to 64, so 99 of the 144 rows.
    assert np.abs(stored - np.stack(source)[:, 22:121].mean(axis=(1, 2))).max() < 4
    description = json.loads((tmp_path / "out" / "dataset.json").read_text())
    assert description["source"] == "clips.json" and description["max_height"] == 1080


def test_partitions_make_the_same_as_one_run_and_fetch_only_theirs(tmp_path, site):
    for name in "abc":
        site.files[f"/{name}.mp4"] = counting_video(tmp_path / f"{name}.mp4", num_frames=20)
    urls = [f"{site.url}/{name}.mp4" for name in "abc"]
    config = {urls[0]: ["0 0.5"], urls[1]: ["0 0.5", "1 1.5"], urls[2]: ["0 0.5"]}
    options = ("--sizes", "8x8", "--num-partitions", 2)
    result = run(config, tmp_path / "two", tmp_path / "cache", *options, "--partition", 1)
    assert result.exit_code == 0, result.output
    assert {path for path, _ in site.requests} == {"/b.mp4", "/c.mp4"}
    assert run(config, tmp_path / "two", tmp_path / "cache", *options, "--partition", 0).exit_code == 0
    num_requests = len(site.requests)
    assert {path for path, _ in site.requests} == {"/a.mp4", "/b.mp4", "/c.mp4"}
    assert run(config, tmp_path / "one", tmp_path / "cache", *options).exit_code == 0
    assert len(site.requests) == num_requests
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    assert sum(path.suffix == ".zip" for path in contents(tmp_path / "one")) == 2


def test_all_intervals_of_a_video_go_to_one_side_and_files_in_the_cache_are_used(tmp_path):
    (tmp_path / "cache").mkdir()
    videos = [f"{ID[:-1]}{letter}" for letter in "abcdef"]
    for name in videos:
        counting_video(tmp_path / "cache" / f"{name}.mp4", num_frames=10)
    options = ("--sizes", "8x8", "--num-partitions", 1, "--val-fraction", 0.5)
    config = {name: ["0 0.3", "0.5 0.8"] for name in videos}
    result = run(config, tmp_path / "out", tmp_path / "cache", *options)
    assert result.exit_code == 0, result.output
    clips = [[clip.path for clip in ClipDataset(tmp_path / "out" / side, [(8, 8)]).clips] for side in ("train", "val")]
    sides = [{path.partition("/")[0] for path in paths} for paths in clips]
    assert sorted(map(len, clips)) == sorted(2 * len(side) for side in sides) and sum(map(len, clips)) == 12
    assert sides[0] | sides[1] == set(videos)


def test_broken_clips_are_named_and_can_be_skipped(tmp_path, site):
    site.files["/a.mp4"] = counting_video(tmp_path / "a.mp4")
    site.files["/noise.mp4"] = b"noise" * 99
    good, gone, noise = (f"{site.url}/{name}.mp4" for name in ("a", "gone", "noise"))
    config = {good: ["0 1", "0:10 0:20", "5 0:07.5"], gone: ["0 1"], noise: ["0 1"]}
    arguments = (tmp_path / "out", tmp_path / "cache", "--sizes", "8x8", "--num-partitions", 1)
    result = run(config, *arguments)
    assert result.exit_code == 1
    assert f"{youtube.video_name(good)}/0_10-0_20 ends after the video, which is 6 s long" in result.output
    assert f"{youtube.video_name(good)}/5-0_07.5 ends after the video" in result.output
    assert f"{gone} cannot be downloaded: [generic] gone: Unable to download webpage: HTTP Error 404" in result.output
    assert f"{youtube.video_name(noise)}" in result.output and "--skip-bad" in result.output
    skipped = run(config, *arguments, "--skip-bad")
    assert skipped.exit_code == 0, skipped.output
    assert [clip.path for clip in ClipDataset(tmp_path / "out", [(8, 8)]).clips] == [f"{youtube.video_name(good)}/0-1"]


def test_dry_run_lists_lengths_without_the_network(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "yt_dlp", None)
    config = {ID: ["0:26 6:30", "6:00 7:30"], "-_aaaaaaaaa": ["1:00:00 1:30:00"], "http://host/a.mp4": ["all"]}
    arguments = (tmp_path / "out", tmp_path / "cache", "--num-partitions", 2)
    result = run(config, *arguments, "--dry-run")
    assert result.exit_code == 0, result.output
    assert "The config lists 4 intervals of 3 videos, 37m 34s and 1 whole videos.\n" in result.output
    assert "Partition 0000 takes 2 intervals of 1 videos, 7m 34s.\n" in result.output
    assert "Partition 0001 takes 2 intervals of 2 videos, 30m 00s and 1 whole videos.\n" in result.output
    assert f"{ID}: '0:26 6:30' and '6:00 7:30' overlap" in result.output
    for words in (
        f"{ID}/0_26-6_30",
        "364.0 s, to be downloaded",
        "1800.0 s, to be",
        "the whole video, to be downloaded",
    ):
        assert words in result.output
    assert not (tmp_path / "out").exists() and not (tmp_path / "cache").exists()
    missing = run(config, *arguments)
    assert missing.exit_code == 1 and "run pip install -e '.[youtube]'" in missing.output
