"""A run goes on whatever has happened to the files beside its newest whole training state."""

import json
import os
import shutil

import pytest
import torch

from tests.training import tiny_gan
from tests.training.tiny_gan import TinyGAN, final_state, stats_lines
from training import checkpoint, curves, side_files
from training.loop import train


def metric_fn(names, system):
    return [{"results": {name: abs(float(system.G.num_calls) - 1)}} for name in names]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return tiny_gan.write_dataset(tmp_path_factory.mktemp("data") / "stripes")


@pytest.fixture(scope="module")
def finished(dataset, tmp_path_factory):
    """Return a run of four steps, whose best checkpoint by a metric is the one at step 1, and its options."""
    options = tiny_gan.option_maker(dataset, tmp_path_factory.mktemp("runs"))
    made = {"checkpoint_steps": 1, "metric_steps": 1, "keep": 2}
    return train(TinyGAN, options(**made, metrics=("distance",)), metric_fn).run_dir, made


@pytest.fixture(autouse=True)
def no_drawing(monkeypatch):
    """Compute what is drawn, but leave out matplotlib, which takes most of the time."""
    monkeypatch.setattr(curves, "draw_charts", lambda *arguments: None)


@pytest.fixture
def run(finished, dataset, tmp_path):
    """Return a copy of that run, and a function that makes its options; each warning is printed again."""
    side_files.warn_once.cache_clear()
    source, made = finished
    run_dir = tmp_path / "runs" / source.name
    shutil.copytree(source, run_dir)
    options = tiny_gan.option_maker(dataset, run_dir.parent)
    return run_dir, lambda **changes: options(**made | changes)


def told(capsys):
    """Return all that was printed."""
    captured = capsys.readouterr()
    return captured.err + captured.out


