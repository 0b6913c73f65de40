"""The loop with a tiny GAN: resuming, checkpoints, metrics, previews and the files of a run."""

import json
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.training import tiny_gan
from tests.training.tiny_gan import TinyGAN, assert_equal, final_state, stats_lines
from training import checkpoint, curves
from training.loop import train


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return tiny_gan.write_dataset(tmp_path_factory.mktemp("data") / "stripes")


@pytest.fixture
def options(dataset, tmp_path):
    """Return a function that makes the options of a short run in a folder of the test's own."""
    return tiny_gan.option_maker(dataset, tmp_path / "runs")


def test_training_goes_on_without_matplotlib(options, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setattr(curves, "_warned", False)
    result = train(TinyGAN, options(sample_steps=1))
    assert result.finished and not (result.run_dir / "curves.png").exists()
    assert (result.run_dir / "log.txt").read_text().count("charts need matplotlib: pip install 'longtake[plots]'") == 1


def test_a_run_leaves_what_it_promises(options, capsys):
    result = train(TinyGAN, options(sample_steps=4))
    assert result.finished and result.step == 4
    run_dir = result.run_dir
    assert run_dir.name == "00000-stripes-4batch-1accum-1.0gamma"
    names = {str(path.relative_to(run_dir)) for path in run_dir.rglob("*") if path.is_file()}
    assert names == {
        "options.json",
        "environment.txt",
        "log.txt",
        "stats.jsonl",
        "curves.png",
            *(f"checkpoints/ckpt-{step:08d}-{kind}" for step in (0, 2, 4) for kind in ("G-ema.pkl", "train.pt")),
        *(f"samples/{name}.{kind}" for name in ("real-0008x0016", "fake-00000000", "fake-00000004")
          for kind in ("mp4", "png")),
    }  # fmt: skip
    log = (run_dir / "log.txt").read_text()
    assert capsys.readouterr().out.endswith(log)
    assert [line.endswith("nonfinite gradients 2") for line in log.splitlines() if line.startswith("step ")] == [
        False,
        False,
        True,
    ]
    line = next(line for line in log.splitlines() if line.startswith("step 2"))
    assert "  sec/step 0.0" in line and "  eta 0s" in line and "  loss/D_loss " in line and "cpumem" in line
    assert "  kimg/s " in line and "  data wait " in line
    lines = stats_lines(run_dir)
    assert [line["progress/step"]["mean"] for line in lines] == [0, 2, 4]
    assert [line["progress/tick"]["mean"] for line in lines] == [0, 1, 2]
    assert lines[1]["loss/D_loss"]["num"] == 8 and lines[1]["loss/D_loss"]["std"] > 0
    assert "loss/D_loss" not in lines[0] or lines[0]["loss/D_loss"]["num"] == 0
    assert lines[1]["timing/sec_per_step"]["mean"] > 0 and lines[2]["timing/total_sec"]["mean"] > 0
    sec, speed = lines[1]["timing/sec_per_step"]["mean"], lines[1]["progress/kimg_per_sec"]["mean"]
    assert speed == pytest.approx(4 / 1000 / sec, rel=1e-5) and 0 < lines[1]["timing/data_wait_sec"]["mean"] < 2 * sec
    assert json.loads((run_dir / "options.json").read_text()) == final_state(run_dir, 4)["options"]
    assert torch.__version__ in (run_dir / "environment.txt").read_text()


def test_previews_show_the_videos(options, dataset):
    samples = train(TinyGAN, options(steps=1, model={"enlarges": True})).run_dir / "samples"
    fake, small, large = (
        np.asarray(Image.open(samples / f"{name}.png")).astype(int)
        for name in ("fake-00000001", "real-0008x0016", "real-0016x0032")
    )
    # Four rows of eight frames. The tiny system only repeats the pixels of its prompt, as the larger clips do.
    assert large.shape == fake.shape == (4 * 16, 8 * 32, 3) and large.std() > 50
    assert np.array_equal(small.repeat(2, axis=0).repeat(2, axis=1), large)
    assert np.abs(fake - large).max() <= 1
    assert len(np.unique(large.reshape(4, 16, 8, 32, 3).swapaxes(1, 2).reshape(32, -1), axis=0)) == 32
    assert (samples / "fake-00000001.mp4").stat().st_size > 1000


def test_a_resumed_run_equals_an_uninterrupted_one(options, tmp_path):
    whole = train(TinyGAN, options(steps=7, checkpoint_steps=0, outdir=str(tmp_path / "whole"))).run_dir
    for steps in (2, 5, 7):
        result = train(TinyGAN, options(steps=steps, workers=steps % 2))
    assert [path.name for path in result.run_dir.parent.iterdir()] == [result.run_dir.name]
    resumed_state, whole_state = final_state(result.run_dir, 7), final_state(whole, 7)
    for part in ("modules", "optimizers", "system"):
        assert_equal(resumed_state[part], whole_state[part], part)
    assert resumed_state["loop"]["num_batches"] == whole_state["loop"]["num_batches"] == 11
    assert whole_state["system"]["strength"] != 0
    assert [line["step"] for line in stats_lines(whole)] == [0, 2, 4, 6, 7]
    assert [line["step"] for line in stats_lines(result.run_dir)] == [0, 2, 4, 5, 6, 7]
    assert (result.run_dir / "environment.txt").read_text().count("command ") == 3


def test_a_finished_run_is_unchanged(options):
    run_dir = train(TinyGAN, options()).run_dir
    before = {path: path.read_bytes() for path in run_dir.rglob("*train.pt")}
    stats = (run_dir / "stats.jsonl").read_text()
    result = train(TinyGAN, options())
    assert result.finished and result.step == 4 and result.run_dir == run_dir
    assert before == {path: path.read_bytes() for path in run_dir.rglob("*train.pt")}
    assert (run_dir / "stats.jsonl").read_text() == stats


def test_a_truncated_checkpoint_falls_back_to_the_one_before(options, capsys):
    run_dir = train(TinyGAN, options()).run_dir
    expected = final_state(run_dir, 4)
    newest = checkpoint.train_state_path(run_dir, 4)
    newest.write_bytes(newest.read_bytes()[:-100])
    assert train(TinyGAN, options()).run_dir == run_dir
    assert "ckpt-00000004-train.pt is not a whole training state" in capsys.readouterr().out
    assert_equal(final_state(run_dir, 4)["modules"], expected["modules"])
    assert [line["step"] for line in stats_lines(run_dir)] == [0, 2, 4]


def test_a_run_that_died_before_its_first_checkpoint_begins_anew_in_place(options):
    run_dir = train(TinyGAN, options()).run_dir
    for path in run_dir.glob("checkpoints/*"):
        path.unlink()
    assert train(TinyGAN, options()).run_dir == run_dir
    assert [line["step"] for line in stats_lines(run_dir)] == [0, 2, 4]


def test_other_options_are_another_run(options):
    first = train(TinyGAN, options(steps=1)).run_dir
    assert train(TinyGAN, options(steps=1, seed=1)).run_dir.name.startswith("00001-")
    assert train(TinyGAN, options(steps=2)).run_dir == first
    assert train(TinyGAN, options(steps=1, resume="never")).run_dir.name.startswith("00002-")
    changed = options(batch=8, model={"gamma": 2, "lr": 1}, resume=str(first))
    message = (
        r"(?s)model.gamma: 1 in the run, 2 .*model.lr: \(absent\) in the run, 1 .*batch: 4 in the run, 8 asked for"
    )
    with pytest.raises(ValueError, match=message):
        train(TinyGAN, changed)
    with pytest.raises(ValueError, match="seed: 0 in the run, 5 asked for"):
        train(TinyGAN, options(seed=5, resume="latest"))
    with pytest.raises(ValueError, match="is no run directory"):
        train(TinyGAN, options(resume=str(first / "samples")))
    assert len(list(first.parent.iterdir())) == 3


def test_overriding_changes_the_run_from_here_on(options, tmp_path):
    run_dir = train(TinyGAN, options(steps=2)).run_dir
    changed = {"steps": 4, "resume": "latest", "model": {"gamma": 1, "lr": 0.5}}
    with pytest.raises(ValueError, match=r"model.lr: \(absent\) in the run, 0.5 asked for"):
        train(TinyGAN, options(**changed))
    assert train(TinyGAN, options(**changed, override=True)).run_dir == run_dir
    assert "override model.lr: (absent) in the run, 0.5 asked for" in (run_dir / "log.txt").read_text()
    state = final_state(run_dir, 4)
    assert (
        state["optimizers"]["G"]["param_groups"][0]["lr"] == 0.5 and state["optimizers"]["G"]["state"][0]["step"] == 4
    )
    assert train(TinyGAN, options(steps=5, model=changed["model"])).run_dir == run_dir


def test_one_training_state_begins_a_branch_that_is_continued(options):
    trunk = train(TinyGAN, options(steps=4)).run_dir
    origin = checkpoint.train_state_path(trunk, 2)
    branch = train(TinyGAN, options(steps=3, resume=str(origin), checkpoint_steps=0)).run_dir
    assert branch != trunk and json.loads((branch / "options.json").read_text())["origin"] == str(origin)
    assert [step for step, _ in checkpoint.list_checkpoints(branch)] == [2, 3]
    origin.unlink()  # as pruning the trunk may do
    assert train(TinyGAN, options(steps=4, resume=str(origin))).run_dir == branch
    for part in ("modules", "optimizers", "system"):
        assert_equal(final_state(branch, 4)[part], final_state(trunk, 4)[part], part)
    assert train(TinyGAN, options(steps=5)).run_dir == trunk and len(list(trunk.parent.iterdir())) == 2
    with pytest.raises(ValueError, match="seed: 0 in the run, 1 asked for"):
        train(TinyGAN, options(resume=str(checkpoint.train_state_path(trunk, 4)), seed=1))
    changed = {"resume": str(checkpoint.train_state_path(trunk, 4)), "override": True, "seed": 1}
    other = train(TinyGAN, options(**changed)).run_dir
    assert train(TinyGAN, options(**changed)).run_dir == other and len(list(trunk.parent.iterdir())) == 3
    with pytest.raises(
        ValueError, match="ckpt-00000009-train.pt is not a whole.*before it there is .*00000005-train.pt"
    ):
        train(TinyGAN, options(resume=str(checkpoint.train_state_path(trunk, 9))))
    assert len(list(trunk.parent.iterdir())) == 3


def test_a_new_run_may_begin_with_weights_of_another(options):
    source = final_state(train(TinyGAN, options(steps=3)).run_dir, 3)
    path = str(checkpoint.train_state_path(Path(options().outdir) / "00000-stripes-4batch-1accum-1.0gamma", 3))
    tuned = train(TinyGAN, options(steps=0, init_from=path)).run_dir
    begun = final_state(tuned, 0)
    assert_equal(begun["modules"]["G_ema"], source["modules"]["G_ema"])
    assert begun["optimizers"]["G"]["state"] == {} and begun["loop"]["step"] == 0
    with pytest.raises(ValueError, match="is a folder, expected a network: pass"):
        train(TinyGAN, options(init_from=str(Path(path).parent), resume="never"))
    assert len(list(tuned.parent.iterdir())) == 2, "a run that cannot begin leaves no directory"
    Path(path).unlink()  # only a run that begins needs it
    assert train(TinyGAN, options(steps=1, init_from=path)).run_dir == tuned


def test_checkpoints_are_written_by_the_clock(options):
    asked = options(steps=3, checkpoint_steps=0, checkpoint_minutes=1e-9, keep=9)
    assert [step for step, _ in checkpoint.list_checkpoints(train(TinyGAN, asked).run_dir)] == [0, 1, 2, 3]


def test_a_metric_that_fails_is_logged_and_measured_again_at_the_next_start(options):
    failing = [True]

    def metric_fn(names, system):
        if failing[0]:
            raise RuntimeError("no memory left")
        return [{"results": {name: 1.0}} for name in names]

    asked = options(metrics=("distance",))
    run_dir = train(TinyGAN, asked, metric_fn).run_dir
    assert (
        "step 4  metric/distance failed (RuntimeError: no memory left); training goes on"
        in (run_dir / "log.txt").read_text()
    )
    failing[0] = False
    train(TinyGAN, asked, metric_fn)
    lines = [json.loads(line) for line in (run_dir / "metric-distance.jsonl").read_text().splitlines()]
    assert [line.get("error") for line in lines] == ["RuntimeError: no memory left"] * 2 + [None]


def test_metrics_share_one_pass_and_one_that_fails_costs_no_other(options):
    asked = []

    def metric_fn(names, system):
        asked.append(tuple(names))
        if "broken" in names:
            raise ValueError("clips are too short")
        return [{"results": {name: 2.0}} for name in names]

    run_dir = train(TinyGAN, options(metrics=("distance", "broken", "other")), metric_fn).run_dir
    assert asked[:4] == [("distance", "broken", "other"), ("distance",), ("broken",), ("other",)]
    texts = {name: (run_dir / f"metric-{name}.jsonl").read_text() for name in asked[0]}
    assert "clips are too short" in texts["broken"]
    for name in ("distance", "other"):
        assert json.loads(texts[name].splitlines()[-1])["results"] == {name: 2.0}

    asked.clear()
    assert train(TinyGAN, options(metrics=("distance", "more", "other", "third")), metric_fn).run_dir == run_dir
    assert asked == [("more", "third")]


def test_old_checkpoints_are_pruned_and_the_best_stays(options):
    measured = []

    def metric_fn(names, system):
        measured.append((*names, int(system.G.num_calls)))
        return [{"results": {name: abs(system.G.num_calls.item() - 3)}, "num_fake": 1} for name in names]

    asked = options(steps=7, checkpoint_steps=1, metric_steps=1, keep=2, metrics=("distance",))
    run_dir = train(TinyGAN, asked, metric_fn).run_dir
    assert [step for step, _ in checkpoint.list_checkpoints(run_dir)] == [3, 6, 7]
    assert sorted(path.name[5:13] for path in run_dir.glob("checkpoints/*.pkl")) == ["00000003", "00000006", "00000007"]
    lines = [json.loads(line) for line in (run_dir / "metric-distance.jsonl").read_text().splitlines()]
    assert [(line["step"], line["results"]["distance"]) for line in lines] == [(s, abs(s - 3)) for s in range(8)]
    assert lines[3]["checkpoint"] == "ckpt-00000003-G-ema.pkl"
    log = (run_dir / "log.txt").read_text()
    assert [step for step in range(8) if f"step {step}  metric/distance {abs(step - 3)}  best so far" in log] == [
        0,
        1,
        2,
        3,
    ]
    assert json.loads((run_dir / "best.json").read_text()) == {
        "metric": "distance",
        "step": 3,
        "checkpoint": "checkpoints/ckpt-00000003-G-ema.pkl",
        "results": {"distance": 0.0},
    }

    # A metric asked for later is measured at the end of the finished run; what is known is not measured again.
    measured.clear()
    train(TinyGAN, options(steps=7, checkpoint_steps=1, metrics=("distance", "other")), metric_fn)
    assert measured == [("other", 7)]

    # It stays the best, and is kept, where nothing is measured any more.
    train(TinyGAN, options(steps=9, checkpoint_steps=1, keep=1), metric_fn)
    assert [step for step, _ in checkpoint.list_checkpoints(run_dir)] == [3, 9]

    # Another metric given first decides from then on; the run goes back to the step that is left.
    (checkpoint.train_state_path(run_dir, 9)).unlink()
    train(TinyGAN, options(steps=4, metrics=("other",)), metric_fn)
    assert json.loads((run_dir / "best.json").read_text())["metric"] == "other"


def test_a_loss_that_stays_nan_stops_the_run(options):
    asked = options(steps=12, model={"nan_from": 5}, checkpoint_steps=1, keep=2)
    with pytest.raises(ValueError, match=r"loss/D_loss has not been finite since step 6.*ckpt-00000004-train.pt"):
        train(TinyGAN, asked)
    (run_dir,) = Path(asked.outdir).iterdir()
    assert [step for step, _ in checkpoint.list_checkpoints(run_dir)] == [4, 6, 7], "the last good one is kept"
    lines = stats_lines(run_dir)
    assert lines[3]["loss/D_loss"]["nonfinite"] == 4 and lines[3]["loss/D_loss"]["num"] == 4
    assert lines[4]["loss/D_loss"]["mean"] is None


def test_what_does_not_fit_is_refused_before_anything_is_written(options):
    for changes, message in [
        ({"batch": 5, "grad_accum": 2}, "batch of 5 does not divide by 1 ranks x 2 rounds.*use a batch of 4 or 6"),
        ({"resume": "latest"}, "no run to resume"),
        ({"dataset": "/nowhere"}, "/nowhere is not a folder"),
        ({"log": ("wandbb",)}, "did you mean wandb"),
    ]:
        with pytest.raises(ValueError, match=message):
            train(TinyGAN, options(**changes))
    with pytest.raises(ValueError, match="did you mean longvideogan-lres"):
        train("longvideogan-lers", options())
    assert not Path(options().outdir).exists()


def test_a_signal_ends_the_run_after_the_step_and_changes_nothing(options, capsys, tmp_path):
    model = {"signal_step": 2}
    handlers = signal.getsignal(signal.SIGUSR1), signal.getsignal(signal.SIGINT)
    stopped = train(TinyGAN, options(checkpoint_steps=0, model=model))
    assert not stopped.finished and stopped.step == 3
    assert handlers == (signal.getsignal(signal.SIGUSR1), signal.getsignal(signal.SIGINT))
    assert "Stopped at step 3, everything is saved; to continue: python " in capsys.readouterr().out
    finished = train(TinyGAN, options(checkpoint_steps=0, model=model))
    assert finished.finished and finished.run_dir == stopped.run_dir
    whole = train(TinyGAN, options(outdir=str(tmp_path / "whole")))
    for part in ("modules", "optimizers", "system"):
        assert_equal(final_state(finished.run_dir, 4)[part], final_state(whole.run_dir, 4)[part], part)
    # The tick that the signal fell into counts all of its steps.
    assert [line["loss/D_loss"] for line in stats_lines(finished.run_dir)[1:]] == [
        line["loss/D_loss"] for line in stats_lines(whole.run_dir)[1:]
    ]
