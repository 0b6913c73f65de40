"""The registry entries of RIVER and of its refinement network; imports none of their modules."""

from training.registry import Spec

ADAPTER = "training.river.published:open_published"
OPENER = "training.river.sampling:open_sampler"

SPEC = Spec(
    name="river",
    title="RIVER: flow matching in the latent space of a tokenizer, which continues videos frame by frame",
    system="training.river.system:River",
    options="training.river.options:RiverTrainOptions",
    presets="training.river.presets:PRESETS",
    networks={
        "training.river.networks:VectorField": "vector field of RIVER",
        "training.modules.latents:LatentScale": "scale of latents",
    },
    open_sampler=OPENER,
    published_adapters=(ADAPTER,),
    next_command="python generate.py --outdir=outputs --seed=0 --model={network} --context={dataset}",
)

REFINER = Spec(
    name="river-refiner",
    title="Refinement of the frames that RIVER decodes, against flicker",
    system="training.river.refiner_system:RefinerTraining",
    options="training.river.options:RefinerOptions",
    presets="training.river.presets:REFINER_PRESETS",
    networks={"training.river.refiner:RCAN": "refinement network of RIVER"},
    open_sampler=OPENER,
    next_command=(
        "python generate.py --outdir=outputs --seed=0 --model=RIVER.pkl --model={network} --context={dataset}"
    ),
)
