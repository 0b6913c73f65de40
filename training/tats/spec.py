"""The registry entries of TATS; imports none of its modules."""

from training.registry import Spec

NETWORKS = {"training.tats.networks:TATSTransformer": "transformer of TATS"}
OPEN = "training.tats.sampling:open_sampler"

SPEC = Spec(
    name="tats",
    title="TATS: a transformer of codes, which writes videos in a sliding window, or key frames",
    system="training.tats.system:TATS",
    options="training.tats.options:TATSOptions",
    presets="training.tats.presets:TATS",
    networks=NETWORKS,
    open_sampler=OPEN,
    protocols="training.tats.protocols:PROTOCOLS",
    published_adapters=("training.tats.published:open_published",),
)
INTERPOLATION = Spec(
    name="tats-interpolation",
    title="TATS: a transformer of the codes between key frames",
    system="training.tats.system:TATSInterpolation",
    options="training.tats.options:NetworkOptions",
    presets="training.tats.presets:INTERPOLATION",
    networks=NETWORKS,
    open_sampler=OPEN,
    next_command=(
        "python generate.py --outdir=outputs --seed=0 --model=KEY_FRAMES --model={network}, "
        "where KEY_FRAMES is a file of tats --every=4"
    ),
)
