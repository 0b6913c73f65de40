"""The registry entry of the world model; imports none of its modules."""

from training.registry import Spec

SPEC = Spec(
    name="world",
    title="World model: flow matching of the next frame under an action, with context that is chosen by pose",
    system="training.world.system:World",
    options="training.world.options:WorldTrainOptions",
    presets="training.world.presets:PRESETS",
    networks={
        "training.world.networks:WorldModel": "world model",
        "training.modules.latents:LatentScale": "scale of latents",
    },
    open_sampler="training.world.sampling:open_sampler",
    next_command="python view.py {network} --context={dataset}",
)
