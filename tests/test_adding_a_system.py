"""What every registered system is held to, through the scripts as their user runs them.

Walk is the worked example of docs/adding_a_system.md, taken out of the page; Recall (tests/recall) reads token shards
and actions, needs 36 past frames, and rolls out. Each is trained, killed, resumed on two ranks, previewed, generated,
measured and explored; so are the systems of the repository, at their toy size, by `make test-all`.
"""

import base64
import dataclasses
import io
import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from selenium.webdriver import ActionChains
from selenium.webdriver.common.keys import Keys

from dataset_tools.archive import ShardWriter, describe_dataset
from dataset_tools.frames import encode_jpeg
from dnnlib.video import VideoWriter, iter_video_frames
from tests.explorer.browser import needs_chromium
from tests.explorer.helpers import until
from tests.overlay import REPO, Overlay
from training import checkpoint
from training.random import random_state

ACTIONS = ("none", "forward", "left", "right")
NUM_FRAMES = 60


@dataclasses.dataclass(frozen=True)
class Case:
    """A system, and what its commands need besides."""

    name: str
    size: tuple[int, int]
    train: tuple[str, ...] = ()  # options of train.py
    low: tuple[int, int] | None = None  # another size that it reads
    prompted: bool = False  # whether its videos need a context
    tokenizer: str = ""  # program that saves its frozen tokenizer
    encode: tuple[str, ...] | None = None  # options of encode_dataset, None if it reads frames
    past: int = 0  # frames of context that its videos need, if actions lead into all frames
    held_out: bool = False  # whether it has held-out losses
    option: str = ""  # of its sampler
    output: str = "video"
    bitwise: bool = True  # whether two ranks are as one to 1e-5


SAVE_TOKENIZER = """
import sys, torch
from tests.recall.networks import Blocks
from training.modules.conv_autoencoder import ConvAutoencoder
from training.modules.vqgan2d import VQGAN2D
from training.modules.vqgan3d import VQGAN3D
from training.network_file import save_network
torch.manual_seed(0)
save_network({}, sys.argv[1])
"""
BLOCKS = "Blocks()"
VQGAN2D = "VQGAN2D(32, 64, resolution=64, ch=32, ch_mult=(1, 1, 1, 1), num_res_blocks=1, attn_resolutions=(), "
VQGAN2D += "z_channels=4, embedding_dim=4, num_codes=32)"
CONV = "ConvAutoencoder(32, 64, widths=(8, 8, 8), blocks=1)"
VQGAN3D = "VQGAN3D(32, 64, downsample=(4, 8, 8), hidden=8, embedding_dim=8, num_codes=32)"

CASES = {
    "walk": Case(
        "walk", (8, 16), ("--size=8x16", "--num-latents=4", "--channels=8", "--walk-frames=6"), option="spread=0.5"
    ),
    "recall": Case(
        "recall", (16, 32), prompted=True, tokenizer=BLOCKS, encode=(), past=36, held_out=True, option="temperature=0.5"
    ),
}
OWN = {
    "longvideogan-lres": Case("longvideogan-lres", (18, 32), (), option="truncation=0.7", output="lres"),
    "longvideogan-sres": Case("longvideogan-sres", (72, 128), (), (18, 32), prompted=True, output="sres"),
    # With 32 groups of one channel, biases in front of a norm have no gradient but rounding, which Adam enlarges.
    "tokenizer": Case("tokenizer", (32, 64), ("--ch=64",), prompted=True),
    "river": Case(
        "river", (32, 64), ("--latents=true", "--num-actions=4"), prompted=True, tokenizer=VQGAN2D,
        encode=("--latents",), past=4, held_out=True, option="steps=2",
    ),
    "river-refiner": Case("river-refiner", (32, 64), prompted=True, tokenizer=VQGAN2D),
    "tats": Case("tats", (32, 64), tokenizer=VQGAN3D, encode=(), held_out=True, option="temperature=0.5"),
    "tats-interpolation": Case(
        "tats-interpolation", (32, 64), prompted=True, tokenizer=VQGAN3D, encode=(), held_out=True,
        option="temperature=0.5",
    ),
    "mebt": Case("mebt", (32, 64), tokenizer=VQGAN3D, encode=(), held_out=True, option="revise_rounds=0"),
    "teco": Case(
        "teco", (32, 64), ("--seq-len=16",), prompted=True, tokenizer=VQGAN2D, encode=(), past=8, held_out=True,
        option="rounds=1",
    ),
    "world": Case(
        "world", (32, 64), ("--num-actions=4", "--poses=false", "--clip-frames=16", "--warmup-steps=1", "--lr=0.02"),
        prompted=True, tokenizer=CONV, encode=("--latents",), past=8, held_out=True, option="steps=2",
    ),
}  # fmt: skip
PARAMETERS = [*CASES, *(pytest.param(name, marks=pytest.mark.slow) for name in OWN)]


