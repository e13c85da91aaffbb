"""Sampling frame by frame: the other voice's codes in, own text and codes out. Pure functions over the same state as `forward`."""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from ttt_jax.config import MoshiConfig
from ttt_jax.moshi.delays import ABSENT
from ttt_jax.moshi.depth import DepthTransformer, init_cache
from ttt_jax.moshi.model import Params, State, temporal, text_logits


class Sampling(NamedTuple):
    """Temperature and top-k for audio and text; temperature 0 takes the likeliest token. Defaults are Kyutai's."""

    temperature: float = 0.8
    top_k: int = 250
    text_temperature: float = 0.7
    text_top_k: int = 25


def sample(logits: jax.Array, key: jax.Array, temperature: float, top_k: int) -> jax.Array:
    """int32 tokens [...] drawn from the `top_k` likeliest of logits [..., V] at `temperature`."""
    if temperature == 0:
        return logits.argmax(-1).astype(jnp.int32)
    values, tokens = jax.lax.top_k(logits, min(top_k, logits.shape[-1]))
    choice = jax.random.categorical(key, values / temperature)
    return jnp.take_along_axis(tokens, choice[..., None], -1)[..., 0].astype(jnp.int32)


@partial(jax.jit, static_argnames=("cfg", "sampling"), donate_argnames=("state",))
def generate_step(
    params: Params,
    other: jax.Array,
    mask: jax.Array,
    state: State,
    key: jax.Array,
    cfg: MoshiConfig,
    sampling: Sampling = Sampling(),
) -> tuple[jax.Array, State]:
    """One call of the streaming model.

    Call s takes the other voice's frame s - 1 and samples column s of the delayed grid: text s, semantic code s, acoustic
    codes s - delay. The first call of a row ignores `other`: position 0 reads initial tokens (as Kyutai's streams do).

    Args:
      other: codes of the other voice, int32 [B, n_q - dep_q]; mask: bool [B], rows that take part; state: donated.
      key: random key; cfg, sampling: static.

    Returns:
      Own tokens of the newest complete frame, int32 [B, 1 + dep_q], `ABSENT` in the first max_delay calls of a row and in
      rows that do not take part; the state.
    """
    own_streams = 1 + cfg.dep_q
    delays, newest_slot = cfg.delays, state.history.shape[-1] - 1
    rows = mask[:, None]
    first = (state.position == 0)[:, None]
    # history[..., -1] is frame s - 1; its own acoustic tokens were not sampled yet when it was pushed.
    newest = jnp.where(rows & ~first, other, state.history[:, own_streams:, -1])
    history = state.history.at[:, own_streams:, -1].set(newest)
    tokens = jnp.stack([history[:, k, newest_slot - delays[k]] for k in range(cfg.num_streams)], 1)[:, None]
    hidden, state, _ = temporal(params, tokens, rows, state, cfg)

    keys = jax.random.split(key, own_streams)
    depth, cache = DepthTransformer(cfg), init_cache(cfg, mask.shape[0])
    token = sample(text_logits(params, hidden[:, 0]), keys[0], sampling.text_temperature, sampling.text_top_k)
    column = [token]
    for codebook in range(cfg.dep_q):
        logits, cache = depth.apply({"params": params["depth"]}, hidden[:, 0], token, codebook, cache, method="step")
        token = sample(logits, keys[1 + codebook], sampling.temperature, sampling.top_k)
        column.append(token)

    # Push frame s, then write column s where it belongs: stream k in frame s - delay_k, unless that lies before frame 0.
    pushed = jnp.concatenate([history[..., 1:], jnp.full_like(history[..., :1], ABSENT)], -1)
    position = state.position - 1
    for k, sampled in enumerate(column):
        keep = pushed[:, k, newest_slot - delays[k]]
        pushed = pushed.at[:, k, newest_slot - delays[k]].set(jnp.where(position >= delays[k], sampled, keep))
    complete = rows & (position >= cfg.max_delay)[:, None]
    own = jnp.where(complete, pushed[:, :own_streams, newest_slot - cfg.max_delay], ABSENT)
    return own, state._replace(history=jnp.where(rows[..., None], pushed, history))
