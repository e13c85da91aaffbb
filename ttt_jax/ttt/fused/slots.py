"""Places of the frames of a call in whole groups of mini-batches, for the fused inner loop."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from ttt_jax.kernels.chain import C


class Plan(NamedTuple):
    """How the mini-batches of a call are laid out: constants of its program."""

    mini_batch: int
    """b."""
    steps: int
    """P, steps of a mini-batch."""
    group: int
    """U, steps of a group."""
    keep: float
    """c, what remains of the displacement after a mini-batch."""

    @property
    def per_group(self) -> int:
        """R, mini-batches of a group."""
        return self.group // self.steps

    @property
    def slots(self) -> int:
        """Slots of a mini-batch, empty ones included."""
        return self.steps * C


class Frames(NamedTuple):
    """Frames of mini-batches in their slots; empty slots hold 0."""

    q: jax.Array  # [N, M, b, D]
    k: jax.Array  # [N, M, b, D]
    t: jax.Array  # [N, M, b, D]
    eta: jax.Array  # [N, M, b]


class Places(NamedTuple):
    """Places of the frames of B rows in M mini-batches of b slots. Unlike in `inner.layout`, every frame has its own
    slot: slots of the first mini-batch below the row's phase stay empty."""

    frame: jax.Array
    """Frame in each slot, int32 [B, M b]; T where the slot is empty."""
    slot: jax.Array
    """Slot of each frame, int32 [B, T]; M b for masked frames."""
    closes: jax.Array
    """Whether the mini-batch is full at the end of the call, bool [B, M]."""
    phase: jax.Array
    """Slots below which earlier calls filled the first mini-batch, int32 [B]."""
    reached: jax.Array
    """Slot behind the last frame, int32 [B]."""


def place(mask: jax.Array, count: jax.Array, mini_batch: int, batches: int) -> Places:
    """Places the valid frames of a call, each row from its phase.

    Args:
      mask: bool [B, T], valid frames.
      count: int32 [B], valid frames of the row before this call.
      mini_batch: b; batches: M.
    """
    rows, frames = mask.shape
    phase = count % mini_batch
    slot = jnp.where(mask, phase[:, None] + jnp.cumsum(mask, 1) - 1, batches * mini_batch).astype(jnp.int32)
    frame = jnp.full((rows, batches * mini_batch), frames, jnp.int32)
    frame = frame.at[jnp.arange(rows)[:, None], slot].set(jnp.arange(frames, dtype=jnp.int32)[None], mode="drop")
    reached = phase + mask.sum(1, dtype=jnp.int32)
    return Places(frame, slot, reached[:, None] >= mini_batch * (jnp.arange(batches) + 1), phase, reached)


@jax.custom_vjp
def rearrange(x: jax.Array, index: jax.Array, inverse: jax.Array) -> jax.Array:
    """x [B, T, ...] at `index` int32 [B, T'], 0 where that is T.

    The gradient gathers by `inverse`, which takes [B, T', ...] back: a scatter is slow on GPUs.
    """
    index = index.reshape(*index.shape, *(1,) * (x.ndim - 2))
    return jnp.take_along_axis(x, index, 1, mode="fill", fill_value=0)


rearrange.defvjp(
    lambda x, index, inverse: (rearrange(x, index, inverse), (index, inverse)),
    lambda kept, d: (rearrange(d, kept[1], kept[0]), None, None),
)


def plan_of(frames: int, mini_batch: int, keep: float, held: int, most: float) -> tuple[Plan, int, int]:
    """Lays out a call of T frames in chunks of whole groups, with as few empty slots as possible.

    A group has 64 to 128 frames, or one mini-batch where that is more, or all of the call. It has two steps at least,
    as the adjoint kernel needs.

    Args:
      frames: T; mini_batch: b; keep: as in `Plan`.
      held: bytes that a mini-batch keeps for the backward pass; most: those that a chunk may keep.

    Returns:
      The plan, the number of chunks and the mini-batches of each.
    """
    batches = -(-(frames - 1) // mini_batch) + 1
    steps = -(-mini_batch // C)
    best = None
    least = 2 if steps == 1 else 1
    widest = max(least, min(batches, 128 // mini_batch))
    narrowest = max(least, min(widest, -(-64 // mini_batch)))
    for per_group in range(widest, narrowest - 1, -1):
        group = per_group * steps
        plan = Plan(mini_batch, steps, group, keep)
        groups = -(-batches // plan.per_group)
        of_chunk = max(1, min(groups, int(most // (per_group * held))))
        chunks = -(-groups // of_chunk)
        of_chunk = -(-groups // chunks)
        padded = chunks * of_chunk * group
        if best is None or padded < best[0]:
            best = padded, plan, chunks, of_chunk * plan.per_group
    return best[1:]


def to_steps(plan: Plan, x: jax.Array) -> jax.Array:
    """[N, M, b, X] -> [N, S, C, X]."""
    x = jnp.pad(x, ((0, 0), (0, 0), (0, plan.slots - plan.mini_batch), (0, 0)))
    return x.reshape(len(x), -1, C, x.shape[-1])


def from_steps(plan: Plan, x: jax.Array) -> jax.Array:
    """[N, S, X, C] -> [N, M, b, X]."""
    x = jnp.swapaxes(x, 2, 3)
    return x.reshape(len(x), -1, plan.slots, x.shape[-1])[:, :, : plan.mini_batch]


def in_steps(x: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """[N, G, X, L] of all slots -> [N, S, X, C]."""
    x = x.astype(dtype).reshape(*x.shape[:3], -1, C)
    return jnp.moveaxis(x, 3, 2).reshape(len(x), -1, x.shape[2], C)


def grouped(plan: Plan, x: jax.Array) -> jax.Array:
    """[N, M, b, X] -> [N, G, R b, X]."""
    return x.reshape(len(x), -1, plan.per_group * plan.mini_batch, x.shape[-1])