def page_files() -> tuple[dict[str, str], str]:
    """Return the files of the worked example, and the lines that register it."""
    page = (REPO / "docs/adding_a_system.md").read_text()
    files = dict(re.findall(r"`([\w/]+\.py)`:\n\n```python\n(.*?)```", page, re.DOTALL))
    (lines,) = re.findall(r"```python\n(SYSTEMS\[.*?)```", page, re.DOTALL)
    return files, lines


def write_dataset(root: Path, sizes: list[tuple[int, int]], seed: int, num_clips: int = 5) -> Path:
    """Write clips of a square that moves as the actions say, on a background of each clip's own."""
    with ShardWriter(root, tuple(sizes), 0) as writer:
        for number in range(num_clips):
            random = random_state("acceptance", seed, number)
            moves = random.randint(1, 4, NUM_FRAMES).tolist()
            moves[0] = 0
            background, x = random.randint(0, 256, (4, 8, 3)).astype(np.uint8), 0
            names = [ACTIONS[move] for move in moves]
            with writer.clip(f"clip{number}", actions=names) as add:
                for move in moves:
                    x = (x + (0, 0, -1, 1)[move]) % 8
                    frame = background.copy()
                    frame[1:3, x] = 255
                    image = Image.fromarray(frame)
                    frames = [np.asarray(image.resize((w, h), Image.Resampling.NEAREST)) for h, w in sizes]
                    add([encode_jpeg(frame) for frame in frames])
    describe_dataset(root, [writer.report({30: num_clips})], 1, (), actions=list(ACTIONS))
    return root


@pytest.fixture(scope="module")
def overlay(tmp_path_factory):
    """Return the repository with both further systems."""
    files, lines = page_files()
    return Overlay(
        tmp_path_factory.mktemp("overlay") / "longtake", files, lines + 'SYSTEMS["recall"] = "tests.recall.spec:SPEC"\n'
    )


@pytest.fixture(scope="module", params=PARAMETERS)
def case(request):
    return (CASES | OWN)[request.param]


@pytest.fixture(scope="module")
def folder(case, tmp_path_factory):
    return tmp_path_factory.mktemp(case.name)


@pytest.fixture(scope="module")
def data(case, overlay, folder):
    """Return datasets to train on and to validate on, with tokens where the system reads them: options of train.py."""
    sizes = [size for size in (case.low, case.size) if size]
    for seed, split in enumerate(("train", "val")):
        write_dataset(folder / split, sizes, seed)
    if case.tokenizer:
        overlay.run("-c", SAVE_TOKENIZER.format(case.tokenizer), folder / "tokenizer.pkl")
    for split in ("train", "val") if case.encode is not None else ():
        words = [folder / split, f"--tokenizer={folder / 'tokenizer.pkl'}", *(case.encode or ())]
        overlay.run("-m", "dataset_tools.encode_dataset", *words)
    return [f"--dataset={folder / 'train'}", *([f"--val-dataset={folder / 'val'}"] if case.held_out else [])]


