"""Options: unknown names, identities, and the directories of runs."""

import dataclasses
import json

import pytest

from training import config
from training.config import FREE_OPTIONS, TrainOptions, differences, find_run, identity, merge, new_run_dir, resolve


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


def test_merging_is_deep_and_strict():
    base = {"steps": 3, "model": {"G": {"width": 8, "depth": 2}, "gamma": 1.0}}
    merged = merge(base, {"model": {"G": {"width": 16}}})
    assert merged == {"steps": 3, "model": {"G": {"width": 16, "depth": 2}, "gamma": 1.0}}
    assert base["model"]["G"]["width"] == 8
    with pytest.raises(ValueError, match=r"Unknown name 'widht' in the options.model.G; did you mean width\?"):
        merge(base, {"model": {"G": {"widht": 16}}})
    with pytest.raises(ValueError, match="known are gamma, G|known are G, gamma"):
        merge(base, {"model": {"zzz": 1}})


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
    free = {"steps": 5, "device": "cuda", "workers": 9, "log": "wandb", "metrics": ("m",), "keep": 1, "tick_steps": 1}
    assert identity(make("elsewhere", **free)) == identity(options)
    for change in ({"seed": 1}, {"batch": 8}, {"model": {"a": 1}}, {"dataset": "data/dogs"}, {"x_flip": False}):
        assert identity(make(tmp_path, **change)) != identity(options)


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
    options = make(tmp_path, batch=32, grad_accum=2, model={"gamma": 1})
    assert new_run_dir(options).name == "00000-horses-32batch-2accum-1.0gamma"
    for name in ("00007-other", "100000-many", "notes"):
        (tmp_path / name).mkdir()
    (tmp_path / "200000-file").write_text("")
    assert new_run_dir(options).name == "100001-horses-32batch-2accum-1.0gamma"
    assert [path.name for path in config.list_runs(tmp_path)] == ["00007-other", "100000-many"]
    assert new_run_dir(make(tmp_path / "none")).name == "00000-horses-64batch-1accum"


def test_which_run_is_continued(tmp_path):
    first, second, third = (begin(make(tmp_path, seed=seed)) for seed in (0, 1, 0))
    (tmp_path / "00009-died-at-once").mkdir()
    assert find_run(make(tmp_path, steps=7)) == third
    assert find_run(make(tmp_path, seed=1)) == second
    assert find_run(make(tmp_path, seed=2)) is None
    assert find_run(make(tmp_path, resume="never")) is None
    assert find_run(make(tmp_path, resume=str(first))) == first
    with pytest.raises(ValueError, match="(?s)seed: 1 in the run, 0 asked for.*--resume=never"):
        find_run(make(tmp_path, resume=str(second)))
    with pytest.raises(ValueError, match="holds no options.json"):
        find_run(make(tmp_path, resume="latest"))
    (second / "options.json").write_text("{")
    with pytest.raises(ValueError, match="options.json cannot be read"):
        find_run(make(tmp_path, resume=str(second)))


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
