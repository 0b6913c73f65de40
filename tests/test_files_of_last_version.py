"""Files written by the last released version load, resume and generate the same frames."""

import json
import shutil

import numpy as np
import pytest
import torch

from tests import last_version
from tests.last_version import FILES, FRAME_CASES, LABDOOM_CASES, NETWORK, OPTION_CASES, STAGES, STATE
from training.longvideogan.lres.generator import LowResGenerator
from training.longvideogan.sres.generator import SuperResGenerator
from training.network_file import load_network

CLASSES = {"lres": LowResGenerator, "sres": SuperResGenerator}
TOLERANCE = 1e-4  # of a sum over a tensor, as part of the sum of magnitudes
LOSS_TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def expected():
    return json.loads((FILES / "expected.json").read_text())


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return last_version.write_dataset(tmp_path_factory.mktemp("moved") / "blocks")


def assert_close(found, name):
    """Compare frames with stored ones: within one grey level of 255."""
    file, key = name
    with np.load(FILES / file) as archive:
        stored = archive[key]
    assert found.dtype == stored.dtype == np.uint8 and found.shape == stored.shape
    assert stored.std() > 10, "frames without contrast would show nothing"
    assert np.abs(found.astype(int) - stored).max() <= 1


def assert_continued(run_dir, expected):
    """Compare a run that was continued with what the last version made of it."""
    found = last_version.summarize(run_dir)
    assert found["tensors"].keys() == expected["tensors"].keys()
    for name, (total, magnitude) in expected["tensors"].items():
        assert found["tensors"][name] == pytest.approx([total, magnitude], abs=TOLERANCE * magnitude + 1e-12), name
    assert [line["step"] for line in found["losses"]] == [line["step"] for line in expected["losses"]]
    for line, stored in zip(found["losses"], expected["losses"], strict=True):
        assert {name: line[name] for name in stored} == pytest.approx(stored, rel=LOSS_TOLERANCE)


@pytest.mark.parametrize("stage", STAGES)
def test_networks_open(stage):
    """The pickle and the .safetensors file hold the same network of the class of today, and it may be trained on."""
    pickled, other = (load_network(f"{FILES}/{stage}{suffix}", "cpu") for suffix in (".pkl", ".safetensors"))
    assert type(pickled) is type(other) is CLASSES[stage]
    ours, theirs = pickled.state_dict(), other.state_dict()
    assert list(ours) == list(theirs) and all(torch.equal(ours[name], theirs[name]) for name in ours)
    state = torch.load(FILES / f"tiny-{stage}" / STATE, weights_only=True)
    assert list(ours) == list(state["modules"]["G_ema"])


@pytest.mark.parametrize("case", FRAME_CASES)
def test_frames_are_the_same(case, tmp_path):
    suffix = ".safetensors" if case in ("pair", "lres, loop") else ".pkl"
    assert_close(last_version.generate_case(tmp_path, case, FILES, suffix), ("frames.npz", case))


@pytest.mark.parametrize("case", LABDOOM_CASES)
def test_frames_of_the_included_pair_are_the_same(case, repo, tmp_path, monkeypatch):
    monkeypatch.chdir(repo)
    assert_close(last_version.generate_labdoom(tmp_path, case), ("labdoom.npz", case))


@pytest.mark.parametrize("case", OPTION_CASES)
def test_command_lines_stand_for_the_same_options(case, expected):
    """So a run that was begun by one goes on by the same; options that are new are at their defaults."""
    stored, found = expected["options"][case], last_version.read_dry_run(case)
    repeated = {name: stored["model"].pop(name) for name in ("batch", "grad_accum", "seed")}  # now said once
    assert {name: found[name] for name in repeated} == repeated
    assert {name: found["model"].get(name) for name in stored["model"]} == stored.pop("model")
    assert {name: found.get(name) for name in stored} == stored


@pytest.mark.parametrize("stage", STAGES)
def test_a_run_goes_on(stage, dataset, expected, tmp_path):
    run_dir = tmp_path / f"tiny-{stage}"
    shutil.copytree(FILES / run_dir.name, run_dir)
    begun = (run_dir / "stats.jsonl").read_text()
    with pytest.raises(ValueError, match="dataset: "):
        last_version.continue_tiny(run_dir, dataset, override=False)
    last_version.continue_tiny(run_dir, dataset)
    assert (run_dir / "stats.jsonl").read_text().startswith(begun)
    assert_continued(run_dir, expected[run_dir.name])
    assert type(load_network(str(run_dir / str(NETWORK).replace("2-G", "4-G")), "cpu")) is CLASSES[stage]


@pytest.mark.parametrize("stage", STAGES)
def test_a_run_goes_on_by_its_command_line(stage, dataset, expected, tmp_path):
    run_dir = tmp_path / f"toy-{stage}"
    shutil.copytree(FILES / run_dir.name, run_dir)
    last_version.unpack_toy(run_dir)
    output = last_version.continue_toy(stage, run_dir, dataset)
    assert "goes on at step 2 of 3" in output and "override dataset" in output
    assert_continued(run_dir, expected[run_dir.name])
