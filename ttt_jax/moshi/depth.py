"""The depth transformer: within a frame, codebook after codebook, each with one weight set each or shared ones by a
schedule.

No positional embedding. `teacher_forced` runs all codebooks at once, `step` one over a cache: the same layers.

Shapes: N frames (any batch of them), Q = dep_q codebooks, S weight sets, L layers, D depth width, H heads, K head
  width,
V codebook entries.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

from ttt_jax.config import MoshiConfig
from ttt_jax.moshi.embed import lookup
from ttt_jax.nn.init import embedding, fan_in_normal, fan_in_uniform
from ttt_jax.nn.linear import Kernel, init_kernel, kernel, linear
from ttt_jax.nn.norms import rms_norm

Params = dict[str, Any]
STACKED = ("input", "qkv", "out", "gate_up", "down", "heads")
"""Maps of which a step reads one matrix."""


Cache = list[list[tuple[jax.Array, jax.Array]]]
"""By layer the keys and values [N, H, K] of the codebooks done so far in this frame."""


def init_params(cfg: MoshiConfig, key: jax.Array) -> Params:
    """Initial parameters: layers stacked [L * S, ...] (XLA reads a slice of one axis in place, and would copy one of
    two axes), "input" [S, ...], tables and heads by codebook."""
    depth, q, dim = cfg.depth, cfg.dep_q, cfg.depth.dim
    sets, layers = max(cfg.depth_sets) + 1, depth.num_layers
    heads, width = (depth.num_heads, dim // depth.num_heads), depth.low_rank or dim
    uniform = fan_in_uniform()
    maps = {
        "input": (uniform, (dim,), cfg.dim, (sets,)),
        "heads": (fan_in_normal(), (cfg.card,), dim, (q,)),
        "qkv": (uniform, (3, *heads), dim, (layers * sets,)),
        "out": (uniform, (dim,), dim, (layers * sets,)),
        "gate_up": (uniform, (2, depth.hidden), dim, (layers * sets,)),
        "down": (uniform, (dim,), depth.hidden, (layers * sets,)),
    }
    if depth.low_rank:
        maps["text_emb_up"] = (uniform, (dim,), width, ())
        maps["audio_emb_up"] = (uniform, (dim,), width, (q - 1,))
    text, audio, *keys = jax.random.split(key, 2 + len(maps))
    params = {
        "text_emb": embedding(text, (cfg.text_card + 1, width)),
        "audio_emb": embedding(audio, (q - 1, cfg.card + 1, width)),
        "norm1": jnp.ones((layers, dim)),
        "norm2": jnp.ones((layers, dim)),
    }
    for part, (name, (init, out, inner, lead)) in zip(keys, maps.items(), strict=True):
        params |= init_kernel(part, name, init, cfg.lora.of("depth"), out, inner, lead)
    return params


def teacher_forced(params: Params, hidden: jax.Array, text: jax.Array, audio: jax.Array, cfg: MoshiConfig) -> jax.Array:
    """Teacher-forced logits of all codebooks.

    Args:
      hidden: the temporal transformer's output [N, dim]; text: int32 [N]; audio: int32 [N, Q], the tokens of the same
        column of the delayed grid; the last is not read.

    Returns:
      float32 (or wider) logits [N, Q, V].
    """
    scaling, q = cfg.lora.scaling, cfg.dep_q

    def of_codebooks(kernel: Kernel, layer: int = 0) -> Kernel:
        """The weights of one layer by codebook; without a copy where no two codebooks share a set."""
        sets = max(cfg.depth_sets) + 1
        kernel = kernel.at(slice(layer * sets, (layer + 1) * sets))
        return kernel if cfg.depth_sets == tuple(range(q)) else kernel.at(jnp.array(cfg.depth_sets))

    def each(x: jax.Array, kernel: Kernel, wide: bool = False) -> jax.Array:
        """[Q, N, in] -> [Q, N, *out], each codebook by one matrix."""
        return jax.vmap(lambda x, kernel: linear(x, kernel, scaling, wide))(x, kernel)

    # Codebook-major inside: each codebook's matrix then meets one contiguous matrix of frames.
    x = jax.vmap(lambda kernel: linear(hidden, kernel, scaling))(of_codebooks(kernel(params, "input")))
    embedded = _embed(params, "text", text, cfg, hidden.dtype)[None]
    if q > 1:
        before = lookup(params["audio_emb"], audio[:, :-1], hidden.dtype).swapaxes(0, 1)
        before = each(before, kernel(params, "audio_emb_up")) if cfg.depth.low_rank else before
        embedded = jnp.concatenate([embedded, before])
    x, seen = x + embedded, jnp.tril(jnp.ones((q, q), bool))
    for layer in range(cfg.depth.num_layers):
        qkv, out, gate_up, down = (
            of_codebooks(kernel(params, name), layer) for name in ("qkv", "out", "gate_up", "down")
        )
        y = each(rms_norm(x, params["norm1"][layer]), qkv)
        read = _attend(y[:, :, 0], y[:, :, 1], y[:, :, 2], seen)
        x = x + each(read.reshape(x.shape), out)
        y = each(rms_norm(x, params["norm2"][layer]), gate_up)
        x = x + each(jax.nn.silu(y[:, :, 0]) * y[:, :, 1], down)
    return each(x, kernel(params, "heads"), wide=True).swapaxes(0, 1)


def step(
    params: Params, hidden: jax.Array, token: jax.Array, codebook: int, cache: Cache, cfg: MoshiConfig
) -> tuple[jax.Array, Cache]:
    """Logits of one codebook.

    Args:
      hidden: [N, dim]; token: int32 [N], the text token for codebook 0, else the token of the codebook before.
      codebook: its number, a Python int; cache: of the codebooks before; for codebook 0 an empty list for each layer.

    Returns:
      Logits [N, V] and the cache with this codebook.
    """
    scaling, weights = cfg.lora.scaling, cfg.depth_sets[codebook]
    x = linear(hidden, kernel(params, "input").at(weights), scaling)
    x = x + _embed(params, codebook - 1 if codebook else "text", token, cfg, hidden.dtype)
    done = []
    for layer, before in enumerate(cache):
        index = layer * (max(cfg.depth_sets) + 1) + weights
        qkv, out, gate_up, down = (kernel(params, name).at(index) for name in ("qkv", "out", "gate_up", "down"))
        y = linear(rms_norm(x, params["norm1"][layer]), qkv, scaling)
        done.append([*before, (y[:, 1], y[:, 2])])
        x = x + linear(_attend_few(y[:, 0], done[-1]).reshape(x.shape), out, scaling)
        y = linear(rms_norm(x, params["norm2"][layer]), gate_up, scaling)
        x = x + linear(jax.nn.silu(y[:, 0]) * y[:, 1], down, scaling)
    return linear(x, kernel(params, "heads").at(codebook), scaling, wide=True), done


def _embed(params: Params, table: str | int, token: jax.Array, cfg: MoshiConfig, dtype: jnp.dtype) -> jax.Array:
    """Embeddings [N, D] of tokens [N] by the text table or that of a codebook."""
    rows = params["text_emb"][None] if table == "text" else params["audio_emb"][table : table + 1]
    embedded = lookup(rows, token[:, None], dtype)[:, 0]
    if cfg.depth.low_rank is None:
        return embedded
    up = kernel(params, "text_emb_up") if table == "text" else kernel(params, "audio_emb_up").at(table)
    return linear(embedded, up, cfg.lora.scaling)


def _attend(q: jax.Array, k: jax.Array, v: jax.Array, seen: jax.Array) -> jax.Array:
    """Queries [T, N, H, K] over keys and values [U, N, H, K] where `seen` [T, U]: [T, N, H, K]."""
    wide = jnp.promote_types(q.dtype, jnp.float32)
    scores = jnp.einsum("TNHK,UNHK->NHTU", q, k, preferred_element_type=wide) * q.shape[-1] ** -0.5
    weights = jax.nn.softmax(jnp.where(seen, scores, -jnp.inf), axis=-1).astype(q.dtype)
    return jnp.einsum("NHTU,UNHK->TNHK", weights, v)


def _attend_few(q: jax.Array, seen: list[tuple[jax.Array, jax.Array]]) -> jax.Array:
    """A query [N, H, K] over the keys and values of a few codebooks, [N, H, K] each: [N, H, K].

    Written out term by term, it is one or two kernels instead of six: at this size starting them is what takes time.
    """
    dtype, wide = q.dtype, jnp.promote_types(q.dtype, jnp.float32)
    q = q.astype(wide) * q.shape[-1] ** -0.5
    scores = [(q * k.astype(wide)).sum(-1, keepdims=True) for k, _ in seen]
    highest = functools.reduce(jnp.maximum, scores)
    weights = [jnp.exp(score - highest) for score in scores]
    total = sum(weights)
    return sum(w / total * v.astype(wide) for w, (_, v) in zip(weights, seen, strict=True)).astype(dtype)
