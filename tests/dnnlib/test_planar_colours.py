"""Conversion of colours through planar RGB, which is faster, gives the pixels of the direct conversion."""

import subprocess

import imageio_ffmpeg
import numpy as np
import pytest

from dnnlib import video

FFMPEG = imageio_ffmpeg.get_ffmpeg_exe()


@pytest.mark.parametrize(
    ("codec", "pixels"),
    [
        *(("libx264", f"yuv{chroma}p{depth}") for chroma in (420, 422, 444) for depth in ("", "10le")),
        *(("libx264", "yuvj420p"), ("libx264", "gray"), ("libvpx-vp9", "yuv420p"), ("libvpx-vp9", "gbrp")),
        *(("mpeg4", "yuv420p"), ("mpeg2video", "yuv422p"), ("libvpx", "yuv420p")),
    ],
)
@pytest.mark.parametrize("aspect", [1, 1.3])
def test_pixels_are_those_of_the_direct_conversion(tmp_path, monkeypatch, codec, pixels, aspect):
    path = tmp_path / "a.mkv"
    made = f"testsrc2=size=70x46:rate=25,noise=alls=30:allf=t,setsar={aspect}"
    command = [FFMPEG, "-v", "error", "-f", "lavfi", "-i", made, "-frames:v", "3", "-c:v", codec, "-pix_fmt", pixels]
    subprocess.run([*command, "-q:v", "2", str(path)], check=True)
    found = np.stack(list(video.iter_video_frames(path)))
    assert any(video._PLANAR in step for step in video._choose_colors(video.probe(path)))
    monkeypatch.setattr(video, "_PLANAR_CODECS", ())
    np.testing.assert_array_equal(found, np.stack(list(video.iter_video_frames(path))))
