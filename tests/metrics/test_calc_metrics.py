"""The command: each combination of networks gives a line of JSON that describes the measurement."""

import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from PIL import Image

import calc_metrics
from dnnlib.video import VideoWriter
from training.checkpoint import save_network
from training.data.dataset import ClipDataset
from training.longvideogan.lres.generator import LowResGenerator
from training.longvideogan.sres.generator import SuperResGenerator

METRIC = "fvd2_9f"


@pytest.fixture(scope="module")
def lres_path(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Return an 18x32 network as small as they get."""
    path = tmp_path_factory.mktemp("lres") / "lres.pkl"
    torch.manual_seed(0)
    lres = LowResGenerator(18, 32, 16, 4, 10, 60, 8, 8, temporal_channels=(8, 8, 6, 6), spatial_channels=(4, 4, 4, 4))
    save_network(lres, path)
    return str(path)


@pytest.fixture(scope="module")
def sres_path(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Return an 18x32 -> 36x64 network as small as they get."""
    path = tmp_path_factory.mktemp("sres") / "sres.pkl"
    torch.manual_seed(1)
    widths = {"z_channels": 8, "w_channels": 8, "num_layers": 8, "channel_base": 256, "channel_max": 4}
    save_network(SuperResGenerator(36, 64, 18, 32, **widths), path)
    return str(path)


@pytest.fixture(scope="module")
def dataset(make_dataset, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_dataset(tmp_path_factory.mktemp("pairs"), [(36, 64), (18, 32)])


def run(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(calc_metrics.main, list(arguments))
    return result.exit_code, result.output


def test_each_combination_of_networks_is_measured(
    lres_path: str, sres_path: str, dataset: Path, own_cache: Path, tmp_path: Path
):
    path = tmp_path / "new" / "metrics.jsonl"
    common = [f"--dataset={dataset}", "-m", METRIC, "--device=cpu", f"--path={path}"]
    lres, sres = f"--lres={lres_path}", f"--sres={sres_path}"
    for networks in ([lres], [sres], [lres, sres]):
        code, output = run(*common, *networks)
        assert code == 0, output
        assert "Next: python " in output.splitlines()[-1]
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(line["lres_path"], line["sres_path"]) for line in lines] == [
        (lres_path, None),
        (None, sres_path),
        (lres_path, sres_path),
    ]
    assert [line["protocol"]["height"] for line in lines] == [18, 36, 36]
    assert [line["protocol"]["policy_fake"].split()[0] for line in lines] == ["random", "conditioned", "random"]
    values = [line["results"][METRIC] for line in lines]
    assert len(set(values)) == 3 and min(values) > 0


@pytest.fixture(scope="module")
def footage_dir(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the clips of the dataset at 18x32 as folders of pictures."""
    root = tmp_path_factory.mktemp("footage_dir")
    clips = ClipDataset(dataset, [(18, 32)])
    for number, clip in enumerate(clips.clips):
        (root / clip.path).mkdir(parents=True)
        for frame, image in enumerate(clips.read(number, (18, 32), range(clip.num_frames))):
            Image.fromarray(image).save(root / clip.path / f"{frame}.png")
    return root


def test_any_side_may_be_footage(lres_path: str, dataset: Path, footage_dir: Path, own_cache: Path, tmp_path: Path):
    """The same clips give the same number from a dataset and from pictures, on either side."""
    path = tmp_path / "metrics.jsonl"
    common = ["-m", "fmd4_4f", "-m", "fd4_efflite0", "--device=cpu", f"--path={path}"]
    for sides in (
        [f"--real={dataset}", f"--lres={lres_path}"],
        [f"--real={footage_dir}", f"--lres={lres_path}"],
        [f"--real={lres_path}", f"--fake={footage_dir}"],
        [f"--real={lres_path}", f"--fake={dataset}", "--size=18x32"],
        [f"--real={dataset}", f"--fake={footage_dir}"],
    ):
        code, output = run(*common, *sides)
        assert code == 0, output
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    values = [line["results"][line["metric"]] for line in lines]
    assert values[0:2] == pytest.approx(values[2:4], rel=1e-5)
    assert values[4:6] == pytest.approx(values[6:8], rel=1e-5)
    assert [line["real"]["kind"] for line in lines[::2]] == ["dataset", "files", "network", "network", "dataset"]


def test_enlarged_videos_are_measured_at_the_size_of_their_frames(dataset: Path, own_cache: Path, tmp_path: Path):
    """What lies beside them is named; the dataset, which has two sizes, is read at theirs."""
    folder = tmp_path / "outputs"
    folder.mkdir()
    clips = ClipDataset(dataset, [(18, 32)])
    for number, clip in enumerate(clips.clips):
        with VideoWriter(folder / f"{number}.mp4", 18, 32, fps=clips.fps, enlarge=True) as writer:
            writer.write(clips.read(number, (18, 32), range(clip.num_frames)))
    Image.new("RGB", (320, 180)).save(folder / "cover.png")
    (folder / "log.txt").touch()
    code, output = run(f"--dataset={dataset}", f"--fake={folder}", "-m", "fmd4_4f", "--device=cpu")
    assert code == 0, output
    result = json.loads(next(line for line in output.splitlines() if line.startswith("{")))
    assert (result["protocol"]["height"], result["protocol"]["width"]) == (18, 32)
    assert "Left out, an image beside videos (1): cover.png" in output and "that is read (1): log.txt" in output


def test_a_model_is_measured_in_another_precision(lres_path: str, dataset: Path, own_cache: Path):
    """The result names it, and is another than in fp32, but not by much."""
    common = [f"--dataset={dataset}", f"--lres={lres_path}", "-m", "fmd4_4f", "--device=cpu"]
    found = []
    for precision in ("fp32", "bf16"):
        code, output = run(*common, f"--precision={precision}")
        assert code == 0, output
        found += [json.loads(line) for line in output.splitlines() if line.startswith("{")]
    assert "precision" not in found[0] and found[1]["precision"] == "bf16"
    exact, rounded = (line["results"]["fmd4_4f"] for line in found)
    assert rounded != exact and rounded == pytest.approx(exact, rel=0.1)

    code, output = run(f"--real={dataset}", f"--fake={dataset}", "--size=18x32", "--precision=bf16")
    assert code == 1 and "--precision is for a model that generates: leave it out for --fake" in output


def test_long_videos_are_measured_by_name(lres_path: str, dataset: Path, own_cache: Path):
    options = ["-m", "color_similarity", "-m", "motion_energy_w1", "--num-videos=3", "--num-frames=16", "--device=cpu"]
    code, output = run(f"--dataset={dataset}", f"--lres={lres_path}", *options, "-o", "truncation=0.9")
    assert code == 0, output
    # What changes the value is in the result, and in the command that repeats it.
    assert f"Next: python generate.py --outdir=outputs --seed=0 --lres={lres_path} -o truncation=0.9" in output
    lines = [json.loads(line) for line in output.splitlines() if line.startswith("{")]
    assert [line["metric"] for line in lines] == ["color_similarity", "motion_energy_w1"]
    assert all((line["num_real"], line["num_fake"]) == (3, 3) and line["results"] for line in lines)
    assert all(line["options"] == {"truncation": "0.9"} for line in lines)


def test_runs_keep_their_own_errors():
    runs = [
        {"results": {"a": value}, "errors": {"a": value / 10}, "floors": {}, "metric": "a", "total_time": 2.0}
        for value in (3.0, 5.0)
    ]
    result = calc_metrics._combine(runs)
    assert result["results"] == {"a_run01": 3, "a_run02": 5, "a_mean": 4, "a_std": 1}
    assert result["errors"] == {"a_run01": 0.3, "a_run02": 0.5}
    assert result["total_time"] == 4 and result["num_runs"] == 2


def test_an_enlarger_alone_needs_a_dataset(sres_path: str, footage_dir: Path, own_cache: Path):
    code, output = run(f"--real={footage_dir}", f"--sres={sres_path}", "-m", "fmd4_4f")
    assert code == 1 and "needs context frames of 18x32 for frames of 36x64, which footage_dir" in output


def test_several_runs_give_each_value_mean_and_deviation(lres_path: str, dataset: Path, own_cache: Path):
    code, output = run(f"--dataset={dataset}", f"--lres={lres_path}", "-m", METRIC, "--num-runs=2")
    assert code == 0, output
    result = json.loads(next(line for line in output.splitlines() if line.startswith("{")))
    values = [result["results"][f"{METRIC}_run0{number}"] for number in (1, 2)]
    assert values[0] != values[1]
    assert result["results"][f"{METRIC}_mean"] == pytest.approx(sum(values) / 2)
    assert result["results"][f"{METRIC}_std"] == pytest.approx(abs(values[0] - values[1]) / 2)
    assert result["num_runs"] == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--dataset=x"], "give --model, --lres, --sres or --fake"),
        (["--fake=y"], "give --dataset or --real"),
        (["--dataset=x", "--real=x", "--fake=y"], "too much: give --dataset or --real"),
        (["--dataset=x", "--fake=y", "--size=64"], "'64' is not a size"),
        (["--dataset=x", "--fake=y", "--detector-path=z"], "give NAME=FILE"),
        (["--real=x", "--fake=y"], "there is no y"),
        (["--dataset=x", "--lres=y", "-m", "fdv2048_16f"], "did you mean fvd2048_16f"),
        (["--dataset=x", "--lres=y.pkl"], "there is no file y.pkl"),
    ],
)
def test_mistakes_are_answered_in_a_line(arguments: list[str], message: str):
    code, output = run(*arguments)
    assert code != 0
    assert message in output and "Traceback" not in output


def test_a_network_of_the_other_kind_is_refused(lres_path: str, dataset: Path):
    code, output = run(f"--dataset={dataset}", f"--sres={lres_path}", "--device=cpu")
    assert code == 1
    assert "is a low-resolution generator, expected a super-resolution generator" in output
