"""Files of the last released version for `test_files_of_last_version.py`: how they are made, read and compared.

Run it in a checkout of the version whose files are wanted, which writes all of tests/golden/files anew:

    cd CHECKOUT && PYTHONPATH=. OMP_NUM_THREADS=1 python -P <here>/tests/last_version.py <here>/tests/golden/files

Tiny runs of both stages are kept as they were written. Runs of the preset `toy`, the smallest that the command lines
offer, would take 28 MB: of their training states large weights are kept as zeros, which `unpack_toy` replaces by a
fixed recipe, before the last version and before the version under test continue them.
"""

from __future__ import annotations

import dataclasses
import io
import json
import lzma
import re
import shutil
import sys
import tempfile
import zipfile
import zlib
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
from click.testing import CliRunner
from PIL import Image

FILES = Path(__file__).parent / "golden" / "files"
STAGES = ("lres", "sres")
SIZES = ((18, 32), (36, 64))
CLIPS, CLIP_FRAMES = "abcde", 20
STATE = Path("checkpoints", "ckpt-00000002-train.pt")
PACKED_STATE = STATE.with_suffix(".pt.xz")
NETWORK = Path("checkpoints", "ckpt-00000002-G-ema.pkl")
FIRST_STEPS = 2
LAST_STEPS = {"tiny": 4, "toy": 3}

TINY: dict[str, dict[str, Any]] = {
    "lres": {
        "height": 18,
        "width": 32,
        "num_frames": 16,
        "preview_frames": 8,
        "r1_interval": 3,
        "generator": {
            "embedding_channels": 16,
            "num_filters": 4,
            "min_filter_taps": 4,
            "max_filter_taps": 24,
            "w_channels": 8,
            "input_channels": 6,
            "temporal_channels": [6, 6, 4, 4],
            "spatial_channels": [4, 4, 4, 4],
        },
        "discriminator": {"channels": [3, 4, 4, 4, 4], "epilogue_channels": 6},
    },
    "sres": {
        "height": 36,
        "width": 64,
        "lres_height": 18,
        "lres_width": 32,
        "num_frames": 2,
        "preview_frames": 4,
        "r1_interval": 3,
        "ada_interval": 2,
        "generator": {
            "num_layers": 8,
            "channel_base": 256,
            "channel_max": 4,
            "temporal_context": 1,
            "z_channels": 6,
            "w_channels": 6,
        },
        "discriminator": {"channel_base": 256, "channel_max": 6},
    },
}
# Networks of two steps make grey frames: which weight to multiply, and by what, for some to compare.
CONTRAST = {"lres": ("to_rgb.weight", 24.0), "sres": ("SG3.synthesis.L8_64_36_3.weight", 8.0)}
TINY_LOOP = {"batch": 2, "seed": 5, "tick_steps": 1, "checkpoint_steps": 0, "sample_steps": 0, "workers": 0}

# What makes runs of the preset `toy` as small as the command lines allow.
TOY_SHARED = ["--preset=toy", "--batch=1", "--r1-interval=2", "--tick-steps=1", "--checkpoint-steps=0", "--workers=0"]
TOY = {
    "lres": [*TOY_SHARED, "--num-frames=16", "--filter-taps", "8", "32", "--sample-steps=0", "--device=cpu"],
    "sres": [*TOY_SHARED, "--num-frames=2", "--size=36x64", "--lres-size=18x32", "--sample-steps=0", "--device=cpu"],
}
PRESETS = ("default", "horseback-{}", "biking-{}", "labdoom-small", "labdoom-tiny", "toy")
OPTION_CASES = {
    f"{stage}, {preset.format(stage)}": (stage, [f"--preset={preset.format(stage)}"])
    for stage in STAGES
    for preset in PRESETS
} | {f"{stage}, toy at its smallest": (stage, arguments) for stage, arguments in TOY.items()}

