"""Options: unknown names, identities, and run directories."""

import dataclasses
import json
import os
from pathlib import Path

import pytest

from train import make_options
from training import config
from training.config import FREE_OPTIONS, TrainOptions, differences, identity, resolve
from training.run_dirs import Beginning, find_run, list_runs, new_run_dir


def make(outdir, **changes):
    return resolve(TrainOptions, {"outdir": str(outdir), "dataset": "data/horses", "system": "s"} | changes)


def begin(options):
    """Make the run directory that training would."""
    run_dir = new_run_dir(options)
    run_dir.mkdir(parents=True)
    (run_dir / "options.json").write_text(json.dumps(config.to_dict(options)))
    return run_dir


def test_unknown_and_missing_names_are_refused(tmp_path):
    with pytest.raises(ValueError, match="Unknown name 'bacth' in the options; did you mean batch"):
        make(tmp_path, bacth=3)
    with pytest.raises(ValueError, match="'outdir' is missing"):
        resolve(TrainOptions, {"dataset": "d", "system": "s"})
    with pytest.raises(ValueError, match="grad_accum is 0; it must be at least 1"):
        make(tmp_path, grad_accum=0)
    with pytest.raises(ValueError, match="steps is -1; it must not be negative"):
        make(tmp_path, steps=-1)
    with pytest.raises(ValueError, match="in a run that is named, not with --resume=auto; add --resume=latest"):
        make(tmp_path, override=True)


def test_a_dictionary_gives_the_options_back(tmp_path):
    options = make(tmp_path, metrics=("a", "b"), model={"sizes": (1, 2)})
    values = config.to_dict(options)
    assert values == json.loads(json.dumps(values)) and values["model"] == {"sizes": [1, 2]}
    again = resolve(TrainOptions, values)
    assert config.to_dict(again) == values and again.metrics == ("a", "b")


def test_identity_is_all_but_what_may_change(tmp_path):
    options = make(tmp_path)
    fields = {field.name for field in dataclasses.fields(options)}
    assert fields - set(identity(options)) == set(FREE_OPTIONS)
    free = {
        "steps": 5,
        "device": "cuda",
        "workers": 9,
        "log": ("wandb",),
        "metrics": ("m",),
        "keep": 1,
        "tick_steps": 1,
    }
    free |= {"checkpoint_minutes": 0.5, "metric_steps": 7, "cache": "ram", "resume": "latest", "override": True}
    assert identity(make("elsewhere", **free)) == identity(options)
    changes = [{"seed": 1}, {"batch": 8}, {"model": {"a": 1}}, {"dataset": "data/dogs"}, {"x_flip": False}]
    for change in [*changes, {"weighting": "frame"}, {"init_from": "net.pkl"}]:
        assert identity(make(tmp_path, **change)) != identity(options)
    assert make(tmp_path, init_from="net.pkl").init_from == os.path.abspath("net.pkl")
    assert make(tmp_path, init_from="https://x.org/net.pkl").init_from == "https://x.org/net.pkl"
    assert make(tmp_path, log=("none",)).log == ()


@pytest.mark.parametrize("system", ["longvideogan-lres", "longvideogan-sres"])
def test_options_that_a_run_does_not_know_yet_are_at_their_defaults(tmp_path, system):
    options = make_options(system, "toy", {"outdir": str(tmp_path), "dataset": "data/horses"})
    stored = config.to_dict(options)
    del stored["weighting"], stored["model"]["freeze_d"], stored["model"]["beta2"]
    assert identity(stored).keys() == identity(options).keys()
    # The preset changes one of these, so that a run without it was another one.
    beta2 = options.model["beta2"]
    expected = [] if beta2 == 0.99 else [f"model.beta2: 0.99 in the run, {beta2} asked for"]
    assert differences(identity(stored), identity(options)) == expected
    stored["model"]["beta2"] = beta2
    run_dir = begin(options)
    (run_dir / "options.json").write_text(json.dumps(stored))
    assert found(options) == run_dir
    assert found(dataclasses.replace(options, weighting="frame")) is None


def test_differences_name_each_leaf():
    stored = {"seed": 0, "model": {"gamma": 1.0, "old": True}}
    wanted = {"seed": 0, "model": {"gamma": 2.0, "new": 3}}
    assert differences(stored, wanted) == [
        "model.gamma: 1.0 in the run, 2.0 asked for",
        "model.old: True in the run, (absent) asked for",
        "model.new: (absent) in the run, 3 asked for",
    ]
    assert differences(stored, stored) == []


def test_run_directories_are_numbered_past_gaps(tmp_path):
    options = make(tmp_path, batch=32, grad_accum=2)
    assert new_run_dir(options, "1.0gamma").name == "00000-horses-32batch-2accum-1.0gamma"
    for name in ("00007-other", "100000-many", "notes"):
        (tmp_path / name).mkdir()
    (tmp_path / "200000-file").write_text("")
    assert new_run_dir(options, "1.0gamma").name == "100001-horses-32batch-2accum-1.0gamma"
    assert [path.name for path in list_runs(tmp_path)] == ["00007-other", "100000-many"]
    assert new_run_dir(make(tmp_path / "none")).name == "00000-horses-64batch-1accum"


