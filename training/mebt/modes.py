"""The modes of MeBT's layers and the published list of them; imports no torch."""

MODES = ("latent_enc", "latent_self", "latent_dec", "lt2l", "maskgit")
RESIDUALS = ("plain", "normalised")  # attention is added to queries before or after the norm


def stack(encoders: int, decoders: int) -> list[str]:
    """Return a list of modes in the published pattern: contexts are read `encoders` times, targets are written
    `decoders` times.
    """
    reading = ["latent_enc", "latent_self"] * (encoders - 1) + ["latent_enc"]
    return reading + ["latent_dec", "lt2l"] * (decoders - 1) + ["latent_dec"]


PUBLISHED_MODES = stack(7, 6)
