"""Actions lead into their frames, from rendered walks through token shards to the network."""

import pytest
import torch
from click.testing import CliRunner

from dataset_tools import encode_dataset, make_dataset_from_vizdoom
from tests.training.teco import tiny
from training.contract import BatchSpec, Stream
from training.data.dataset import BatchStream, ClipDataset, to_device
from training.network_file import save_network

TURN = {"left": 10.0, "right": -10.0, "forward": 0.0}  # degrees a frame, counted anticlockwise


@pytest.fixture(scope="module")
def walks(tmp_path_factory):
    """Return a dataset of walks with three actions, encoded by the tiny tokenizer."""
    pytest.importorskip("vizdoom")
    folder = tmp_path_factory.mktemp("walks")
    save_network(tiny.tokenizer(), folder / "tokenizer.pkl")
    words = [
        str(folder / "data"),
        "--clips=3",
        "--frames=100",
        "--difficulty=hard",
        f"--sizes={tiny.HEIGHT}x{tiny.WIDTH}",
        "--workers=1",
    ]
    made = CliRunner().invoke(make_dataset_from_vizdoom.main, [*words, "--walker=discrete", "--textures=flat"])
    assert made.exit_code == 0, made.output
    words = [str(folder / "data"), f"--tokenizer={folder / 'tokenizer.pkl'}"]
    made = CliRunner().invoke(encode_dataset.main, words)
    assert made.exit_code == 0, made.output
    return folder


def test_a_left_turn_turns_left(walks):
    system = tiny.system(walks, batch=4, seq_len=24)
    inputs = system.inputs()
    dataset = ClipDataset(walks / "data", [], "none", inputs.codes, (*inputs.streams, "poses"))
    names = list(dataset.vocabularies()["actions"])
    assert names == ["none", "forward", "left", "right"] and len(names) == tiny.ACTIONS
    (spec,) = system.batch_spec(0)
    spec = BatchSpec(spec.num_frames, (*spec.parts, Stream("poses", 0, spec.num_frames)))
    stream = BatchStream(dataset, seed=0, batch_size=4, num_workers=1, x_flip=False)
    batches = [to_device(batch, torch.device("cpu")) for batch in stream.prefetch((n, spec) for n in range(6))]
    moves, poses = (torch.cat([batch[name] for batch in batches]) for name in ("actions", "poses"))
    turned = (poses[:, 1:, 2] - poses[:, :-1, 2] + 180) % 360 - 180  # into frames 1, 2, ...
    for name, angle in TURN.items():
        found = turned[moves[:, 1:] == names.index(name)]
        assert len(found) > 3 and (found - angle).abs().max() < 0.5, name
    # An action one frame earlier or later would not fit.
    expected = torch.tensor([0.0, *(TURN[name] for name in names[1:])])
    assert (expected[moves[:, 2:]] - turned[:, :-1]).abs().max() > 5
    assert (expected[moves[:, :-1]] - turned).abs().max() > 5


def test_the_action_into_a_frame_decides_it(walks):
    """In a step, h of frame t changes with action t, and no earlier h does."""
    system = tiny.system(walks, batch=1, seq_len=24)
    network = tiny.network(seq_len=24)
    inputs = system.inputs()
    dataset = ClipDataset(walks / "data", [], "none", inputs.codes, inputs.streams)
    plan = ((n, system.batch_spec(0)[0]) for n in range(1))
    (batch,) = BatchStream(dataset, seed=0, batch_size=1, num_workers=1, x_flip=False).prefetch(plan)
    batch = to_device(batch, torch.device("cpu"))
    x = tiny.tokenizer().quantizer.lookup(batch["codes"]).transpose(1, 2)
    cond, z, _ = network.posterior(x)
    other = batch["actions"].clone()
    other[0, 9] = (other[0, 9] + 1) % tiny.ACTIONS
    change = network.predict(cond, z, batch["actions"]) - network.predict(cond, z, other)
    changed = change.abs().flatten(2).amax(2)[0] > 1e-6
    assert not changed[: 9 - 1].any() and changed[9 - 1]
