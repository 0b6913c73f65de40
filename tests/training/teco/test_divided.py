"""A network that is divided among ranks, by --shard, by --tensor-parallel and by both, is trained as by one rank."""

import json

import pytest
import torch
from click.testing import CliRunner
from torch import distributed as dist

from dataset_tools import encode_dataset
from tests.ranks import run_ranks
from tests.training.data.clips import write_dataset
from tests.training.teco import tiny
from training import loop
from training.checkpoint import load_any, load_run_state
from training.config import TrainOptions, identity
from training.modules import linear
from training.network_file import save_network
from training.teco.system import TecoOptions, TecoTraining

DIVIDED = """
import copy, json, sys, torch
from pathlib import Path
from tests.training.teco import tiny
from torch_utils import distributed, misc, sharding
torch.set_num_threads(1)
distributed.init("cpu")
folder, changes = Path(sys.argv[1]), json.loads(sys.argv[2])
rank = distributed.get_rank()

def check_gradients(mesh):
    from torch.distributed.tensor import DTensor, Replicate, Shard
    values = torch.tensor([mesh.get_local_rank("data") + 1.0, torch.inf])  # averaged over the groups
    gradients = [DTensor.from_local(values, mesh["tensor"], [Shard(0)]),
                 DTensor.from_local(torch.tensor([torch.nan, 1.0]), mesh["tensor"], [Replicate()]),
                 torch.tensor([torch.nan, 1.0])]
    parameters = [torch.nn.Parameter(torch.zeros_like(gradient)) for gradient in gradients]
    for parameter, gradient in zip(parameters, gradients):
        parameter.grad = gradient
    assert distributed.sync_grads(parameters, gain=2.0) == 4
    assert distributed.own_part(parameters[0].grad).tolist() == [mesh.size(0) + 1.0, 1e5]
    found = distributed.total_norm([parameter.grad for parameter in parameters]).item()
    assert abs(found - (2 * (mesh.size(0) + 1) ** 2 + 2e10 + 8) ** 0.5) < 0.1

if "tensor_parallel" in changes:
    check_gradients(sharding.make_mesh(torch.device("cpu"), 2))

def batch(system, number):
    size, reader = system.run.local_batch, system.run.reader
    return tiny.batch(number, first=reader * size, last=(reader + 1) * size)

def step(system, number):
    report = system.step(iter([batch(system, number)]), number)
    return distributed.all_reduce_mean(report["loss/loss"].mean()).item(), report["progress/grad_norm"].item()

def state_of(system):
    states = {"network": sharding.whole_state(system.network)}
    states["optimizer"] = sharding.whole_optimizer_state(system.optimizers["teco"])
    return copy.deepcopy(states)  # the count of steps is the optimiser's own

def restore(system, state):
    sharding.load_state(system.network, state["network"])
    sharding.load_optimizer_state(system.optimizers["teco"], state["optimizer"])

system = tiny.system(folder, **changes)
assert sharding.is_sharded(system.network)
assert system.run.num_readers * changes.get("tensor_parallel", 1) == distributed.get_world_size()
distributed.broadcast_module(system.network)
misc.check_ddp_consistency(system.network)
held = {name: distributed.own_part(p).numel() / p.numel() for name, p in system.network.named_parameters()}
validation = system.validate(iter([batch(system, 0)]))
found = {"losses": [step(system, number) for number in (1, 2)], "middle": state_of(system)}
found["losses"] += [step(system, 3)]
found["end"] = state_of(system)
again = tiny.system(folder, **changes)
restore(again, found["middle"])
assert step(again, 3) == found["losses"][2]
end = state_of(again)["network"]
assert all(torch.equal(value, end[name]) for name, value in found["end"]["network"].items())
restore(again, torch.load(folder / "alone.pt"))
found["continued"] = step(again, 3)
misc.check_ddp_consistency(system.network)
system.gather()
bundle = system.export()
assert all(torch.equal(bundle.networks["teco"].state_dict()[name], value) for name, value in end.items())
system.sampler()
step(system, 4)
assert next(system.average.parameters()).is_meta
found |= {"held": held, "validation": distributed.all_reduce_mean(validation["loss/loss"].mean()).item()}
torch.save(found, f"{folder}/rank{rank}.pt")
distributed.shutdown()
"""

