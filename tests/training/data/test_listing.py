"""One list says what footage is, and names all else."""

import subprocess
from pathlib import Path

import imageio_ffmpeg
import iscc_samples
import numpy as np
import pytest
from PIL import Image

from dnnlib.text import escape
from dnnlib.video import scan
from tests.training.data.clips import VIDEO, write
from training.data.footage import open_videos
from training.data.frames import iter_frames
from training.data.listing import (
    CONTAINERS,
    VIDEO_SUFFIXES,
    clip_names,
    generated_stem,
    image_suffixes,
    is_by_product,
    kind_of,
    list_footage,
)
from training.data.prompts import FilePrompt
from training.video_files import VideoPlan

FFMPEG = imageio_ffmpeg.get_ffmpeg_exe()


def lines(folder: Path) -> list[str]:
    return list(list_footage(folder).remarks.lines())


# ----------------------------------------------------------------------------
# Kinds of files.


def test_the_containers_are_those_of_the_bundled_ffmpeg():
    run = subprocess.run([FFMPEG, "-hide_banner", "-demuxers"], capture_output=True, text=True, check=True)
    known = {line.split()[1] for line in run.stdout.splitlines() if line.startswith(" D")}
    assert CONTAINERS.keys() <= known
    assert len(set(VIDEO_SUFFIXES)) == len(VIDEO_SUFFIXES)


H264, MPEG2 = ("-c:v", "libx264", "-pix_fmt", "yuv420p"), ("-c:v", "mpeg2video")
ENCODERS = {
    "mp4": H264,
    "mkv": H264,
    "avi": ("-c:v", "mpeg4"),
    "avs2": ("-c:v", "libxavs2", "-xavs2-params", "Log=-1"),
    "asf": ("-c:v", "wmv2"),
    "flv": ("-c:v", "flv1"),
    "ts": H264,
    "mpg": MPEG2,
    "m2v": MPEG2,
    "mxf": MPEG2,
    "gxf": (*MPEG2, "-s", "720x576"),
    "dv": ("-c:v", "dvvideo", "-s", "720x576", "-pix_fmt", "yuv420p"),
    "nut": ("-c:v", "ffv1"),
    "ivf": ("-c:v", "libvpx"),
    "ogv": ("-c:v", "libtheora"),
    "rm": ("-c:v", "rv10"),
    "swf": ("-c:v", "flv1"),
    "wtv": MPEG2,
    "h264": H264,
    "hevc": ("-c:v", "libx265", "-x265-params", "log-level=none"),
    "vvc": ("-c:v", "libvvenc", "-preset", "faster", "-pix_fmt", "yuv420p10"),
    "y4m": ("-pix_fmt", "yuv420p"),
    "gif": (),
    "apng": (),
    "webp": ("-c:v", "libwebp_anim"),
}


@pytest.fixture(scope="module")
def make(tmp_path_factory):
    """Return a function that makes a video of 25 frames at 25 a second, once for each suffix."""
    folder = tmp_path_factory.mktemp("containers")

    def make(suffix: str) -> Path:
        path = folder / f"whole.{suffix}"
        source = ["-f", "lavfi", "-i", "testsrc2=s=96x64:r=25:d=1"]
        if not path.exists():
            subprocess.run([FFMPEG, "-nostdin", "-v", "error", *source, *ENCODERS[suffix], path], check=True)
        return path

    return make


@pytest.mark.parametrize("suffix", ENCODERS)
def test_containers_are_read_with_their_frames_and_rate(make, suffix):
    path = make(suffix)
    assert kind_of(path) == "video"
    timing = scan(path)
    assert (timing.num_frames, timing.fps) == (25, 25) and len(list(iter_frames(path))) == 25


def test_all_containers_are_tried():
    tried = {container for container, names in CONTAINERS.items() if ENCODERS.keys() & names.split()}
    assert CONTAINERS.keys() - tried == {"flic"}  # ffmpeg writes none


@pytest.mark.parametrize("suffix", [".gif", ".webp", ".apng"])
def test_what_may_be_either_is_a_picture_or_a_video_by_its_content(tmp_path, suffix):
    images = [Image.fromarray(frame) for frame in VIDEO[:3]]
    options = {"save_all": True, "append_images": images[1:], "duration": 40}
    images[0].save(tmp_path / f"one{suffix}", format="PNG" if suffix == ".apng" else None)
    images[0].save(tmp_path / f"three{suffix}", format="PNG" if suffix == ".apng" else None, **options)
    assert [kind_of(tmp_path / f"{name}{suffix}") for name in ("one", "three")] == ["picture", "video"]
    assert [open_videos(tmp_path / f"{name}{suffix}").footage.clips[0].num_frames for name in ("one", "three")] == [
        1,
        3,
    ]


@pytest.mark.parametrize("share", [0.23, 0.55, 0.97])
@pytest.mark.parametrize("suffix", ["gif", "y4m", "dv", "apng", "webp", "nut"])
def test_animations_and_plain_streams_that_are_cut_off_are_refused(make, suffix, share):
    whole = make(suffix)
    assert len(list(iter_frames(whole))) == 25
    cut = whole.with_stem(f"cut{share}")
    cut.write_bytes(whole.read_bytes()[: int(whole.stat().st_size * share)])
    with pytest.raises(ValueError, match=cut.name):
        list(iter_frames(cut))


