"""The depth transformer: within a frame, codebook after codebook, each with weights of its own.

Shapes: N frames (any batch of them), Q = dep_q codebooks, D depth width, H heads, K head width, V codebook entries.
"""

from __future__ import annotations

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from ttt_jax.config import MoshiConfig
from ttt_jax.init import embedding, fan_in_normal, fan_in_uniform
from ttt_jax.moshi.embed import lookup
from ttt_jax.norms import rms_norm


class Cache(NamedTuple):
    """Keys and values of the codebooks done so far in this frame, [L, Q, N, H, K]."""

    k: jax.Array
    v: jax.Array


class DepthTransformer(nn.Module):
    """From a frame's hidden vector and its tokens so far to the logits of the next codebook. No positional embedding.

    `__call__` teaches all codebooks at once; `step` takes one. Both run the same layers: a step is a call of one codebook
    over a cache.
    """

    cfg: MoshiConfig

    def setup(self) -> None:
        """Declares the parameters, stacked by layer (first axis) and codebook."""
        cfg, depth = self.cfg, self.cfg.depth
        q, layers, width = cfg.dep_q, depth.num_layers, depth.dim // depth.num_heads
        heads_in = (layers, q, depth.dim, 3, depth.num_heads, width)
        self.input = self.param("input", fan_in_uniform(1), (q, cfg.dim, depth.dim))
        self.text_emb = self.param("text_emb", embedding, (cfg.text_card + 1, depth.dim))
        self.audio_emb = self.param("audio_emb", embedding, (q - 1, cfg.card + 1, depth.dim))
        self.heads = self.param("heads", fan_in_normal(1), (q, depth.dim, cfg.card))
        self.qkv = self.param("qkv", fan_in_uniform(2), heads_in)
        self.out = self.param("out", fan_in_uniform((2, 3)), (layers, q, depth.num_heads, width, depth.dim))
        self.gate_up = self.param("gate_up", fan_in_uniform(2), (layers, q, depth.dim, 2, depth.hidden))
        self.down = self.param("down", fan_in_uniform(2), (layers, q, depth.hidden, depth.dim))
        self.norm1 = self.param("norm1", nn.initializers.ones, (layers, depth.dim))
        self.norm2 = self.param("norm2", nn.initializers.ones, (layers, depth.dim))

    def __call__(self, hidden: jax.Array, text: jax.Array, audio: jax.Array) -> jax.Array:
        """Teacher-forced logits.

        Args:
          hidden: the temporal transformer's output [N, dim]; text: int32 [N]; audio: int32 [N, Q], the tokens of the same
            column of the delayed grid; the last is not read.

        Returns:
          float32 (or wider) logits [N, Q, V].
        """
        # Codebook-major inside: each codebook's matrix then meets one contiguous matrix of frames.
        x = jnp.einsum("ND,QDE->QNE", hidden, self.input.astype(hidden.dtype))
        tokens = lookup(self.audio_emb, audio[:, :-1], hidden.dtype)
        tokens = jnp.concatenate([lookup(self.text_emb[None], text[:, None], hidden.dtype), tokens], 1)
        x = x + tokens.swapaxes(0, 1)
        codebooks = slice(0, self.cfg.dep_q)
        for layer in range(self.cfg.depth.num_layers):
            q, k, v = self._qkv(x, layer, codebooks)
            x = self._layer(x, q, k, v, layer, codebooks, jnp.tril(jnp.ones((x.shape[0],) * 2, bool)))
        return self._logits(x, codebooks).swapaxes(0, 1)

    def step(self, hidden: jax.Array, token: jax.Array, codebook: int, cache: Cache) -> tuple[jax.Array, Cache]:
        """Logits of one codebook.

        Args:
          hidden: [N, dim]; token: int32 [N], the text token for codebook 0, else the token of the codebook before.
          codebook: which one, a Python number; cache: of the codebooks before.

        Returns:
          Logits [N, V] and the cache with this codebook.
        """
        table = self.text_emb if codebook == 0 else self.audio_emb[codebook - 1]
        x = hidden @ self.input[codebook].astype(hidden.dtype) + lookup(table[None], token[:, None], hidden.dtype)[:, 0]
        x, here, done = x[None], slice(codebook, codebook + 1), slice(0, codebook + 1)
        for layer in range(self.cfg.depth.num_layers):
            q, k, v = self._qkv(x, layer, here)
            cache = Cache(cache.k.at[layer, here].set(k), cache.v.at[layer, here].set(v))
            seen = jnp.ones((1, codebook + 1), bool)
            x = self._layer(x, q, cache.k[layer, done], cache.v[layer, done], layer, here, seen)
        return self._logits(x, here)[0], cache

    def _qkv(self, x: jax.Array, layer: int, codebooks: slice) -> jax.Array:
        kernel = self.qkv[layer, codebooks].astype(x.dtype)
        return jnp.einsum("QND,QDPHK->PQNHK", rms_norm(x, self.norm1[layer]), kernel)

    def _layer(
        self, x: jax.Array, q: jax.Array, k: jax.Array, v: jax.Array, layer: int, codebooks: slice, seen: jax.Array
    ) -> jax.Array:
        wide = jnp.promote_types(x.dtype, jnp.float32)
        scores = jnp.einsum("QNHK,SNHK->NHQS", q, k, preferred_element_type=wide) * q.shape[-1] ** -0.5
        weights = jax.nn.softmax(jnp.where(seen, scores, -jnp.inf), axis=-1).astype(x.dtype)
        read = jnp.einsum("NHQS,SNHK->QNHK", weights, v)
        x = x + jnp.einsum("QNHK,QHKD->QND", read, self.out[layer, codebooks].astype(x.dtype))
        h = jnp.einsum("QND,QDPF->PQNF", rms_norm(x, self.norm2[layer]), self.gate_up[layer, codebooks].astype(x.dtype))
        return x + jnp.einsum("QNF,QFD->QND", jax.nn.silu(h[0]) * h[1], self.down[layer, codebooks].astype(x.dtype))

    def _logits(self, x: jax.Array, codebooks: slice) -> jax.Array:
        wide = jnp.promote_types(x.dtype, jnp.float32)
        return jnp.einsum("QND,QDV->QNV", x, self.heads[codebooks].astype(x.dtype), preferred_element_type=wide)


def init_cache(cfg: MoshiConfig, batch: int) -> Cache:
    """An empty cache for one frame of `batch` rows."""
    depth = cfg.depth
    empty = jnp.zeros((depth.num_layers, cfg.dep_q, batch, depth.num_heads, depth.dim // depth.num_heads), cfg.dtype)
    return Cache(empty, empty)