# Arguments of generate.py; LRES, SRES and VIDEO stand for stored files.
LRES, SRES = "--lres=LRES", "--sres=SRES"
FRAME_CASES: dict[str, list[str]] = {
    "lres": [LRES, "--len=9"],
    "pair": [LRES, SRES, "--len=5"],
    "pair, later": [LRES, SRES, "--len=3", "--start=1000"],
    "pair, truncation": [LRES, SRES, "--len=3", "--truncation=0.6"],
    "pair, temporal scale": [LRES, SRES, "--len=3", "--start=20", "--temporal-scale=0.5"],
    "lres, blend": [LRES, "--len=9", "--start=30", "--blend=7@40"],
    "lres, loop": [LRES, "--len=9", "--loop=40", "--start=36"],
    "lres, legacy": [LRES, "--len=5", "--rng=legacy"],
    "given video": ["--lres-video=VIDEO", SRES],
}
LABDOOM_CASES = {f"seed {seed}, frame {t}": (seed, t) for seed in (0, 1) for t in (0, 40, 300)}


# ----------------------------------------------------------------------------
# Input data.


def write_dataset(root: Path) -> Path:
    """Write five clips of coloured 8x8 blocks, drawn from a fixed seed, at both sizes; return the root.

    A block of one colour survives JPEG coding without loss of its own, so every decoder reads the same.
    """
    rng = np.random.RandomState(0)
    blocks = {clip: rng.randint(0, 256, (CLIP_FRAMES, 5, 8, 3)).astype(np.uint8) for clip in CLIPS}
    names = [f"{index:06d}.jpg" for index in range(CLIP_FRAMES)]
    for height, width in SIZES:
        folder = root / f"{height:04d}x{width:04d}"
        folder.mkdir(parents=True)
        with zipfile.ZipFile(folder / "shard.zip", "w") as archive:
            for clip, name in ((clip, name) for clip in CLIPS for name in names):
                frame = blocks[clip][int(name[:6])].repeat(8, axis=0).repeat(8, axis=1)[:height, :width]
                content = io.BytesIO()
                Image.fromarray(frame).save(content, "jpeg", quality=100, subsampling=0)
                archive.writestr(f"{clip}/{name}", content.getvalue())
            archive.writestr("frame_paths.json", json.dumps(dict.fromkeys(CLIPS, names)))
    (root / "dataset.json").write_text(json.dumps({"fps": 30}))
    return root


def make_video() -> np.ndarray:
    """Return a given low-resolution video: uint8 (6, 18, 32, 3)."""
    rng = np.random.RandomState(1)
    return rng.randint(0, 256, (6, 3, 4, 3)).astype(np.uint8).repeat(6, axis=1).repeat(8, axis=2)


def recipe(name: str, shape: torch.Size) -> torch.Tensor:
    """Return the weights that stand in for those that a packed state leaves out; G and G_ema share them."""
    rng = np.random.RandomState(zlib.crc32(name.encode()))
    values = torch.from_numpy(rng.standard_normal(tuple(shape)).astype(np.float32))
    return values * (100 if "mapping." in name else 1)


