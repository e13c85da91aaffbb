"""Mimi as pure functions: audio to codes, codes to audio. A stream's state is passed in and returned.

Défossez et al. 2024 (arXiv 2410.00037), section 3.3; Kyutai's PyTorch package `moshi` is the reference. One function
serves whole recordings, blocks and single frames, on any number of rows. In float32 and with the exact window its
results are those of PyTorch for whole recordings.

Shapes: B rows, n frames of the call, Q codebooks, S samples of a frame.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ttt_jax.codec.mimi import layers
from ttt_jax.codec.mimi.config import MimiConfig, Use, shapes
from ttt_jax.codec.mimi.layers import Advance, Params

ABSENT = -1
"""Code of a frame that the mask leaves out."""


class State(NamedTuple):
    """What an encoder or a decoder knows of the past of each row; zeros before the first frame."""

    past: jax.Array
    """Last inputs of all convolutions, [B, N]."""
    caches: tuple[jax.Array, ...]
    """Keys and values of each attention layer, [B, slots, 2 * D]."""
    position: jax.Array
    """Latents so far, int32 [B]."""


def prepare(params: Mapping[str, np.ndarray], cfg: MimiConfig, use: Use) -> dict[str, jax.Array]:
    """Parameters as the functions here take them, of parameters by the names of `config.shapes`.

    Weights are cast to `use.dtype`, the quantiser's stay float32. Codebooks beyond `use.num_codebooks` are left out.
    All vectors become one, as a call's cost on a GPU grows with the number of its arguments.
    """
    ready, vectors = {}, []
    for name, shape in shapes(cfg).items():
        value = params[name]
        if len(shape) == 1:
            vectors.append(value)
            continue
        if name == "quantizer/acoustic/codebooks":
            value = value[: use.num_codebooks - 1]
        ready[name] = jnp.asarray(value, jnp.float32 if name.startswith("quantizer/") else use.dtype)
        if name.endswith("/codebooks"):
            half_norms = 0.5 * np.square(np.asarray(value, np.float64)).sum(-1)
            ready[name.removesuffix("codebooks") + "half_norms"] = jnp.asarray(half_norms, jnp.float32)
    return ready | {"vectors": jnp.asarray(np.concatenate(vectors), use.dtype)}


def by_name(params: Params, cfg: MimiConfig) -> dict[str, jax.Array]:
    """Parameters of `prepare` by the names of `config.shapes`, vectors too. The functions here take both forms; this
    one is for tuning."""
    if "vectors" not in params:
        return dict(params)
    lengths = {name: shape[0] for name, shape in shapes(cfg).items() if len(shape) == 1}
    ends = np.cumsum([*lengths.values()])
    vectors = jnp.split(params["vectors"], ends[:-1])
    return {**params, **dict(zip(lengths, vectors, strict=True))}


def init_params(cfg: MimiConfig, seed: int) -> dict[str, np.ndarray]:
    """Random parameters of a size that keeps activations of the order of 1: for tests and benchmarks."""
    rng = np.random.default_rng(seed)

    def make(name: str, shape: tuple[int, ...]) -> np.ndarray:
        leaf = name.rsplit("/", 1)[1]
        noise = rng.standard_normal(shape, np.float32)
        if leaf in ("b", "bias"):
            return 0.02 * noise
        if leaf.startswith("scale"):
            return 1 + 0.1 * noise if leaf == "scale" else 0.1 + 0.01 * noise
        if leaf == "codebooks":
            return 0.1 * noise
        fan_in = 2 if name == "upsample/w" else int(np.prod(shape[1:])) // (shape[1] if "/up/w" in name else 1)
        return noise * np.float32(fan_in) ** -0.5

    return {name: make(name, shape) for name, shape in shapes(cfg).items()}


def init_encoder(cfg: MimiConfig, use: Use, batch: int) -> State:
    """The state of `batch` streams of audio before their first sample."""
    return _init(cfg, use, batch, _encoder_past(cfg))


def init_decoder(cfg: MimiConfig, use: Use, batch: int) -> State:
    """The state of `batch` streams of codes before their first frame."""
    return _init(cfg, use, batch, _decoder_past(cfg))


Sizes = dict[str, tuple[int, int]]
"""Steps and channels of the last inputs of each convolution."""


def _encoder_past(cfg: MimiConfig) -> Sizes:
    sizes = {"encoder/first": (cfg.kernel - 1, 1), "encoder/last": (cfg.last_kernel - 1, cfg.widths[-1])}
    for i, (ratio, width) in enumerate(zip(cfg.ratios, cfg.widths[:-1], strict=True)):
        sizes[f"encoder/{i}/residual"] = (cfg.residual_kernel - 1, width)
        sizes[f"encoder/{i}/down"] = (ratio, width)
    return sizes | {"downsample": (cfg.stride, cfg.dim)}


def _decoder_past(cfg: MimiConfig) -> Sizes:
    sizes = {"decoder/first": (cfg.kernel - 1, cfg.dim), "decoder/last": (cfg.last_kernel - 1, cfg.filters)}
    for i, width in enumerate(cfg.widths[:0:-1]):
        sizes[f"decoder/{i}/up"] = (1, width)
        sizes[f"decoder/{i}/residual"] = (cfg.residual_kernel - 1, width // 2)
    return sizes | {"upsample": (1, cfg.dim)}


def _init(cfg: MimiConfig, use: Use, batch: int, sizes: Sizes) -> State:
    slots = layers.cache_slots(cfg.context, cfg.stride)
    caches = tuple(jnp.zeros((batch, slots, 2 * cfg.dim), use.dtype) for _ in range(cfg.num_layers))
    past = jnp.zeros((batch, sum(steps * width for steps, width in sizes.values())), use.dtype)
    return State(past, caches, jnp.zeros(batch, jnp.int32))


def _unpack(past: jax.Array, sizes: Sizes) -> dict[str, jax.Array]:
    """The last inputs of each convolution, [B, steps, C]."""
    parts = jnp.split(past, np.cumsum([steps * width for steps, width in sizes.values()])[:-1], 1)
    return {name: part.reshape(len(past), *sizes[name]) for name, part in zip(sizes, parts, strict=True)}


def _pack(parts: Mapping[str, jax.Array], sizes: Sizes) -> jax.Array:
    return jnp.concatenate([parts[name].reshape(len(parts[name]), -1) for name in sizes], 1)


def reset(state: State, rows: jax.Array) -> State:
    """A state in which the streams of `rows`, bool [B], begin anew."""
    return jax.tree.map(lambda x: jnp.where(rows.reshape(-1, *(1,) * (x.ndim - 1)), 0, x), state)


def encode(
    params: Params, audio: jax.Array, mask: jax.Array, state: State, cfg: MimiConfig, use: Use
) -> tuple[jax.Array, State]:
    """The next frames of each stream to codes.

    Args:
      params: of `prepare`.
      audio: float32 [B, n * S], full scale 1; mask: bool [B, n], the frames that there are.

    Returns:
      int32 [B, Q, n], -1 in frames that the mask leaves out, and the state after the call.
    """
    latents, state = encode_latents(params, audio, mask, state, cfg, use)
    codes = layers.quantise(params, latents, use.num_codebooks)
    return jnp.where(mask[:, None], codes, ABSENT), state


def encode_latents(
    params: Params, audio: jax.Array, mask: jax.Array, state: State, cfg: MimiConfig, use: Use
) -> tuple[jax.Array, State]:
    """`encode` without its quantiser: latents [B, n, D] of type `use.dtype`, of any value in frames left out."""
    rows, frames = mask.shape
    params, sizes = by_name(params, cfg), _encoder_past(cfg)
    past, advance = _unpack(state.past, sizes), Advance(mask.sum(1), frames)
    run, after = _runner(params, past, advance)
    x = jnp.where(mask[..., None], audio.reshape(rows, frames, -1), 0)
    x = _first(x, mask).reshape(rows, -1, 1).astype(use.dtype)
    x = run(layers.conv, "encoder/first", x)
    for i, ratio in enumerate(cfg.ratios):
        x = run(layers.residual, f"encoder/{i}/residual", x)
        x = run(layers.conv, f"encoder/{i}/down", jax.nn.elu(x), ratio)
    x = run(layers.conv, "encoder/last", jax.nn.elu(x))
    x, caches = _transformer(params, "encoder_transformer", x, state, advance, cfg, use)
    # The reference pads a stream's beginning here with its first latent, elsewhere with zeros.
    begins = (state.position == 0)[:, None, None]
    before = jnp.where(begins, x[:, :1], past["downsample"])
    x, last = layers.conv(params, "downsample", x, before, advance, cfg.stride)
    after["downsample"] = jnp.where(advance.count[:, None, None] > 0, last, past["downsample"])
    return _back(x, mask), State(_pack(after, sizes), caches, state.position + advance.count * cfg.stride)


def decode(
    params: Params, codes: jax.Array, mask: jax.Array, state: State, cfg: MimiConfig, use: Use
) -> tuple[jax.Array, State]:
    """The next frames of each stream of codes to audio.

    Args:
      params: of `prepare`.
      codes: int [B, q, n] of the first q codebooks, 1 <= q <= Q; mask: bool [B, n], the frames that there are.

    Returns:
      float32 [B, n * S], 0 in frames that the mask leaves out, and the state after the call.
    """
    return decode_latents(params, layers.dequantise(params, jnp.maximum(codes, 0)), mask, state, cfg, use)


def decode_latents(
    params: Params, latents: jax.Array, mask: jax.Array, state: State, cfg: MimiConfig, use: Use
) -> tuple[jax.Array, State]:
    """`decode` of latents [B, n, D], such as quantised ones with a gradient."""
    rows, frames = mask.shape
    params, sizes = by_name(params, cfg), _decoder_past(cfg)
    past, advance = _unpack(state.past, sizes), Advance(mask.sum(1), frames)
    run, after = _runner(params, past, advance)
    x = _first(jnp.where(mask[..., None], latents, 0), mask).astype(use.dtype)
    x, after["upsample"] = layers.upsample(params, x, past["upsample"], advance)
    x, caches = _transformer(params, "decoder_transformer", x, state, advance, cfg, use)
    x = run(layers.conv, "decoder/first", x)
    for i in range(len(cfg.ratios)):
        x = run(layers.conv_transpose, f"decoder/{i}/up", jax.nn.elu(x))
        x = run(layers.residual, f"decoder/{i}/residual", x)
    x = run(layers.conv, "decoder/last", jax.nn.elu(x))
    audio = _back(x.astype(jnp.float32).reshape(rows, frames, -1), mask)
    audio = jnp.where(mask[..., None], audio, 0).reshape(rows, -1)
    return audio, State(_pack(after, sizes), caches, state.position + advance.count * cfg.stride)


def _runner(
    params: Params, past: Mapping[str, jax.Array], advance: Advance
) -> tuple[Callable[..., jax.Array], dict[str, jax.Array]]:
    """Returns a function that runs a layer by name, and the last inputs that it leaves for the next call."""
    after = {}

    def run(layer: Callable[..., tuple[jax.Array, jax.Array]], name: str, x: jax.Array, *args: int) -> jax.Array:
        y, after[name] = layer(params, name, x, past[name], advance, *args)
        return y

    return run, after


def _transformer(
    params: Params, name: str, x: jax.Array, state: State, advance: Advance, cfg: MimiConfig, use: Use
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    where = layers.sight(state.position, advance, cfg.stride, cfg.context, use.window == "reference")
    return layers.transformer(params, name, x, state.caches, where, cfg.num_heads, cfg.max_period)


def _first(frames: jax.Array, mask: jax.Array) -> jax.Array:
    """The frames [B, n, ...] that the mask keeps in front of the others, in order."""
    if mask.shape[1] == 1:
        return frames
    order = jnp.argsort(~mask, axis=1, stable=True)
    return jnp.take_along_axis(frames, order[..., None], 1)


def _back(frames: jax.Array, mask: jax.Array) -> jax.Array:
    """Undoes `_first`."""
    if mask.shape[1] == 1:
        return frames
    rank = jnp.maximum(jnp.cumsum(mask, 1) - 1, 0)
    return jnp.take_along_axis(frames, rank[..., None], 1)
