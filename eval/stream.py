"""Held-out files through the model, one frame at a time, in one jitted scan: what a live stream would see."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from eval.arms import ARMS
from ttt_jax.config import MoshiConfig
from ttt_jax.moshi import model
from ttt_jax.moshi.loss import token_losses


class Scores(NamedTuple):
    """What a stream of T frames in B rows (files) gave; NaN where a token was not scored."""

    nats: np.ndarray
    """Cross-entropy of each token, float32 [B, 1 + Q, T]: text, then the own codebooks, on the delayed grid."""
    displacement: np.ndarray
    """Norm of each TTT layer's displacement relative to its base, float32 [B, layers, T]."""
    tokens: np.ndarray
    """The tokens scored, int32 [B, 1 + Q, T]."""


def score_frame(
    params: model.Params, frame: jax.Array, mask: jax.Array, reset: jax.Array, state: model.State, cfg: MoshiConfig
) -> tuple[model.State, tuple[jax.Array, ...]]:
    """One frame of a stream.

    Args:
      frame: int32 [B, K]; mask: bool [B], rows whose file goes on; reset: bool [], clear the TTT states first.

    Returns:
      The state and (nats [B, 1 + Q], whether scored [B, 1 + Q], tokens [B, 1 + Q], displacement norms [B, layers]).
    """
    state = model.reset_ttt_rows(state, jnp.broadcast_to(reset, mask.shape))
    outputs, state = model.forward(params, frame[..., None], mask[:, None], state, cfg)
    nats = token_losses(outputs)[..., 0]
    return state, (
        nats,
        outputs.target_mask[..., 0],
        outputs.targets[..., 0],
        model.displacement_ratios(params, state, cfg),
    )


@partial(jax.jit, static_argnames="cfg", donate_argnames="state")
def _scan(
    params: model.Params, frames: jax.Array, mask: jax.Array, resets: jax.Array, state: model.State, cfg: MoshiConfig
):
    def body(state: model.State, x):
        return score_frame(params, *x, state, cfg)

    return jax.lax.scan(body, state, (frames, mask, resets))


def stream(params: model.Params, files: Sequence[np.ndarray], arm: str, chunk: int, cfg: MoshiConfig) -> Scores:
    """Streams every file from a fresh state under one arm of `ARMS`.

    Args:
      params: parameters; files: int32 [K, T_i] each; chunk: frames between resets in arms that reset.

    Returns:
      `Scores` of all files, padded with NaN to the longest.
    """
    length = max(file.shape[1] for file in files)
    padded = np.stack([np.pad(file, ((0, 0), (0, length - file.shape[1]))) for file in files])
    mask = np.arange(length) < np.array([[file.shape[1]] for file in files])
    resets = ARMS[arm].resets & (np.arange(length) % chunk == 0)
    state = model.init_state(cfg, len(files))
    frames = jnp.asarray(padded.transpose(2, 0, 1))
    _, (nats, scored, tokens, moved) = _scan(
        ARMS[arm].edit(params), frames, jnp.asarray(mask.T), jnp.asarray(resets), state, cfg=cfg
    )
    nats = np.where(scored, nats, np.nan).transpose(1, 2, 0)
    moved = np.where(mask.T[..., None], moved, np.nan).transpose(1, 2, 0)
    return Scores(nats, moved, np.asarray(tokens).transpose(1, 2, 0))
