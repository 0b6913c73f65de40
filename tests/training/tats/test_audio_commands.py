"""Videos with sound become a dataset, two tokenizers and a model that hears, by the commands; bad input of each."""

import numpy as np
import pytest
from click.testing import CliRunner

import generate
from dataset_tools import encode_dataset, make_dataset_from_videos
from dnnlib.video import iter_video_frames
from tests.training.data.sounds import write_tone
from tests.training.tats import tiny
from train import training_command
from training.data.dataset import ClipDataset
from training.data.spectrograms import read_sound
from training.network_file import load_bundle, save_bundle
from training.tats.networks import TATSTransformer


def run(command, *arguments, code=0):
    result = CliRunner().invoke(command, [str(argument) for argument in arguments])
    assert result.exit_code == code, result.output
    return result.output


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Return a folder of two videos with sound, the dataset made of them, and a tokenizer of its frames."""
    folder = tmp_path_factory.mktemp("heard")
    for name, hertz in (("a", 500), ("b", 2000)):
        write_tone(folder / "videos" / f"{name}.mkv", 2.4, hertz=hertz)
    run(
        make_dataset_from_videos.main,
        *[folder / "videos", folder / "data", "--sizes=8x8", "--audio", "--num-partitions=1", "--workers=1"],
    )
    save_bundle(tiny.Bundle({"tokenizer": tiny.tokenizer()}, "tokenizer"), folder / "tokenizer.pkl")
    return folder


def read(path):
    return np.stack(list(iter_video_frames(path)))


def train(folder, name, *arguments):
    small = ["--device=cpu", "--workers=0", "--batch=2", "--steps=2", "--tick-steps=1", "--sample-steps=2"]
    places = [f"--outdir={folder / name}", f"--dataset={folder / 'data'}"]
    output = run(training_command(name), *places, *small, *arguments)
    (run_dir,) = (folder / name).iterdir()
    assert (run_dir / "samples" / "fake-00000002.png").is_file(), output
    return next((run_dir / "checkpoints").glob("ckpt-00000002-*.pkl"))


@pytest.mark.slow
def test_videos_with_sound_become_a_model_that_hears(folder, tmp_path):
    dataset = ClipDataset(folder / "data", [(8, 8)], streams=["audio"])
    assert [clip.num_frames for clip in dataset.clips] == [24, 24] and dataset.fps == 10
    wanted = read_sound(folder / "videos" / "b.mkv", 10, 24)
    np.testing.assert_array_equal(dataset.read_stream(1, "audio", 0, 24), wanted.astype(np.float32))

    tiny_sizes = ["--hidden=2", "--embedding-dim=4", "--num-codes=7", "--clip-frames=8"]
    sound = train(folder, "tokenizer", "--preset=toy-audio", *tiny_sizes)
    run(encode_dataset.main, folder / "data", f"--tokenizer={folder / 'tokenizer.pkl'}", "--workers=1")
    books = [f"--tokenizer={folder / 'tokenizer.pkl'}", f"--audio-tokenizer={sound}"]
    model = train(folder, "tats", "--preset=toy-audio", "--layers=1", "--width=16", "--frames=8", *books)
    network = load_bundle(model).networks["transformer"]
    assert isinstance(network, TATSTransformer) and network.options["condition_length"] == 32

    video = write_tone(tmp_path / "c.mkv", 1.2)
    out = [f"--outdir={tmp_path}", "--device=cpu", f"--model={model}", "--seed=0"]
    first, second = (run(generate.main, *out, given) for given in (f"--audio={video}", f"--context={video}"))
    assert "12 frames in" in first and "12 frames in" in second
    made = [read(path) for path in sorted(tmp_path.glob("*len=12*.mp4"))]
    assert [len(frames) for frames in made] == [12, 12] and np.array_equal(made[0], made[1]), [*tmp_path.iterdir()]
    output = run(generate.main, *out, "--len=30", f"--audio={video}", code=1)
    assert "has audio for 12 frames, 0 for the context and 30 for the video are needed" in output
    assert "24 frames in" in run(generate.main, *out, f"--context={folder / 'data'}")
    for given, words in (
        ([], "give --audio"),
        ([f"--audio={write_tone(tmp_path / 'silent.mkv', 1, 0)}"], "has no audio track; give a file with sound"),
        ([f"--audio={tmp_path / 'none.wav'}"], "none.wav is not a file"),
        ([f"--audio={video}", f"--context={video}"], "are two: leave out --context"),
    ):
        assert words in run(generate.main, *out, *given, code=1)


def test_sound_is_not_encoded_ahead(folder, tmp_path):
    save_bundle(tiny.Bundle({"tokenizer": tiny.sound_tokenizer()}, "tokenizer"), tmp_path / "sound.pkl")
    output = run(encode_dataset.main, folder / "data", f"--tokenizer={tmp_path / 'sound.pkl'}", code=1)
    assert "encodes sound, which training does as it goes: give a tokenizer of frames" in output


@pytest.mark.parametrize(
    ("arguments", "files", "words"),
    [
        (["--audio"], {"sound_seconds": 0}, "a.mkv has no audio track; give a file with sound"),
        (["--audio"], {"sound_seconds": 0.5}, "a.mkv lasts 0.5 s from 0 s on, but its 10 frames last 1 s"),
        (["--stft={folder}"], {}, "add --audio"),
        (["--audio", "--stft={folder}"], {}, "a.pickle cannot be read as spectrograms"),
        (["--audio", "--stft={folder}", "--fps=5"], {}, "has a.pickle, one value for each of its frames: leave out"),
    ],
)
def test_videos_whose_sound_is_not_there_are_refused(arguments, files, words, tmp_path):
    write_tone(tmp_path / "in" / "a.mkv", 1, **files)
    given = [argument.format(folder=tmp_path) for argument in arguments]
    result = CliRunner().invoke(make_dataset_from_videos.main, [str(tmp_path / "in"), str(tmp_path / "out"), *given])
    assert result.exit_code and words in result.output, result.output


def test_spectrograms_of_the_release_are_taken(tmp_path):
    write_tone(tmp_path / "in" / "x" / "a.mkv", 1, 0)
    stft = np.random.RandomState(0).uniform(0, 1, (90, 20, 10))
    (tmp_path / "stft" / "x").mkdir(parents=True)
    np.save(tmp_path / "stft" / "x" / "a.npy", stft)
    given = [tmp_path / "in", tmp_path / "out", "--sizes=8x8", "--audio", f"--stft={tmp_path / 'stft'}"]
    run(make_dataset_from_videos.main, *given)
    dataset = ClipDataset(tmp_path / "out", [], streams=["audio"])
    assert dataset.read_stream(0, "audio", 0, 10).shape == (10, 1024)


@pytest.mark.parametrize(
    ("name", "arguments", "words"),
    [
        ("tokenizer", ["--preset=toy-3d", "--content=audio"], "of 64x16 and one channel, but the network takes 32x64"),
        ("tokenizer", ["--preset=toy-audio", "--content=frames"], "as for sound: add --content=audio"),
        ("tats", ["--preset=toy-audio", "--tokenizer=a.pkl"], "give --audio-tokenizer"),
    ],
)
def test_options_that_do_not_fit_are_refused(name, arguments, words):
    assert words in run(training_command(name), "--dataset=data", "--device=cpu", *arguments, code=1)
