"""The worked example of docs/adding_a_system.md is taken out of the page, trained, resumed, saved and sampled."""

import importlib
import io
import json
import os
import re
import subprocess
import sys
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image

import training
from metrics import samplers
from torch_utils import distributed
from training import checkpoint, registry

SIZE, NUM_CLIPS = (8, 16), 4
SMALL = {"network": {"height": 8, "width": 16, "num_latents": 4, "channels": 8}, "walk_frames": 6}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    root = tmp_path_factory.mktemp("data") / "noise"
    folder = root / "{:04d}x{:04d}".format(*SIZE)
    folder.mkdir(parents=True)
    rng = np.random.RandomState(0)
    names = {f"clip{clip}": [f"{t}.png" for t in range(40)] for clip in range(NUM_CLIPS)}
    with zipfile.ZipFile(folder / "partition_0000.zip", "w") as archive:
        for path in [f"{clip}/{name}" for clip in names for name in names[clip]]:
            data = io.BytesIO()
            Image.fromarray(rng.randint(0, 256, (*SIZE, 3)).astype(np.uint8)).save(data, "PNG")
            archive.writestr(path, data.getvalue())
        archive.writestr("frame_paths.json", json.dumps(names))
    return str(root)


@pytest.fixture
def example(repo, tmp_path, monkeypatch):
    """The modules of the page, where it says that they belong, and registered as it says."""
    page = (repo / "docs/adding_a_system.md").read_text()
    files = dict(re.findall(r"`([\w/]+\.py)`:\n\n```python\n(.*?)```", page, re.DOTALL))
    assert list(files) == ["training/walk/system.py", "train_walk.py"]
    for name, text in files.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    monkeypatch.setattr(training, "__path__", [*training.__path__, str(tmp_path / "training")])
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(registry, "SYSTEMS", dict(registry.SYSTEMS))
    monkeypatch.setattr(registry, "NETWORKS", dict(registry.NETWORKS))
    (lines,) = re.findall(r"```python\n(SYSTEMS.*?)```", page, re.DOTALL)
    exec(lines, {"SYSTEMS": registry.SYSTEMS, "NETWORKS": registry.NETWORKS})
    yield importlib.import_module("train_walk"), page
    for name in ("train_walk", "training.walk.system", "training.walk"):
        sys.modules.pop(name, None)


def run(script, dataset, outdir, steps, **model):
    return script.main(dataset, str(outdir), steps, batch=4, **{**SMALL, **model})


def weights(result):
    return checkpoint.load_train_state(checkpoint.train_state_path(result.run_dir, result.step))["modules"]["VAE"]


def test_it_is_small_enough_to_read(example):
    _, page = example
    text = re.findall(r"`training/walk/system.py`:\n\n```python\n(.*?)```", page, re.DOTALL)[0]
    lines = [line for line in text.splitlines() if line.strip()]
    assert len(lines) < 150 and max(map(len, lines)) <= 120


def test_a_resumed_run_equals_an_uninterrupted_one(example, dataset, tmp_path):
    script, _ = example
    assert run(script, dataset, tmp_path / "a", 2).step == 2
    resumed, whole = run(script, dataset, tmp_path / "a", 4), run(script, dataset, tmp_path / "b", 4)
    assert len(list((tmp_path / "a").iterdir())) == 1 and resumed.finished
    for name, value in weights(whole).items():
        assert torch.equal(value, weights(resumed)[name]), name
    lines = [json.loads(line) for line in (whole.run_dir / "stats.jsonl").read_text().splitlines()]
    assert lines[-1]["loss/reconstruction"]["mean"] > 0
    assert (whole.run_dir / "samples" / "fake-00000004.mp4").is_file()


