"""The networks, a training sample and generation: numbers that the release gave for made-up weights."""

import re

import numpy as np
import pytest
import torch

from tests import golden_files
from tests.training.modules.test_vqgan2d import river_network, small_inputs
from training.generation import flow
from training.modules.latents import LatentScale
from training.river import draws, networks, prediction, refiner, schedules
from training.river.networks import VectorField
from training.river.published import to_uint8


def close(found, expected, where="", single=5e-5):
    golden_files.check(found, expected, single=single, where=where)


def search(pattern, text):
    match = re.search(pattern, text)
    assert match is not None, text
    return match


def numbers(text, name):
    return [float(part) for part in search(rf"\b{name}=\[(.*?)\]", text)[1].split(",")]


def with_shape(text):
    """Write "x=RS(1), u=RS(4), all standard_normal(S)" as terms that each draw."""
    shape = search(r"standard_normal(\(\(.*?\)\))", text)[1]
    return re.sub(r"(RS\(\d+\))(?!\.)", rf"\1.standard_normal{shape}", text)


def whole_entry(golden):
    """The first entry of a field that has a config and formulas of inputs, to which others refer."""
    found = (entry for key, entry in golden.items() if key.startswith("vector_field"))
    return next(entry for entry in found if "config" in entry and "RS(" in entry["input"])


def make_field(golden, entry, **options):
    """The field of an entry, which may have config and inputs of another."""
    config = entry.get("config") or whole_entry(golden)["config"]
    field = VectorField(**config, **options)
    golden_files.fill_river(field, entry["base"])
    return field.eval()


def field_inputs(golden, entry):
    text = entry["input"] if "RS(" in entry["input"] else whole_entry(golden)["input"]
    x, reference, condition, target = golden_files.normals(with_shape(text), golden["about"]["seed"])
    return (x, reference, condition, torch.tensor(numbers(text, "dist")), torch.tensor(numbers(text, "t"))), target


def check_names(network, names):
    own = sorted([name, list(value.shape)] for name, value in network.state_dict().items())
    assert own == sorted(names)


# ----------------------------------------------------------------------------
# The vector field.


@golden_files.entries("river", "time_embedding*")
def test_time_code(entry, golden):
    width = int(search(r"width (\d+)", entry["input"])[1])
    close(networks.time_code(torch.tensor(numbers(entry["input"], "t")), width), {"values": entry["values"]})


@golden_files.entries("river", "vector_field_ln*")
def test_vector_field_with_layer_norm(entry, golden):
    field = make_field(golden, entry)
    check_names(field, entry["names"])
    assert sum(p.numel() for p in field.parameters()) == entry["total"]
    inputs, target = field_inputs(golden, entry)
    x, _, _, distances, t = inputs
    close(networks.time_code(t, field.inner_dim), entry["time_token"], "time_token")
    position = field.position_encoding(*field.state_res).T.unflatten(1, field.state_res)
    close(position.expand(len(x), -1, -1, -1), entry["position"], "position")
    close(field.distance_code(distances), entry["distance_embedding"], "distance_embedding")
    close(field.cells(*inputs[:3]), entry["tokens_in"], "tokens_in")
    tokens = field.embed(*inputs[:4])
    blocks = []
    field.trunk(torch.cat([networks.time_code(t, field.inner_dim).unsqueeze(1), tokens], dim=1), record=blocks)
    for number, (found, expected) in enumerate(zip(blocks, entry["blocks"], strict=True)):
        close(found, expected, f"block {number}")
    v = field(*inputs)
    close(v, entry["v"], "v")
    loss = (v - target).square().mean()
    assert loss.item() == pytest.approx(entry["loss_mse"], rel=1e-4)
    loss.backward()
    gradients = {name: p.grad.norm().item() for name, p in field.named_parameters() if p.grad is not None}
    for name, norm in entry["grad_norms"].items():
        assert gradients[name] == pytest.approx(norm, rel=1e-3), name


@golden_files.entries("river", "vector_field_bn*")
@torch.no_grad()
def test_vector_field_with_batch_norm(entry, golden):
    field = make_field(golden, entry)
    names = list(entry["names_project_out"])
    own = [[name, list(value.shape)] for name, value in field.state_dict().items() if name.startswith("project_out")]
    assert sorted(own) == sorted(names)
    inputs, _ = field_inputs(golden, entry)
    close(field(*inputs), entry["v_eval"], "v_eval")
    close(field.train()(*inputs), entry["v_train_dropout0"], "v_train_dropout0")
    norm = field.get_submodule("project_out.3")
    close(norm.get_buffer("running_mean"), entry["running_mean_after"], "running_mean_after")
    close(norm.get_buffer("running_var"), entry["running_var_after"], "running_var_after")


@golden_files.entries("river", "vector_field_no_reference*")
@torch.no_grad()
def test_vector_field_without_reference(entry, golden):
    field = make_field(golden, entry, reference=False)
    assert list(field.get_parameter("project_in.1.weight").shape) == entry["project_in_shape"]
    close(field(*field_inputs(golden, entry)[0]), entry["v"])


