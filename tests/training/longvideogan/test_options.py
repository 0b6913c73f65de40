"""Invalid options are rejected in one sentence; frozen blocks stay constant; initial weights are loaded."""

import copy

import pytest
import torch

from tests.training.longvideogan import tiny
from training.contract import Bundle
from training.longvideogan.lres.generator import LowResGenerator
from training.longvideogan.sres.generator import SuperResGenerator
from training.longvideogan.sres.schedule import check_pair

LRES, SRES = tiny.STAGES

REFUSED = [
    (LRES, {"gama": 2}, "did you mean gamma"),
    (SRES, {"r1_interval": 0}, "set gamma to 0"),
    (LRES, {"g_lr": 0}, "g_lr is 0; it must be above 0"),
    (SRES, {"d_lr": float("nan")}, "d_lr is nan; it must be above 0"),
    (LRES, {"gamma": -1}, "gamma is -1; it must be 0"),
    (LRES, {"beta2": 1.0}, "beta2 is 1.0; it must be at least 0 and below 1"),
    (SRES, {"ema_beta": -0.1}, "ema_beta is -0.1"),
    (SRES, {"ema_rampup_steps": -1}, "ema_rampup_steps is -1"),
    (LRES, {"freeze_d": 5}, "freeze_d is 5; it must be from 0 to 4"),
    (SRES, {"freeze_d": 5}, "freeze_d is 5; it must be from 0 to 4"),
    (SRES, {"freeze_d": -1}, "freeze_d is -1; it must be from 0 to 4"),
    (LRES, {"num_frames": 20}, "multiple of 8 from 16; use 16"),
    (SRES, {"num_frames": 0}, "at least 1; the published one is 4"),
    (LRES, {"width": 60}, "power of two from 16"),
    (LRES, {"height": 0, "width": 0}, "power of two from 16"),
    (LRES, {"diffaug": "color,colour"}, "'colour'.*choose from color, translation, cutout, or none"),
    (LRES, {"temporal_stretch": -0.5}, "at least 0 and at most 4"),
    (LRES, {"temporal_stretch": 4.5}, "at least 0 and at most 4, at which a clip of 16 frames shrinks to one"),
    (
        LRES,
        {"generator": {"min_filter_taps": 64, "max_filter_taps": 16}},
        "from 64 to 16 frames.*no more than the longest",
    ),
    (SRES, {"ada_interval": 0}, "set augment to none"),
    (SRES, {"ada_target": 1.0}, "above -1 and below 1"),
    (SRES, {"augment": "bcg"}, "'bcg'; choose from none, b, bg, bgc, bgcf, bgcfn, bgcfnc"),
    (SRES, {"augment": "bgcf", "height": 16, "width": 64}, "more than frames of 16x64 have; use bgc"),
    (SRES, {"lres_height": 0, "lres_width": 0}, "possible are 18x32"),
    (SRES, {"height": 0, "width": 0}, "power of two from 64"),
]


@pytest.mark.parametrize(("stage", "changes", "sentence"), REFUSED)
def test_what_cannot_work_is_refused_in_one_sentence(stage, changes, sentence):
    with pytest.raises(ValueError, match=sentence) as refusal:
        tiny.make(stage, **changes)
    assert "\n" not in str(refusal.value) and ". " not in str(refusal.value)


def test_low_resolution_sizes_suit_a_low_resolution_network():
    check_pair(144, 256, 18, 32)
    with pytest.raises(ValueError, match="possible are 36x64, 18x32$"):  # the edges of 9x16 differ by 7
        check_pair(72, 128, 9, 16)
    with pytest.raises(ValueError, match="quarter"):
        check_pair(16, 128, 4, 32)
    with pytest.raises(ValueError, match="cannot be halved.*use 140x256"):
        check_pair(142, 256, 71, 128)


@pytest.mark.parametrize("changes", [{"augment": "none"}, {"augment": "bgcfnc"}, {"gamma": 0}])
def test_super_resolution_trains_with_every_kind_of_augmentation(changes):
    system = tiny.make(SRES, **changes)
    for _ in range(3):
        (stats,) = tiny.train(system, [0])
        assert all(value.isfinite().all() for value in stats.values())
    assert (stats["progress/augment_p"] == 0) == (system.ada.p == 0)
    with torch.no_grad():
        video = torch.rand(4, 3, 2, 36, 64, dtype=torch.float64)
        assert torch.equal(system.augment(video, system.run.rngs("G", 0), 1.0), video) == (
            changes == {"augment": "none"}
        )


