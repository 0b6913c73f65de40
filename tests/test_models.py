"""The included models match their cards, are small, and are the default of the commands."""

import hashlib
import re
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

import generate
from dnnlib.video import iter_video_frames
from explorer.session import list_entries
from training import network_file
from training.data.dataset import ClipDataset
from training.longvideogan.lres.generator import LowResGenerator
from training.longvideogan.presets import STAGES
from training.longvideogan.sres.generator import SuperResGenerator

NAME = network_file.DEFAULT_MODEL
NETWORKS = sorted(network_file.MODELS.glob("*.pkl"))


PAIRS = [path for path in NETWORKS if re.search("-[ls]res$", path.stem)]


def name_of(path: Path) -> str:
    return re.sub("-[ls]res$", "", path.stem)


def test_each_has_a_card_and_each_card_a_model():
    cards = {path.stem for path in network_file.MODELS.glob("*.md")}
    assert NAME in cards and {name_of(path) for path in NETWORKS} == cards
    assert {path.stem for path in PAIRS} == {f"{name_of(path)}-{role}" for path in PAIRS for role in ("lres", "sres")}
    assert [entry.name for entry in list_entries()] == sorted(cards)


@pytest.mark.parametrize("path", NETWORKS, ids=lambda path: path.stem)
def test_it_is_the_file_of_the_card(path: Path):
    card = path.with_name(f"{name_of(path)}.md").read_text()
    assert f"| `{path.name}` |" in card and hashlib.sha256(path.read_bytes()).hexdigest() in card
    assert path.stat().st_size <= 20e6


@pytest.mark.parametrize("path", PAIRS, ids=lambda path: path.stem)
def test_it_has_the_options_of_its_preset(path: Path):
    """So that `--init-from` and the recipe of the card fit it."""
    name, role = path.stem.rsplit("-", 1)
    row = STAGES[f"longvideogan-{role}"][name]["model"]
    network = network_file.load_network(path)
    expected = {"height": row["height"], "width": row["width"], **row["generator"]}
    assert isinstance(network, LowResGenerator | SuperResGenerator) and expected.items() <= network.options.items()
    millions = sum(parameter.numel() for parameter in network.parameters()) / 1e6
    assert millions <= (1 if name.endswith("tiny") else 4)
    assert isinstance(network, LowResGenerator) == (role == "lres")


def test_without_a_model_the_included_one_generates_a_video(tmp_path):
    result = CliRunner().invoke(generate.main, [f"--outdir={tmp_path}", "--seed=1", "--len=12"], catch_exceptions=False)
    assert result.exit_code == 0
    (path,) = tmp_path.glob("*.mp4")
    frames = np.stack(list(iter_video_frames(path))).astype(float)
    # A maze has several colours, and changes little from frame to frame.
    assert len(frames) == 12 and frames.std((1, 2)).mean() > 20
    assert 0.1 < np.abs(np.diff(frames, axis=0)).mean() < 20


def test_each_seed_begins_with_its_own_clip_alone_and_beside_others(tmp_path):
    def frames(seed: int, *arguments: str) -> np.ndarray:
        command = [f"--outdir={tmp_path}", "--len=2", "--format=npz", *arguments]
        assert CliRunner().invoke(generate.main, command, catch_exceptions=False).exit_code == 0
        path = tmp_path / f"seed={seed}_len=2_video.npz"
        with np.load(path) as archive:
            found = archive["frames"].astype(float)
        path.unlink()
        return found

    together = frames(2, "--seeds=1-2"), frames(9, "--seeds=8-9")  # of seven clips
    alone = frames(2, "--seed=2"), frames(9, "--seed=9")
    for one, other in zip(together, alone, strict=True):
        assert np.abs(one - other).max() <= 1  # grey levels
    starts = ClipDataset(f"{network_file.MODELS}/{NAME}.starts", [(48, 64)])
    after = [starts.read(n, (48, 64), [32])[0].astype(float) for n in range(7)]  # the context has 32 frames

    def start(made: np.ndarray) -> int:
        return int(np.argmin([np.abs(made[0] - real).mean() for real in after]))

    assert [start(made) for made in (*alone, frames(1, "--seed=1"))] == [2, 2, 1]
