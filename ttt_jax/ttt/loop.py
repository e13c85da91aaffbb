"""The inner loop over a call of several frames, by the implementation that is chosen for it."""

from __future__ import annotations

import jax

from ttt_jax.config import TTTConfig
from ttt_jax.kernels import choice
from ttt_jax.ttt import inner
from ttt_jax.ttt.fused.scan import fused_scan
from ttt_jax.ttt.measure import InnerMeasurement
from ttt_jax.ttt.network import Inputs, Network
from ttt_jax.ttt.state import TTTState


def inner_loop(
    base: Network,
    scale: jax.Array,
    bias: jax.Array,
    state: TTTState,
    inputs: Inputs,
    mask: jax.Array,
    cfg: TTTConfig,
    measured: bool = False,
) -> tuple[TTTState, jax.Array, InnerMeasurement | None]:
    """Runs the inner loop by the fused kernels or by the scan; arguments and results as of `inner.inner_scan`.

    Raises `InputError` where `cfg.impl` asks for kernels that cannot run.
    """
    chain = choice.chain(cfg, inputs.q.shape[-1], mask.shape[1], inputs.q.dtype)
    if chain is None:
        return inner.inner_scan(base, scale, bias, state, inputs, mask, cfg, measured)
    return fused_scan(base, scale, bias, state, inputs, mask, cfg, measured, chain)