def test_options_of_the_run_that_older_files_repeat_are_no_part_of_the_system(tmp_path):
    options = make_options("longvideogan-lres", "toy", {"outdir": str(tmp_path), "dataset": "data/horses"})
    stored = config.to_dict(options)
    stored["model"] |= {"batch": 4, "grad_accum": 1, "seed": 0}
    assert identity(stored) == identity(options)
    assert resolve(TrainOptions, stored).model["batch"] == 4
    with pytest.raises(ValueError, match="Option batch is 8 for the run but 4 for the system; give it once"):
        resolve(TrainOptions, stored | {"batch": 8})


def found(options):
    return find_run(options).run_dir


def test_which_run_is_continued(tmp_path):
    first, second, third = (begin(make(tmp_path, seed=seed)) for seed in (0, 1, 0))
    (tmp_path / "00009-died-at-once").mkdir()
    assert found(make(tmp_path, steps=7)) == found(make(tmp_path, resume="latest")) == third
    assert found(make(tmp_path, seed=1)) == second
    assert found(make(tmp_path, seed=2)) is None
    assert found(make(tmp_path, resume="never")) is None
    assert found(make(tmp_path, resume=str(first))) == first
    with pytest.raises(ValueError, match="(?s)seed: 1 in the run, 0 asked for.*--override.*--resume=never"):
        find_run(make(tmp_path, resume=str(second)))
    (first / "net.pkl").touch()
    for path in (tmp_path / "00009-died-at-once", first / "net.pkl", tmp_path / "nowhere"):
        with pytest.raises(ValueError, match=r"holds no options.json. --resume takes .*--init-from"):
            find_run(make(tmp_path, resume=str(path)))
    with pytest.raises(ValueError, match="no run to resume"):
        find_run(make(tmp_path / "empty", resume="latest"))
    (second / "options.json").write_text("{")
    with pytest.raises(ValueError, match="options.json cannot be read"):
        find_run(make(tmp_path, resume=str(second)))


def test_a_run_directory_given_as_outdir_is_that_run(tmp_path):
    run_dir = begin(make(tmp_path))
    for resume in ("auto", "latest", str(run_dir)):
        assert found(make(run_dir, resume=resume)) == run_dir
    with pytest.raises(ValueError, match="seed: 0 in the run, 1 asked for"):
        find_run(make(run_dir, seed=1))
    for resume in ("never", str(run_dir / "checkpoints" / "ckpt-00000010-train.pt")):
        with pytest.raises(ValueError, match=rf"no other run can begin.*--outdir={tmp_path}"):
            find_run(make(run_dir, resume=resume))


def test_overriding_lists_what_changes(tmp_path):
    run_dir = begin(make(tmp_path, model={"gamma": 1.0}))
    beginning = find_run(make(tmp_path, model={"gamma": 2.0}, resume="latest", override=True))
    assert (beginning.run_dir, beginning.changes) == (run_dir, ["model.gamma: 1.0 in the run, 2.0 asked for"])


def test_a_branch_is_found_again_by_its_origin_only(tmp_path):
    trunk = begin(make(tmp_path))
    state = str(trunk / "checkpoints" / "ckpt-00000010-train.pt")
    new = find_run(make(tmp_path, resume=state))
    assert (new.run_dir, new.origin) == (None, state)
    branch = begin(make(tmp_path, resume=state, origin=state))
    for path in (state, os.path.relpath(state)):
        assert find_run(make(tmp_path, resume=path)) == Beginning(branch, state)
    assert found(make(tmp_path)) == trunk
    assert found(make(tmp_path, resume=state, seed=1)) is None
    assert found(make(tmp_path, resume=str(Path(state).with_name("ckpt-00000020-train.pt")))) is None
    for resume in ("latest", str(branch)):
        assert find_run(make(tmp_path, resume=resume)) == Beginning(branch, state)


@pytest.mark.parametrize(
    ("batch", "ranks", "remedy"), [(10, 2, "a batch of 8 or 12"), (3, 2, "a batch of 4"), (8, 2, None)]
)
def test_a_batch_divides_into_ranks_and_rounds(tmp_path, batch, ranks, remedy):
    options = make(tmp_path, batch=batch, grad_accum=2)
    if remedy is None:
        options.check_ranks(ranks)
    else:
        with pytest.raises(ValueError, match=remedy):
            options.check_ranks(ranks)


@pytest.mark.parametrize(
    ("ranks", "batch", "message"),
    [
        (1, 4, "1 rank does not divide into tensor-parallel groups of 2; start 2 ranks"),
        (3, 4, "3 ranks do not divide into tensor-parallel groups of 2; start 2 or 4 ranks"),
        (8, 6, "does not divide by 4 groups of 2 ranks x 1 rounds of accumulation; use a batch of 4 or 8"),
        (8, 4, None),
    ],
)
def test_ranks_divide_into_groups_that_read_the_same_clips(tmp_path, ranks, batch, message):
    options = make(tmp_path, batch=batch)
    if message is None:
        options.check_ranks(ranks, tensor_parallel=2)
    else:
        with pytest.raises(ValueError, match=message):
            options.check_ranks(ranks, tensor_parallel=2)


def test_runs_are_named_before_their_frozen_networks_are_known(tmp_path):
    stored = make(tmp_path, frozen={"tokenizer": "ab"})
    run = begin(stored)
    assert find_run(make(tmp_path, resume="latest")) == Beginning(run)
    with pytest.raises(ValueError, match="frozen.tokenizer: ab in the run, cd asked for"):
        find_run(make(tmp_path, resume="latest", frozen={"tokenizer": "cd"}))
