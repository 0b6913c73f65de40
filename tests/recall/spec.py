"""The registry entry of Recall."""

from training.registry import Spec

SPEC = Spec(
    name="recall",
    title="A tiny predictor of tokens under actions, for tests",
    system="tests.recall.system:Recall",
    presets="tests.recall.system:PRESETS",
    networks={
        "tests.recall.networks:Predictor": "predictor of tokens",
        "tests.recall.networks:Blocks": "tokenizer of blocks",
    },
    open_sampler="tests.recall.sampling:open_sampler",
    protocols="tests.recall.protocols:PROTOCOLS",
    next_command="python generate.py --outdir=outputs --seed=0 --model={network} --context={dataset}",
)