def large_weights(state: dict[str, Any]) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the tensors of a training state that are left out when it is packed, by name."""
    for module in state["modules"].values():
        for name, tensor in module.items():
            if re.search(r"\bweight(_\w+)?$", name) and tensor.numel() >= 256:
                yield name, tensor


def pack_toy(run_dir: Path) -> None:
    """Replace the training state of a run by one without large weights and moments, compressed."""
    state = torch.load(run_dir / STATE, weights_only=True)
    for _, tensor in large_weights(state):
        tensor.zero_()
    for optimizer in state["optimizers"].values():
        for moments in optimizer["state"].values():
            if moments["exp_avg"].numel() >= 256:
                moments["exp_avg"].zero_()
                moments["exp_avg_sq"].fill_(float(f"{moments['exp_avg_sq'].mean():.1e}"))
    content = io.BytesIO()
    torch.save(state, content)
    (run_dir / PACKED_STATE).write_bytes(lzma.compress(content.getvalue(), preset=9))
    (run_dir / STATE).unlink()


def unpack_toy(run_dir: Path) -> None:
    """Write the training state that a packed one stands for."""
    state = torch.load(io.BytesIO(lzma.decompress((run_dir / PACKED_STATE).read_bytes())), weights_only=True)
    for name, tensor in large_weights(state):
        tensor.copy_(recipe(name, tensor.shape))
    torch.save(state, run_dir / STATE)
    (run_dir / PACKED_STATE).unlink()


# ----------------------------------------------------------------------------
# What both versions do with the files.


def run_command(script: str, *arguments: str) -> str:
    """Run a command line of the checkout in this process; return what it prints, AssertionError if it fails."""
    result = CliRunner().invoke(import_module(script).main, list(arguments))
    assert result.exit_code == 0, f"{script}.py {' '.join(arguments)}\n{result.output}\n{result.exception!r}"
    return result.output


def generate(folder: Path, *arguments: str) -> np.ndarray:
    """Run generate.py in `folder`; return the frames that it writes, uint8 (T, H, W, 3)."""
    outdir = Path(tempfile.mkdtemp(dir=folder))
    run_command("generate", f"--outdir={outdir}", "--device=cpu", "--format=npz", *arguments)
    (path,) = outdir.glob("*.npz")
    with np.load(path) as archive:
        return archive["frames"]


def generate_case(folder: Path, case: str, files: Path, suffix: str = ".pkl") -> np.ndarray:
    """Return the frames of one of `FRAME_CASES` from the stored networks."""
    stand_for = {"=LRES": f"={files}/lres{suffix}", "=SRES": f"={files}/sres{suffix}", "=VIDEO": f"={files}/video.npz"}
    arguments = ["--seed=3"]
    for argument in FRAME_CASES[case]:
        for name, path in stand_for.items():
            argument = argument.replace(name, path)
        arguments.append(argument)
    return generate(folder, *arguments)


def generate_labdoom(folder: Path, case: str) -> np.ndarray:
    """Return one frame of the included pair of networks, (1, H, W, 3)."""
    seed, start = LABDOOM_CASES[case]
    names = ("--lres=models/labdoom-tiny-lres.pkl", "--sres=models/labdoom-tiny-sres.pkl")
    return generate(folder, *names, f"--seed={seed}", f"--start={start}", "--len=1")


def read_dry_run(case: str) -> dict[str, Any]:
    """Return the options that a command line of `OPTION_CASES` stands for."""
    stage, arguments = OPTION_CASES[case]
    fixed = ["--dataset=/data/blocks", "--device=cpu", "--precision=fp32"]  # not every CPU has that of labdoom-tiny
    text = run_command(f"train_{stage}", *fixed, *arguments, "--dry-run")
    return json.loads(text[text.index("{") :])


def continue_tiny(run_dir: Path, dataset: Path, **changes: Any) -> None:
    """Continue a tiny run with its own options, on a dataset that was moved."""
    from training import loop
    from training.config import TrainOptions, resolve

    moved = {
        "dataset": str(dataset),
        "outdir": str(run_dir.parent),
        "steps": LAST_STEPS["tiny"],
        "resume": str(run_dir),
    }
    values = json.loads((run_dir / "options.json").read_text()) | moved | {"override": True} | changes
    loop.train(values["system"], resolve(TrainOptions, values))


def continue_toy(stage: str, run_dir: Path, dataset: Path) -> str:
    """Continue a toy run by its command line, on a dataset that was moved; return what is printed."""
    where = [f"--outdir={run_dir.parent}", f"--dataset={dataset}", f"--resume={run_dir}", "--override"]
    return run_command(f"train_{stage}", *where, *TOY[stage], f"--steps={LAST_STEPS['toy']}")


def summarize(run_dir: Path) -> dict[str, Any]:
    """Return sum and sum of magnitudes of some tensors of the last training state, and the losses of each step."""
    path = max((run_dir / "checkpoints").glob("ckpt-*-train.pt"))
    tensors = dict(sorted(_tensors(torch.load(path, weights_only=True))))
    chosen = [name for name, tensor in tensors.items() if tensor.is_floating_point()][::7]
    lines = [json.loads(line) for line in (run_dir / "stats.jsonl").read_text().splitlines()]
    return {
        "tensors": {name: [tensors[name].double().sum().item(), tensors[name].double().abs().sum().item()]
                    for name in chosen},
        "losses": [{"step": line["step"], **{name: value["mean"] for name, value in line.items()
                                             if name.endswith("_loss")}} for line in lines],
    }  # fmt: skip


def _tensors(value: Any, name: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the tensors of modules and optimizers in a training state, with the path to each."""
    if isinstance(value, torch.Tensor):
        yield name, value
    elif isinstance(value, dict):
        for key, entry in value.items():
            if name or key in ("modules", "optimizers"):
                yield from _tensors(entry, f"{name}/{key}" if name else key)


