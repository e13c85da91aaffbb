"""The TTT layer: parameters, and the map from hidden vectors to the inner loop's queries, keys, targets and rates."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from ttt_jax.config import MoshiConfig
from ttt_jax.distributed.sharding import by_rows
from ttt_jax.nn.init import fan_in_normal, fan_in_uniform, linear_kernel
from ttt_jax.nn.linear import Kernel, linear
from ttt_jax.nn.norms import rms_norm
from ttt_jax.nn.rotary import rotate
from ttt_jax.ttt import network
from ttt_jax.ttt import state as ttt_state
from ttt_jax.ttt.loop import inner_loop
from ttt_jax.ttt.measure import InnerMeasurement
from ttt_jax.ttt.one_frame import one_frame
from ttt_jax.ttt.state import TTTState

UNIT_EPS = 1e-12  # under the root of the norm of q and k
TARGET_EPS = 1e-10  # added to the target's variance
POST_NORM_EPS = 1e-6
ROPE_PERIOD = 10000.0


class Measurement(NamedTuple):
    """Measurement of a TTT layer for each frame of a call; 0 where masked."""

    inner: InnerMeasurement
    """Inner losses and displacement, [B, T, H]."""
    rate: jax.Array
    """Inner rate eta, [B, T, H]."""
    read: jax.Array
    """Input of the layer, the residual stream after attention, [B, T, dim]."""
    output: jax.Array
    """Output before the gate, [B, T, dim]: the layer adds tanh(alpha) times this."""


class Control(NamedTuple):
    """What rows of a running stream do with their memory, other than learning and reading as trained."""

    learns: jax.Array
    """bool [B]; the other rows read their fast weights as they stand, and their state does not change."""
    gate: jax.Array
    """float32 [B], tanh(alpha) of all channels; NaN: as learned."""


class TTTLayer(nn.Module):
    """x + tanh(alpha) * Wo post_norm(q + LN(f_{W_i}(q))), heads joined; alpha per channel."""

    cfg: MoshiConfig

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        mask: jax.Array,
        state: TTTState,
        measured: bool = False,
        control: Control | None = None,
        close: bool = True,
    ) -> tuple[jax.Array, TTTState, Measurement | None]:
        """Runs the layer over a call of any length.

        Args:
          x: hidden vectors [B, T, dim]; masked frames may hold any value, NaN included.
          mask: bool [B, T], valid frames; masked frames take no place in a mini-batch, and their output is 0.
          state: of `init_state` or of the previous call.
          measured: whether to measure, too.
          control: by row; None: every row learns, and gates are as learned.
          close: whether a call of one frame closes its mini-batch; else the caller does, by `state.close`.

        Returns:
          [B, T, dim] in the type of `x`, the new state, and the measurement or None.
        """
        cfg, heads, width = self.cfg, self.cfg.num_heads, self.cfg.head_dim
        wide = jnp.promote_types(x.dtype, jnp.float32)
        x = jnp.where(mask[..., None], x, 0)
        h = rms_norm(x, self.param("norm", nn.initializers.ones, (cfg.dim,))) if cfg.ttt.pre_norm else x

        # Queries start equal to keys: a frame then reads the values of similar frames from the first step on. With
        # other initial queries, learning to read takes far longer or fails (docs/results/memory_layers.md).
        k, q, v = (
            self._project(name, h, like).reshape(*x.shape[:2], heads, width).astype(wide)
            for name, like in (("k", None), ("q", "k"), ("v", None))
        )
        q, k = (y * jax.lax.rsqrt((y * y).sum(-1, keepdims=True) + UNIT_EPS) for y in (q, k))
        if cfg.ttt.rope:
            # Positions start from the state's count, so that any split of a mini-batch into calls gives the same
            # positions.
            position = (state.count[:, None] + jnp.cumsum(mask, 1) - 1) % cfg.ttt.mini_batch
            q, k = (rotate(y, position, ROPE_PERIOD) for y in (q, k))

        scale = self.param("ln_scale", nn.initializers.ones, (heads, width)).astype(wide)
        bias = self.param("ln_bias", nn.initializers.zeros, (heads, width)).astype(wide)
        r = v - k
        r = r - r.mean(-1, keepdims=True)
        variance = (r * r).sum(-1, keepdims=True) / (width - 1)
        target = scale * r * jax.lax.rsqrt(variance + TARGET_EPS) + bias

        rate_weight = self.param("rate_weight", nn.initializers.normal(0.02), (heads, cfg.dim)).astype(wide)
        rate_bias = self.param("rate_bias", nn.initializers.zeros, (heads,)).astype(wide)
        rate = jax.nn.sigmoid(jnp.einsum("BTD,HD->BTH", h.astype(wide), rate_weight) + rate_bias)
        eta = cfg.inner_lr / width * rate
        if control is not None:
            eta = jnp.where(control.learns[:, None, None], eta, 0)

        base = tuple(
            network.Affine(
                self.param(f"inner_w{layer}", fan_in_normal(in_axis=1), (heads, i, o)).astype(wide),
                self.param(f"inner_b{layer}", nn.initializers.zeros, (heads, o)).astype(wide),
            )
            for layer, (i, o) in enumerate(network.widths(width, cfg.ttt.hidden))
        )
        # Sharded by heads over a mesh: the inner loop then needs nothing from another device.
        inputs = network.Inputs(*(by_rows(y, None, "tensor") for y in (q, k, target, eta)))
        arguments = base, scale, bias, state, inputs, mask, cfg.ttt, measured
        if x.shape[1] == 1:
            after, z, of_inner = one_frame(*arguments)
            if control is not None:  # with a rate of 0 it has left no step
                after = after._replace(count=jnp.where(control.learns, after.count, state.count))
            if close:
                run = jax.tree.map(lambda leaf: leaf[None], (state, after))
                after = jax.tree.map(lambda leaf: leaf[0], ttt_state.close(*run, [base], cfg.ttt))
        else:
            after, z, of_inner = inner_loop(*arguments)
            if control is not None:
                after = _where(control.learns, after, state)

        z = z.reshape(x.shape)
        if cfg.ttt.post_norm:
            z = network.layer_norm(
                z,
                self.param("post_norm_scale", nn.initializers.ones, (cfg.dim,)).astype(wide),
                self.param("post_norm_bias", nn.initializers.zeros, (cfg.dim,)).astype(wide),
                POST_NORM_EPS,
            )
        gate = jnp.tanh(self.param("gate", nn.initializers.constant(cfg.ttt.gate_init), (cfg.dim,)).astype(wide))
        if control is not None:
            given = control.gate.astype(wide)[:, None, None]
            gate = jnp.where(jnp.isnan(given), gate, given)
        output = self._project("out", z.astype(x.dtype))
        update = gate * output
        out = jnp.where(mask[..., None], x + update.astype(x.dtype), 0)
        if of_inner is None:
            return out, after, None
        return out, after, Measurement(of_inner, *(jnp.where(mask[..., None], y, 0) for y in (eta, x, output)))

    def _project(self, name: str, x: jax.Array, like: str | None = None) -> jax.Array:
        """x through the affine map `name`; its initial value is that of the map `like`, or random."""

        def init(part: str, random: nn.initializers.Initializer) -> nn.initializers.Initializer:
            return random if like is None else lambda *_: self.get_variable("params", f"{like}_{part}")

        kernel = self.param(f"{name}_kernel", init("kernel", linear_kernel), (self.cfg.dim, self.cfg.dim))
        # With biases of 0 a frame of zeros has k = v = f(k) = 0, where only the epsilons bound the slopes of the norms
        # and a few such mini-batches overflow the gradient. PyTorch's default, as in the original, avoids that.
        bias = nn.initializers.zeros if name == "out" else fan_in_uniform()
        return linear(x, Kernel(kernel)) + self.param(f"{name}_bias", init("bias", bias), (self.cfg.dim,)).astype(
            x.dtype
        )


def _where(rows: jax.Array, a: TTTState, b: TTTState) -> TTTState:
    return jax.tree.map(lambda x, y: jnp.where(rows.reshape(-1, *(1,) * (x.ndim - 1)), x, y), a, b)


def base_of(params: Mapping[str, jax.Array]) -> network.Network:
    """The learned start W0 among the parameters of a layer."""
    maps = sum(name.startswith("inner_w") for name in params)
    wide = lambda p: p.astype(jnp.promote_types(p.dtype, jnp.float32))  # noqa: E731
    return tuple(network.Affine(wide(params[f"inner_w{i}"]), wide(params[f"inner_b{i}"])) for i in range(maps))


def init_state(cfg: MoshiConfig, batch: int) -> TTTState:
    """A fresh state of one TTT layer for `batch` rows: float32 zeros (float64 where the model is)."""
    dtype = jnp.promote_types(cfg.dtype, jnp.float32)
    return ttt_state.init_state(batch, cfg.num_heads, cfg.head_dim, cfg.ttt.hidden, cfg.ttt.mini_batch, dtype)
