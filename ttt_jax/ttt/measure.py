"""Inner losses of frames before and after their own gradient step, and the norm of the displacement."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from ttt_jax.ttt.network import (
    Frames,
    Network,
    Readable,
    Seen,
    apply,
    gelu,
    halves,
    layer_norm,
    overlap,
    read,
    squared_norm,
)


class InnerMeasurement(NamedTuple):
    """Inner losses l(W; k_t, t_t) and displacement of each frame, [B, T, H] each, 0 where masked."""

    loss_base: jax.Array
    """At W0, the learned start."""
    loss_before: jax.Array
    """At W_{t-1}, the weights before the frame's step, inside a mini-batch too."""
    loss_after: jax.Array
    """At W_t, the weights that the frame's query reads."""
    displacement: jax.Array
    """Norm of W_t - W0 over that of W0."""


def measure(
    base: Network,
    scale: jax.Array,
    bias: jax.Array,
    displacement: Network,
    now: Readable,
    taken: Sequence[Seen],
    x: Frames,
) -> InnerMeasurement:
    """`InnerMeasurement` of the frames of a mini-batch, [B, H, C] each.

    Args:
      base, scale, bias, displacement, x: as in `inner.advance`; now: `network.readable` of base and displacement.
      taken: steps of the frames themselves, then those of frames before them, as the queries see them.
    """

    def loss(y: jax.Array) -> jax.Array:
        return 0.5 * ((layer_norm(y, scale, bias) - x.t) ** 2).sum(-1)

    k, at_base = halves(x.kq)[0], halves(x.at_base)[0]
    twice = lambda y: jnp.concatenate([y, y], -2)  # noqa: E731
    # All frames before and after their step, in one pass.
    own, *earlier = (part.seen for part in taken)
    masks = jnp.concatenate([jnp.tril(own, -1), own]), *earlier
    of_both = [
        Seen(of, overlap(twice(k), of.inputs[0], seen), seen) for (of, *_), seen in zip(taken, masks, strict=True)
    ]
    after_steps = read(now, twice(at_base + apply(k, *now[0])), *of_both)
    at_w0 = at_base  # reads no state, so that NaN in a state does not reach it
    for affine in base[1:]:
        at_w0 = apply(gelu(at_w0), affine)
    # |displacement - sum of steps|^2, multiplied out so that no prefix of the sum is formed.
    steps = jax.tree.map(lambda *parts: jnp.concatenate(parts, 2), *(part.steps for part in taken))
    shape = len(k), 1, k.shape[2]
    upto = jnp.concatenate([jnp.broadcast_to(part.seen, (*shape, part.seen.shape[-1])) for part in taken], -1)
    moved = squared_norm(displacement)[..., None]
    both = upto[..., :, None] & upto[..., None, :]  # [i, j, k]: frame i has seen j and k
    for affine, x_k, step in zip(displacement, *steps, strict=True):
        cross = (apply(x_k, affine) * step).sum(-1)
        square = (jnp.einsum("BHCI,BHSI->BHCS", x_k, x_k) + 1) * jnp.einsum("BHCO,BHSO->BHCS", step, step)
        moved -= 2 * jnp.where(upto, cross[..., None, :], 0).sum(-1)
        moved += jnp.where(both, square[..., None, :, :], 0).sum((-2, -1))
    return InnerMeasurement(
        loss(at_w0),
        *(loss(y) for y in halves(after_steps)),
        jnp.sqrt(jnp.maximum(moved, 0) / squared_norm(base)[..., None]),
    )