# ----------------------------------------------------------------------------
# Making the files.


def make_tiny(stage: str, dataset: Path, outdir: Path) -> Path:
    """Train a tiny run for its first steps; return its directory."""
    from training import loop
    from training.config import TrainOptions, resolve

    system = f"longvideogan-{stage}"
    values = {"system": system, "dataset": str(dataset), "outdir": str(outdir), "steps": FIRST_STEPS, **TINY_LOOP}
    model = {"batch": TINY_LOOP["batch"], "seed": TINY_LOOP["seed"], "grad_accum": 1, **TINY[stage]}
    options = resolve(TrainOptions, values | {"model": model})
    return loop.train(system, dataclasses.replace(options, device="cpu")).run_dir


def keep_run(run_dir: Path, target: Path) -> None:
    """Copy what a run needs to go on, and what it has logged."""
    (target / "checkpoints").mkdir(parents=True)
    for name in ("options.json", "stats.jsonl", STATE, NETWORK):
        shutil.copyfile(run_dir / name, target / name)


def keep_network(source: Path, target: Path, name: str, factor: float) -> None:
    """Move a network, with one of its weights multiplied: that of the layer that decides how far pixels are apart."""
    from training.checkpoint import save_network
    from training.network_file import load_network

    network = load_network(str(source))
    with torch.no_grad():
        network.get_parameter(name).mul_(factor)
    save_network(network, target)
    source.unlink()


def make_files(files: Path, folder: Path) -> None:
    """Write all stored files; `folder` is for what is thrown away."""
    dataset = write_dataset(folder / "blocks")
    expected: dict[str, Any] = {"options": {case: read_dry_run(case) for case in OPTION_CASES}}
    np.savez_compressed(files / "video.npz", frames=make_video())
    for stage in STAGES:
        kept = files / f"tiny-{stage}"
        keep_run(make_tiny(stage, dataset, folder / "tiny" / stage), kept)
        keep_network(kept / NETWORK, files / f"{stage}.pkl", *CONTRAST[stage])
        run_command("training.checkpoint", "convert", f"{files}/{stage}.pkl", f"{files}/{stage}.safetensors")
        copy = Path(shutil.copytree(kept, folder / "copies" / kept.name))
        continue_tiny(copy, dataset)
        expected[kept.name] = summarize(copy)

        outdir = folder / "toy" / stage
        steps = f"--steps={FIRST_STEPS}"
        run_command(f"train_{stage}", f"--outdir={outdir}", f"--dataset={dataset}", *TOY[stage], steps)
        kept = files / f"toy-{stage}"
        keep_run(next(outdir.iterdir()), kept)
        (kept / NETWORK).unlink()
        pack_toy(kept)
        copy = Path(shutil.copytree(kept, folder / "copies" / kept.name))
        unpack_toy(copy)
        continue_toy(stage, copy, dataset)
        expected[kept.name] = summarize(copy)
    frames = {case: generate_case(folder, case, files) for case in FRAME_CASES}
    labdoom = {case: generate_labdoom(folder, case) for case in LABDOOM_CASES}
    np.savez_compressed(files / "frames.npz", allow_pickle=False, **frames)
    np.savez_compressed(files / "labdoom.npz", allow_pickle=False, **labdoom)
    (files / "expected.json").write_text(json.dumps(expected, indent=1) + "\n")


if __name__ == "__main__":
    torch.set_num_threads(1)
    shutil.rmtree(sys.argv[1], ignore_errors=True)
    Path(sys.argv[1]).mkdir(parents=True)
    workspace = Path(tempfile.gettempdir(), "longtake-files")  # stored options name it, so it is the same each time
    workspace.mkdir()
    try:
        make_files(Path(sys.argv[1]), workspace)
    finally:
        shutil.rmtree(workspace)