def training(case, data, folder, outdir, steps):
    options = [*case.train, *([f"--tokenizer={folder / 'tokenizer.pkl'}"] if case.tokenizer else [])]
    shared = ["--preset=toy", "--batch=4", f"--steps={steps}", "--device=cpu", "--checkpoint-steps=2", "--keep=9"]
    intervals = ["--tick-steps=1", "--sample-steps=2", "--metric-steps=2", "--workers=0"]
    return ["train.py", case.name, *data, f"--outdir={outdir}", *shared, *intervals, *options]


@pytest.fixture(scope="module")
def run_dir(case, overlay, data, folder):
    """Return a run that was killed after two steps or more, then resumed on two ranks to six."""
    outdir = folder / "runs"
    overlay.kill_when(outdir / "*/checkpoints/ckpt-00000002-train.pt", *training(case, data, folder, outdir, 6))
    (run,) = outdir.iterdir()
    for path in run.glob("checkpoints/ckpt-*"):  # as if it had been killed right then
        if int(re.findall(r"\d+", path.name)[0]) > 2:
            path.unlink()
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    output = overlay.run(*launcher, *training(case, data, folder, outdir, 6))
    assert "goes on at step 2 of 6" in output and "Next: " in output, output
    assert [path.name for path in outdir.iterdir()] == [run.name]
    return run


@pytest.fixture(scope="module")
def model(run_dir):
    return checkpoint.network_path(run_dir, 6)


def generated(case, overlay, model, folder, name, *options):
    """Return frames that generate.py makes: uint8 (T, H, W, 3)."""
    outdir = folder / name
    overlay.run("generate.py", f"--outdir={outdir}", f"--model={model}", "--device=cpu", "--format=npz", *options)
    (path,) = outdir.glob(f"*_{case.output}.npz")
    with np.load(path) as archive:
        return archive[archive.files[0]].reshape(-1, *case.size, 3)


# So that small differences of logits count.
SHARP = {"recall": ("-o", "temperature=0.1")}


def context_of(case, folder):
    return [f"--context={folder / 'train'}:clip1"] if case.prompted else []