@golden_files.entries("river", "full_size*")
def test_full_size(entry, golden):
    sizes = {}
    for name, total in entry.items():
        match = re.fullmatch(r"vector_field_(\d+)x(\d+)x(\d+)_(\w+)", name)
        if match is not None:
            with torch.device("meta"):
                field = VectorField(int(match[1]), (int(match[2]), int(match[3])), out_norm=match[4])
            assert sum(p.numel() for p in field.parameters()) == total
            sizes[match[4]] = len(field.state_dict())
    assert sizes.get("ln", entry["vector_field_state_entries"]) == entry["vector_field_state_entries"]


@golden_files.entries("river", "small_inputs*")
@torch.no_grad()
def test_small_inputs(entry, golden):
    """Norms and their epsilons, at inputs of about the same size."""
    fields = {
        key: make_field(golden, golden[key])
        for key in golden
        if key.startswith("vector_field") and "config" in golden[key]
    }
    for names, places, network, offsets, shape, trains in small_inputs(entry["input"]):
        if network not in fields:
            continue
        for name, place, offset in zip(names, places, offsets, strict=True):
            rng = golden_files.generator(f"RS({offset})", golden["about"]["seed"])
            x = torch.from_numpy((rng.standard_normal(golden_files.number(shape)) * 1e-3).astype("float32"))
            module = fields[network].get_submodule(place).train(trains)
            close(module(x), entry[name], name)


# ----------------------------------------------------------------------------
# A training sample.


def make_model(golden, entry):
    """The field and the latents of frames of an entry, and its autoencoder."""
    field = VectorField(**entry["vector_field_config"])
    golden_files.fill_river(field, entry["vector_field_base"])
    tokenizer = river_network(golden[entry["autoencoder"]])
    scale = LatentScale(entry["vector_field_config"]["state_size"])
    return field.eval(), prediction.LatentVideo(tokenizer, scale)


def training_inputs(golden, entry):
    """Observations, noise and times of an entry."""
    config = entry["vector_field_config"]
    shape = golden["about"]["batch"], config["state_size"], *config["state_res"]
    return golden_files.normals(entry["input"].replace("latent shape", str(shape)), golden["about"]["seed"])


@golden_files.entries("river", "train_*")
@torch.no_grad()
def test_training_sample(entry, golden):
    field, video = make_model(golden, entry)
    observations, noise, t = training_inputs(golden, entry)
    latents = video.encode(observations.transpose(1, 2))
    close(latents, entry["latents"], "latents")
    sample = draws.Sample(
        torch.tensor(entry["tau"]), torch.tensor(entry["cond_index"]).unsqueeze(1),
        noise, t,
    )  # fmt: skip
    assert sample.distances.flatten().tolist() == entry["distance"]
    losses, v, target = draws.flow_losses(field, sample.pick(latents), sample)
    close(target, entry["target"], "target")
    close(v, entry["v"], "v")
    assert losses.mean().item() == pytest.approx(entry["loss"], rel=1e-4)


@golden_files.entries("river", "torch_rng_order*")
def test_order_of_published_draws(entry, golden):
    text = entry["input"]
    seed, num_frames, batch = (int(search(rf"{name}\D?(\d+)", text)[1]) for name in ("manual_seed", "N", "B"))
    shape = tuple(int(part) for part in search(r"latents (\d+)x(\d+)x(\d+)", text).groups())
    sample = draws.published_sample(torch.Generator().manual_seed(seed), num_frames, batch, shape)
    assert sample.targets.tolist() == entry["tau"] and sample.conditions.flatten().tolist() == entry["c"]
    close(sample.noise, entry["noise"], "noise")
    close(sample.t, entry["t"], "t")


@golden_files.entries("river", "lr*")
def test_learning_rates(entry, golden):
    schedule = schedules.PublishedSchedule(peak=1e-4, warmup=5000, steps=300_000)
    for step, rate in entry.items():
        assert schedule.at(int(step)) == pytest.approx(rate, rel=2e-6, abs=1e-12), step


# ----------------------------------------------------------------------------
# Generation.


@golden_files.entries("river", "generate_*")
@torch.no_grad()
def test_generation(entry, golden):
    (key,) = (key for key in golden if golden[key] is entry)
    training = golden[key.replace("generate", "train")]
    field, video = make_model(golden, training)
    observations, *_ = training_inputs(golden, training)
    for name, case in entry.items():
        if isinstance(case, dict):
            check_case(field, video, observations, make_draws(Recorded, entry, golden), case, name)
            made = make_draws(prediction.StreamDraws, entry, golden)
            check_latents(latents_of(field, video, observations, case, made), case, name)
        elif case == "IndexError":
            with pytest.raises(IndexError):
                made = make_draws(Lowest, entry, golden)
                prediction.generate_frames(
                    field, video, observations[:, :3], 1, 3, past_horizon=7, legacy=True, draws=made
                )
        else:
            assert name == "input", f"{name} is of no known kind"


def make_draws(cls, entry, golden):
    """The draws of a class from the streams of an entry, of noise and of indices."""
    about = golden["about"]
    noise, indices = (golden_files.generator(part, about["seed"]) for part in re.findall(r"RS\(\d+\)", entry["input"]))
    return cls(noise, indices, about["batch"])