@pytest.mark.parametrize("read", [open_videos, lambda path: list(iter_frames(path))], ids=["metrics", "prompts"])
def test_files_cut_off_before_their_stated_end_are_refused_by_metrics_and_prompts(tmp_path, read):
    """As by makers: see their tests."""
    whole = Path(iscc_samples.__file__).parent / "files" / "video" / "demo.mkv"
    (tmp_path / "cut.mkv").write_bytes(whole.read_bytes()[:200_000])
    with pytest.raises(ValueError, match=r"cut\.mkv ends early: it states 60\.\d s"):
        read(tmp_path / "cut.mkv")


def test_suffixes_of_pictures_are_those_of_pillow():
    assert {".png", ".jpg", ".jfif", ".mpo", ".ppm", ".webp", ".avif"} <= image_suffixes()
    assert kind_of(Path("a.HEIC")) is None and kind_of(Path("a.pdf")) is None and kind_of(Path("a.txt")) is None


# ----------------------------------------------------------------------------
# Folders.


def test_all_that_is_left_out_is_named_and_counted(tmp_path):
    write(tmp_path / "a.mp4")
    for name in ("b.srt", "c.heic", "notes.txt", ".hidden.mp4", *(f"{number}.log" for number in range(9))):
        (tmp_path / name).write_bytes(b"")
    (tmp_path / "gone.mp4").symlink_to(tmp_path / "nothing")
    (tmp_path / ".folder").mkdir()
    assert list_footage(tmp_path).videos == [tmp_path / "a.mp4"]
    assert lines(tmp_path) == [
        "Left out, hidden (2): .folder, .hidden.mp4",
        "Left out, no kind of file that is read (12): 0.log, 1.log, 2.log, 3.log, 4.log and 7 more",
        "Left out, a broken link or no regular file (1): gone.mp4",
    ]


def test_linked_folders_are_followed_once_and_never_around(tmp_path):
    root, outside = tmp_path / "root", tmp_path / "outside"
    (root / "own").mkdir(parents=True)
    (outside / "deep").mkdir(parents=True)
    write(root / "own" / "a.gif")
    write(outside / "deep" / "b.gif")
    (root / "link").symlink_to(outside)
    (root / "again").symlink_to(outside / "deep")  # listed first, by its name
    (root / "same").symlink_to(root / "own")
    (root / "up").symlink_to(tmp_path)
    (outside / "back").symlink_to(root)
    listing = list_footage(root)
    assert [path.relative_to(root).as_posix() for path in listing.videos] == ["again/b.gif", "own/a.gif"]
    (line,) = listing.remarks.lines()
    assert line == "Left out, a link to a folder that is listed already (4): same, up, link/back, link/deep"


def test_pictures_beside_videos_are_covers_and_those_in_their_own_folders_are_clips(tmp_path):
    write(tmp_path / "a.mp4")
    Image.fromarray(VIDEO[0]).save(tmp_path / "cover.png")
    write(tmp_path / "frames", VIDEO[:5])
    np.savez(tmp_path / "frames.npz", frames=VIDEO[:7])
    side = open_videos(tmp_path)
    assert {clip.path: clip.num_frames for clip in side.footage.clips} == {"a.mp4": 20, "frames": 5, "frames.npz": 7}
    assert side.remarks == ["Left out, an image beside videos (1): cover.png"]


def test_a_gap_divides_a_clip_of_metrics_and_refuses_a_prompt(tmp_path):
    folder = write(tmp_path / "c", VIDEO)
    (folder / "000007.png").unlink()
    side = open_videos(tmp_path)
    assert {c.path: c.num_frames for c in side.footage.clips} == {"c/000000": 7, "c/000008": 12}
    assert "c between 000006.png and 000008.png" in side.remarks[0]
    with pytest.raises(ValueError, match=r"000008\.png does not follow 000006\.png"):
        FilePrompt(folder)


# ----------------------------------------------------------------------------
# Names.


@pytest.mark.parametrize(
    ("files", "names"),
    [
        ("a.mp4 b.mov", "a b"),
        ("a.mov a.mp4 b.mp4", "a.mov a.mp4 b"),
        ("a.mov a.mov.mp4 a.mp4", "a.mov a.mov.mp4 a.mp4"),
        ("a/x.mp4 x.mp4", "a/x x"),
        ("caf\udce9.mp4 café.mp4 caf%E9.mp4 a\x1bb.mp4", "caf%E9_2 café caf%E9 a%1Bb"),
    ],
)
def test_two_files_of_one_stem_get_two_names(files, names):
    paths = [Path(file) for file in files.split()]
    assert list(clip_names(paths).values()) == names.split()


def test_footage_whose_name_is_not_utf8_is_measured(tmp_path):
    write(tmp_path / "caf\udce9.gif")
    write(tmp_path / "na\udcefve", VIDEO)
    side = open_videos(tmp_path)
    assert [clip.path for clip in side.footage.clips] == ["caf%E9.gif", "na%EFve"] and len(side.content) == 16


def test_names_are_shown_without_control_characters():
    assert escape("a\x1b[31m\n.mp4") == r"a\x1b[31m\x0a.mp4" and escape("caf\udce9") == r"caf\xe9"


def test_files_of_generated_videos_are_known_by_their_names():
    for plan in (VideoPlan(Path()), VideoPlan(Path(), start=-8, prefix="clip_"), VideoPlan(Path(), grid=(1, 2))):
        for stem in (plan.stem([3, 4], 9), plan.stem([0, 7], 301)):
            assert generated_stem(f"out/{stem}_video.mp4") == f"out/{stem}"
            assert is_by_product(f"{stem}_sheet.png") and is_by_product(f"{stem}_frame=-008.png")
            assert not is_by_product(f"{stem}_video.mp4") and not is_by_product("sheet.png")
    assert generated_stem("a_video.mp4") is None
