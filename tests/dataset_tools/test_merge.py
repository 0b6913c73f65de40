"""Merging restores the descriptions of the makers from the zips, and reports missing parts."""

import json

import pytest
from click.testing import CliRunner

from dataset_tools import archive, merge

SIZES = [(4, 8), (8, 16)]


def make(root, index, names, num_partitions=3, sizes=SIZES):
    with archive.ShardWriter(root, sizes, index) as writer:
        for name in names:
            with writer.clip(name, facts={"level": "easy"}) as add:
                add([f"frame of {name}".encode()] * len(sizes))
    report = writer.report({24.0: len(names)}, [f"bad{index}"])
    archive.describe_dataset(root, [report], num_partitions, ["numpy"], source="test")


def descriptions(root):
    return [json.loads((root / name).read_text()) for name in ("dataset.json", "manifest.json")]


@pytest.fixture
def root(tmp_path):
    for index, names in enumerate((["a", "b"], [], ["c"])):
        make(tmp_path, index, names)
    return tmp_path


def test_merging_changes_nothing_where_all_is_well(root):
    before = descriptions(root)
    result = CliRunner().invoke(merge.main, [str(root)])
    assert result.exit_code == 0, result.output
    assert "partition 0000  2 clips  2 frames" in result.output
    assert f"{root}: 3 clips, 3 frames, 0.00 hours at 0004x0008, 0008x0016" in result.output
    assert descriptions(root) == before


def test_merging_finds_what_lost_its_description(root):
    expected = descriptions(root)
    for name in ("dataset.json", "manifest.json"):
        (root / name).unlink()
    with pytest.raises(ValueError, match="no dataset.json to tell the frame rate; give it, such as by --fps 30"):
        merge.merge(root)
    assert merge.merge(root, fps=24) == [1]  # nobody knows any more that it has no clips
    description, manifest = descriptions(root)
    assert description["hashes"] == expected[0]["hashes"] and description["fps"] == 24
    assert description["num_clips"] == 3 and description["sizes"] == expected[0]["sizes"]
    assert {name: clip["sha256"] for name, clip in manifest["clips"].items()} == {
        name: clip["sha256"] for name, clip in expected[1]["clips"].items()
    }


def test_partitions_that_were_never_made_are_named(tmp_path):
    make(tmp_path, 1, ["a"], num_partitions=4)
    result = CliRunner().invoke(merge.main, [str(tmp_path)])
    assert result.exit_code == 1
    assert "partitions not made yet: 0, 2, 3; make them by the command of the others with --partition 0 and so on" in (
        result.output
    )


def test_what_is_broken_is_named(root):
    path = root / "0008x0016" / "partition_0002.zip"
    whole = path.read_bytes()
    path.write_bytes(whole[:-30])
    with pytest.raises(ValueError, match=r"0008x0016/partition_0002.zip is not a whole dataset shard"):
        merge.merge(root)
    path.unlink()
    with pytest.raises(ValueError, match=r"0008x0016/partition_0002.zip is missing while other sizes"):
        merge.merge(root)
    make(root / "other", 2, ["d"])
    path.write_bytes((root / "other" / "0008x0016" / "partition_0002.zip").read_bytes())
    with pytest.raises(
        ValueError, match=r"does not show the same clips as 0004x0008 \(see c\); make partition 2 again"
    ):
        merge.merge(root)
    path.rename(path.with_name("mine.zip"))
    with pytest.raises(ValueError, match=r"mine.zip is not named like partition_0000.zip"):
        merge.merge(root)
    with pytest.raises(ValueError, match="holds no zips in folders such as 0036x0064"):
        merge.merge(root / "0004x0008")
