"""The registry entry of TECO; imports none of its modules."""

from training.registry import Spec

SPEC = Spec(
    name="teco",
    title="TECO: videos of hundreds of frames from a context and actions, by codes of what is new in each frame",
    system="training.teco.system:TecoTraining",
    options="training.teco.options:TecoOptions",
    presets="training.teco.presets:PRESETS",
    networks={"training.teco.networks:TECO": "temporally consistent transformer"},
    open_sampler="training.teco.sampling:open_sampler",
    protocols="training.teco.protocols:PROTOCOLS",
    published_adapters=("training.teco.published:open_published",),
    next_command="python generate.py --outdir=outputs --seed=0 --model={network} --context={dataset}",
)
