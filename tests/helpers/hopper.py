"""Settings, inputs and gradients for tests of the inner loop in sizes of the fused kernels."""

from typing import NamedTuple

import jax
import numpy as np

from ttt_jax.config import TTTConfig, default_base_lr
from ttt_jax.ttt.network import Affine, Descent, Inputs, widths
from ttt_jax.ttt.state import TTTState

ROWS, HEADS = 2, 2


class Setting(NamedTuple):
    """Sizes of a call of the inner loop."""

    width: int
    """Of a head."""
    mini_batch: int
    frames: int = 2048
    hidden: tuple[int, ...] = (4,)
    """Of the inner network, as in `TTTConfig`."""

    @property
    def cfg(self) -> TTTConfig:
        return TTTConfig(layers="0", mini_batch=self.mini_batch, hidden=self.hidden)

    def drawn(self, seed, dtype=np.float32):
        """Arguments of `inner_scan` up to the mask, and weights for a loss that reads z and the new state.

        Magnitudes are those of a layer at its initialisation; rows stand at any phase of a mini-batch, with weights
        moved, and masks have gaps.
        """
        rng, width, b = np.random.default_rng(seed), self.width, self.mini_batch
        normal = lambda *shape: rng.standard_normal(shape).astype(dtype)  # noqa: E731
        unit = lambda x: x / np.linalg.norm(x, axis=-1, keepdims=True)  # noqa: E731
        sizes = widths(width, self.hidden)
        base = tuple(Affine(normal(HEADS, i, o) / np.sqrt(i, dtype=dtype), 0.1 * normal(HEADS, o)) for i, o in sizes)
        count = rng.integers(0, 3 * b, ROWS).astype(np.int32)
        held = (np.arange(b) < count[:, None] % b)[:, None, :, None]
        moved = tuple(
            Affine(0.2 * normal(ROWS, HEADS, i, o) / np.sqrt(i, dtype=dtype), 0.02 * normal(ROWS, HEADS, o))
            for i, o in sizes
        )
        inputs, steps = (
            tuple(held * factor * unit(normal(ROWS, HEADS, b, size)) for size in pair)
            for factor, pair in zip((dtype(1), dtype(0.02)), zip(*sizes, strict=True), strict=True)
        )
        state = TTTState(moved, Descent(inputs, steps) if b > 1 else (), count)
        shape = (ROWS, self.frames, HEADS)
        rate = default_base_lr(b, width) / width / (1 + np.exp(-normal(*shape)))
        frames = Inputs(unit(normal(*shape, width)), unit(normal(*shape, width)), normal(*shape, width), rate)
        mask = rng.random(shape[:2]) < np.array([[1.0], [0.8]])
        weights = normal(*shape, width), jax.tree.map(lambda x: normal(*x.shape), state[:2])
        return (base, 1 + 0.2 * normal(HEADS, width), 0.2 * normal(HEADS, width), state, frames, mask), weights


def value_and_grads(scan, cfg, args, weights):
    """Results of `scan`, and the gradients of a loss that reads z and the new state to all numbers that go in."""
    base, scale, bias, state, inputs, mask = args

    def loss(base, scale, bias, moved, inputs):
        old = state._replace(displacement=moved[0], open_steps=moved[1])
        new, z, *more = scan(base, scale, bias, old, inputs, mask, cfg)
        parts = zip(jax.tree.leaves((z, new[:2])), jax.tree.leaves(weights), strict=True)
        return sum((a * b).sum() for a, b in parts), (new, z, *more)

    grads, results = jax.grad(loss, range(5), has_aux=True)(base, scale, bias, state[:2], inputs)
    return results, grads
