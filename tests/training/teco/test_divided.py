"""A network that is divided among ranks, by --shard, by --tensor-parallel and by both, is trained as by one rank."""

import pytest
import torch

from tests.ranks import run_ranks
from tests.training.teco import tiny
from training.config import TrainOptions
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


@pytest.mark.parametrize(
    ("world_size", "changes"),
    [
        pytest.param(2, '{"tensor_parallel": 2}', id="tensor-2"),
        pytest.param(2, '{"shard": true}', marks=pytest.mark.slow, id="shard-2"),
        pytest.param(4, '{"shard": true}', marks=pytest.mark.slow, id="shard-4"),
        pytest.param(4, '{"tensor_parallel": 2}', marks=pytest.mark.slow, id="data-2-tensor-2"),
        pytest.param(4, '{"tensor_parallel": 2, "shard": true}', marks=pytest.mark.slow, id="shard-2-tensor-2"),
    ],
)
def test_a_divided_network_gives_the_losses_of_one(world_size, changes, tmp_path):
    alone = tiny.system(tmp_path)
    print(alone.validate(iter([tiny.batch(0)])))
