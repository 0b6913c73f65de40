"""--skip-made keeps what was made, makes what is missing or has new sources, and never replaces another dataset."""

import json

import numpy as np
import pytest
from click.testing import CliRunner

from dataset_tools.make_dataset_from_videos import main
from dnnlib import video


@pytest.fixture
def footage(tmp_path):
    """Four videos of ten frames."""
    for name in "abcd":
        add(tmp_path / "in", name)
    return tmp_path / "in"


def add(folder, name):
    """Store a video of ten frames."""
    folder.mkdir(exist_ok=True)
    with video.VideoWriter(folder / f"{name}.mp4", 16, 16) as writer:
        writer.write(np.full((10, 16, 16, 3), 40 * ord(name) % 256, np.uint8))


def make(footage, *options):
    out = footage.parent / "out"
    arguments = [footage, out, "--sizes=8x8", "--num-partitions=2", *options]
    return out, CliRunner().invoke(main, [str(argument) for argument in arguments])


def shards(out):
    """Inode of each shard, which a rewritten file would change; the dataset must agree with its description."""
    found = {path.name: path.stat().st_ino for path in sorted((out / "0008x0008").glob("*.zip"))}
    assert {f"0008x0008/{name}" for name in found} == set(json.loads((out / "dataset.json").read_text())["hashes"])
    return found


def test_a_repeated_command_makes_only_what_is_missing(footage):
    out, first = make(footage)
    assert first.exit_code == 0 and "4 clips, 40 frames" in first.output, first.output
    before = shards(out)
    _, again = make(footage, "--skip-made")
    assert again.exit_code == 0 and "2 of 2 partitions were made before and are kept" in again.output
    assert "4 clips, 40 frames are in" in again.output and shards(out) == before
    (out / "0008x0008/partition_0001.zip").unlink()
    _, mended = make(footage, "--skip-made")
    assert "1 of 2 partitions were made before" in mended.output and "4 clips, 40 frames" in mended.output
    assert shards(out)["partition_0000.zip"] == before["partition_0000.zip"]


def test_added_footage_becomes_part_of_the_dataset(footage):
    make(footage)
    add(footage, "e")
    out, result = make(footage, "--skip-made")
    assert result.exit_code == 0 and "5 clips, 50 frames" in result.output, result.output
    assert "kept" not in result.output
    assert len(json.loads((out / "manifest.json").read_text())["clips"]) == 5


@pytest.mark.parametrize("options", [["--fps=15"], ["--quality=50"], ["--min-frames=2"], ["--num-partitions=3"]])
def test_a_dataset_made_with_other_options_is_not_replaced(footage, options):
    out, _ = make(footage)
    before = shards(out)
    _, result = make(footage, "--skip-made", *options)
    assert result.exit_code == 1 and "made otherwise" in result.output and "another output folder" in result.output
    assert shards(out) == before
