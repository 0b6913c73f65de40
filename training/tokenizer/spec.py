"""The registry entry of tokenizers; imports none of their modules."""

from training.registry import Spec

SPEC = Spec(
    name="tokenizer",
    title="Tokenizers: autoencoders of frames or clips into grids of codes, for systems that model codes",
    system="training.tokenizer.system:TokenizerTraining",
    options="training.tokenizer.options:TokenizerOptions",
    presets="training.tokenizer.presets:PRESETS",
    networks={
        "training.modules.vqgan3d:VQGAN3D": "3-D VQGAN",
        "training.modules.vqgan2d:VQGAN2D": "2-D VQGAN",
        "training.modules.vqgan2d:RiverVQVAE": "VQ-VAE of RIVER",
        "training.modules.conv_autoencoder:ConvAutoencoder": "convolutional autoencoder",
    },
    open_sampler="training.tokenizer.sampling:open_sampler",
    published_adapters=("training.tokenizer.published:open_published",),
    next_command=(
        "python -m dataset_tools.encode_dataset {dataset} --tokenizer={network} (a tokenizer of sound needs none: "
        "python train.py tats --condition=audio --audio-tokenizer={network}), and to see what it keeps: "
        "python generate.py --outdir=outputs --seed=0 --model={network} --context={dataset}"
    ),
)
