"""The inner loop for a call of one frame, as a live stream makes it: every weight is read, few are written.

It gives what `inner.inner_scan` gives, to rounding. What costs a frame is reading fast weights and base; the scan would
also sum them, write the displacement whether or not a mini-batch closes, and place a single frame in slots.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from ttt_jax.config import TTTConfig
from ttt_jax.ttt.inner import advance
from ttt_jax.ttt.measure import InnerMeasurement
from ttt_jax.ttt.network import Inputs, Network, prepare
from ttt_jax.ttt.state import TTTState


def one_frame(
    base: Network,
    scale: jax.Array,
    bias: jax.Array,
    state: TTTState,
    inputs: Inputs,
    mask: jax.Array,
    cfg: TTTConfig,
    measured: bool = False,
) -> tuple[TTTState, jax.Array, InnerMeasurement | None]:
    """Runs the inner loop over one frame; arguments and results as of `inner.inner_scan` with T = 1.

    The state waits for `state.close`: its displacement is that before the frame, its `open_steps` are the frame's own
    alone, with a single slot.
    """
    x = prepare(base, Inputs(*(jnp.moveaxis(y, 1, 2) for y in inputs)))
    x = x._replace(eta=jnp.where(mask[:, None], x.eta, 0))
    ln = scale[:, None], bias[:, None]
    phase = state.count % cfg.mini_batch
    own, out = advance(base, *ln, state.displacement, x, state.open_steps, phase, measured, apart=True)
    # As `put` has it, a frame that teaches nothing leaves no trace, not even the sign of a 0.
    own = jax.tree.map(lambda y: jnp.where(x.eta[..., None] != 0, y, 0), own)
    z, measurement = jax.tree.map(lambda y: _masked(jnp.moveaxis(y, 2, 1), mask), out)
    return TTTState(state.displacement, own, state.count + mask[:, 0]), z, measurement


def _masked(x: jax.Array, mask: jax.Array) -> jax.Array:
    return jnp.where(mask.reshape(mask.shape + (1,) * (x.ndim - 2)), x, 0)
