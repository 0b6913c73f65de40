"""Audio tracks: level and pitch of a tone, where it begins, and what cannot be read."""

import subprocess
import wave

import imageio_ffmpeg
import numpy as np
import pytest

from tests.training.data.clips import drifting, write
from training.data.audio import read_audio

RATE = 16000


def tone(seconds, hertz=440.0, rate=RATE, level=0.5):
    return level * np.sin(2 * np.pi * hertz * np.arange(int(seconds * rate)) / rate)


def write_wave(path, *channels, rate=RATE):
    values = (np.stack(channels, 1) * 32767).round().astype("<i2")
    with wave.open(str(path), "wb") as file:
        file.setnchannels(len(channels))
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes(values.tobytes())
    return path


def ffmpeg(*arguments):
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-y", *map(str, arguments)]
    subprocess.run(command, check=True)


def pitch(samples, rate):
    spectrum = np.abs(np.fft.rfft(samples * np.hanning(len(samples))))
    return spectrum.argmax() * rate / len(samples)


def test_samples_are_those_of_the_file(tmp_path):
    wanted = tone(0.5)
    samples = read_audio(write_wave(tmp_path / "a.wav", wanted), RATE)
    assert samples.dtype == np.float32 and samples.shape == wanted.shape
    np.testing.assert_allclose(samples, wanted, atol=1e-4)


def test_channels_are_mixed_and_rates_changed(tmp_path):
    path = write_wave(tmp_path / "a.wav", tone(0.5, rate=44100), -0.5 * tone(0.5, rate=44100), rate=44100)
    samples = read_audio(path, 22050)
    assert abs(len(samples) - 11025) <= 2
    assert abs(pitch(samples[1000:9192], 22050) - 440) < 4
    assert abs(np.abs(samples[1000:10000]).max() - 0.125) < 0.005


def test_the_track_of_a_video_is_read_in_parts(tmp_path):
    video = write(tmp_path / "video.mp4", drifting("audio", 12))
    write_wave(tmp_path / "a.wav", np.concatenate([tone(0.5, 300), tone(0.5, 1200)]))
    ffmpeg("-i", video, "-i", tmp_path / "a.wav", "-c:v", "copy", "-c:a", "aac", "-shortest", tmp_path / "both.mp4")
    samples = read_audio(tmp_path / "both.mp4", RATE)
    assert len(samples) >= 0.95 * RATE
    assert abs(pitch(samples[2000:6096], RATE) - 300) < 10 and abs(pitch(samples[9000:13096], RATE) - 1200) < 10
    part = read_audio(tmp_path / "both.mp4", RATE, 0.55, 4000)
    assert part.shape == (4000,) and abs(pitch(part, RATE) - 1200) < 10


def test_a_track_that_begins_late_is_padded(tmp_path):
    video = write(tmp_path / "video.mp4", drifting("audio", 12))
    write_wave(tmp_path / "a.wav", tone(0.4))
    late = ("-i", video, "-itsoffset", "0.5", "-i", tmp_path / "a.wav", "-map", "0:v", "-map", "1:a")
    ffmpeg(*late, "-c:v", "copy", "-c:a", "pcm_s16le", tmp_path / "late.mkv")
    samples = read_audio(tmp_path / "late.mkv", RATE)
    first = int(np.argmax(np.abs(samples) > 0.05))
    assert abs(first / RATE - 0.5) < 0.01 and abs(len(samples) / RATE - 0.9) < 0.02


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.wav", b"RIFF", "the audio track of .*a.wav cannot be decoded"),
        ("a.wav", b"", "cannot be decoded"),
        ("none.wav", None, "none.wav is not a file"),
        ("silent.mp4", "video", "silent.mp4 has no audio track; give a file with sound"),
    ],
)
def test_what_has_no_audio_is_refused(tmp_path, name, content, message):
    if content == "video":
        write(tmp_path / name, drifting("audio", 3))
    elif content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_audio(tmp_path / name, RATE)


def test_a_rate_out_of_range_is_refused(tmp_path):
    with pytest.raises(ValueError, match="the rate of samples is 0 Hz"):
        read_audio(write_wave(tmp_path / "a.wav", tone(0.1)), 0)
