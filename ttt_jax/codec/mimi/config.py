"""Sizes of a Mimi, and the shapes of its parameters. Imports no jax."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import ClassVar, Literal

from ttt_jax.config import Checked
from ttt_jax.errors import InputError
from ttt_jax.utils import config_json

Dtype = Literal["float32", "bfloat16"]
Window = Literal["exact", "reference"]


@dataclasses.dataclass(frozen=True)
class MimiConfig(Checked):
    """Sizes of a Mimi; the defaults are Kyutai's. Names and order follow the path of the audio."""

    prefix: ClassVar[str] = "mimi"
    sizes: ClassVar[tuple[str, ...]] = (
        "sample_rate",
        "filters",
        "kernel",
        "residual_kernel",
        "last_kernel",
        "compress",
        "dim",
        "num_layers",
        "num_heads",
        "hidden",
        "context",
        "stride",
        "quantizer_dim",
        "codebooks",
        "cardinality",
    )

    sample_rate: int = 24000
    """Samples a second."""
    filters: int = 64
    """Channels at the rate of the samples; each downsampling doubles them."""
    ratios: tuple[int, ...] = (4, 5, 6, 8)
    """Factors of the encoder's downsampling convolutions, in the order of the encoder; the decoder's is reversed."""
    kernel: int = 7
    """Width of the first convolution of encoder and decoder."""
    residual_kernel: int = 3
    """Width of the first convolution of a residual block; the second is of width 1."""
    last_kernel: int = 3
    """Width of the last convolution of encoder and decoder."""
    compress: int = 2
    """Factor by which a residual block narrows its channels."""
    dim: int = 512
    """Width of the latents."""
    num_layers: int = 8
    """Layers of each transformer."""
    num_heads: int = 8
    """Attention heads."""
    hidden: int = 2048
    """Hidden width of the feed-forward layers."""
    context: int = 250
    """Latents that attention sees, the present one included: 10 seconds."""
    max_period: float = 10000.0
    """Longest period of the rotary embedding."""
    stride: int = 2
    """Latents a frame: the factor of the last downsampling convolution."""
    quantizer_dim: int = 256
    """Width of the entries of a codebook."""
    codebooks: int = 32
    """Codebooks that there are: one semantic, then the acoustic ones."""
    cardinality: int = 2048
    """Entries of a codebook."""

    def _rules(self) -> Iterator[tuple[str, str]]:
        if min(self.ratios, default=0) < 1:
            yield "ratios", "is no list of factors: give one or more, of 1 or more."
        if not (0 < self.max_period < math.inf):
            yield "max_period", "is not a period: give more than 0, such as 10000."
        if self.dim % (2 * self.num_heads):
            yield "num_heads", f"does not divide mimi.dim={self.dim} into heads of even width: choose one that does."
        if self.filters % self.compress:
            yield "compress", f"does not divide mimi.filters={self.filters}: choose a factor that does."
        if self.codebooks < 2:
            yield "codebooks", "leaves no acoustic ones beside the semantic one: give 2 or more."

    @property
    def hop(self) -> int:
        """Samples of a latent."""
        return math.prod(self.ratios)

    @property
    def frame_size(self) -> int:
        """Samples of a frame."""
        return self.hop * self.stride

    @property
    def frame_rate(self) -> float:
        """Frames a second."""
        return self.sample_rate / self.frame_size

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels before, between and after the downsampling convolutions."""
        return tuple(self.filters * 2**i for i in range(len(self.ratios) + 1))


def shapes(cfg: MimiConfig) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a Mimi's parameters, float32.

    Convolutions are [out, kernel, in], the earliest sample first. Transposed convolutions, of kernel 2 * ratio, are
    [ratio, out, 2, in]: what the input before (0) and the present one (1) add to each of `ratio` outputs. Linear maps
    are [out, in]. Codebooks are the entries themselves.
    """
    return dict(_shapes(cfg))