HALF = ("attention.query.weight", "attention.value.bias", "attention.out.weight", "wi.weight", "wi.bias", "wo.weight")


def slow(world_size, **changes):
    name = "-".join([str(world_size), *(f"{key}={value}" for key, value in changes.items())])
    return pytest.param(world_size, changes, marks=pytest.mark.slow, id=name)


def weights_distance(one, other):
    """Return the norm of the difference of two networks, relative to that of one.

    Biases in front of a norm of single channels have no gradient but rounding, which Adam enlarges.
    """
    one, other = (torch.cat([value.flatten() for value in found.values()]) for found in (one, other))
    return ((one - other).norm() / one.norm()).item()


@pytest.mark.parametrize(
    ("world_size", "changes"),
    [
        (2, {"tensor_parallel": 2}),
        (2, {"shard": True}),
        slow(4, shard=True),
        slow(4, tensor_parallel=2),
        slow(4, tensor_parallel=2, shard=True),
        slow(2, tensor_parallel=2, shard=True, legacy=True, grad_accum=2),
        slow(4, tensor_parallel=2, shard=True, recompute=True, positions="rotary", clip_norm=1.0),
        slow(2, tensor_parallel=2, precision="bf16"),
    ],
)
def test_a_divided_network_gives_the_losses_of_one(world_size, changes, tmp_path):
    """Ranks continue bit for bit, go on from what one has begun, and the reverse."""
    layout = ("shard", "tensor_parallel")
    same = {name: value for name, value in changes.items() if name not in layout}
    alone, rel = tiny.system(tmp_path, **same), 2e-3 if "precision" in changes else 1e-5
    validation = alone.validate(iter([tiny.batch(0)]))["loss/loss"].mean().item()
    reports = []
    for number in (1, 2, 3):
        if number == 3:
            state = {"network": alone.network.state_dict(), "optimizer": alone.optimizers["teco"].state_dict()}
            torch.save(state, tmp_path / "alone.pt")
        reports.append(alone.step(iter([tiny.batch(number)]), number))
    ranks = run_ranks(DIVIDED, tmp_path, json.dumps(changes), world_size=world_size, timeout=280)
    assert [code for code, *_ in ranks] == [0] * world_size, ranks
    found = torch.load(tmp_path / "rank0.pt")
    assert found["validation"] == pytest.approx(validation, rel=rel)
    expected = [(report["loss/loss"].mean().item(), report["progress/grad_norm"].item()) for report in reports]
    for mine, theirs in zip([*found["losses"], found["continued"]], [*expected, expected[2]], strict=True):
        assert mine[0] == pytest.approx(theirs[0], rel=rel) and mine[1] == pytest.approx(theirs[1], rel=10 * rel)
    other = tiny.system(tmp_path, **same)
    other.network.load_state_dict(found["middle"]["network"])
    other.optimizers["teco"].load_state_dict(found["middle"]["optimizer"])
    report = other.step(iter([tiny.batch(3)]), 3)
    assert report["loss/loss"].mean().item() == pytest.approx(found["losses"][2][0], rel=rel)
    far = 0.05 if "precision" in changes else 5e-3
    assert weights_distance(other.network.state_dict(), found["end"]["network"]) < far
    shares = [share for name, share in found["held"].items() if "layers" in name and name.endswith(HALF)]
    groups = world_size if changes.get("shard") else changes["tensor_parallel"]
    assert len(shares) == 4 * len(HALF) and max(shares) == pytest.approx(1 / groups)


LOOP = """
import json, sys
from training import loop
from training.config import TrainOptions
from torch_utils import distributed
loop.train("teco", TrainOptions(**json.loads(sys.argv[1])))
distributed.shutdown()
"""


