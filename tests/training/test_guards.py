"""Only saving the training state may fail a run: all else that fails is said once, and training goes on."""

import errno
import io
import os
import sys
from pathlib import Path

import pytest

from tests.training import tiny_gan
from tests.training.tiny_gan import TinyGAN, assert_equal, final_state
from training import checkpoint, curves, loop
from training.loop import train


def raises(error):
    def function(*arguments, **named):
        raise error

    return function


def metric_fn(names, system):
    return [{"results": {name: abs(float(system.G.num_calls) - 1)}} for name in names]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return tiny_gan.write_dataset(tmp_path_factory.mktemp("data") / "stripes")


@pytest.fixture
def options(dataset, tmp_path, monkeypatch):
    """Return a function that makes the options of a short run; nothing is drawn, as that takes most of the time."""
    monkeypatch.setattr(curves, "draw_charts", lambda *arguments: None)
    return tiny_gan.option_maker(dataset, tmp_path / "runs")


@pytest.fixture(scope="module")
def whole(dataset, tmp_path_factory):
    """Return the last state of a run in which nothing fails."""
    options = tiny_gan.option_maker(dataset, tmp_path_factory.mktemp("runs"))
    return final_state(train(TinyGAN, options()).run_dir, 4)


def encoder(lines):
    """Return an ffmpeg that does as the lines of shell say, but for telling its version."""

    def disturb(monkeypatch, run_dir):
        program = run_dir.parent.parent / "ffmpeg"
        program.write_text(f'#!/bin/bash\n[ "$1" = -version ] && exit 0\n{lines}\n')
        program.chmod(0o755)
        monkeypatch.setenv("IMAGEIO_FFMPEG_EXE", str(program))

    return disturb


def broken(where, name, error):
    """Return a function of a module that raises an error."""
    return lambda monkeypatch, run_dir: monkeypatch.setattr(where, name, raises(error))


def folder(name):
    """Return a folder, which is not empty, where the run writes a file."""
    return lambda monkeypatch, run_dir: (run_dir / name / "in it").mkdir(parents=True)


def file(name):
    return lambda monkeypatch, run_dir: (run_dir / name).write_text("a file where a folder should be")


def stuck(monkeypatch, run_dir):
    """Nothing can be deleted, as on a file system that has turned read-only."""
    monkeypatch.setattr(Path, "unlink", raises(OSError(errno.EROFS, "Read-only file system")))


def no_terminal(monkeypatch, run_dir):
    closed = io.StringIO()
    closed.close()
    monkeypatch.setattr(sys, "stdout", closed)


DISTURBANCES = {
    "encoder exits": (encoder("exit 1"), "the preview failed"),
    "encoder exits late": (encoder("head -c 1000 > /dev/null; echo No space left >&2; exit 1"), "the preview failed"),
    "encoder is killed": (encoder("kill -9 $$"), "the preview failed"),
    "no samples": (file("samples"), "the preview failed"),
    "sampler fails": (broken(tiny_gan.TinySampler, "frames", RuntimeError("out of memory")), "the preview failed"),
    "preview fails": (broken(loop, "write_preview", MemoryError()), "the preview failed"),
    "clips fail": (broken(loop, "preview_clips", AssertionError("no clip has more")), "previews failed"),
    "curves fail": (broken(curves, "draw_charts", TypeError("no such font")), "curves.png failed"),
    "log": (folder("log.txt"), "log.txt failed"),
    "stats": (folder("stats.jsonl"), "stats.jsonl failed"),
    "result": (folder("metric-distance.jsonl"), "metric-distance.jsonl failed"),
    "best": (folder("best.json"), "metric/distance failed"),
    "environment": (folder("environment.txt"), "environment.txt failed"),
    "environment fails": (broken(loop, "environment_text", ValueError("no package")), "environment.txt failed"),
    "older checkpoint is a folder": (folder("checkpoints/ckpt-00000001-train.pt"), None),
    "older network is a folder": (folder("checkpoints/ckpt-00000001-G-ema.pkl"), None),
    "nothing can be deleted": (stuck, None),
    "pruning fails": (broken(checkpoint, "prune_checkpoints", KeyError(3)), "deleting older checkpoints failed"),
    "no terminal": (no_terminal, None),
}