DAMAGES = {
    "missing": lambda data: None,
    "empty": lambda data: b"",
    "cut": lambda data: data[: len(data) // 2],
    "NUL": lambda data: bytes(len(data)),
    "begins with NUL": lambda data: bytes(4096) + data,
    "UTF-16": lambda data: data.decode().encode("utf-16"),
    "not UTF-8": lambda data: b"\xff\xfe\xfa" + data,
    "list": lambda data: b"[1, 2]\n",
    "numbers": lambda data: b"17\nNaN\n",
    "other values": lambda data: b'{"step": "x", "metric": {}, "system": [], "model": 3, "results": 5}\n',
    "other entries": lambda data: b'{"step": 1, "loss/D_loss": 3, "distance": [], "results": null}\n',
    "nested": lambda data: b"[" * 100_000,
    "a folder": None,
}
FILES = ("options.json", "stats.jsonl", "metric-distance.jsonl", "best.json", "environment.txt", "log.txt")


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("how", DAMAGES)
def test_a_damaged_side_file_costs_no_run(run, name, how, capsys):
    run_dir, options = run
    path, change = run_dir / name, DAMAGES[how]
    data = path.read_bytes()
    path.unlink()
    if change is None:
        path.mkdir()
    elif (new := change(data)) is not None:
        path.write_bytes(new)
    result = train(TinyGAN, options(steps=5, tick_steps=1), metric_fn)
    output = told(capsys)
    assert result.run_dir == run_dir and result.finished and "goes on at step 4 of 5" in output
    assert final_state(run_dir, 5)["loop"]["num_batches"] == 8
    if how in ("cut", "NUL", "list", "nested", "a folder") and name not in ("environment.txt", "log.txt"):
        warnings = [line for line in output.splitlines() if line.startswith("Warning: ") and name in line]
        assert 1 <= len(warnings) <= (3 if how == "a folder" else 1), output  # which cannot be written, either
    if how != "a folder":
        if name == "options.json":
            assert json.loads(path.read_text()) == final_state(run_dir, 5)["options"]
        if name == "stats.jsonl":
            assert [line["step"] for line in stats_lines(run_dir)][-1] == 5
        if name.startswith("environment"):
            assert b"command " in path.read_bytes()
    if name != "metric-distance.jsonl":  # which tells which step is the best
        assert checkpoint.train_state_path(run_dir, 1).is_file()
    assert "curves.png failed" not in output


def test_an_empty_line_and_a_cut_end_cost_no_other_line(tmp_path):
    path = tmp_path / "stats.jsonl"
    path.write_text('{"step": 1}\n\n{"step": 2}\n{"step": 3, "va')
    side_files.append_line(path, {"step": 4})
    assert [line["step"] for line in side_files.read_lines(path, step=int)] == [1, 2, 4]


# ----------------------------------------------------------------------------
# Training states.


def edit(change):
    def damage(path):
        state = torch.load(path, weights_only=True)
        change(state)
        torch.save(state, path)

    return damage


def as_folder(path):
    path.unlink()
    path.mkdir()
    (path / "file").touch()


class Foreign:
    def __reduce__(self):
        return os.getcwd, ()


STATES = {
    "empty": lambda path: path.write_bytes(b""),
    "NUL": lambda path: path.write_bytes(bytes(path.stat().st_size)),
    "cut": lambda path: path.write_bytes(path.read_bytes()[:-100]),
    "text": lambda path: path.write_text("not here"),
    "a folder": as_folder,
    "a list": lambda path: torch.save([1, 2], path),
    "code": lambda path: torch.save({"modules": Foreign()}, path),
    "another program's": lambda path: torch.save({"state_dict": {}, "epoch": 3}, path),
    "no step": edit(lambda state: state["loop"].pop("step")),
    "step of text": edit(lambda state: state["loop"].update(step="\x1b[1m4")),
    "loop as list": edit(lambda state: state.update(loop=[4])),
    "stats as list": edit(lambda state: state["loop"]["stats"].update(moments=[])),
    "moments of text": edit(lambda state: state["loop"]["stats"]["moments"].update({"loss/D_loss": ["x"]})),
    "a module less": edit(lambda state: state["modules"].pop("D")),
    "a module of another shape": edit(lambda state: state["modules"]["G"].update(weight=torch.zeros(2))),
    "a module as number": edit(lambda state: state["modules"].update(G=3)),
    "a tensor as text": edit(lambda state: state["modules"]["G"].update(weight="x")),
    "optimizer of another": edit(lambda state: state["optimizers"]["G"].update(param_groups=[])),
    "optimizer of numbers": edit(lambda state: state["optimizers"]["G"].update(param_groups=[3])),
    "system as list": edit(lambda state: state.update(system=[])),
    "system of another": edit(lambda state: state.update(system={"other": 1})),
    "options as text": edit(lambda state: state.update(options="x")),
    "footage as numbers": edit(lambda state: state.update(footage={"0008x0016": 3})),
}


@pytest.mark.parametrize("how", STATES)
def test_the_newest_good_state_is_taken_whatever_is_wrong_with_the_newest(run, how, capsys):
    run_dir, options = run
    STATES[how](checkpoint.train_state_path(run_dir, 4))
    result = train(TinyGAN, options(steps=5), metric_fn if how == "empty" else None)
    output = told(capsys)
    assert result.run_dir == run_dir and result.finished and "goes on at step 3 of 5" in output
    (warning,) = [line for line in output.splitlines() if line.startswith("Warning: ") and "00000004-train" in line]
    for foreign in ("\x1b", "weights_only", "torch.load", "file an issue"):
        assert foreign not in output
    assert len(warning.replace(str(run_dir), "")) < 400
    if how != "a folder":
        assert [step for step, _ in checkpoint.list_checkpoints(run_dir)][-2:] == [4, 5]
    assert final_state(run_dir, 5)["loop"]["num_batches"] == 8


@pytest.mark.parametrize("how", ["empty", "a folder", "code", "a module of another shape", "a tensor as text"])
def test_weights_of_a_damaged_state_begin_no_run(run, how, tmp_path):
    run_dir, options = run
    path = checkpoint.train_state_path(run_dir, 4)
    STATES[how](path)
    with pytest.raises(ValueError, match="ckpt-00000004-train.pt (do not fit|is not a whole)"):
        train(TinyGAN, options(init_from=str(path), outdir=str(tmp_path / "new")))
    assert not (tmp_path / "new").exists()


def test_states_from_before_the_run_went_back_displace_no_good_one(run):
    run_dir, options = run
    for step in (3, 4):
        edit(lambda state: state["loop"].pop("step"))(checkpoint.train_state_path(run_dir, step))
    train(TinyGAN, options(steps=2))  # goes back to step 1
    assert {1, 2} <= {step for step, _ in checkpoint.list_checkpoints(run_dir)}
    assert train(TinyGAN, options(steps=2)).step == 2


def test_where_no_state_fits_the_system_that_is_said_and_all_are_kept(run):
    run_dir, options = run
    before = checkpoint.list_checkpoints(run_dir)
    for _, path in before:
        STATES["a module less"](path)
    with pytest.raises(ValueError, match="00000004-train.pt does not fit the system.*repeat the options"):
        train(TinyGAN, options(steps=5))
    assert checkpoint.list_checkpoints(run_dir) == before


# ----------------------------------------------------------------------------
# Footage.


@pytest.mark.parametrize("how", ["the same", "more", "other", "fewer"])
def test_footage_that_was_replaced_is_noticed(how, tmp_path, dataset):
    root = tmp_path / "stripes"
    shutil.copytree(dataset, root)
    options = tiny_gan.option_maker(root, tmp_path / "runs")
    run_dir = train(TinyGAN, options(steps=2)).run_dir
    shutil.rmtree(root)
    clips = {"the same": range(6), "more": range(7), "other": range(1, 7), "fewer": range(5)}[how]
    tiny_gan.write_dataset(root, clips)
    if how in ("other", "fewer"):
        with pytest.raises(ValueError, match="other footage.*of its 6 clips at 0008x0016, 1 are gone.*--override"):
            train(TinyGAN, options(steps=3))
    changes = {"resume": "latest", "override": True} if how in ("other", "fewer") else {}
    assert train(TinyGAN, options(steps=3, **changes)).run_dir == run_dir
    assert ("1 are new" in (run_dir / "log.txt").read_text()) == (how in ("more", "other"))
    assert train(TinyGAN, options(steps=4)).run_dir == run_dir  # it was noticed once
