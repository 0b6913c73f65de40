"""A training step queues its work without synchronising with the device, except for the cases listed here.

Tensors on the meta device replace those of a GPU: operations that would synchronise are detected without one.
"""

import traceback
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.training.longvideogan import tiny
from torch_utils import distributed, misc, training_stats
from training.augment.ada import AugmentPipe

ROOT = Path(__file__).parents[3]
OURS = (str(ROOT / "training"), str(ROOT / "torch_utils"))
ADA = "training/augment/ada.py:_gather reads a value"  # what the next clips are augmented with, every `ada_interval`
READS = {"_local_scalar_dense", "item", "equal", "is_nonzero"}
DATA_DEPENDENT = {"nonzero", "masked_select", "_unique2", "unique_dim", "unique_consecutive", "bincount"}


class Stalls(TorchDispatchMode):
    """Lists in `found` where the host would wait for a GPU, as "file:function what it does"."""

    def __init__(self):
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        on_device = [tensor for tensor in tensors if tensor.is_meta]
        if name in READS and on_device:
            self.note("reads a value")
            return 0.0 if name in ("_local_scalar_dense", "item") else False
        if name in DATA_DEPENDENT and on_device:
            self.note(f"{name} waits for a shape")
        result = func(*args, **kwargs)
        if name in ("_to_copy", "copy_", "_copy_from"):
            source = tensors[-1] if name == "copy_" else tensors[0]
            if source.is_meta != result.is_meta and not (kwargs.get("non_blocking") or True in args[2:]):
                self.note("copies and waits")
            elif source.is_meta and not result.is_meta:
                self.note("copies back")
        elif on_device and any(tensor.ndim for tensor in tensors if not tensor.is_meta):
            self.note(f"{name} takes a tensor of the host")
        return result

    def note(self, what: str) -> None:
        ours = [frame for frame in traceback.extract_stack() if frame.filename.startswith(OURS)]
        where = f"{Path(ours[-1].filename).relative_to(ROOT)}:{ours[-1].name} " if ours else ""
        self.found.append(where + what)


def stalls_of(system, steps) -> list[str]:
    """Return what a few steps wait for, their statistics being reported as the loop does."""
    batches = [
        [{name: part.float().to("meta") for name, part in batch.items()} for batch in tiny.batches(system, step)]
        for step in steps
    ]
    with Stalls() as stalls:
        for step, taken in zip(steps, batches, strict=True):
            for name, value in system.step(iter(taken), step).items():
                training_stats.report(f"stalls/{name}", value)
    return stalls.found


@pytest.fixture(autouse=True)
def no_statistics_stay(monkeypatch):
    """Forget statistics on the meta device, which have no values that a later collector could read."""
    monkeypatch.setattr(training_stats, "_counters", {})


# Step 0 has an R1 update; magnitudes move at once in a single round, and are collected in two.
@pytest.mark.parametrize(("grad_accum", "step"), [(1, 0), (2, 1)])
def test_low_resolution_never_waits(grad_accum, step):
    system = tiny.make("longvideogan-lres", torch.float32, "meta", batch=2, grad_accum=grad_accum)
    assert stalls_of(system, [step]) == []


@pytest.mark.parametrize(("grad_accum", "step"), [(1, 0), (2, 1)])
def test_super_resolution_waits_only_to_adapt_its_augmentation(grad_accum, step):
    changes = {"batch": 2, "grad_accum": grad_accum, "ada_interval": 2 - step, "augment": "bgcfnc"}
    system = tiny.make("longvideogan-sres", torch.float32, "meta", **changes)
    system.ada.p = 0.9  # everything is drawn now and then
    assert stalls_of(system, [step]) == [ADA] * step


def test_what_would_wait_is_found():
    """The list of the tests above is empty because nothing waits, and not because nothing is seen."""
    x = torch.ones(2, 3, 4, 4, 4, device="meta")
    rngs = [np.random.RandomState(0), np.random.RandomState(1)]
    pipe = AugmentPipe(xflip=1).to("meta")
    host = torch.ones(4)
    for call, expected in [
        (lambda: pipe(x, rngs), "training/augment/ada.py:forward reads a value"),
        (lambda: x[0, 0, 0, 0].copy_(host), "copies and waits"),
        (lambda: misc.constant([1.0, 2.0, 3.5], device="meta"), "constant copies and waits"),
        (lambda: bool((x > 0).any()), "reads a value"),
        (lambda: x[..., host.long()], "index takes a tensor of the host"),
        (lambda: x.mean().add(host[0]), None),  # numbers of the host travel with the kernel
        (lambda: misc.upload(host, "meta"), None),
        (lambda: training_stats.report("stalls/x", x), None),
        (lambda: distributed.sync_grads([torch.nn.Parameter(x)]), None),
    ]:
        with Stalls() as stalls:
            call()
        assert len(stalls.found) > 0 if expected else stalls.found == []
        assert expected is None or expected in stalls.found[0]
