"""Generation frame by frame: the user's codes in, Moshi's text and codes out. Pure functions over the state of
`forward`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from ttt_jax.config import MoshiConfig
from ttt_jax.errors import InputError
from ttt_jax.moshi import depth
from ttt_jax.moshi.delays import ABSENT
from ttt_jax.moshi.model import PRNG, Params, State, temporal, text_logits
from ttt_jax.ttt.layer import Control, Measurement

FREE = -2
"""In place of a forced token: sample it (Kyutai's "ungenerated" token)."""


class Sampling(NamedTuple):
    """Temperature and top-k for audio and text. Temperature 0 is greedy, top-k 0 is no limit. Defaults are Kyutai's."""

    temperature: float = 0.8
    top_k: int = 250
    text_temperature: float = 0.7
    text_top_k: int = 25


class RowSampling(NamedTuple):
    """`Sampling` of rows that differ, [B] each; no top-k is larger than that of the `Sampling` beside it."""

    temperature: jax.Array
    top_k: jax.Array
    text_temperature: jax.Array
    text_top_k: jax.Array


class Frame(NamedTuple):
    """What a call generates."""

    moshi: jax.Array
    """Moshi's tokens of the newest complete frame s - max_delay, int32 [B, 1 + dep_q]; `ABSENT` in the first max_delay
    calls of a row and in inactive rows."""
    column: jax.Array
    """Tokens of column s, int32 [B, 1 + dep_q]; `ABSENT` where a stream has not begun and in inactive rows."""
    log_probs: jax.Array | None
    """Of the tokens of `column` under the model's distribution (all tokens, temperature 1), float32 [B, 1 + dep_q]; 0
    where absent; None unless measured."""
    ttt: Measurement | None
    """By TTT layer, leaves [L, B, 1, ...]; None unless measured."""


def streaming_params(params: Params, cfg: MoshiConfig) -> Params:
    """Parameters in the layout that `stream_step` and `generate` read fastest; in float32 on a CPU results have equal
    bits.

    Converts matrices to the type of the activations once. On a CPU it also unstacks the matrices of layers, since XLA's
    CPU products copy a matrix out of its stack first; elsewhere few large arrays are faster
    (docs/performance/streaming.md). `forward` takes `params` itself.
    """
    unstack = jax.default_backend() == "cpu"

    def convert(path: tuple, leaf: jax.Array) -> Any:
        names = [step.key for step in path]
        leaf = leaf if is_wide(names) else leaf.astype(cfg.dtype)
        stacked = names[0] == "layers" or (names[0] == "depth" and names[-1].split("_lora_")[0] in depth.STACKED)
        return tuple(leaf) if stacked and unstack else leaf

    return jax.tree_util.tree_map_with_path(convert, params)


def is_wide(names: Sequence[str]) -> bool:
    """Returns whether the parameter at this path is used in float32 or wider, whatever the type of the activations."""
    narrow = ("_kernel", "q_bias", "k_bias", "v_bias", "out_bias")
    return "norm" in names[-1] or ("ttt" in names and not names[-1].endswith(narrow))


def sample(
    logits: jax.Array, noise: jax.Array | None, temperature: float | jax.Array, top_k: jax.Array | None = None
) -> jax.Array:
    """Draws tokens from the top k of `logits` at a temperature.

    Args:
      logits: [B, V].
      noise: standard Gumbel [B, k]; None with temperature 0.
      temperature: of all rows, or [B], where 0 takes the largest logit; top_k: int32 [B], 0 for all k; None: all k.

    Returns:
      int32 [B]: a draw from the softmax over the top k; without noise the token of the largest logit.
    """
    if noise is None:
        return logits.argmax(-1).astype(jnp.int32)
    values, tokens = jax.lax.top_k(logits, noise.shape[-1])
    if top_k is None:
        choice = (values / temperature + noise).argmax(-1)
    else:
        draws, limit = (temperature > 0)[:, None], jnp.where(top_k > 0, top_k, noise.shape[-1])
        scores = jnp.where(draws, values / jnp.where(draws, temperature[:, None], 1) + noise, values)
        choice = jnp.where(jnp.arange(noise.shape[-1]) < limit[:, None], scores, -jnp.inf).argmax(-1)
    return jnp.take_along_axis(tokens, choice[:, None], -1)[:, 0].astype(jnp.int32)


@partial(jax.jit, static_argnames=("cfg", "sampling"), donate_argnames=("state",))
def stream_step(
    params: Params,
    user: jax.Array,
    mask: jax.Array,
    state: State,
    cfg: MoshiConfig,
    sampling: Sampling = Sampling(),
    forced: jax.Array | None = None,
) -> tuple[jax.Array, State]:
    """One frame of the streaming model.

    Call s of a row takes the user's frame s - 1 and generates column s of the delayed grid: text s, semantic code s,
    acoustic codes s - delay. The first call of a row ignores `user`: position 0 reads initial tokens.

    A stream may begin with `forward` (a prompt) and go on here; the first call then takes the codes of the prompt's
    last frame.

    Args:
      params: of `init_params`, or converted.
      user: codes of the user's stream, int32 [B, n_q - dep_q].
      mask: bool [B], active rows; the others keep their state.
      state: donated: go on with the returned one. `fork_rows` makes a copy.
      cfg, sampling: static.
      forced: Moshi's tokens of frame s (undelayed: its acoustic codes count in later calls), int32 [B, 1 + dep_q],
        `FREE` where sampled; unset: all are sampled.

    Returns:
      Moshi's tokens of the newest complete frame s - max_delay, int32 [B, 1 + dep_q], `ABSENT` in the first max_delay
      calls of a row and in inactive rows; the state.
    """
    frame, state = next_frame(params, user, mask, state, cfg, sampling, forced=forced)
    return frame.moshi, state


def next_frame(
    params: Params,
    user: jax.Array,
    mask: jax.Array,
    state: State,
    cfg: MoshiConfig,
    sampling: Sampling = Sampling(),
    rows: RowSampling | None = None,
    forced: jax.Array | None = None,
    control: Control | None = None,
    measured: bool = False,
) -> tuple[Frame, State]:
    """`stream_step` as a part of a larger program, with more to give and to get.

    Args:
      rows: where rows sample differently.
      control: what rows do with their memory.
      measured: whether to compute the log-probabilities and to measure the TTT layers; static.
    """
    moshi_streams = 1 + cfg.dep_q
    delays, newest_slot = cfg.delays, state.history.shape[-1] - 1
    active, position = mask[:, None], state.position
    text_noise, noise = _gumbel(state, cfg, sampling)
    # history[..., -1] is frame s - 1, pushed by the call before, before the user's codes were known.
    newest = jnp.where(active & (position > 0)[:, None], user, state.history[:, moshi_streams:, -1])
    history = state.history.at[:, moshi_streams:, -1].set(newest)
    tokens = jnp.stack([history[:, k, newest_slot - delays[k]] for k in range(cfg.num_streams)], 1)[:, None]
    hidden, state, ttt = temporal(params, tokens, active, state, cfg, measured, control=control)

    # Push frame s, then generate column s and put stream k into frame s - delay_k, unless that lies before frame 0. A
    # token that is there already is forced, or part of a prompt.
    moshi = jnp.full((mask.shape[0], moshi_streams), FREE, jnp.int32) if forced is None else forced
    pushed = jnp.concatenate([moshi, jnp.full_like(newest, ABSENT)], 1)[..., None]
    pushed = jnp.concatenate([history[..., 1:], pushed], -1)
    column, log_probs = [], []

    def put(pushed: jax.Array, stream: int, logits: jax.Array, sampled: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Token of `stream` in column s, and the frames with it."""
        place = newest_slot - delays[stream]
        held, begun = pushed[:, stream, place], position >= delays[stream]
        token = jnp.where(begun & (held != FREE), held, sampled)
        present = mask & begun & (token >= 0)
        column.append(jnp.where(present, token, ABSENT))
        if measured:
            of_token = jnp.take_along_axis(logits, jnp.maximum(token, 0)[:, None], 1)[:, 0]
            log_probs.append(jnp.where(present, of_token - jax.nn.logsumexp(logits, -1), 0))
        return token, pushed.at[:, stream, place].set(jnp.where(begun, token, held))

    cache: depth.Cache = [[] for _ in range(cfg.depth.num_layers)]
    hidden, by_row = hidden[:, 0], rows or RowSampling(sampling.temperature, None, sampling.text_temperature, None)
    logits = text_logits(params, hidden, cfg)
    token = sample(logits, text_noise, by_row.text_temperature, by_row.text_top_k)
    token, pushed = put(pushed, 0, logits, token)
    for codebook in range(cfg.dep_q):
        logits, cache = depth.step(params["depth"], hidden, token, codebook, cache, cfg)
        of_codebook = None if noise is None else noise[:, codebook]
        token = sample(logits, of_codebook, by_row.temperature, by_row.top_k)
        token, pushed = put(pushed, 1 + codebook, logits, token)

    complete = active & (position >= cfg.max_delay)[:, None]
    moshi = jnp.where(complete, pushed[:, :moshi_streams, newest_slot - cfg.max_delay], ABSENT)
    state = state._replace(history=jnp.where(active[..., None], pushed, history))
    return Frame(moshi, jnp.stack(column, 1), jnp.stack(log_probs, 1) if measured else None, ttt), state


@partial(jax.jit, static_argnames=("cfg", "sampling", "first_frame"), donate_argnames=("state",))
def generate(
    params: Params,
    user: jax.Array,
    mask: jax.Array,
    state: State,
    cfg: MoshiConfig,
    sampling: Sampling = Sampling(),
    forced: jax.Array | None = None,
    first_frame: Literal["twice", "once"] = "twice",
) -> tuple[jax.Array, State]:
    """Scans `stream_step` over T frames of the user's stream.

    The first call of a fresh row ignores its frame. With `first_frame="twice"` fresh rows get their first frame twice,
    so that Moshi hears all frames, aligned as in training (Kyutai's ``run_inference``). With "once" that frame is lost
    and all later ones arrive a frame earlier (Kyutai's server). Rows that have begun go on alike in both.

    Args:
      user: int32 [B, n_q - dep_q, T]; mask: bool [B, T]: a masked frame pauses its row.
      forced: int32 [B, 1 + dep_q, N], Moshi's tokens of the first N frames that each row generates here, `FREE` where
        sampled.
      params, state, cfg, sampling: as in `stream_step`; the state is donated.

    Returns:
      Moshi's tokens of each call, int32 [B, 1 + dep_q, calls], T + 1 calls with "twice" and T with "once"; the state.

    Raises:
      InputError: `first_frame` or `sampling` has an impossible value.
    """
    if first_frame not in ("twice", "once"):
        raise InputError(f'first_frame="{first_frame}" is no convention: give "twice" or "once".')
    if first_frame == "twice":
        user = jnp.concatenate([user[..., :1], user], -1)
        fresh = mask.any(1) & (state.position == 0)
        mask = jnp.concatenate([fresh[:, None], mask], 1)
    start = state.position

    def body(state: State, x: tuple[jax.Array, jax.Array]):
        user, mask = x
        given = None
        if forced is not None:
            index = jnp.broadcast_to((state.position - start)[:, None, None], (*forced.shape[:2], 1))
            given = jnp.take_along_axis(forced, index, 2, mode="fill", fill_value=FREE)[..., 0]
        moshi, state = stream_step(params, user, mask, state, cfg, sampling, given)
        return state, moshi

    state, moshi = jax.lax.scan(body, state, (jnp.moveaxis(user, -1, 0), mask.T))
    return jnp.moveaxis(moshi, 0, -1), state


def _gumbel(state: State, cfg: MoshiConfig, sampling: Sampling) -> tuple[jax.Array | None, jax.Array | None]:
    """Gumbel noise of one call by the key and position of each row: text [B, k], audio [B, Q, k]; None where greedy."""
    for name, value in sampling._asdict().items():
        if not 0 <= value < math.inf:
            raise InputError(f"sampling {name}={value} cannot be: give 0 or a positive number.")
    text = min(sampling.text_top_k or cfg.text_card, cfg.text_card) if sampling.text_temperature else 0
    audio = min(sampling.top_k or cfg.card, cfg.card) if sampling.temperature else 0
    shape = (max(text, audio), 1 + cfg.dep_q)  # in this order a draw does not depend on how large top-k is

    def draw(key: jax.Array, position: jax.Array) -> jax.Array:
        key = jax.random.fold_in(jax.random.wrap_key_data(key, impl=PRNG), position)
        return jax.random.gumbel(key, shape, jnp.float32)

    noise = jax.vmap(draw)(state.key, state.position) if max(text, audio) else None
    return (
        noise[:, :text, 0] if text else None,
        noise[:, :audio, 1:].swapaxes(1, 2) if audio else None,
    )
