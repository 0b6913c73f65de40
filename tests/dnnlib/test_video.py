"""Written videos are read back unchanged; user videos are read with the right orientation, colours and times."""

import concurrent.futures
import functools
import itertools
import os
import subprocess

import imageio_ffmpeg
import iscc_samples
import numpy as np
import pytest

from dnnlib import video

# Grey frames whose brightness counts them, with enough between two numbers to survive compression.
COUNTED = "nullsrc=size=32x32:rate={rate}:duration={duration},geq=lum='20+3*mod(N,70)':cb=128:cr=128"
X264 = ["-c:v", "libx264", "-crf", "8", "-bf", "3"]
THEORA = ["-c:v", "libtheora", "-q:v", "10", "-g", "15"]
MPEG2 = ["-c:v", "mpeg2video", "-q:v", "2", "-bf", "2", "-g", "12"]


def moving_bar(num_frames, height, width):
    """Smooth frames, so that compression changes little, whose brightness tells their number."""
    frames = np.zeros((num_frames, height, width, 3), np.uint8)
    frames[..., 0] = np.linspace(40, 220, width)
    frames[..., 1] = np.linspace(220, 40, height)[:, None]
    frames[..., 2] = 30 + 8 * np.arange(num_frames)[:, None, None]
    return frames


def write(path, frames, **options):
    with video.VideoWriter(path, frames.shape[1], frames.shape[2], **options) as writer:
        writer.write(frames[:3])
        writer.write(frames[3:])


@pytest.mark.parametrize("suffix", [".mp4", ".webm", ".gif"])
def test_frames_come_back_in_number_order_and_colour(tmp_path, suffix):
    frames = moving_bar(12, 48, 64)
    path = tmp_path / f"a{suffix}"
    write(path, frames, fps=25)
    info = video.probe(path)
    assert (info.height, info.width, info.fps) == (48, 64, 25) and info.duration_sec == pytest.approx(12 / 25, abs=0.02)
    read = list(video.iter_video_frames(path))
    assert len(read) == 12 and read[0].dtype == np.uint8
    assert np.abs(np.stack(read).astype(int) - frames).mean() < (10 if suffix == ".gif" else 2)
    assert os.listdir(tmp_path) == [path.name]


def test_frames_of_one_colour_each_stay_apart_in_a_gif(tmp_path):
    levels = [20, 235, 20, 235, 20, 120, 20]
    write(tmp_path / "a.gif", np.array(levels, np.uint8)[:, None, None, None] + np.zeros((1, 16, 16, 3), np.uint8))
    read = [frame.mean() for frame in video.iter_video_frames(tmp_path / "a.gif")]
    assert np.abs(np.subtract(read, levels)).max() <= 2