@pytest.mark.parametrize("how", DISTURBANCES)
def test_what_is_no_weights_fails_no_run(how, options, whole, monkeypatch, capsys):
    disturb, warning = DISTURBANCES[how]
    made = {"sample_steps": 1, "metric_steps": 1, "metrics": ("distance",), "keep": 1}
    run_dir = train(TinyGAN, options(**made, steps=0), metric_fn).run_dir
    capsys.readouterr()
    for path in ("log.txt", "stats.jsonl", "metric-distance.jsonl", "best.json", "environment.txt"):
        (run_dir / path).unlink()
    for path in [*run_dir.glob("samples/*"), run_dir / "samples"]:
        path.rmdir() if path.is_dir() else path.unlink()
    disturb(monkeypatch, run_dir)
    result = train(TinyGAN, options(**made), metric_fn)
    assert result.finished and result.run_dir == run_dir
    if how != "no terminal":
        output = capsys.readouterr().out
        assert warning is None or output.count(warning) == 1, output
        assert output.rstrip().endswith(f"Finished 4 steps in {run_dir}")
    found = final_state(run_dir, 4)
    for part in ("modules", "optimizers", "system"):
        assert_equal(found[part], whole[part], part)
    monkeypatch.undo()
    assert checkpoint.network_path(run_dir, 4).is_file()


@pytest.mark.parametrize("how", ["state", "network", "export"])
@pytest.mark.parametrize("is_stuck", [False, True])
def test_a_save_that_fails_is_tried_again(how, is_stuck, options, whole, monkeypatch, capsys):
    """Also where nothing of it can be removed, as the disk has turned read-only for a while."""

    class Disturbed(TinyGAN):
        def step(self, batches, step):
            monkeypatch.undo()
            monkeypatch.setattr(curves, "draw_charts", lambda *arguments: None)
            if step == 1:
                error = OSError(errno.EROFS, "Read-only file system")
                places = {"state": (checkpoint, "save_train_state"), "network": (loop, "save_bundle")}
                monkeypatch.setattr(*places.get(how, (Disturbed, "export")), raises(error))
                if is_stuck:
                    monkeypatch.setattr(Path, "unlink", raises(error))
            return super().step(batches, step)

    result = train(Disturbed, options())
    output = capsys.readouterr().out
    assert result.finished and output.count("Step 2 was not saved in") == 1 and "Read-only file system" in output
    assert "the newest checkpoint is " in output and "00000000-train.pt. Make sure that it can be written" in output
    assert [step for step, _ in checkpoint.list_checkpoints(result.run_dir)] == [0, 4]
    assert_equal(final_state(result.run_dir, 4)["modules"], whole["modules"])


def test_a_folder_where_a_checkpoint_should_be_costs_only_that_checkpoint(options, capsys):
    run_dir = train(TinyGAN, options(steps=0)).run_dir
    (run_dir / "checkpoints/ckpt-00000002-train.pt/in it").mkdir(parents=True)
    assert train(TinyGAN, options()).finished and "Step 2 was not saved in" in capsys.readouterr().out
    (run_dir / "checkpoints/ckpt-00000006-train.pt").mkdir()
    with pytest.raises(ValueError, match="Step 6 was not saved .*the newest checkpoint is .*00000004-train.pt"):
        train(TinyGAN, options(steps=6))


class Held(TinyGAN):
    """Has losses of the validation split, which fail at the second evaluation."""

    num_calls = 0

    def validate(self, batches):
        next(batches)
        Held.num_calls += 1
        if Held.num_calls > 8:
            raise OSError(errno.EIO, "Input/output error")
        return {"loss/D_loss": self.G.num_calls}


def test_validation_that_fails_stops_nothing(options, dataset, capsys):
    run_dir = train(Held, options(steps=2, metric_steps=1, tick_steps=1, val_dataset=str(dataset))).run_dir
    assert capsys.readouterr().out.count("validation failed and may be incomplete (Input/output error)") == 1
    lines = tiny_gan.stats_lines(run_dir)
    assert ["validation/D_loss" in line for line in lines] == [True, False, False]


def test_names_that_are_not_utf_8_are_logged(options, tmp_path):
    root = tiny_gan.write_dataset(Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9")))
    run_dir = train(TinyGAN, options(dataset=str(root), steps=1)).run_dir
    assert rb"caf\udce9" in (run_dir / "log.txt").read_bytes()
    assert train(TinyGAN, options(dataset=str(root), steps=2)).run_dir == run_dir
