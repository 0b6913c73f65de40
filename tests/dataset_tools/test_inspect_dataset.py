"""Every kind of damage of a dataset is found in one run, and reported with the command that fixes it."""

import io
import json
import shutil
import zipfile
from collections.abc import Sequence

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image, ImageFilter

from dataset_tools import archive, inspect_dataset, inspect_findings, inspection
from dataset_tools.frames import encode_at_sizes, encode_jpeg
from dataset_tools.inspect_findings import KINDS
from dataset_tools.inspect_shard import encoding, regular_interval
from training.data.dataset import ClipDataset

SMALL, LARGE = (18, 32), (36, 64)
FOLDERS = ("0018x0032", "0036x0064")
NUM_FRAMES = 14
FIRST, SECOND, SMALL_FIRST = (
    "0036x0064/partition_0000.zip",
    "0036x0064/partition_0001.zip",
    "0018x0032/partition_0000.zip",
)


def footage(seed, num_frames=NUM_FRAMES):
    """Return a window that glides over a landscape of blots: uint8 (36, 64, 3) each."""
    noise = np.random.RandomState(seed).randint(0, 256, (36, 64 + 2 * num_frames, 3), np.uint8)
    blots = np.asarray(Image.fromarray(noise).filter(ImageFilter.GaussianBlur(2))).astype(float)
    blots = ((blots - blots.mean()) / blots.std() * 40 + 128).clip(0, 255).astype(np.uint8)
    return [blots[:, 2 * frame : 2 * frame + 64] for frame in range(num_frames)]


def write(root, partitions, num_partitions=2, fps=24, sizes=(SMALL, LARGE), **facts):
    """`partitions` maps an index to {clip: frames}."""
    for index, clips in partitions.items():
        with archive.ShardWriter(root, sizes, index) as writer:
            for name, frames in clips.items():
                with writer.clip(name) as clip:
                    for frame in frames:
                        clip(encode_at_sizes(frame, sizes))
        report = writer.report({fps: len(clips)})
        packages, facts = ("imageio-ffmpeg", "pillow"), {"source": "my videos", "trim_start": 1.5, **facts}
        archive.describe_dataset(root, [report], num_partitions, packages, **facts)
    return root


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    clips = {0: {"a": footage(0), "b/c": footage(1)}, 1: {"d": footage(2)}}
    return write(tmp_path_factory.mktemp("good") / "mine", clips)


@pytest.fixture
def described(good, tmp_path):
    return shutil.copytree(good, tmp_path / "mine")


@pytest.fixture
def published(described):
    """As the published tools leave it: without what describes it."""
    (described / "dataset.json").unlink()
    (described / "manifest.json").unlink()
    return described


def inspect(root, *options):
    """Return the exit code, the report, and the kinds that were found."""
    path = root.parent / "report.json"
    path.unlink(missing_ok=True)
    arguments = [str(root), "--num-frames", "12", "--workers", "2", "--json", str(path), *options]
    result = CliRunner().invoke(inspect_dataset.main, arguments, catch_exceptions=False)
    report = json.loads(path.read_text())
    assert report["accepted"] == (result.exit_code == 0), result.output
    return result, report, {finding["kind"]: finding for finding in report["findings"]}


def rewrite(path, edit, compression=zipfile.ZIP_STORED):
    """Write a zip anew after `edit` changed its content, a dict; None stands for nothing to change."""
    with zipfile.ZipFile(path) as old:
        content = {name: old.read(name) for name in old.namelist()}
    edit(content)
    with zipfile.ZipFile(path, "w", compression) as new:
        for name, data in content.items():
            new.writestr(name, data)


def paths_json(change):
    def edit(content):
        listed = json.loads(content["frame_paths.json"])
        change(listed)
        content["frame_paths.json"] = json.dumps(listed).encode()

    return edit


def pop(name):
    return lambda content: content.pop(name)


def replace(name, data):
    return lambda content: content.update({name: data})


def saved(mode, kind="JPEG", size=LARGE):
    buffer = io.BytesIO()
    Image.new(mode, size[::-1], 99).save(buffer, kind)
    return buffer.getvalue()