def check_case(field, video, observations, record, case, name):
    found = prediction.generate_frames(
        field, video, observations[:, : case["n"]], case["num_frames"], case["steps"], case["warm_start"],
        case["past_horizon"], solver=case["method"], draws=record, legacy=True,
    )  # fmt: skip
    assert len(record.ranges) == case["field_calls"], name
    assert [list(pair) for pair in dict.fromkeys(record.ranges)] == case["ranges"], name
    assert record.indices_drawn[: len(case["first_index_draws"])] == case["first_index_draws"], name
    close(found, case["frames"], f"{name} frames", 5e-4)


def check_latents(past, case, name):
    close(past, case["latents"], f"{name} latents", 5e-4)
    close(past[:, -1], case["latents_last"], f"{name} latents_last", 5e-4)
    sums = past.double().sum((2, 3, 4))
    np.testing.assert_allclose(
        sums, case["latent_frame_sums"], atol=1e-4 * case["latents_last"]["abssum"], err_msg=name
    )


class Lowest(prediction.StreamDraws):
    """Draws that are always the lowest number."""

    def indices(self, low, high, count):
        return np.full((self.num_videos, count), low)


class Recorded(prediction.StreamDraws):
    """Draws from two streams, with a record of the ranges and the numbers of indices."""

    def __init__(self, noise, indices, num_videos):
        super().__init__(noise, indices, num_videos)
        self.ranges, self.indices_drawn = [], []

    def indices(self, low, high, count):
        found = super().indices(low, high, count)
        self.ranges.append((low, high))
        self.indices_drawn.append(found[:, 0].tolist())
        return found


def latents_of(field, video, observations, case, made):
    """The latents of a case, the given ones once."""
    points = flow.published_points(case["steps"], case["warm_start"])
    grid = tuple(flow.time_grid(points, case["warm_start"]))
    settings = prediction.Integration(case["method"], grid, past_horizon=case["past_horizon"], legacy=True)
    past = prediction.begin(video.encode(observations[:, : case["n"]].transpose(1, 2)))
    for _ in range(case["num_frames"]):
        past.append(prediction.next_latents(field, past, made, settings))
    return torch.stack(past.latents[-case["n"] - case["num_frames"] :], dim=1)


# ----------------------------------------------------------------------------
# The rest.


@golden_files.entries("river", "refiner*")
def test_refiner(entry, golden):
    config, seed = entry["config"], golden["about"]["seed"]
    sizes = config["n_resgroups"], config["n_resblocks"], config["n_feats"], config["reduction"]
    network = refiner.RCAN(*sizes)
    check_names(network, entry["names"])
    golden_files.fill_river(network, entry["base"])
    x, target = golden_files.normals(entry["input"], seed)
    out = network(x[:, :3], x[:, 3:])
    close(out, entry["out"], "out")
    loss = (out - target).square().mean()
    assert loss.item() == pytest.approx(entry["loss"], rel=1e-4)
    loss.backward()
    gradients = {name: p.grad for name, p in network.named_parameters() if p.grad is not None}
    for name, norm in entry["grad_norms"].items():
        assert gradients[name].norm().item() == pytest.approx(norm, rel=1e-3), name
    bounded = refiner.RCAN(*sizes, tanh=True)
    assert [name for name in bounded.state_dict() if name.startswith("tail")] == entry["tanh_tail_names"]
    golden_files.fill_river(bounded, entry["base"])
    with torch.no_grad():
        close(bounded(x[:, :3], x[:, 3:]), entry["tanh_variant"], "tanh_variant")
    for name, total in entry["totals"].items():
        groups, blocks, width = (int(part) for part in re.findall(r"\d+", name))
        assert sum(p.numel() for p in refiner.RCAN(groups, blocks, width).parameters()) == total
    check_refiner_schedule(entry["lr_schedule"])
    text = entry["ssim"]["input"]
    a, noise = golden_files.normals(text.replace("a.shape", search(r"standard_normal\((\(.*?\))\)", text)[1]), seed)
    found = refiner.ssim(a, a + noise)
    assert found.mean().item() == pytest.approx(entry["ssim"]["value"], rel=1e-4)


def check_refiner_schedule(entry):
    pattern = r"lr ([\d.e-]+), batch (\d+) x (\d+) GPUs, (\d+) epochs of (\d+) iterations, (\d+) warm-up"
    lr, batch, gpus, epochs, length, warm_up = map(float, search(pattern, entry["input"]).groups())
    schedule = schedules.RefinerSchedule(lr * batch * gpus / 256, int(warm_up * length), int(epochs * length))
    assert entry["length"] == schedule.steps
    for step, rate in entry["values"].items():
        assert schedule.at(int(step)) == pytest.approx(rate, rel=1e-5, abs=1e-12), step


@golden_files.entries("river", "to_uint8*")
def test_published_bytes(entry, golden):
    assert to_uint8(torch.tensor(entry["input"])).tolist() == entry["output"]
