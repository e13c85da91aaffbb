"""The parts of Mimi: causal convolutions, transformers and the split residual quantiser, as functions on arrays.

Shapes: B rows, T steps of the call at the part's rate, C channels, D width of a latent, Q codebooks. A part of the
state is what a part of the network must know of the past: the last inputs of a convolution, the keys and values of
attention. `Advance` says how many steps of the call each row keeps; those that it does not keep lie behind the others.

Every convolution is a product of windows with a matrix. A transposed convolution of kernel 2 * ratio is a convolution
of kernel 2 with `ratio` times the outputs, so it needs the last input, not the overlap of outputs.

Products of float32 are computed in float32 on every device (`_PRECISION`): the shorter formats that GPUs and TPUs take
by default change codes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp

from ttt_jax.nn import linear
from ttt_jax.nn.rotary import rotate

Params = Mapping[str, jax.Array]
"""Parameters by the names of `ttt_jax.codec.mimi.config.shapes`."""
_PRECISION = jax.lax.Precision.HIGHEST
_REDUCED = 4
"""Rows up to which a GPU reads a matrix faster by reductions than by the library's products."""
_HIDDEN = -1e30  # finite: a query without any key must not turn into NaN
_NORM_EPS = 1e-5


class Advance(NamedTuple):
    """Frames of a call that each row keeps, int32 [B], of `frames` that the call has."""

    count: jax.Array
    frames: int

    def tail(self, line: jax.Array, size: int) -> jax.Array:
        """The last `size` steps before the next call, of `line` [B, size + T, C]: the steps before the call and those
        of the call."""
        if self.frames == 1:
            return jnp.where(_wide(self.count == 1, line), line[:, line.shape[1] - size :], line[:, :size])
        steps = self.count * ((line.shape[1] - size) // self.frames)
        return jnp.take_along_axis(line, (steps[:, None] + jnp.arange(size))[..., None], 1)


def product(x: jax.Array, w: jax.Array) -> jax.Array:
    """W x, [..., out] of [..., in] and [out, in]."""
    return linear.product(x, w, precision=_PRECISION, reduced=_REDUCED)


# Convolutions


def conv(
    params: Params, name: str, x: jax.Array, past: jax.Array, advance: Advance, stride: int = 1
) -> tuple[jax.Array, jax.Array]:
    """A causal convolution, [B, T, C] -> [B, T / stride, out], and its past [B, kernel - stride, C] after the call."""
    w = params[f"{name}/w"]
    y, past = _windows(x, past, advance, w.shape[1], stride)
    y = product(y, w.reshape(len(w), -1))
    return _biased(params, name, y), past


def conv_transpose(
    params: Params, name: str, x: jax.Array, past: jax.Array, advance: Advance
) -> tuple[jax.Array, jax.Array]:
    """A causal transposed convolution, [B, T, C] -> [B, T * ratio, out], and its past [B, 1, C] after the call."""
    w = params[f"{name}/w"]
    ratio, out = w.shape[:2]
    y, past = _windows(x, past, advance, 2, 1)
    y = product(y, w.reshape(ratio * out, -1)).reshape(len(x), -1, out)
    return _biased(params, name, y), past


def upsample(params: Params, x: jax.Array, past: jax.Array, advance: Advance) -> tuple[jax.Array, jax.Array]:
    """The transposed convolution from frames to latents, each channel on its own: [B, T, D] -> [B, T * stride, D]."""
    w = params["upsample/w"]
    line = jnp.concatenate([past, x], 1)
    y = line[:, :-1, None] * w[:, 0] + line[:, 1:, None] * w[:, 1]
    return y.reshape(len(x), -1, x.shape[2]), advance.tail(line, 1)


def residual(params: Params, name: str, x: jax.Array, past: jax.Array, advance: Advance) -> tuple[jax.Array, jax.Array]:
    """SEANet's residual block, [B, T, C]: x + wide(elu(narrow(elu(x))))."""
    y, past = conv(params, f"{name}/narrow", jax.nn.elu(x), past, advance)
    w = params[f"{name}/wide/w"]
    return x + _biased(params, f"{name}/wide", product(jax.nn.elu(y), w.reshape(len(w), -1))), past


def _windows(x: jax.Array, past: jax.Array, advance: Advance, kernel: int, stride: int) -> tuple[jax.Array, jax.Array]:
    """The inputs of each output of a convolution, [B, T / stride, kernel * C], and the past after the call."""
    line = jnp.concatenate([past, x], 1)
    blocks = line.reshape(len(x), -1, stride * x.shape[2])
    count = x.shape[1] // stride
    windows = jnp.concatenate([blocks[:, i : i + count] for i in range(kernel // stride)], 2)
    return windows, advance.tail(line, past.shape[1])


def _biased(params: Params, name: str, y: jax.Array) -> jax.Array:
    bias = params.get(f"{name}/b")
    return y if bias is None else y + bias


# Transformers


class Sight(NamedTuple):
    """Where the latents of a call stand, and which keys each of them sees."""

    query: jax.Array
    """Position of each latent, int32 [B, T]; unbounded, never wrapped."""
    visible: jax.Array
    """bool [B, T, keys]."""
    slot: jax.Array
    """Slot of the cache that stores each latent, int32 [B, T]; S: none."""


def cache_slots(context: int, stride: int) -> int:
    """Slots S of a cache: a frame is written before its first latent reads, which must not lose a key by it."""
    return context + stride


def sight(position: jax.Array, advance: Advance, stride: int, context: int, lossy: bool) -> Sight:
    """The `Sight` of a call in rows that have seen `position` latents, int32 [B], `stride` of them a frame.

    A latent sees the last `context` latents, itself included. With `lossy`, the last latent of a frame does, the one
    before it sees one less, and so on: PyTorch's stream writes a frame into a ring of `context` before it reads.
    """
    slots, latents = cache_slots(context, stride), advance.frames * stride
    count = (advance.count * stride)[:, None]
    place = jnp.arange(latents)
    query = position[:, None] + place
    # A call of one frame writes before it reads. A longer one reads cache and call, then writes.
    last = position[:, None] + (latents if advance.frames == 1 else 0) - 1
    key = last - (last - jnp.arange(slots)) % slots  # position of the latent in each slot; negative if it is empty
    if advance.frames > 1:
        key = jnp.concatenate([key, query], 1)
    distance = query[:, :, None] - key[:, None]
    reach = context - (stride - 1 - query % stride if lossy else 0)
    visible = (key >= 0)[:, None] & (distance >= 0) & (distance < jnp.broadcast_to(reach, query.shape)[:, :, None])
    stays = (place < count) & (place >= count - slots)
    return Sight(query, visible, jnp.where(stays, query % slots, slots))


def transformer(
    params: Params,
    name: str,
    x: jax.Array,
    caches: tuple[jax.Array, ...],
    where: Sight,
    heads: int,
    max_period: float,
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    """Causal transformer layers with LayerNorm, rotary embedding, GELU and layer scales: latents [B, T, D].

    A layer's cache is a ring of S slots of keys (rotated) and values, [B, S, 2 * D].
    """
    after = []
    for i, cache in enumerate(caches):
        layer = f"{name}/{i}"
        h, cache = _attention(params, layer, _norm(params, f"{layer}/norm1", x), cache, where, heads, max_period)
        x = x + params[f"{layer}/scale1"] * h
        h = product(_norm(params, f"{layer}/norm2", x), params[f"{layer}/up"])
        x = x + params[f"{layer}/scale2"] * product(jax.nn.gelu(h, approximate=False), params[f"{layer}/down"])
        after.append(cache)
    return x, tuple(after)


def _norm(params: Params, name: str, x: jax.Array) -> jax.Array:
    """LayerNorm over the last axis, in float32 or wider."""
    wide = jnp.promote_types(x.dtype, jnp.float32)
    y = x.astype(wide)
    y = y - y.mean(-1, keepdims=True)
    y = y * jax.lax.rsqrt((y * y).mean(-1, keepdims=True) + _NORM_EPS)
    y = (y * params[f"{name}/scale"].astype(wide) + params[f"{name}/bias"].astype(wide)).astype(x.dtype)
    return jax.lax.optimization_barrier(y)  # else a reduction over a matrix computes it again for each row


def _attention(
    params: Params, layer: str, x: jax.Array, cache: jax.Array, where: Sight, heads: int, max_period: float
) -> tuple[jax.Array, jax.Array]:
    rows, steps, dim = x.shape
    qkv = product(x, params[f"{layer}/qkv"])
    turned = rotate(qkv[..., : 2 * dim].reshape(rows, steps, 2 * heads, -1), where.query, max_period)
    q, k = turned[:, :, :heads], turned[:, :, heads:].reshape(x.shape)
    new = jnp.concatenate([k, qkv[..., 2 * dim :]], 2)
    after = cache.at[jnp.arange(rows)[:, None], where.slot].set(new, mode="drop")
    one_frame = where.visible.shape[2] == cache.shape[1]
    seen = after if one_frame else jnp.concatenate([cache, new], 1)
    keys, values = (seen[..., i * dim :][..., :dim].reshape(rows, -1, heads, dim // heads) for i in range(2))
    args = q * (dim // heads) ** -0.5, keys, values, where.visible
    read = jax.lax.platform_dependent(*args, cuda=_attend_few, default=_attend) if one_frame else _attend(*args)
    return product(read.reshape(x.shape), params[f"{layer}/out"]), after


def _attend(q: jax.Array, keys: jax.Array, values: jax.Array, visible: jax.Array) -> jax.Array:
    """Attention of queries [B, T, H, K] to keys and values [B, S, H, K]; softmax in float32 or wider."""
    wide = jnp.promote_types(q.dtype, jnp.float32)
    scores = jnp.einsum("BTHK,BSHK->BHTS", q, keys, precision=_PRECISION, preferred_element_type=wide)
    weights = jax.nn.softmax(jnp.where(visible[:, None], scores, _HIDDEN), -1).astype(q.dtype)
    return jnp.einsum("BHTS,BSHK->BTHK", weights, values, precision=_PRECISION)


def _attend_few(q: jax.Array, keys: jax.Array, values: jax.Array, visible: jax.Array) -> jax.Array:
    """`_attend` of few queries as reductions, which read keys and values in place: products copy them first."""
    wide = jnp.promote_types(q.dtype, jnp.float32)
    scores = (q[:, :, None].astype(wide) * keys[:, None].astype(wide)).sum(-1)
    weights = jax.nn.softmax(jnp.where(visible[..., None], scores, _HIDDEN), 2)
    return (weights[..., None] * values[:, None].astype(wide)).sum(2).astype(q.dtype)


# Quantiser


def nearest(x: jax.Array, codebook: jax.Array, half_norms: jax.Array) -> jax.Array:
    """Entries of a codebook [entries, E] that lie nearest to vectors [..., E] in the Euclidean distance, int32 [...].

    argmin |x - e|^2 = argmax <x, e> - |e|^2 / 2; `half_norms` are the |e|^2 / 2. Of equally near ones the first.
    """
    return (product(x, codebook) - half_norms).argmax(-1).astype(jnp.int32)


def quantise(params: Params, latents: jax.Array, num_codebooks: int) -> jax.Array:
    """Codes int32 [B, Q, T] of latents [B, T, D]: one semantic codebook, then acoustic ones, each of which quantises
    what those before it leave of the latent. The acoustic ones read the latent itself, not what the semantic one
    leaves."""
    codes = []
    for part, count in (("semantic", 1), ("acoustic", num_codebooks - 1)):
        name = f"quantizer/{part}"
        rest = product(latents.astype(jnp.float32), params[f"{name}/input"])
        for i in range(count):
            codebook = params[f"{name}/codebooks"][i]
            codes.append(nearest(rest, codebook, params[f"{name}/half_norms"][i]))
            rest = rest - codebook[codes[-1]]
    return jnp.stack(codes, 1)


def dequantise(params: Params, codes: jax.Array) -> jax.Array:
    """Latents float32 [B, T, D] of codes [B, Q, T]."""
    total = 0.0
    for part, rows in (("semantic", codes[:, :1]), ("acoustic", codes[:, 1:])):
        codebooks = params[f"quantizer/{part}/codebooks"]
        if rows.shape[1]:
            entries = sum(codebooks[i][rows[:, i]] for i in range(rows.shape[1]))
            total = total + product(entries, params[f"quantizer/{part}/output"])
    return total


def _wide(rows: jax.Array, like: jax.Array) -> jax.Array:
    """A value for each row, [B], with as many axes as `like`."""
    return rows.reshape(-1, *(1,) * (like.ndim - 1))