def test_without_augmentation_its_strength_stays_zero():
    system = tiny.make(SRES, augment="none", ada_target=-0.99)  # below every mean of signs but one
    stats = tiny.train(system, range(3))
    assert [value["progress/augment_p"].item() for value in stats] == [0, 0, 0]


@pytest.mark.parametrize("stage", tiny.STAGES)
@pytest.mark.parametrize("freeze_d", [1, 3])
def test_frozen_blocks_keep_their_weights_and_the_rest_moves(stage, freeze_d):
    system, free = tiny.make(stage, freeze_d=freeze_d), tiny.make(stage)
    before = tiny.weights(system)
    assert before.keys() == tiny.weights(free).keys()
    tiny.train(system, range(3))
    blocks = ["blocks.0.", "blocks.1.", "blocks.2."] if stage == LRES else ["b64.", "b32.", "b16."]
    frozen = tuple(f"D.{block}" for block in blocks[:freeze_d])
    parameters = {f"D.{name}" for name, _ in system.D.named_parameters()}
    moved = {name for name, tensor in tiny.weights(system).items() if not torch.equal(tensor, before[name])}
    assert moved & parameters == {name for name in parameters if not name.startswith(frozen)}
    # A frozen block passes gradients on: the generator learns from the same discriminator at first.
    updates, others = tiny.record_gradients(tiny.make(stage, freeze_d=freeze_d)), tiny.record_gradients(free)
    assert updates == others == []
    system = tiny.make(stage, freeze_d=freeze_d)
    updates = tiny.record_gradients(system)
    tiny.train(system, [0])
    tiny.train(free, [0])
    assert tiny.distance(updates[0], others[0]) == 0
    for mine, theirs in zip(updates[1:], others[1:], strict=True):
        assert mine.keys() == {name for name in theirs if not name.startswith(frozen)}
    assert tiny.distance(updates[1], {name: others[1][name] for name in updates[1]}) < 1e-12


@pytest.mark.parametrize("stage", tiny.STAGES)
def test_weights_to_begin_with_are_taken(stage):
    trained = tiny.make(stage, seed=1)
    tiny.train(trained, [0])
    network = copy.deepcopy(trained.export())
    alone, whole = tiny.make(stage), tiny.make(stage, freeze_d=1)
    fresh = tiny.weights(alone)
    alone.init_from(network)
    found, given = tiny.weights(alone), tiny.weights(trained)
    for name, tensor in found.items():
        module, _, key = name.partition(".")
        assert torch.equal(tensor, fresh[name] if module == "D" else given[f"G_ema.{key}"])
    whole.init_from({name: module.state_dict() for name, module in trained.modules.items()})
    assert tiny.largest_difference(tiny.weights(whole), given) == 0
    tiny.train(whole, [0])
    first = next(iter(whole.frozen_blocks)).state_dict()
    assert all(
        torch.equal(tensor, trained.discriminator_blocks()[0].state_dict()[key]) for key, tensor in first.items()
    )


def test_weights_that_do_not_fit_are_refused():
    system = tiny.make(LRES)
    before = tiny.weights(system)
    options = {**tiny.TINY[LRES]["generator"], "height": 18, "width": 32}
    with pytest.raises(ValueError, match=r"G\.spatial_input is 1x6x1x3x4 there and 1x6x1x4x4 here"):
        system.init_from(Bundle({"network": LowResGenerator(**options)}, LRES))
    with pytest.raises(ValueError, match=r"G\.spatial_input is absent there"):
        system.init_from(tiny.make(SRES).export())
    modules = {name: module.state_dict() for name, module in system.modules.items()}
    longer = tiny.make(LRES, num_frames=24)
    with pytest.raises(ValueError, match=r"D\.epilogue\.linear_0\.weight is 6x12 there and 6x18 here.*clip length"):
        longer.init_from(modules)
    with pytest.raises(ValueError, match="generator file has no discriminator.*-train.pt"):
        tiny.make(LRES, freeze_d=1).init_from(system.export())
    assert tiny.largest_difference(tiny.weights(system), before) == 0
    (network,) = tiny.make(SRES).export().networks.values()
    assert isinstance(network, SuperResGenerator)
