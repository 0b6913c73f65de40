"""Every entry of a golden file has a test, or is listed as one that has none."""

import pytest

from tests import golden_files

TESTED = {
    "tats": [
        "vqgan_eval*",
        "disc*",
        "samepad*",
        "codebook*",
        "lpips*",
        "train_*",
        "preprocess*",
        "frame_folder*",
        "stft_prep*",
        "metrics*",
        "gpt_*",
        "bpe*",
        "filter*",
        "sampling*",
    ],
    "mebt": [
        "state*",
        "stack*",
        "block*",
        "short_mode_list*",
        "schedules*",
        "divide*",
        "t_prior*",
        "train_*",
        "sample_from_logits*",
        "sampling*",
        "frame_list*",
        "frame_image*",
        "preprocess*",
    ],
    "river": [
        "own_vqvae*",
        "ldm_vq*",
        "quantiser*",
        "small_inputs*",
        "colour_augmentation*",
        "h5*",
        "vector_field*",
        "time_embedding*",
        "full_size*",
        "path*",
        "train_*",
        "generate_*",
        "integrators*",
        "grid_points*",
        "torch_rng_order*",
        "refiner*",
        "lr*",
        "to_uint8*",
        "checkpoint_loader*",
    ],
    "teco": [
        "vqgan*",
        "codebook*",
        "small_inputs*",
        "checkpoint_files*",
        "metrics*",
        "parameters*",
        "posterior*",
        "temporal*",
        "train*",
        "schedule*",
        "maskgit*",
        "decoder*",
        "sampler*",
        "timestep*",
        "rollout*",
        "n_cond*",
        "lr*",
        "uint8_roundtrip*",
    ],
}


@pytest.mark.parametrize("name", TESTED, ids=lambda name: f"golden-{name}")
def test_entries_are_of_known_kinds(name):
    assert not golden_files.unknown_entries(name, TESTED[name])