def test_rounds_of_accumulation_change_nothing(example, dataset, tmp_path):
    script, _ = example
    system = importlib.import_module("training.walk.system")
    batch = torch.rand(4, 3, 1, *SIZE, dtype=torch.float64) * 2 - 1
    results = []
    for rounds in (1, 2):
        walk = system.Walk({**SMALL, "batch": 4, "grad_accum": rounds}, torch.device("cpu"))
        walk.network.double()
        walk.average.double()
        report = walk.step(iter([{"frame": batch}]), 0)
        assert report["loss/kl"].shape == (4,) and report["progress/nonfinite_gradients"] == 0
        results.append([parameter.grad.clone() for parameter in walk.network.parameters()])
    for one, two in zip(*results, strict=True):
        torch.testing.assert_close(one, two, rtol=0, atol=1e-12)


def test_its_network_is_opened_safely_and_its_videos_have_no_end(example, dataset, tmp_path, capsys):
    script, page = example
    result = run(script, dataset, tmp_path / "runs", 2)
    path = checkpoint.network_path(result.run_dir, 2)
    assert str(path) in capsys.readouterr().out
    network = checkpoint.load_network(path)
    system = importlib.import_module("training.walk.system")
    assert type(network).__name__ == "FrameVAE" and network.options == SMALL["network"]
    source = system.Source(network, walk_frames=6)
    long = torch.cat(list(source.frames([3, 5], -10, 40)), dim=2)
    assert long.shape == (2, 3, 40, *SIZE) and long.dtype == torch.float32
    part = torch.cat(list(source.frames([5], 7, 9)), dim=2)
    torch.testing.assert_close(part, long[1:, :, 17:26], rtol=0, atol=1e-6)
    torch.testing.assert_close(
        torch.cat(list(source.frames([5, 5], [7, 8], 4)), dim=2)[1], part[0, :, 1:5], rtol=0, atol=1e-6
    )
    endless = source.sample([0], 0, None)
    assert [next(endless).shape for _ in range(3)] == [(1, 16, *SIZE, 3)] * 3
    shape = samplers.ClipShape(9, 1)
    (batch,) = samplers.generated_batches(source, {shape: 2}, range(2), seed=0, batch=2)
    assert batch.clips[shape].shape[:1] == (2,)  # what metrics look at

    (snippet,) = [code for code in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if "load_network(path)" in code]
    exec(snippet, {"path": path})
    assert capsys.readouterr().out.count("torch.Size([2, 16, 8, 16, 3])") == 2


DRIVER = """
import sys
import training
training.__path__.append("training")
from training import registry
registry.SYSTEMS["walk"] = "training.walk.system:Walk"
registry.NETWORKS["training.walk.system:FrameVAE"] = "autoencoder of frames"
sys.path.insert(0, ".")
import train_walk
train_walk.main(sys.argv[1], sys.argv[2], 3, batch=4, **{small})
train_walk.distributed.shutdown()
"""


@pytest.mark.slow
def test_two_ranks_train_as_one_does(example, repo, dataset, tmp_path):
    script, _ = example
    (tmp_path / "driver.py").write_text(DRIVER.replace("{small}", repr(SMALL)))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "driver.py"]
    environment = {**os.environ, "PYTHONPATH": str(repo), "OMP_NUM_THREADS": "1"}
    subprocess.run([*command, dataset, str(tmp_path / "two")], cwd=tmp_path, env=environment, check=True)
    one = weights(run(script, dataset, tmp_path / "one", 3))
    (run_dir,) = (tmp_path / "two").iterdir()
    two = checkpoint.load_train_state(checkpoint.train_state_path(run_dir, 3))["modules"]["VAE"]
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=0, atol=1e-5)


def test_weights_to_begin_with_are_taken_or_refused(example, tmp_path):
    system = importlib.import_module("training.walk.system")
    one, two = (system.Walk({**SMALL, "seed": seed}, torch.device("cpu")) for seed in (0, 1))
    two.init_from(one.export())
    assert torch.equal(two.network.decoder_0.weight, one.network.decoder_0.weight)
    other = system.Walk({"network": {**SMALL["network"], "channels": 9}}, torch.device("cpu"))
    with pytest.raises(ValueError, match="do not fit"):
        other.init_from(one.export())
    assert distributed.get_world_size() == 1
