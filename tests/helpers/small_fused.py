"""Settings, inputs and a loss for tests of `ttt.fused`."""

from functools import partial

import jax
import numpy as np

from tests.helpers.drawing import quick_jit, random_mask
from ttt_jax.config import TTTConfig
from ttt_jax.ttt.fused.scan import fused_scan
from ttt_jax.ttt.inner import inner_scan
from ttt_jax.ttt.network import Affine, Descent, Inputs, layer_norm, widths
from ttt_jax.ttt.state import TTTState

ROWS, HEADS, D = 2, 2, 16
MLP, LINEAR = (4,), ()


def config(mini_batch=4, horizon=100.0, **ttt):
    return TTTConfig(layers="0", mini_batch=mini_batch, horizon=horizon, **ttt)


def drawn(seed, frames, mini_batch, rows=ROWS, fresh=False, hidden=MLP):
    """Arguments of `fused_scan` up to the mask, in float64: a state at any phases, gaps in the mask."""
    rng = np.random.default_rng(seed)
    normal = rng.standard_normal
    sizes = widths(D, hidden)
    base = tuple(Affine(normal((HEADS, i, o)) / i**0.5, 0.1 * normal((HEADS, o))) for i, o in sizes)
    scale, bias = 1 + 0.2 * normal((HEADS, D)), 0.2 * normal((HEADS, D))
    unit = lambda x: x / np.linalg.norm(x, axis=-1, keepdims=True)  # noqa: E731
    shape = (rows, frames, HEADS, D)
    inputs = Inputs(
        unit(normal(shape)),
        unit(normal(shape)),
        np.asarray(layer_norm(normal(shape), scale, bias)),
        min(0.5, 8 / mini_batch) / D / (1 + np.exp(-normal(shape[:3]))),
    )
    count = np.asarray(rng.integers(0, 3 * mini_batch, rows), np.int32)
    moved = jax.tree.map(lambda w: 0.05 * normal((rows, *w.shape)), base)
    held = (np.arange(mini_batch) < count[:, None] % mini_batch)[:, None, :, None]
    wide = lambda size, factor: held * factor * normal((rows, HEADS, mini_batch, size))  # noqa: E731
    steps = Descent(tuple(wide(i, 0.3) for i, _ in sizes), tuple(wide(o, 0.02) for _, o in sizes))
    state = TTTState(moved, steps if mini_batch > 1 else (), count)
    if fresh:
        state = jax.tree.map(np.zeros_like, state)
    return base, scale, bias, state, inputs, random_mask(rng, (rows, frames))


def narrow(tree):
    """In float32."""
    return jax.tree.map(lambda x: np.asarray(x, np.float32) if x.dtype == np.float64 else x, tree)


def value_and_grads(scan, base, scale, bias, state, inputs, mask, cfg, weights):
    """A loss that reads z and the new state, and its gradients to all numbers that go in."""

    def loss(base, scale, bias, moved, inputs):
        old = state._replace(displacement=moved[0], open_steps=moved[1])
        new, z, _ = scan(base, scale, bias, old, inputs, mask, cfg)
        parts = jax.tree.leaves((z, new[0], new[1]))
        return sum((a * b).sum() for a, b in zip(parts, jax.tree.leaves(weights), strict=True))

    return jax.value_and_grad(loss, range(5))(base, scale, bias, tuple(state[:2]), inputs)


def loss_weights(args, seed=7):
    """Random weights of the parts that `value_and_grads` reads."""
    rng, state = np.random.default_rng(seed), args[3]
    return jax.tree.map(lambda x: rng.standard_normal(x.shape).astype(x.dtype), (args[4].q, *state[:2]))


call = quick_jit(fused_scan, static_argnums=(6, 7))
plain_call = quick_jit(inner_scan, static_argnums=(6, 7))
grads = quick_jit(partial(value_and_grads, fused_scan), static_argnums=6)
plain_grads = quick_jit(partial(value_and_grads, inner_scan), static_argnums=6)