def test_a_sound_dataset_is_described_and_accepted(described):
    result, report, found = inspect(described)
    assert result.exit_code == 0 and not found
    assert "3 clips, 42 frames, 0.00 hours at 24 frames per second" in result.output
    assert f"python train_lres.py --dataset={described}" in result.output
    assert report["fps"] == 24 and report["lengths"] == [{"from": 14, "to": 14, "clips": 3}]
    large = report["sizes"]["0036x0064"]
    assert {key: large[key] for key in ("shards", "clips", "frames", "frames_read")} == {
        "shards": 2,
        "clips": 3,
        "frames": 42,
        "frames_read": 42,
    }
    assert large["chroma"] == {"4:4:4": 3} and large["quality"] == {"100": 3}
    assert large["bytes"] == sum((described / name).stat().st_size for name in (FIRST, SECOND))
    assert report["matching"]["clips_compared"] == 3 and report["matching"]["median_distance"] < 2


def test_clips_too_short_for_a_stage_are_counted(described):
    result, report, found = inspect(described, "--num-frames", "128")
    assert result.exit_code == 1 and found.keys() == {"no long clip", "short clip"}
    assert "needed; the longest of its 3 clips has 14" in result.output
    assert {stage: entry["clips"] for stage, entry in report["long_enough"].items()} == {
        "low resolution": 0,
        "super-resolution": 3,
    }
    assert "--min-frames 128" in found["short clip"]["mend"]


def test_what_mends_a_set_of_one_size_makes_its_counterpart(tmp_path):
    for size, other in (((36, 64), "144x256"), ((144, 256), "36x64")):
        root = write(tmp_path / other, {0: {"a": footage(0)}}, 1, sizes=[size])
        _, _, found = inspect(root)
        assert found["one size"]["mend"].endswith(f" --num-partitions 1 --sizes {other}")


def break_json(root):
    (root / "dataset.json").write_text('{"fps": ')


def change_manifest(root):
    manifest = json.loads((root / "manifest.json").read_text())
    manifest["clips"]["a"]["sha256"]["0018x0032"] = "0" * 64
    (root / "manifest.json").write_text(json.dumps(manifest))


def forget_partition(root):
    description = json.loads((root / "dataset.json").read_text())
    description["num_partitions"] = 3
    (root / "dataset.json").write_text(json.dumps(description))


AGAIN = "make_dataset_from_videos 'path/to/my videos' {root} --trim-start 1.5 --num-partitions 2 --partition {index}"
DESCRIBED = {
    "lost": (lambda root: (root / SECOND).unlink(), {"missing shard", "absent clip", "refused"}, AGAIN, 1),
    "foreign": (
        lambda root: [
            shutil.copy(root / folder / "partition_0001.zip", root / folder / "x.zip") for folder in FOLDERS
        ],
        {"extra shard", "odd name", "clip twice", "refused"},
        "python -m dataset_tools.merge {root}",
        None,
    ),
    "cut off": (
        lambda root: (root / SECOND).write_bytes((root / SECOND).read_bytes()[:5000]),
        {"damaged shard", "changed shard", "absent clip", "refused"},
        AGAIN,
        1,
    ),
    "description": (break_json, {"damaged description", "refused"}, "python -m dataset_tools.merge {root}", None),
    "manifest": (change_manifest, {"stale manifest"}, "python -m dataset_tools.merge {root}", None),
    "unfinished": (forget_partition, {"unfinished"}, "--num-partitions 3 --partition 2", None),
    "killed": (lambda root: (root / FOLDERS[0] / ".partition_0001.1.tmp.zip").touch(), {"leftover"}, "delete", None),
    "one size": (lambda root: shutil.rmtree(root / "0018x0032"), {"one size", "missing shard"}, AGAIN, 0),
}  # fmt: skip


@pytest.mark.parametrize("name", DESCRIBED)
def test_what_differs_from_the_description_is_found(described, name):
    damage, kinds, mending, index = DESCRIBED[name]
    damage(described)
    result, _, found = inspect(described)
    assert found.keys() == kinds
    assert result.exit_code == int(any(KINDS[kind].is_error for kind in kinds))
    first = found[next(kind for kind in KINDS if kind in kinds and kind != "one size")]
    assert mending.format(root=described, index=index) in first["mend"]
    assert first["mend"] in result.output