def _shapes(cfg: MimiConfig) -> Iterator[tuple[str, tuple[int, ...]]]:
    dim, widths, last = cfg.dim, cfg.widths, len(cfg.ratios)

    def conv(name: str, out: int, kernel: int, inputs: int) -> Iterator[tuple[str, tuple[int, ...]]]:
        yield f"{name}/w", (out, kernel, inputs)
        yield f"{name}/b", (out,)

    def residual(name: str, width: int) -> Iterator[tuple[str, tuple[int, ...]]]:
        yield from conv(f"{name}/narrow", width // cfg.compress, cfg.residual_kernel, width)
        yield from conv(f"{name}/wide", width, 1, width // cfg.compress)

    yield from conv("encoder/first", widths[0], cfg.kernel, 1)
    for i, ratio in enumerate(cfg.ratios):
        yield from residual(f"encoder/{i}/residual", widths[i])
        yield from conv(f"encoder/{i}/down", widths[i + 1], 2 * ratio, widths[i])
    yield from conv("encoder/last", dim, cfg.last_kernel, widths[last])
    yield from _transformer("encoder_transformer", cfg)
    yield "downsample/w", (dim, 2 * cfg.stride, dim)
    for part, count in (("semantic", 1), ("acoustic", cfg.codebooks - 1)):
        yield f"quantizer/{part}/input", (cfg.quantizer_dim, dim)
        yield f"quantizer/{part}/output", (dim, cfg.quantizer_dim)
        yield f"quantizer/{part}/codebooks", (count, cfg.cardinality, cfg.quantizer_dim)
    yield "upsample/w", (cfg.stride, 2, dim)
    yield from _transformer("decoder_transformer", cfg)
    yield from conv("decoder/first", widths[last], cfg.kernel, dim)
    for i, ratio in enumerate(reversed(cfg.ratios)):
        wide, narrow = widths[last - i], widths[last - i - 1]
        yield f"decoder/{i}/up/w", (ratio, narrow, 2, wide)
        yield f"decoder/{i}/up/b", (narrow,)
        yield from residual(f"decoder/{i}/residual", narrow)
    yield from conv("decoder/last", 1, cfg.last_kernel, widths[0])


def _transformer(name: str, cfg: MimiConfig) -> Iterator[tuple[str, tuple[int, ...]]]:
    dim = cfg.dim
    for i in range(cfg.num_layers):
        layer = f"{name}/{i}"
        yield f"{layer}/norm1/scale", (dim,)
        yield f"{layer}/norm1/bias", (dim,)
        yield f"{layer}/qkv", (3 * dim, dim)
        yield f"{layer}/out", (dim, dim)
        yield f"{layer}/scale1", (dim,)
        yield f"{layer}/norm2/scale", (dim,)
        yield f"{layer}/norm2/bias", (dim,)
        yield f"{layer}/up", (cfg.hidden, dim)
        yield f"{layer}/down", (dim, cfg.hidden)
        yield f"{layer}/scale2", (dim,)


@dataclasses.dataclass(frozen=True)
class Use:
    """How a Mimi is used. Codes depend on all of it."""

    num_codebooks: int = 8
    """Codebooks that are written and read, the first ones."""
    dtype: Dtype = "float32"
    """Type of weights and activations. Norms, softmax and the search for codes are float32 always."""
    window: Window = "exact"
    """"exact": a stream gives what PyTorch gives for the whole recording. "reference": what PyTorch gives for a stream
    of single frames, whose ring has lost the oldest keys (from 10 seconds on)."""


def check_use(cfg: MimiConfig, use: Use, where: str) -> None:
    """Raises `InputError`, which begins with `where`, unless a Mimi of `cfg` can be used so."""
    for key, kind in (("dtype", Dtype), ("window", Window)):
        config_json.conform(kind, getattr(use, key), where, key)
    count = use.num_codebooks
    if type(count) is not int or not 1 <= count <= cfg.codebooks:
        raise InputError(
            f"{where}: num_codebooks={count} is no number of codebooks of a Mimi that has {cfg.codebooks}: give 1 to"
            f" {cfg.codebooks}."
        )