def test_a_run_that_was_killed_and_changed_its_ranks_equals_one_that_was_not(case, overlay, data, folder, run_dir):
    overlay.run(*training(case, data, folder, folder / "whole", 6))
    (whole,) = (folder / "whole").iterdir()
    states = [checkpoint.load_run_state(checkpoint.train_state_path(path, 6)) for path in (whole, run_dir)]
    for name, module in states[0]["modules"].items():
        other, floats = states[1]["modules"][name], [key for key in module if module[key].is_floating_point()]
        # Adam divides rounding errors of gradients near zero by their own size, so that single values may differ.
        error = math.sqrt(sum(float((other[key] - module[key]).double().square().sum()) for key in floats))
        assert error < 2e-3 * math.sqrt(sum(float(module[key].double().square().sum()) for key in floats)), name
        for key in module if case.name in CASES else ():
            torch.testing.assert_close(other[key], module[key], rtol=1e-4, atol=1e-5, msg=key)
    lines = [json.loads(line) for line in (run_dir / "stats.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(7))
    assert any(name.startswith("loss/") for name in lines[-1])
    held_out = [line["step"] for line in lines if any(name.startswith("validation/") for name in line)]
    assert held_out == ([0, 2, 4, 6] if case.held_out else [])


def test_previews_show_it(case, run_dir):
    names = {path.name for path in (run_dir / "samples").iterdir()}
    assert {f"fake-{step:08d}.{kind}" for step in (0, 2, 4, 6) for kind in ("mp4", "png")} <= names
    assert f"real-{case.size[0]:04d}x{case.size[1]:04d}.png" in names
    assert (run_dir / "curves.png").is_file()


def test_frames_do_not_depend_on_start_length_or_batch(case, overlay, model, folder):
    context = context_of(case, folder)
    whole = generated(case, overlay, model, folder, "whole", "--seed=3", "--len=14", *context)
    part = generated(case, overlay, model, folder, "part", "--seed=3", "--len=5", "--start=6", *context)
    assert whole.shape == (14, *case.size, 3) and whole.std() > 0
    assert np.abs(part.astype(int) - whole[6:11]).max() <= 1
    if case.option:
        other = generated(case, overlay, model, folder, "other", "--seed=3", "--len=14", "-o", case.option, *context)
        assert (other != whole).any()
    outdir = folder / "company"
    words = ["generate.py", f"--outdir={outdir}", f"--model={model}", "--seeds=2-4", "--batch=3", "--len=14"]
    overlay.run(*words, "--format=npz", "--device=cpu", *context)
    (path,) = outdir.glob(f"*seed=3_*{case.output}.npz")
    with np.load(path) as archive:
        alone = archive[archive.files[0]].reshape(whole.shape)
    assert np.abs(alone.astype(int) - whole).max() <= 1


def test_a_file_and_actions_are_a_prompt(case, overlay, model, folder):
    if not case.prompted:
        words = ["generate.py", f"--outdir={folder / 'no'}", f"--model={model}", "--seed=0"]
        assert "takes none" in overlay.run(*words, f"--context={folder / 'train'}", fails=True)
        return
    clip = folder / "clip.mp4"
    size = case.low or case.size
    rng = np.random.RandomState(0)
    frames = rng.randint(0, 256, (48, size[0] // 2, size[1] // 2, 3)).astype(np.uint8).repeat(2, 1).repeat(2, 2)
    with VideoWriter(clip, size[0], size[1], 30, crf=1) as writer:
        writer.write(frames)
    options = [f"--context={clip}", "--seed=0", "--len=16"]
    if case.past:
        made, sharp = [], []
        for number, name in enumerate(("left", "right")):
            actions = folder / f"{name}.json"
            actions.write_text(json.dumps(["none"] * case.past + [name] * 16))
            sharp = [*SHARP.get(case.name, ()), f"--actions={actions}"]
            made.append(generated(case, overlay, model, folder, f"prompt{number}", *options, *sharp))
        assert made[0].shape == (16, *case.size, 3) and (made[0] != made[1]).any()
        sharp[-1] = f"--actions={folder / 'left.json'}"
        endless = generated(case, overlay, model, folder, "endless", options[0], "--seed=0", "--len=inf", *sharp)
        assert (endless == made[0]).all()  # it ends with the actions
    else:
        assert generated(case, overlay, model, folder, "prompt", *options).shape == (16, *case.size, 3)


def test_it_is_measured(case, overlay, data, model, folder):
    out = folder / "results.jsonl"
    overlay.run(
        *["calc_metrics.py", data[0], f"--model={model}", "-m", "color_similarity", "--num-videos=3"],
        *["--num-frames=16", f"--path={out}", "--device=cpu", f"--size={case.size[0]}x{case.size[1]}"],
    )
    (line,) = [json.loads(line) for line in out.read_text().splitlines()]
    assert line["metric"] == "color_similarity" and all(np.isfinite(value) for value in line["results"].values())


@needs_chromium
def test_it_is_explored(case, overlay, model, folder, browser):
    options = context_of(case, folder)
    with overlay.serving("view.py", f"--model={model}", "--port=0", "--device=cpu", *options) as url:
        browser.get(url)

        def canvas(script):
            shown = "[...document.querySelectorAll('figure canvas')].find(canvas => canvas.offsetParent)"
            return browser.execute_script(f"const c = {shown}; return {script}")

        until(lambda: canvas("c?.dataset.frame") == "0")
        first = canvas("c.toDataURL()")
        ActionChains(browser).send_keys(*[Keys.ARROW_RIGHT] * 3).perform()
        until(lambda: canvas("c?.dataset.frame") == "3")
        data = base64.b64decode(canvas("c.toDataURL()").partition(",")[2])
        shown = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
        assert shown.std() > 0 and canvas("c.toDataURL()") != first
        expected = generated(case, overlay, model, folder, "explored", "--seed=0", "--len=4", *options)[3]
        factor = shown.shape[0] // case.size[0]
        assert np.abs(shown[::factor, ::factor].astype(int) - expected).max() <= 1
        browser.get("about:blank")


def test_its_file_says_what_it_is(case, overlay, model):
    output = overlay.run("-m", "training.checkpoint", "info", model)
    assert "system" in output and case.name in output
    assert ("tokenizer" in output) == (case.name == "tokenizer" or bool(case.tokenizer))


REFUSED = {
    "context too short": (["--context={short}"], "36 frames|context"),
    "context of another size": (["--context={small}"], "8x16"),
    "context of another rate": (["--context={slow}"], "--fps"),
    "no context": ([], "--context"),
    "actions too short": (["--context={clip}", "--actions={few}"], "36 for the context and 8 for the video are needed"),
    "actions out of range": (["--context={clip}", "--actions={high}"], "has 9 at entry|action 9 at entry"),
    "actions of unknown names": (["--context={clip}", "--actions={names}"], "jump"),
    "actions that are not there": (["--context={clip}", "--actions=nowhere.json"], "nowhere.json"),
    "label": (["--context={train}", "--label=3"], "no classes"),
    "text": (["--context={train}", "--text=a"], "no text"),
    "unknown option": (["--context={train}", "-o", "temprature=1"], "did you mean temperature"),
    "option of another type": (["--context={train}", "-o", "temperature=hot"], "use a number"),
    "option out of range": (["--context={train}", "-o", "temperature=9"], "from 0.1 to 2"),
    "start": (["--context={train}", "--start=-1"], "begin with 0"),
}


@pytest.fixture(scope="module")
def recalled(overlay, tmp_path_factory):
    """Return an untrained exported file of Recall, its tokenizer, a dataset, and footage that does not suit."""
    folder = tmp_path_factory.mktemp("refused")
    write_dataset(folder / "train", [(16, 32)], 0, num_clips=2)
    overlay.run("-c", EXPORT, folder)
    for name, size, count, fps in (
        ("short", (16, 32), 20, 30),
        ("small", (8, 16), 40, 30),
        ("slow", (16, 32), 40, 12),
        ("clip", (16, 32), 40, 30),
    ):
        with VideoWriter(folder / f"{name}.mp4", *size, fps, crf=20) as writer:
            writer.write(np.random.RandomState(0).randint(0, 256, (count, *size, 3)).astype(np.uint8))
    for name, values in (("few", [0] * 40), ("high", [0] * 40 + [9] * 8), ("names", ["none"] * 43 + ["jump"])):
        (folder / f"{name}.json").write_text(json.dumps(values))
    return folder


EXPORT = """
import sys, torch
from tests.recall.networks import Blocks, Predictor
from training.contract import Bundle
from training.network_file import content_hash, save_bundle, save_network
folder = sys.argv[1]
torch.manual_seed(0)
tokenizer, other, network = Blocks(), Blocks(), Predictor()
save_network(tokenizer, f"{folder}/tokenizer.pkl")
save_network(other, f"{folder}/other.pkl")
names = {"actions": ["none", "forward", "left", "right"]}
bundle = Bundle({"predictor": network, "tokenizer": tokenizer}, "recall", {}, content_hash(tokenizer), 30.0, names)
save_bundle(bundle, f"{folder}/model.pkl")
"""


@pytest.mark.parametrize("what", REFUSED)
def test_what_does_not_suit_is_refused_in_one_sentence(what, overlay, recalled):
    options, message = REFUSED[what]
    places = {name: recalled / f"{name}.mp4" for name in ("short", "small", "slow", "clip")}
    places |= {name: recalled / f"{name}.json" for name in ("few", "high", "names")} | {"train": recalled / "train"}
    words = [option.format(**places) for option in options]
    output = overlay.run(
        "generate.py", f"--outdir={recalled / 'out'}", "--seed=0", "--len=8", f"--model={recalled / 'model.pkl'}",
        "--device=cpu", *words, fails=True,
    )  # fmt: skip
    assert re.search(message, " ".join(output.split())), output
    assert not (recalled / "out").exists() or not list((recalled / "out").iterdir())


def test_tokens_of_another_tokenizer_are_refused(overlay, recalled):
    overlay.run("-m", "dataset_tools.encode_dataset", recalled / "train", f"--tokenizer={recalled / 'tokenizer.pkl'}")
    words = ["train.py", "recall", f"--dataset={recalled / 'train'}", "--preset=toy", f"--outdir={recalled / 'runs'}"]
    output = overlay.run(*words, f"--tokenizer={recalled / 'other.pkl'}", "--device=cpu", fails=True)
    assert "encode_dataset" in output and "tokenizer" in output
    assert not (recalled / "runs").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--precision=bf16"], "trains in fp32"),
        (["--compile"], "cannot be compiled"),
        (["--x-flip=true"], "mirrored"),
        (["--val-dataset=x"], "held-out"),
    ],
)
def test_settings_that_a_system_lacks_are_refused(overlay, recalled, options, message):
    name = "walk" if "--val-dataset=x" in options else "recall"
    own = [f"--tokenizer={recalled / 'tokenizer.pkl'}"] if name == "recall" else ["--size=16x32"]
    words = ["train.py", name, f"--dataset={recalled / 'train'}", "--preset=toy", f"--outdir={recalled / 'no'}"]
    assert message in overlay.run(*words, *own, *options, "--device=cpu", fails=True)
    assert not (recalled / "no").exists()


def test_a_tokenizer_reconstructs_its_context(overlay, recalled):
    outdir = recalled / "reconstructed"
    words = ["generate.py", f"--outdir={outdir}", "--seed=0", f"--model={recalled / 'tokenizer.pkl'}", "--format=npz"]
    overlay.run(*words, f"--context={recalled / 'clip.mp4'}", "--device=cpu")
    with np.load(outdir / "clip_seed=0_len=40_video.npz") as archive:
        video = archive[archive.files[0]].reshape(40, 16, 32, 3)
    given = np.stack(list(iter_video_frames(recalled / "clip.mp4")))
    blocks = given.reshape(40, 2, 8, 4, 8, 3).mean(axis=(2, 4))
    found = video.reshape(40, 2, 8, 4, 8, 3)
    assert (found == found[:, :, :1, :, :1]).all()  # each block has one colour
    assert np.corrcoef(blocks.ravel(), found[:, :, 0, :, 0].ravel())[0, 1] > 0


def test_the_page_is_small_enough_to_read_and_its_program_works(overlay, tmp_path, capsys):
    page = (REPO / "docs/adding_a_system.md").read_text()
    files, _ = page_files()
    text = files["training/walk/system.py"]
    assert len([line for line in text.splitlines() if line.strip()]) < 150
    (program,) = [
        code for code in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if "open_sampler([path])" in code
    ]
    model = tmp_path / "walk.pkl"
    overlay.run("-c", EXPORT_WALK, model)
    assert overlay.run("-c", f"path = {str(model)!r}\n{program}").count("torch.Size([2, 16, 36, 64, 3])") == 2


EXPORT_WALK = """
import sys
from training.contract import Run
from training.network_file import save_bundle
from training.walk.system import Walk
save_bundle(Walk(Walk.Options(), Run()).export(), sys.argv[1])
"""


def test_rounds_of_accumulation_change_nothing(overlay):
    assert "equal" in overlay.run("-c", ROUNDS)


ROUNDS = """
import torch
from training.contract import Run
from training.walk.system import Walk
batch = torch.rand(4, 3, 1, 8, 16, dtype=torch.float64) * 2 - 1
gradients = []
for rounds in (1, 2):
    walk = Walk(Walk.Options(8, 16, 4, 8), Run(batch=4, grad_accum=rounds))
    walk.network.double(), walk.average.double()
    report = walk.step(iter([{"frame": batch}]), 0)
    assert report["loss/kl_loss"].shape == (4,) and report["progress/nonfinite_gradients"] == 0
    gradients.append([parameter.grad.clone() for parameter in walk.network.parameters()])
for one, two in zip(*gradients, strict=True):
    torch.testing.assert_close(one, two, rtol=0, atol=1e-12)
print("equal")
"""