def test_a_flipped_bit_is_found_in_its_frame(described):
    data = bytearray((described / FIRST).read_bytes())
    data[data.index(b"a/frame_000003.jpg") + 500] ^= 1
    (described / FIRST).write_bytes(data)
    _, _, found = inspect(described)
    assert found.keys() == {"damaged frame", "changed shard"}
    assert [entry["place"] for entry in found["damaged frame"]["places"]] == [f"{FIRST}  a/frame_000003.jpg"]


def shift(content):
    frames = [f"a/frame_{index:06d}.jpg" for index in range(NUM_FRAMES)]
    moved = [content[name] for name in frames[1:]] + [content[frames[-1]]]
    content.update(zip(frames, moved, strict=True))


def swap(content):
    for index in range(NUM_FRAMES):
        a, b = f"a/frame_{index:06d}.jpg", f"b/c/frame_{index:06d}.jpg"
        content[a], content[b] = content[b], content[a]


def fill(data, frames: Sequence[int] = range(NUM_FRAMES)):
    return lambda content: content.update({f"a/frame_{index:06d}.jpg": data for index in frames})


BLACK = encode_jpeg(np.zeros((*LARGE, 3), np.uint8))
PUBLISHED = {
    "grey": (FIRST, fill(saved("L"), [3]), {"colour mode"}),
    "cmyk": (FIRST, fill(saved("CMYK"), [3]), {"colour mode"}),
    "rgba": (FIRST, fill(saved("RGBA", "PNG"), [3]), {"colour mode"}),
    "wrong size": (FIRST, fill(saved("RGB", size=(35, 64)), [3]), {"frame size"}),
    "cut image": (FIRST, fill(encode_jpeg(footage(5, 1)[0])[:900], [3]), {"unreadable frame"}),
    "no image": (FIRST, fill(b"text", [0]), {"unreadable frame", "refused"}),
    "empty": (FIRST, fill(b"", [3]), {"unreadable frame"}),
    "missing": (FIRST, pop("a/frame_000003.jpg"), {"missing frame", "different frames", "refused"}),
    "unlisted": (FIRST, fill(b"", [99]), {"unlisted entry"}),
    "no index": (FIRST, pop("frame_paths.json"), {"no index", "absent clip", "refused"}),
    "strange index": (FIRST, replace("frame_paths.json", b"[]"), {"no index", "absent clip", "refused"}),
    "empty clip": (FIRST, paths_json(lambda listed: listed.update(e=[])), {"empty clip"}),
    "shorter": (FIRST, paths_json(lambda listed: listed["a"].pop()), {"different frames", "unlisted entry", "refused"}),
    "other names": (
        FIRST,
        lambda content: (
            paths_json(lambda listed: listed["a"].__setitem__(3, "x.jpg"))(content),
            content.update({"a/x.jpg": content.pop("a/frame_000003.jpg")}),
        ),
        {"different frames", "refused"},
    ),
    "swapped": (SMALL_FIRST, swap, {"other pictures"}),
    "black": (FIRST, fill(BLACK, [0]), {"blank frames"}),
    "all black": (FIRST, fill(BLACK), {"blank clip", "still clip", "other pictures"}),
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_what_is_wrong_inside_a_zip_is_found(published, name):
    path, edit, kinds = PUBLISHED[name]
    rewrite(published / path, edit)
    result, _, found = inspect(published)
    assert found.keys() == {"no description", *kinds}
    assert result.exit_code == int(any(KINDS[kind].is_error for kind in kinds))
    if name in ("grey", "missing", "no image", "wrong size"):
        assert f"{path}  a/frame_" in found[min(kinds - {"different frames", "refused"})]["places"][0]["place"]


def test_a_moved_set_says_by_how_much(published):
    rewrite(published / FIRST, shift)
    _, _, found = inspect(published)
    assert found.keys() == {"no description", "other pictures"}
    (entry,) = found["other pictures"]["places"]
    assert entry == {"place": f"{SMALL_FIRST}  a", "detail": "moved by +1 frames against 0036x0064"}


def test_only_sizes_of_one_aspect_are_compared(tmp_path):
    sizes = [SMALL, (20, 20), LARGE]
    _, report, found = inspect(write(tmp_path / "d", {0: {"a": footage(0)}}, 1, sizes=sizes))
    assert not found and report["matching"]["not_compared"] == ["0020x0020"]
    assert report["matching"]["clips_compared"] == 1


def test_a_published_dataset_is_accepted_with_remarks(published):
    for path in published.rglob("*.zip"):
        rewrite(path, lambda content: None, zipfile.ZIP_DEFLATED)
        with pytest.warns(UserWarning, match="Duplicate"), zipfile.ZipFile(path, "a", zipfile.ZIP_DEFLATED) as twice:
            for name in twice.namelist():
                twice.writestr(name, twice.read(name))
    for folder in FOLDERS:
        (published / folder / "partition_0001.zip").rename(published / folder / "partition_0002.zip")
    result, report, found = inspect(published)
    assert result.exit_code == 0 and report["fps"] == 30
    assert found.keys() == {"no description", "compressed entry", "double entry", "gap"}
    assert found["gap"]["places"][0]["place"] == "partition_0001.zip"
    assert (
        found["double entry"]["count"] == 4
        and "all with the same content" in found["double entry"]["places"][0]["detail"]
    )
    assert f"merge {published} --fps 30" in found["no description"]["mend"]
    assert ClipDataset(published, [SMALL, LARGE]).eligible(12) == [0, 1, 2]


def test_encrypted_and_strangely_compressed_zips_are_named(published):
    rewrite(published / FIRST, lambda content: None, zipfile.ZIP_BZIP2)
    data = bytearray((published / SECOND).read_bytes())
    with zipfile.ZipFile(published / SECOND) as shard:
        info = shard.getinfo("d/frame_000002.jpg")
    data[info.header_offset + 6] |= 1
    data[data.rindex(b"d/frame_000002.jpg") - 46 + 8] |= 1
    (published / SECOND).write_bytes(data)
    _, _, found = inspect(published)
    assert {"unknown compression", "encrypted entry", "damaged frame", "refused"} < found.keys()
    assert (
        "--partition 1" in found["encrypted entry"]["mend"] and "--partition 0" in found["unknown compression"]["mend"]
    )


def test_kinds_of_repeats_are_distinguished(tmp_path):
    moving = footage(0)
    halting = [*moving[:5], *[moving[5]] * 4, *moving[6:]]
    slow = [moving[frame * 12 // 30] for frame in range(30)]  # 12 frames a second, stored at 30
    clips = {"moving": moving, "same": moving, "halting": halting, "slow": slow, "still": [moving[0]] * 13}
    _, _, found = inspect(write(tmp_path / "d", {0: clips}, num_partitions=1))
    places = {
        kind: [(p["place"].split()[-1], p["detail"]) for p in finding["places"]] for kind, finding in found.items()
    }
    assert places == {
        "still clip": [("still", "13 equal frames")],
        "repeated frames": [("slow", "18 of 30 frames, every 3 frames")],
        "same clip": [("same", "as moving")],
    }


@pytest.mark.parametrize(
    ("rate", "expected"), [(10, 3), (12, 3), (15, 2), (20, 3), (24, 5), (25, 6), (29, 30), (30, 0)]
)
def test_repeats_of_a_slower_source_are_regular(rate, expected):
    shown = [frame * rate // 30 for frame in range(128)]
    repeats = [frame for frame in range(1, 128) if shown[frame] == shown[frame - 1]]
    assert regular_interval(repeats, 128) == pytest.approx(expected, abs=rate == 12)


def test_pauses_are_not_regular():
    """A person stands now and then, for any time."""
    assert regular_interval([*range(5, 20), *range(60, 64), *range(71, 90), *range(111, 115)], 128) == 0
    assert regular_interval([50, 53, 54, 56, 57], 128) == 0, "a few short ones in a moment"
    assert regular_interval([7], 20) == regular_interval([], 20) == regular_interval(list(range(1, 100)), 128) == 0


def test_several_frame_rates_are_remarked(tmp_path):
    write(tmp_path / "d", {0: {"a": footage(0)}}, fps=24)
    _, _, found = inspect(write(tmp_path / "d", {1: {"b": footage(1)}}, fps=30))
    assert {entry["place"] for entry in found["several rates"]["places"]} == {
        "24 frames per second",
        "30 frames per second",
    }
    assert "--fps 30" in found["several rates"]["mend"]


def test_nothing_stops_at_the_first_problem_and_quick_finds_what_directories_tell(published):
    rewrite(published / FIRST, fill(saved("L"), [0]))
    rewrite(published / SECOND, pop("d/frame_000001.jpg"))
    (published / SMALL_FIRST).write_bytes(b"PK")
    expected = {"no description", "colour mode", "missing frame", "damaged shard", "absent clip", "different frames"}
    for options in ([], ["--quick"]):
        result, report, found = inspect(published, *options)
        assert result.exit_code == 1 and report["quick"] == bool(options)
        assert found.keys() == expected | {"refused"}
        for finding in found.values():
            assert finding["title"] in result.output and finding["mend"] in result.output


def test_the_command_says_how_to_make_a_partition_as_it_was_made(tmp_path):
    facts = {"split_shots": True, "resampled_fps": 24.0, "val_fraction": 0.25, "quality": 95, "chroma": "4:4:4"}
    root = write(tmp_path / "train", {0: {"a": footage(0)}}, 9, split="train", min_frames=1, **facts)
    command = inspect_findings.command_again(
        root, json.loads((root / "dataset.json").read_text()), {"0018x0032": []}, [3, 5]
    )
    assert command == (
        f"python -m dataset_tools.make_dataset_from_videos 'path/to/my videos' {tmp_path} --trim-start 1.5 "
        "--split-shots --quality 95 --val-fraction 0.25 --fps 24.0 --num-partitions 9 --partition 3 --sizes 18x32  "
        "(likewise partition 5)"
    )


def test_folders_that_are_no_dataset_are_refused_with_a_hint(described):
    for folder, hint in ((described / "0018x0032", f"give {described}"), (described.parent, f"give {described}")):
        result = CliRunner().invoke(inspect_dataset.main, [str(folder)])
        assert result.exit_code == 1 and "no folders of frame sizes" in result.output and hint in result.output


def test_the_sheet_shows_each_clip_and_what_cannot_be_read(published):
    rewrite(published / FIRST, fill(b"", [0]))
    sheet = published.parent / "sheets" / "mine.png"
    result, _, _ = inspect(published, "--sheet", str(sheet))
    assert f"{sheet} shows some clips" in result.output
    pixels = np.asarray(Image.open(sheet)).astype(int)
    assert pixels.shape == (3 * (16 + 144), 8 * 256, 3)
    assert (pixels[16:160, :256] == (128, 0, 128)).all()
    with zipfile.ZipFile(published / FIRST) as shard, Image.open(shard.open("b/c/frame_000000.jpg")) as image:
        enlarged = np.asarray(image.resize((256, 144), Image.Resampling.LANCZOS)).astype(int)
    assert np.abs(pixels[176:320, :256] - enlarged).max() == 0
    assert pixels[:16].max() > 200  # a caption


@pytest.mark.parametrize(
    ("quality", "chroma"), [(100, "4:4:4"), (95, "4:2:0"), (75, "4:4:4"), (30, "4:2:0"), (5, "4:2:0")]
)
def test_quality_and_chroma_are_read_from_the_file(quality, chroma):
    assert encoding(encode_jpeg(footage(0, 1)[0], quality, chroma)) == (chroma, quality)


def test_lengths_fall_into_round_steps():
    assert inspection.histogram([7, 7, 12, 30]) == [
        (5, 9, 2),
        (10, 14, 1),
        (15, 19, 0),
        (20, 24, 0),
        (25, 29, 0),
        (30, 34, 1),
    ]
