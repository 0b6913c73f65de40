"""The registry entry of MeBT; imports none of its modules."""

from training.registry import Spec

SPEC = Spec(
    name="mebt",
    title="MeBT: a bidirectional transformer of whole long videos, in memory linear in their length",
    system="training.mebt.system:MeBTTraining",
    options="training.mebt.options:MeBTOptions",
    presets="training.mebt.presets:PRESETS",
    networks={"training.mebt.networks:MeBT": "MeBT transformer"},
    open_sampler="training.mebt.sampling:open_sampler",
    protocols="training.mebt.protocols:PROTOCOLS",
    published_adapters=("training.mebt.published:open_published",),
)
