"""Training of tokenizers: published losses and weights."""

import numpy as np
import pytest
import torch

from tests import golden_files
from tests.training.modules.test_reconstruction_loss import golden_lpips
from tests.training.modules.test_vqgan3d import ARGUMENTS
from training.contract import Run
from training.modules.reconstruction_loss import PerceptualLoss
from training.tokenizer.system import TokenizerOptions, TokenizerTraining

# Options of the release by the names of its command line, with the defaults of the golden numbers.
OPTIONS = {
    "disc_channels": ("disc_channels", 4),
    "disc_layers": ("disc_layers", 3),
    "l1_weight": ("l1_weight", 4.0),
    "perceptual_weight": ("perceptual_weight", 4.0),
    "image_gan_weight": ("image_gan_weight", 1.0),
    "video_gan_weight": ("video_gan_weight", 1.0),
    "gan_feat_weight": ("feature_weight", 4.0),
    "disc_loss_type": ("gan_loss", "hinge"),
    "discriminator_iter_start": ("gan_start", 2),
    "lr": ("lr", 3e-4),
}
PREFIXES = {
    "image_discriminator": "image_discriminator.",
    "video_discriminator": "video_discriminator.",
    "tokenizer": "",
}


class GoldenTraining(TokenizerTraining):
    """The system with the weights and draws of the golden numbers, which records the sums of codes."""

    def __init__(self, options, run, salt):
        self.salt = salt
        super().__init__(options, run)
        self.drawn, self.code_sums = [], []
        for name, module in self.modules.items():
            prefix = PREFIXES[name]
            state = {prefix + key: value for key, value in module.state_dict().items()}
            module.load_state_dict({k.removeprefix(prefix): v for k, v in golden_files.wave_fill(state, salt).items()})
        self.network.get_buffer("codebook.initialised").fill_(1)

    def load_perceptual(self):
        """Without its dropout, as the golden numbers were made."""
        return PerceptualLoss(golden_lpips(self.salt), legacy=True).eval()

    def draw_frames(self, step, num_frames):
        """Recorded ones."""
        return self.drawn[step]

    def reconstruct(self, x, step, part):
        """See the base class."""
        made, quantized = super().reconstruct(x, step, part)
        self.code_sums.append(quantized.codes.sum().item())
        return made, quantized

    def tensor(self, name):
        """A parameter or buffer by its published name."""
        for module, prefix in PREFIXES.items():
            if name.startswith(prefix):
                return self.modules[module].state_dict()[name.removeprefix(prefix)]
        raise KeyError(name)


def golden_system(entry, salt):
    arguments, shape, rounds = entry["args"], entry["batch"], entry["accumulate"]
    given = {ours: arguments.get(theirs, default) for theirs, (ours, default) in OPTIONS.items()}
    network = {ours: arguments.get(theirs, default) for theirs, (ours, default) in ARGUMENTS.items()}
    options = TokenizerOptions(
        height=shape[3], width=shape[4], clip_frames=shape[2], arguments=network, clip_norm=entry["clip"], legacy=True,
        quantizer={"kind": "ema", "restart": not arguments.get("no_random_restart", True)}, **given,
    )  # fmt: skip
    return GoldenTraining(options, Run(batch=shape[0] * rounds, grad_accum=rounds, steps=100), salt)


def clips_of(entry, step):
    """The clips of a step, in [-1, 1]."""
    rounds = entry["accumulate"]
    parts = [golden_files.wave_of(entry["video"], entry["batch"], n=step * rounds + i) for i in range(rounds)]
    return 2 * torch.cat(parts)


@golden_files.entries("tats", "train_*")
def test_steps(entry, golden):
    system, size = golden_system(entry, golden_files.salt_of(golden)), entry["batch"][0]
    system.drawn = [
        np.concatenate([np.stack([part[k]["frame_idx"] for k in "GD"], 1) for part in step["micro"]])
        for step in entry["steps"]
    ]
    rng = golden_files.generator(entry["frame_idx"])
    again = [[rng.randint(0, entry["batch"][2], size=[size]) for _ in "GD"] for s in entry["steps"] for _ in s["micro"]]
    assert np.array_equal(np.concatenate([np.stack(pair, 1) for pair in again]), np.concatenate(system.drawn))
    for step, expected in enumerate(entry["steps"]):
        assert step == expected["step"]
        system.code_sums.clear()
        found = system.step(iter([{"clip": clips_of(entry, step)}]), step)
        check_losses(system, found, expected["micro"], step)
        assert system.code_sums == [part[k]["codes_sum"] for part in expected["micro"] for k in "GD"]
        check_weights(system, expected)
    system.network.eval()
    x = clips_of(entry, len(entry["steps"]) - 1)[-size:]
    with torch.no_grad():
        z = system.network.latents(x)
        golden_files.check(z, entry["eval_after"]["z"], 5e-3, where="z")
        golden_files.check(system.network(x / 2)[0], entry["eval_after"]["rec"], 5e-3, where="rec")


def check_losses(system, found, micro, step):
    """Compare the terms of each round, and both norms of gradients, with the recorded ones."""
    weights = system.loss.weights
    for i, part in enumerate(micro):
        terms = {name.partition("/")[2]: value[i].item() for name, value in found.items() if len(value) > i}
        pair = terms["g_image_loss"] * weights.image_gan + terms["g_video_loss"] * weights.video_gan
        terms |= {"aeloss": weights.share(step) * pair, "discloss": terms["d_loss"]}
        terms = {"image_gan_feat_loss": 0.0, "video_gan_feat_loss": 0.0} | terms
        for kind, own in (("G", "loss"), ("D", "d_loss")):
            for name, value in part[kind].items():
                if name not in ("frame_idx", "codes_sum", "grad_norm"):
                    ours = own if name == "loss" else name
                    assert terms[ours] == pytest.approx(value, rel=2e-3, abs=2e-5), f"step {step} {kind} {name}"
        for kind, name in (("G", "tokenizer"), ("D", "discriminators")):
            if "grad_norm" in part[kind]:
                norm = found[f"progress/{name}_grad_norm"].item()
                assert norm == pytest.approx(part[kind]["grad_norm"], rel=2e-3), f"step {step} {kind} grad_norm"


def check_weights(system, expected):
    """Compare weights, running statistics and the codebook after a step with the recorded ones."""
    for name, digest in {**expected.get("after", {}), **expected.get("bn", {})}.items():
        golden_files.check(system.tensor(name), digest, 5e-4, where=name)
    if "N" in expected:
        golden_files.check(system.network.codebook.N, expected["N"], 5e-4, where="N")
        golden_files.check(system.network.codebook.embeddings, expected["emb"], 5e-4, where="embeddings")
    counts = {"enc": "tokenizer", "imgD": "image_discriminator", "vidD": "video_discriminator"}
    for name, count in expected.get("nbt", {}).items():
        state = system.modules[counts[name]].state_dict()
        tracked = {value.item() for key, value in state.items() if key.endswith("num_batches_tracked")}
        assert tracked <= {count}, name