@pytest.mark.slow
def test_a_run_goes_on_with_other_groups_of_ranks(tmp_path):
    """The same run, which its layout does not identify, and each clip and random number is that of its position."""
    tokenizer, root = tmp_path / "tokenizer.pkl", write_dataset(tmp_path / "data", [(tiny.HEIGHT, tiny.WIDTH)])
    save_network(tiny.tokenizer(), tokenizer)
    made = CliRunner().invoke(encode_dataset.main, [str(root), f"--tokenizer={tokenizer}"])
    assert made.exit_code == 0, made.output

    def options(outdir, steps, **layout):
        model = {**tiny.SIZES, "tokenizer": str(tokenizer), "use_actions": False, "dropout_actions": False, **layout}
        places = {"outdir": str(tmp_path / outdir), "dataset": str(root)}
        return {**places, "system": "teco", "model": model, "steps": steps, "batch": 4, "sample_steps": 1000}

    def state(result, step):
        return load_run_state(result.run_dir / "checkpoints" / f"ckpt-{step:08d}-train.pt")

    whole = loop.train("teco", TrainOptions(**options("whole", 3)))
    divided = json.dumps(options("parts", 2, tensor_parallel=2, shard=True))
    ranks = run_ranks(LOOP, divided, world_size=4, timeout=280)
    assert [code for code, *_ in ranks] == [0] * 4, ranks
    assert "batch    4 clips: 2 groups of 2 ranks x 1 rounds" in ranks[0][1]
    parts = loop.train("teco", TrainOptions(**options("parts", 3)))
    assert parts.run_dir.name.startswith("00000-")
    expected, found = state(whole, 3), state(parts, 3)
    assert weights_distance(expected["modules"]["teco"], found["modules"]["teco"]) < 5e-3
    assert expected["footage"] == found["footage"]
    network = load_any(str(parts.run_dir / "checkpoints" / "ckpt-00000002-train.pt")).networks["teco"].state_dict()
    assert all(torch.equal(value, network[name]) for name, value in state(parts, 2)["modules"]["teco"].items())


def test_how_ranks_share_the_work_does_not_identify_a_run():
    run = TrainOptions(outdir="", dataset="", system="teco", model={"tensor_parallel": 2, "shard": True})
    assert identity(run) == identity(TrainOptions(outdir="", dataset="", system="teco"))
    assert identity(run) != identity(TrainOptions(outdir="", dataset="", system="teco", model={"seq_len": 9}))


REFUSED = [
    ({"tensor_parallel": 3}, "tensor_parallel is 3, which does not divide the 2 heads of the temporal transformer"),
    (
        {"tensor_parallel": 2, "prior": {**tiny.SIZES["prior"], "mlp_dim": 33}},
        "tensor_parallel is 2, which does not divide the 33 hidden channels of the prior transformer",
    ),
    ({"tensor_parallel": 2, "ema_beta": 0.9}, "no moving average: leave out --tensor-parallel or --ema-beta"),
]


@pytest.mark.parametrize(("changes", "message"), REFUSED)
def test_what_cannot_be_divided_is_refused(changes, message):
    options = TecoOptions(**{**tiny.SIZES, "tokenizer": "x.pkl", **changes})
    with pytest.raises(ValueError, match=message):
        TecoTraining.check(options, TrainOptions(outdir="", dataset="", system="teco", steps=20))


def test_large_products_of_divided_weights_are_those_of_torch(monkeypatch, tmp_path):
    """The kernels that are chosen for large products know no `DTensor`."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Replicate

    monkeypatch.setattr(linear, "is_amd", lambda: True)
    monkeypatch.setattr(linear, "TRAINED_PRODUCTS", 1)
    store = dist.FileStore(str(tmp_path / "store"), 1)  # pyright: ignore[reportPrivateImportUsage]
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        x, weight = torch.randn(3, 8), torch.randn(4, 8)
        parts = [DTensor.from_local(part, mesh, [Replicate()]) for part in (x, weight)]
        product = linear.linear(*parts)
        assert isinstance(product, DTensor) and torch.equal(product.to_local(), torch.nn.functional.linear(x, weight))
    finally:
        dist.destroy_process_group()
