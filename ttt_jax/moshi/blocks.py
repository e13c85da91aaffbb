"""One layer of the temporal transformer: attention, TTT where configured, feed-forward. Linen declares its
parameters."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import flax.linen as nn
import jax

from ttt_jax.config import MoshiConfig
from ttt_jax.nn.init import linear_kernel
from ttt_jax.nn.linear import declare, linear
from ttt_jax.nn.norms import rms_norm
from ttt_jax.nn.rotary import rotate
from ttt_jax.ttt.layer import Control, Measurement, TTTLayer
from ttt_jax.ttt.state import TTTState

Remat = Literal["none", "dots", "layers"]
REMAT = {
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "layers": jax.checkpoint_policies.nothing_saveable,
}
"""By name, what the backward pass computes again: all but a layer's products with weights, all but its inputs."""

Attend = Callable[[jax.Array, jax.Array, jax.Array], tuple[jax.Array, Any]]
"""From queries, keys and values [B, T, H, K] to the read values of the same shape, and a result for the caller."""


class Attention(nn.Module):
    """Multi-head self-attention with rotary positions, no biases."""

    cfg: MoshiConfig

    @nn.compact
    def __call__(self, x: jax.Array, position: jax.Array, attend: Attend) -> tuple[jax.Array, Any]:
        """x [B, T, dim] at positions [B, T] -> update [B, T, dim] and the caller's result of `attend`."""
        cfg, lora = self.cfg, self.cfg.lora.of("attention")
        heads = (cfg.num_heads, cfg.head_dim)
        qkv = linear(x, declare(self, "qkv", linear_kernel, lora, (3, *heads), cfg.dim), lora.scaling)
        q, k, v = (qkv[:, :, i] for i in range(3))
        q, k = (rotate(y, position, cfg.max_period) for y in (q, k))
        read, kept = attend(q, k, v)
        out = declare(self, "out", linear_kernel, lora, (cfg.dim,), cfg.dim)
        return linear(read.reshape(x.shape), out, lora.scaling), kept


class FeedForward(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x)), no biases."""

    cfg: MoshiConfig

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """[..., dim] -> [..., dim]."""
        dim, hidden, lora = self.cfg.dim, self.cfg.hidden, self.cfg.lora.of("ffn")
        h = linear(x, declare(self, "gate_up", linear_kernel, lora, (2, hidden), dim), lora.scaling)
        gated = jax.nn.silu(h[..., 0, :]) * h[..., 1, :]
        return linear(gated, declare(self, "down", linear_kernel, lora, (dim,), hidden), lora.scaling)


class Block(nn.Module):
    """Pre-norm layer: x + attention, then the TTT layer, then x + feed-forward."""

    cfg: MoshiConfig
    has_ttt: bool
    remat: Remat = "none"
    """Recomputation in the backward pass (`REMAT`)."""

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        mask: jax.Array,
        position: jax.Array,
        attend: Attend,
        ttt: TTTState | None,
        measured: bool = False,
        control: Control | None = None,
        close: bool = True,
    ) -> tuple[jax.Array, tuple[Any, TTTState | None, Measurement | None]]:
        """One layer over a call.

        Args:
          x: [B, T, dim]; mask: bool [B, T]; position: int32 [B, T]; attend: attention's rule;
          ttt: the TTT state, None in layers without TTT; measured: whether to measure TTT layers;
          control: of TTT layers, by row; close: as in `TTTLayer`.

        Returns:
          x and (the caller's result of `attend`, new TTT state, measurement); the last two are None in layers without
          TTT.
        """
        norm = lambda name: self.param(name, nn.initializers.ones, (self.cfg.dim,))  # noqa: E731
        attention, feed_forward = Attention, FeedForward
        if self.remat != "none":
            # Attention and feed-forward apart: the TTT layer stores what its backward pass needs, and a second run of
            # its scan would cost more than all other recomputation.
            attention = nn.remat(Attention, policy=REMAT[self.remat], static_argnums=(3,), prevent_cse=self.has_ttt)
            feed_forward = nn.remat(FeedForward, policy=REMAT[self.remat], prevent_cse=self.has_ttt)
        update, kept = attention(self.cfg, name="attention")(rms_norm(x, norm("norm1")), position, attend)
        x = x + update
        measurement = None
        if self.has_ttt:
            x, ttt, measurement = TTTLayer(self.cfg, name="ttt")(x, mask, ttt, measured, control, close)
        x = x + feed_forward(self.cfg, name="ffn")(rms_norm(x, norm("norm2")))
        return x, (kept, ttt, measurement)