@pytest.mark.parametrize(("enlarge", "height", "width"), [(False, 38, 64), (True, 37 * 16, 63 * 16)])
def test_odd_edges_are_padded_or_pixels_repeated(tmp_path, enlarge, height, width):
    frames = moving_bar(3, 37, 63)
    write(tmp_path / "a.mp4", frames, enlarge=enlarge)
    read = np.stack(list(video.iter_video_frames(tmp_path / "a.mp4")))
    assert read.shape == (3, height, width, 3)
    factor = 16 if enlarge else 1
    centres = read[:, factor // 2 :: factor, factor // 2 :: factor][:, :37, :63]
    assert np.abs(centres.astype(int) - frames).mean() < 3


def test_small_frames_are_enlarged_by_the_least_whole_factor():
    factors = [video.VideoWriter("a.mp4", *size, enlarge=True).factor for size in ((36, 64), (144, 256), (18, 32))]
    assert factors == [4, 1, 8]


def test_an_interrupted_writer_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "a.mp4"
    path.write_bytes(b"old")
    with pytest.raises(KeyboardInterrupt), video.VideoWriter(path, 32, 32) as writer:
        writer.write(moving_bar(5, 32, 32))
        raise KeyboardInterrupt
    with pytest.raises(ValueError, match="no frames were written"), video.VideoWriter(path, 32, 32):
        pass
    assert path.read_bytes() == b"old" and os.listdir(tmp_path) == ["a.mp4"]


def test_an_encoder_that_fails_says_why(tmp_path):
    with pytest.raises(ValueError, match=r"cannot encode .*absent/a.mp4: .*No such file"):
        write(tmp_path / "absent" / "a.mp4", moving_bar(60, 64, 64))
    assert os.listdir(tmp_path) == []
    with pytest.raises(ValueError, match=r"use one of .mp4, .webm, .gif"):
        video.VideoWriter(tmp_path / "a.mpq", 32, 32)


@pytest.fixture(scope="module")
def make(tmp_path_factory):
    """Make a file by ffmpeg, once for each name and set of arguments; returns its path."""
    folder = tmp_path_factory.mktemp("videos")

    @functools.cache
    def make(name, *arguments, content=None):
        command = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-y", *arguments, folder / name]
        subprocess.run(command, check=True, input=content)
        return folder / name

    return make


def counted(rate: str | float = 25, duration=2.4):
    return "-f", "lavfi", "-i", COUNTED.format(rate=rate, duration=duration)


def numbers(path, **options):
    """Return what the frames of a counted video tell: their numbers modulo 70."""
    grey = np.array([frame.mean() for frame in video.iter_video_frames(path, **options)])
    return np.round((grey * 219 / 255 + 16 - 20) / 3).astype(int).tolist()


@pytest.mark.parametrize(
    ("name", "encoder"),
    [
        ("a.mp4", [*X264, "-g", "15"]),
        ("open.mp4", [*X264, "-x264opts", "open-gop=1:keyint=15:scenecut=0"]),
        ("a.mkv", [*X264, "-g", "15"]),
        ("a.ts", [*X264, "-g", "15"]),
        ("a.flv", [*X264, "-g", "15"]),
        ("a.avi", ["-c:v", "mpeg4", "-q:v", "2", "-g", "15"]),
        ("b.avi", [*X264, "-g", "15"]),  # without times of display
        ("a.mpg", MPEG2),
        ("a.m2v", MPEG2),
        ("a.wmv", ["-c:v", "wmv2", "-q:v", "2", "-g", "15"]),
        ("a.ogv", THEORA),
        ("a.webm", ["-c:v", "libvpx", "-b:v", "1M", "-auto-alt-ref", "1", "-lag-in-frames", "16", "-g", "15"]),
    ],
)
def test_windows_of_time_are_exact_in_every_container(make, name, encoder):
    path = make(name, *counted(), *encoder)
    assert numbers(path) == list(range(60))
    assert numbers(path, start_sec=1.32, end_sec=1.6) == list(range(33, 40))
    assert numbers(path, start_sec=57 / 25) == [57, 58, 59]


def test_frames_do_not_depend_on_how_busy_the_machine_is(make):
    # Of 32 readers of Theora on a busy machine about two got wrong frames when ffmpeg decoded several at once.
    path = make("a.ogv", *counted(), *THEORA)
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        assert all(read == list(range(60)) for read in pool.map(lambda _: numbers(path), range(96)))


def test_times_count_from_the_first_frame(make):
    path = make("late.ts", *counted(), *X264, "-g", "15", "-output_ts_offset", "7")
    assert numbers(path, start_sec=0.4, end_sec=0.48) == [10, 11]
    source = make("whole.mp4", *counted(), *X264, "-g", "15")
    cut = make("cut.mp4", "-ss", "0.8", "-i", source, "-c", "copy")  # an edit list hides frames 15 to 19
    assert numbers(cut) == list(range(20, 60)) and numbers(cut, start_sec=0.6, end_sec=0.68) == [35, 36]


def test_rates_with_a_fraction_do_not_drift(make):
    path = make("ntsc.mkv", *counted("30000/1001", 20), *X264)  # times in whole milliseconds
    expected = [number % 70 for number in range(600)]
    assert numbers(path) == expected and numbers(path, fps=30000 / 1001) == expected
    start = 500 * 1001 / 30000
    assert numbers(path, start_sec=start, end_sec=start + 0.1) == [10, 11, 12]


def test_another_rate_repeats_or_drops_frames(make):
    path = make("slow.mp4", *counted(12, 2), *X264)
    assert numbers(path, fps=24, end_sec=0.25) == [0, 0, 1, 1, 2, 2]
    assert numbers(path, fps=24, start_sec=0.5, end_sec=0.6) == [6, 6, 7]
    assert len(numbers(path, fps=6)) == 12


@pytest.mark.parametrize("name", ["variable.mp4", "variable.mkv"])
def test_a_variable_rate_comes_evenly(make, name):
    due = np.array([i / 30 if i < 20 else 20 / 30 + (i - 20) / 10 for i in range(40)])
    timed = [*counted(30, 4 / 3)[:-1], counted(30, 4 / 3)[-1] + ",setpts='if(lt(N,20),N,20+(N-20)*3)/30/TB+0.01'"]
    path = make(name, *timed, "-fps_mode", "passthrough", *X264, "-g", "10")
    rate = video.scan(path).fps
    assert rate == pytest.approx(39 / due[-1], rel=0.001)

    def shown(rate, start, end):
        """Return the last frame due by the middle of each step."""
        ticks = np.floor((due - start) * rate + 0.5 + 1e-3)
        return [int(np.flatnonzero(ticks <= k).max()) for k in range(round((end - start) * rate))]

    assert numbers(path) == shown(rate, 0, video.scan(path).duration_sec)
    assert numbers(path, fps=20, start_sec=1.0, end_sec=1.5) == shown(20, 1.0, 1.5)
    assert numbers(path, fps=60, start_sec=0.5, end_sec=0.75) == shown(60, 0.5, 0.75)


def test_still_images_are_repeated_to_the_end(make):
    # Theora has empty packets for pictures that stay.
    path = make("stills.ogv", "-f", "lavfi", "-i", "testsrc=s=64x48:r=1:d=4", "-r", "24", "-c:v", "libtheora")
    assert video.scan(path) == video.Timing(96, 24, True, pytest.approx(4))  # pyright: ignore[reportArgumentType]
    assert len(list(video.iter_video_frames(path))) == 96
    assert len(list(video.iter_video_frames(path, start_sec=3.5, end_sec=9))) == 12
    assert list(video.iter_video_frames(path, start_sec=5)) == []


def test_a_lost_frame_does_not_make_a_constant_rate_be_resampled(make):
    lossy = counted(25, 2.6)[:-1] + (counted(25, 6)[-1] + ",select='not(eq(n,100))'",)
    path = make("lossy.mp4", *lossy, "-fps_mode", "passthrough", *X264)
    assert numbers(path) == [number % 70 for number in range(150) if number != 100]


@pytest.mark.parametrize("angle", [0, 90, 180, 270])
def test_frames_come_upright(make, angle):
    corners = np.array([[[220, 30, 30], [30, 220, 30]], [[30, 30, 220], [220, 220, 220]]], np.uint8)
    raw = corners.repeat(32, 0).repeat(48, 1)
    size = ("-f", "rawvideo", "-pix_fmt", "rgb24", "-s", "96x64", "-i", "pipe:0")
    source = make("corners.mp4", *size, *X264, "-pix_fmt", "yuv444p", content=raw.tobytes())
    path = make(f"turned{angle}.mp4", "-display_rotation", str(angle), "-i", source, "-c", "copy")
    (frame,) = video.iter_video_frames(path)
    expected = np.rot90(raw, angle // 90)  # counterclockwise
    info = video.probe(path)
    assert frame.shape == expected.shape == (info.height, info.width, 3)
    assert np.abs(frame.astype(int) - expected).mean() < 6


def test_oblong_pixels_are_widened(make):
    path = make("wide.mp4", *counted(), "-vf", "setsar=2/1", *X264)
    assert next(video.iter_video_frames(path)).shape == (32, 64, 3)
    assert (video.probe(path).height, video.probe(path).width) == (32, 64)


@pytest.mark.parametrize("size", ["64x48", "63x47", "1x1"])
@pytest.mark.parametrize(
    "pixels",
    ["yuv420p", "yuvj420p", "yuv422p10le", "yuv420p12le", "yuv444p16le", "yuva420p", "gbrp10le", "bgra", "gray12le"],
)
def test_every_kind_of_pixels_is_read(make, size, pixels):
    color = (90, 90, 90) if pixels.startswith("gray") else (48, 96, 192)
    text = "0x" + "".join(f"{level:02x}" for level in color)
    path = make(f"{size}{pixels}.mkv", "-f", "lavfi", "-i", f"color=c={text}:s={size}:d=0.1,format={pixels}", *FFV1)
    depth = int(pixels[-4:-2]) if pixels.endswith("le") else 8
    assert video.probe(path).bit_depth == depth and not video.probe(path).is_hdr
    frames = list(video.iter_video_frames(path))
    width, height = map(int, size.split("x"))
    assert [frame.shape for frame in frames] == [(height, width, 3)] * 3
    assert np.abs(frames[1].astype(int) - color).max() <= 3


FFV1 = ("-c:v", "ffv1")
BT601, BT709, BT2020 = (0.299, 0.114), (0.2126, 0.0722), (0.2627, 0.0593)


def encode_colors(rgb, weights, depth=8):
    """Return planes 4:4:4 of limited range for colours (N, 3) of 0 to 1: eight rows of eight pixels for each."""
    red, blue = weights
    luma = rgb @ [red, 1 - red - blue, blue]
    planes = [16 + 219 * luma]
    planes += [128 + 112 * (rgb[:, channel] - luma) / (1 - weight) for channel, weight in ((2, blue), (0, red))]
    levels = np.round(np.stack(planes) * 2 ** (depth - 8)).astype("<u2" if depth > 8 else "u1")
    return np.ascontiguousarray(np.broadcast_to(levels.repeat(8, 1)[:, None], (3, 8, 8 * len(rgb)))).tobytes()


def decoded_colors(path):
    (frame,) = video.iter_video_frames(path)
    return frame[4, 4::8].astype(int)


PAINTS = np.array([[0.8, 0.2, 0.1], [0.1, 0.7, 0.2], [0.2, 0.3, 0.9], [0.9, 0.9, 0.1]])


@pytest.mark.parametrize(
    ("copies", "tag", "weights"),
    [(1, None, BT601), (40, None, BT709), (1, "bt709", BT709), (40, "smpte170m", BT601), (1, "bt2020nc", BT2020)],
)
def test_colours_follow_the_tag_and_else_the_size(make, copies, tag, weights):
    paints = np.tile(PAINTS, (copies, 1))  # 32 or 1280 pixels wide
    raw = ("-f", "rawvideo", "-pix_fmt", "yuv444p", "-s", f"{len(paints) * 8}x8", "-i", "pipe:0")
    tagging = ("-vf", f"setparams=colorspace={tag}") if tag else ()
    path = make(f"{copies}{tag}.mkv", *raw, *tagging, *FFV1, content=encode_colors(paints, weights))
    assert video.probe(path).matrix == tag
    assert np.abs(decoded_colors(path) - paints * 255).max() <= 3


def code_pq(nits):
    """SMPTE ST 2084."""
    power = (nits / 10000) ** 0.1593017578125
    return ((0.8359375 + 18.8515625 * power) / (1 + 18.6875 * power)) ** 78.84375


# Linear BT.709 to linear BT.2020, ITU-R BT.2087.
WIDER = np.array([[0.6274, 0.3293, 0.0433], [0.0691, 0.9195, 0.0114], [0.0164, 0.0880, 0.8956]])


def make_hdr(make, name, transfer, signal):
    raw = ("-f", "rawvideo", "-pix_fmt", "yuv444p12le", "-s", f"{len(signal) * 8}x8", "-i", "pipe:0")
    tags = f"setparams=range=tv:colorspace=bt2020nc:color_primaries=bt2020:color_trc={transfer}"
    path = make(name, *raw, "-vf", tags, *FFV1, content=encode_colors(signal, BT2020, depth=12))
    assert video.probe(path).is_hdr and video.probe(path).bit_depth == 12
    return path


def test_high_dynamic_range_is_mapped_to_the_common_one(make):
    # Colours darker than three tenths of white, which is 203 nits, look as they would in a common video.
    linear = PAINTS * 0.3
    dark = decoded_colors(make_hdr(make, "dark.mkv", "smpte2084", code_pq(203 * linear @ WIDER.T)))
    assert np.abs(dark - 255 * linear ** (1 / 2.4)).max() <= 4  # as screens show it, ITU-R BT.1886
    # Brighter ones are compressed but stay apart, grey and in order; white leaves room for highlights.
    nits = np.array([50, 100, 203, 400, 1000, 2000])
    grey = decoded_colors(make_hdr(make, "pq.mkv", "smpte2084", np.repeat(code_pq(nits)[:, None], 3, 1)))
    assert np.ptp(grey, axis=1).max() <= 1 and (np.diff(grey[:, 0]) >= 4).all() and 200 < grey[2, 0] < 230
    # White of HLG is three quarters of its range, and looks as white of PQ.
    hlg = decoded_colors(make_hdr(make, "hlg.mkv", "arib-std-b67", np.full((1, 3), 0.75)))
    assert np.abs(hlg[0] - grey[2]).max() <= 4


def test_interlaced_footage_is_deinterlaced_frame_for_frame(make):
    # Fields of 50 a second whose brightness jumps make combs of 25 frames.
    fields = "nullsrc=size=64x64:rate=50:duration=1,geq=lum='40+mod(67*N,160)':cb=128:cr=128,tinterlace=interleave_top"
    tagged = make("tagged.mp4", "-f", "lavfi", "-i", fields, *X264, "-flags", "+ildct+ilme", "-x264opts", "tff=1")
    plain = make("plain.mp4", "-f", "lavfi", "-i", f"{fields},setfield=prog", *X264)
    combed = np.stack(list(video.iter_video_frames(plain))).astype(int)
    smooth = np.stack(list(video.iter_video_frames(tagged))).astype(int)
    assert video.probe(tagged).is_interlaced and not video.probe(plain).is_interlaced
    assert len(combed) == len(smooth) == 25
    assert np.abs(np.diff(combed, axis=1)).mean() > 80 and np.abs(np.diff(smooth, axis=1)).mean() < 8


@pytest.mark.parametrize("angle", [90, 180, 270])
def test_interlaced_footage_is_deinterlaced_before_it_is_rotated(make, angle):
    # A bar that moves 2 pixels a field makes combs of 25 frames.
    fields = "nullsrc=s=64x48:r=50:d=1,geq=lum='if(between(X,2*N,2*N+12),220,40)':cb=128:cr=128"
    tagged = [*X264, "-flags", "+ildct+ilme", "-x264opts", "tff=1"]
    source = make("fields.mp4", "-f", "lavfi", "-i", f"{fields},tinterlace=interleave_top", *tagged)
    path = make(f"fields{angle}.mp4", "-display_rotation", str(angle), "-i", source, "-c", "copy")
    assert video.probe(path).is_interlaced
    for frame, turned in zip(video.iter_video_frames(source), video.iter_video_frames(path), strict=True):
        assert np.abs(np.rot90(frame, angle // 90).astype(int) - turned).max() <= 3


TRANSPARENT = {
    "argb.mov": ["-c:v", "qtrle", "-pix_fmt", "argb"],
    "rgba.mov": ["-c:v", "png", "-pix_fmt", "rgba"],
    "yuva.mov": ["-c:v", "prores_ks", "-pix_fmt", "yuva444p10le"],
    "gbrap.mkv": ["-c:v", "ffv1", "-pix_fmt", "gbrap"],
    "ya.mkv": ["-c:v", "ffv1", "-pix_fmt", "ya8"],
    "vp8.webm": ["-c:v", "libvpx", "-pix_fmt", "yuva420p", "-auto-alt-ref", "0", "-b:v", "1M"],
    "vp9.webm": ["-c:v", "libvpx-vp9", "-pix_fmt", "yuva420p", "-b:v", "1M"],
    "a.gif": ["-vf", "split[a][b];[a]palettegen[p];[b][p]paletteuse=dither=none"],
}


@pytest.mark.parametrize("name", TRANSPARENT)
def test_transparent_parts_are_shown_over_black(make, name):
    pixels = np.full((4, 48, 64, 4), (200, 200, 200, 255), np.uint8)
    pixels[:, :, 32:, 3] = 0
    pixels[:, 24:, :, 3] //= 2  # of those that are visible
    raw = ("-f", "rawvideo", "-pix_fmt", "rgba", "-s", "64x48", "-i", "pipe:0")
    path = make(name, *raw, *TRANSPARENT[name], content=pixels.tobytes())
    frames = list(video.iter_video_frames(path))
    assert len(frames) == 4
    for frame in frames:
        assert frame[4:20, 36:60].max() <= 3 and np.abs(frame[4:20, 4:28].astype(int) - 200).max() <= 5
        assert name == "a.gif" or np.abs(frame[28:44, 4:28].astype(int) - 100).max() <= 5


def test_the_unused_byte_of_uncompressed_pixels_is_no_transparency(make):
    raw = ("-f", "rawvideo", "-pix_fmt", "bgra", "-s", "64x48", "-i", "pipe:0")
    content = np.full((3, 48, 64, 4), (10, 20, 200, 0), np.uint8).tobytes()
    path = make("raw.avi", *raw, "-c:v", "rawvideo", "-pix_fmt", "bgra", content=content)
    assert [frame[5, 5].tolist() for frame in video.iter_video_frames(path)] == [[200, 20, 10]] * 3


@pytest.mark.parametrize(
    ("marks", "shown"),
    [
        (("0", "default"), 1),
        (("default", "0"), 0),
        (("0", "0"), 1),
        (("default", "default"), 1),
    ],
)
def test_the_stream_is_shown_that_players_show(make, marks, shown):
    sizes = [(24, 32), (48, 64)]
    sources = [
        make(f"{height}.mp4", "-f", "lavfi", "-i", f"testsrc2=s={width}x{height}:r=25:d={0.4 * (number + 1)}", *X264)
        for number, (height, width) in enumerate(sizes)
    ]
    inputs = [argument for source in sources for argument in ("-i", source)]
    marks = [argument for number, mark in enumerate(marks) for argument in (f"-disposition:v:{number}", mark)]
    path = make(f"{'-'.join(marks)}.mkv".replace(":", ""), *inputs, "-map", "0", "-map", "1", "-c", "copy", *marks)
    assert (video.probe(path).height, video.probe(path).width) == sizes[shown]
    assert video.scan(path).num_frames == len(list(video.iter_video_frames(path))) == 10 * (shown + 1)
    assert {frame.shape for frame in video.iter_video_frames(path)} == {(*sizes[shown], 3)}


def test_a_timecode_beside_the_pictures_changes_nothing(make):
    source = make("whole.mp4", *counted(), *X264, "-g", "15")
    sound = ("-f", "lavfi", "-i", "sine=d=9")
    turned = ("-display_rotation", "90", "-i", source, *sound, "-map", "0", "-map", "1", "-c:v", "copy")
    path = make("timecode.mov", *turned, "-timecode", "01:00:00:00")
    assert numbers(path) == list(range(60)) and video.missing_end(path) is None
    assert video.probe(path).quarter_turns == 3


def test_later_frames_of_another_size_are_scaled_to_the_first(make):
    small, large = (
        make(f"{edge}.ts", "-f", "lavfi", "-i", f"testsrc2=s={edge}x{edge}:r=25:d=1", *X264) for edge in (64, 128)
    )
    path = make(
        "both.ts", "-f", "mpegts", "-i", "pipe:0", "-c", "copy", content=small.read_bytes() + large.read_bytes()
    )
    assert [frame.shape for frame in video.iter_video_frames(path)] == [(64, 64, 3)] * 50


def test_what_is_no_video_is_refused_by_name(make, tmp_path):
    path = tmp_path / "no.mp4"
    path.write_bytes(b"nothing " * 999)
    picture = make("cover.png", "-f", "lavfi", "-i", "color=s=64x64", "-frames:v", "1")
    tone = ("-f", "lavfi", "-i", "sine=duration=0.5")
    both = (*tone, "-i", picture, "-map", "0", "-map", "1", "-c:v", "copy", "-disposition:v", "attached_pic")
    music = make("music.mp3", *both)
    for read in (video.probe, video.scan, lambda path: next(video.iter_video_frames(path))):
        with pytest.raises(ValueError, match=r"no.mp4 has no video that ffmpeg can read: .*Invalid data"):
            read(path)
        with pytest.raises(ValueError, match="music.mp3 has no video that ffmpeg can read: it holds a cover picture"):
            read(music)
        with pytest.raises(ValueError, match=r"tone.wav has no video that ffmpeg can read"):
            read(make("tone.wav", *tone))
        with pytest.raises(ValueError, match="is not a file"):
            read(tmp_path / "absent.mp4")


@pytest.mark.parametrize("suffix", [".mp4", ".webm"])
@pytest.mark.parametrize(("native", "fps"), [(12, 6), (30, 15), (24, 12), (60, 30), (29.97, 14.985), (24, 30)])
def test_steps_at_another_rate_are_even_and_windows_are_parts_of_the_whole(tmp_path, native, fps, suffix):
    path = tmp_path / f"ramp{suffix}"
    with video.VideoWriter(path, 16, 16, fps=native, crf=4) as writer:
        writer.write(np.arange(0, 240, 10, dtype=np.uint8)[:, None, None, None] + np.zeros((1, 16, 16, 3), np.uint8))

    def read(start, stop=None):
        end_sec = None if stop is None else stop / fps
        return [round(frame.mean() / 10) for frame in video.iter_video_frames(path, fps, start / fps, end_sec)]

    whole = read(0)
    if fps < native:
        assert whole[:11] == list(range(0, 22, 2))
    for start in (1, 2, 3, 7):
        assert read(start, start + 3) == whole[start : start + 3]


def test_a_cover_image_beside_a_video_is_skipped(make):
    picture = make("cover.png", "-f", "lavfi", "-i", "color=s=64x64", "-frames:v", "1")
    source = make("whole.mp4", *counted(), *X264, "-g", "15")
    both = ("-i", picture, "-i", source, "-map", "0", "-map", "1", "-c", "copy", "-disposition:v:0", "attached_pic")
    path = make("covered.mp4", *both)
    assert numbers(path) == list(range(60)) and video.scan(path).num_frames == 60
    unmarked = make("unmarked.mkv", *both[:8], "-c", "copy", "-disposition:v:0", "default", "-disposition:v:1", "0")
    assert numbers(unmarked) == list(range(60))


@pytest.mark.parametrize(
    ("name", "encoder"),
    [("a.mp4", [*X264, "-movflags", "+faststart"]), ("a.mkv", X264), ("a.mpg", MPEG2), ("a.avi", ["-c:v", "mpeg4"])],
)
def test_damaged_files_are_refused_by_name(make, tmp_path, name, encoder):
    noisy = "testsrc2=s=128x96:r=25:d=3,noise=alls=30:allf=t"
    path = make(f"noisy-{name}", "-f", "lavfi", "-i", noisy, *encoder)
    whole = path.read_bytes()
    assert len(list(video.iter_video_frames(path))) == 75
    middle = len(whole) // 2
    damaged = whole[:middle] + bytes(range(256)) * 16 + whole[middle + 4096 :]
    for content in (whole[: middle + 99], damaged):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=rf"cannot decode .*{name}: \[.*\] \w+"):
            list(video.iter_video_frames(tmp_path / name))


@pytest.mark.parametrize("end", ["close", "forget", "throw"])
def test_a_reader_that_stops_early_leaves_nothing_behind(make, end):
    path = make("long.mp4", "-f", "lavfi", "-i", "testsrc2=s=256x256:r=25:d=4", *X264)
    before = _children(), os.listdir("/proc/self/fd")
    for _ in range(3):
        frames = video.iter_video_frames(path)
        next(frames)
        assert len(_children()) == len(before[0]) + 1
        if end == "throw":
            with pytest.raises(KeyboardInterrupt):
                frames.throw(KeyboardInterrupt())  # pyright: ignore[reportAttributeAccessIssue]
        elif end == "close":
            frames.close()  # pyright: ignore[reportAttributeAccessIssue]
        del frames
    assert (_children(), os.listdir("/proc/self/fd")) == before


def _children():
    with open(f"/proc/{os.getpid()}/task/{os.getpid()}/children") as file:
        return file.read().split()


def test_real_footage_shows_the_same_in_every_container():
    samples = {path.suffix: path for path in iscc_samples.videos()}
    (expected,) = video.iter_video_frames(samples[".mp4"], start_sec=30, end_sec=30.04)
    for suffix in (".3gp", ".avi", ".flv", ".m1v", ".mkv", ".mov", ".mpg", ".rm", ".vob", ".webm", ".wmv"):
        info, timing = video.probe(samples[suffix]), video.scan(samples[suffix])
        assert (timing.num_frames, timing.fps, timing.is_variable) == (1441, 24, False), suffix
        (frame,) = itertools.islice(video.iter_video_frames(samples[suffix], start_sec=30, end_sec=30.04), 2)
        assert frame.shape == (info.height, info.width, 3), suffix
        same_size = frame[::2, ::2] if suffix == ".3gp" else frame
        assert np.abs(same_size.astype(int) - expected).mean() < 12, suffix
