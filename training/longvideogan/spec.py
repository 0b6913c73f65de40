"""The registry entries of LongVideoGAN's two stages; imports none of their modules."""

from training.registry import Alias, Spec

OPENER = "training.longvideogan.sampling:open_sampler"

ALIASES = (
    Alias("--lres", "model", "Low-resolution network", "PATH|URL|NAME", role="lres"),
    Alias("--sres", "model", "Super-resolution network; low resolution only without", "PATH|URL|NAME", role="sres"),
    Alias(
        "--lres-video",
        "context",
        "Enlarge this instead of generated low-resolution frames: a video, an npz file, a folder of images",
        "PATH",
    ),
    Alias("--save-lres", "save", "Also write the low-resolution video", kind=bool, default=False, role="lres"),
    Alias("--truncation", "option:truncation", "Below 1: more typical, less varied", "FLOAT", default=1.0),
    Alias("--temporal-scale", "option:temporal_scale", "Below 1: slow motion; above: fast", "FLOAT", default=1.0),
    Alias(
        "--blend",
        "option:blend",
        "Turn into another seed's video, reached at this frame; repeatable",
        "SEED@FRAME",
        multiple=True,
    ),
    Alias("--loop", "option:loop", "Repeat exactly after so many frames", "FRAMES"),
    Alias(
        "--rng",
        "option:rng",
        "How noise is drawn; legacy: in the published order, of which every frame depends on --len",
        "[blocks|legacy]",
        default="blocks",
    ),
)

LRES = Spec(
    name="longvideogan-lres",
    title="LongVideoGAN, low-resolution stage: long clips from noise",
    system="training.longvideogan.lres.gan:LowResGAN",
    options="training.longvideogan.options:LowResOptions",
    presets="training.longvideogan.presets:LRES",
    networks={
        "training.longvideogan.lres.generator:LowResGenerator": "low-resolution generator",
        "training.longvideogan.lres.discriminator:LowResDiscriminator": "low-resolution discriminator",
    },
    open_sampler=OPENER,
    role="lres",
    next_command=(
        "python train_sres.py --dataset={dataset}{preset}, and then "
        "python generate.py --outdir=outputs --seed=0 --lres={network}"
    ),
    outdir="runs/lres",
    aliases=ALIASES,
)

SRES = Spec(
    name="longvideogan-sres",
    title="LongVideoGAN, super-resolution stage: sharp frames from low-resolution ones",
    system="training.longvideogan.sres.gan:SuperResGAN",
    options="training.longvideogan.options:SuperResOptions",
    presets="training.longvideogan.presets:SRES",
    networks={
        "training.longvideogan.sres.generator:SuperResGenerator": "super-resolution generator",
        "training.longvideogan.sres.discriminator:SuperResDiscriminator": "super-resolution discriminator",
    },
    open_sampler=OPENER,
    role="sres",
    next_command="python generate.py --outdir=outputs --seed=0 --lres=<low-resolution network> --sres={network}",
    outdir="runs/sres",
    aliases=ALIASES,
)
