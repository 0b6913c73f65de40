"""The common part of tokenizers: an encoder, a quantizer and a decoder behind the contract's `Tokenizer`."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from torch import Tensor

from torch_utils.precision import MixedPrecision
from training.modules.quantizers import Quantized, Quantizer

Result = TypeVar("Result", Tensor, Tensor | None)


class Autoencoder(MixedPrecision):
    """A tokenizer; subclasses set the attributes and define `features` and `generate`.

    Inside, frames are in the network's own units: `scale` times those in [-1, 1]. In half precision, which is for use
    and not for training, latents before quantization are rounded, so that codes may differ.
    """

    formats = ("bf16",)

    height: int  # of the frames
    width: int
    clip_frames: int  # frames that are encoded together
    stride: tuple[int, int]  # frames per step of the grid, pixels along an edge of a cell
    scale: float = 1.0

    @property
    def quantizer(self) -> Quantizer:
        """Return the quantizer, which a subclass may hold under its published name."""
        raise NotImplementedError

    @property
    def vocabulary(self) -> int:
        """Return the number of different codes, 0 if latents are continuous."""
        return self.quantizer.num_codes

    @property
    def last_layer(self) -> Tensor:
        """Return the weight of the decoder's last convolution, at which an adaptive GAN weight is computed."""
        raise NotImplementedError

    def features(self, x: Tensor) -> Tensor:
        """Return the latents before quantization: (N, channels, T, H, W) in the network's units -> (N, C, t, h, w)."""
        raise NotImplementedError

    def generate(self, z: Tensor) -> Tensor:
        """Return the frames, in the network's units, of latents: (N, C, t, h, w) -> (N, channels, T, H, W)."""
        raise NotImplementedError

    def decoding_copy(self) -> Autoencoder:
        """Return a network for decoding one frame after another: this one, or a copy that is faster at it."""
        return self

    def in_chosen(self, function: Callable[[Tensor], Result], x: Tensor) -> Result:
        """Return function(x), computed in the half precision that was chosen, if any, and returned in single."""
        if self.half is None:
            return function(x)
        with self.in_half(x):
            y = function(x)
        return y if y is None else y.float()

    def forward(self, x: Tensor, rng=None) -> tuple[Tensor, Quantized]:
        """Return the reconstruction of x (N, channels, T, H, W) in the network's units, and its quantized latents."""
        quantized = self.quantizer(self.features(x), rng)
        return self.generate(quantized.output), quantized

    def latents(self, video: Tensor) -> Tensor:
        """Return the latents before quantization of a video in [-1, 1]: (N, channels, T, H, W) -> (N, C, t, h, w)."""
        return self.features(video * self.scale)

    def decode_latents(self, z: Tensor) -> Tensor:
        """Quantize latents (N, C, t, h, w), if there are codes, and decode them into a video in [-1, 1]."""
        return self.decode(self.quantizer.encode(z)) if self.vocabulary else self.generate(z) / self.scale

    def encode(self, video: Tensor) -> Tensor:
        """See `training.contract.Tokenizer`."""
        return self.quantizer.encode(self.latents(video))

    def decode(self, codes: Tensor) -> Tensor:
        """See `training.contract.Tokenizer`; values are not clamped."""
        return self.generate(self.quantizer.lookup(codes)) / self.scale


def check_divisible(x: Tensor, stride: tuple[int, int, int]) -> None:
    """Raise `ValueError` unless the strides divide the last three axes of x: frames, height and width."""
    if any(size % step for size, step in zip(x.shape[-3:], stride, strict=True)):
        found, wanted = ("x".join(map(str, sizes)) for sizes in (x.shape[-3:], stride))
        raise ValueError(
            f"the tokenizer got {found} (frames, height, width), but encodes blocks of {wanted}: crop or resize to "
            "multiples"
        )
