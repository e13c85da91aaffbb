"""Samples in, samples and text out: the codec and the language model as one step of all rows. The state is a value.

Shapes: B rows, S samples of a frame, Q codebooks of a voice, L TTT layers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ttt_jax.codec import Codec
from ttt_jax.codec.mimi import model as mimi
from ttt_jax.codec.mimi.codec import MimiCodec
from ttt_jax.config import MoshiConfig
from ttt_jax.moshi import generate, model
from ttt_jax.moshi.generate import RowSampling, Sampling
from ttt_jax.ttt.layer import Control


class State(NamedTuple):
    """All of B running talks."""

    encoder: Any
    """Of the codec, for the user's samples."""
    model: model.State
    decoder: Any
    """Of the codec, for Moshi's codes."""


class RowSettings(NamedTuple):
    """How each row samples, and what it does with its memory."""

    sampling: RowSampling
    control: Control


class Inner(NamedTuple):
    """Measurement of the TTT layers in one frame, mean over heads, [L, B] each (`ttt_jax.ttt.measure`)."""

    loss_base: Any
    loss_before: Any
    loss_after: Any
    displacement: Any
    rate: Any


class Spoken(NamedTuple):
    """One step of each row, NumPy arrays."""

    audio: np.ndarray
    """Moshi's voice in its newest complete frame, float32 [B, S]; 0 in rows without one."""
    moshi: np.ndarray
    """Tokens of that frame, int32 [B, 1 + Q]; -1 in rows without one."""
    user: np.ndarray
    """Codes of the user's frame, int32 [B, Q]; -1 in rows that heard none."""
    column: np.ndarray
    """Tokens that the step generated, int32 [B, 1 + Q], as in `generate.Frame`."""
    log_probs: np.ndarray | None
    """Of these tokens, float32 [B, 1 + Q]; None unless measured."""
    inner: Inner | None
    """None unless measured, or without TTT layers."""


class Speech:
    """A language model and a codec that fits it.

    Mimi and the language model are one compiled program; other codecs run on the host around that of the language
    model. A state is passed on once: its memory is used again.
    """

    def __init__(self, params: model.Params, cfg: MoshiConfig, codec: Codec, most: Sampling = Sampling()) -> None:
        """
        Args:
          params: of `model.init_params`, or those of `generate.streaming_params`.
          codec: of as many codebooks and entries as `cfg`.
          most: its top-k are the largest that a row may ask for (0: no limit); its temperatures have no effect.
        """
        self.cfg, self.codec = cfg, codec
        top_k, text_top_k = (
            given if given < size else 0 for given, size in ((most.top_k, cfg.card), (most.text_top_k, cfg.text_card))
        )
        self.most = Sampling(1.0, top_k, 1.0, text_top_k)
        self.params = generate.streaming_params(params, cfg)

    def init_state(self, seeds: Sequence[int]) -> State:
        """The state of talks that have not begun; each row draws by its seed. Raises `InputError` for seeds."""
        rows = len(seeds)
        return State(
            self.codec.init_encoder(rows), model.init_state(self.cfg, rows, seeds), self.codec.init_decoder(rows)
        )

    def begin(self, state: State, row: int, seed: int) -> State:
        """The state with a new talk in `row`, as one of `init_state`, written in place. `state` is passed on.

        Raises `InputError` for the seed.
        """
        key = model.init_keys([seed], 1)
        rows = np.arange(len(state.model.position)) == row
        return State(
            self.codec.reset(state.encoder, rows),
            _begin(state.model, jnp.int32(row), key, cfg=self.cfg),
            self.codec.reset(state.decoder, rows),
        )

    def step(
        self,
        audio: np.ndarray,
        hears: np.ndarray,
        speaks: np.ndarray,
        state: State,
        settings: RowSettings,
        measured: bool = False,
    ) -> tuple[Spoken, State]:
        """One frame of each row.

        A row's first step reads initial tokens: it speaks without hearing. In each later one it hears a frame and
        speaks. A row that does neither keeps its state.

        Args:
          audio: the user's samples, finite, float32 [B, S], full scale 1; hears: bool [B], rows that have a frame.
          speaks: bool [B], rows that the language model goes on in.
          measured: whether to compute log-probabilities and to measure the TTT layers.

        Returns:
          What was spoken, and the state after the step.
        """
        codec, lm = self.codec, {"cfg": self.cfg, "most": self.most, "measured": measured}
        if isinstance(codec, MimiCodec):
            params = self.params, codec.params
            spoken, state = _with_mimi(
                params, audio, hears, speaks, state, settings, mimi_cfg=codec.cfg, use=codec.use, **lm
            )
            return jax.device_get(spoken), state
        codes, encoder = codec.encode_step(audio, state.encoder, hears[:, None])
        user = codes[:, :, 0]
        frame, model_state = _language_model(self.params, user, speaks, state.model, settings, **lm)
        frame = jax.device_get(frame)
        there = (frame.moshi[:, 1:] >= 0).all(1, keepdims=True)
        sound, decoder = codec.decode_step(frame.moshi[:, 1:, None], state.decoder, there)
        return Spoken(sound, frame.moshi, user, *frame[1:]), State(encoder, model_state, decoder)


class _Frame(NamedTuple):
    """`generate.Frame` with less of the measurement."""

    moshi: jax.Array
    column: jax.Array
    log_probs: jax.Array | None
    inner: Inner | None


def _next_frame(
    params: model.Params,
    user: jax.Array,
    speaks: jax.Array,
    state: model.State,
    settings: RowSettings,
    cfg: MoshiConfig,
    most: Sampling,
    measured: bool,
) -> tuple[_Frame, model.State]:
    frame, state = generate.next_frame(
        params, user, speaks, state, cfg, most, settings.sampling, None, settings.control, measured
    )
    inner = None
    if frame.ttt is not None:
        losses = frame.ttt.inner
        parts = (losses.loss_base, losses.loss_before, losses.loss_after, losses.displacement, frame.ttt.rate)
        inner = Inner(*(part[:, :, 0].mean(-1) for part in parts))
    return _Frame(frame.moshi, frame.column, frame.log_probs, inner), state


_language_model = jax.jit(_next_frame, static_argnames=("cfg", "most", "measured"), donate_argnames="state")


@partial(jax.jit, static_argnames=("cfg", "mimi_cfg", "use", "most", "measured"), donate_argnames="state")
def _with_mimi(
    params: tuple[model.Params, mimi.Params],
    audio: jax.Array,
    hears: jax.Array,
    speaks: jax.Array,
    state: State,
    settings: RowSettings,
    cfg: MoshiConfig,
    mimi_cfg: Any,
    use: Any,
    most: Sampling,
    measured: bool,
) -> tuple[Spoken, State]:
    lm_params, mimi_params = params
    codes, encoder = mimi.encode(mimi_params, audio, hears[:, None], state.encoder, mimi_cfg, use)
    user = codes[:, :, 0]
    frame, lm = _next_frame(lm_params, user, speaks, state.model, settings, cfg, most, measured)
    there = (frame.moshi[:, 1:] >= 0).all(1, keepdims=True)
    sound, decoder = mimi.decode(mimi_params, frame.moshi[:, 1:, None], there, state.decoder, mimi_cfg, use)
    return Spoken(sound, frame.moshi, user, *frame[1:]), State(encoder, lm, decoder)


# Rows of a state


def take(state: State, row: int) -> State:
    """A copy of one row, a state of B = 1."""
    return _over(lambda leaf, axis: leaf.take(np.array([row]), axis), state)


def put(state: State, row: int, one: State) -> State:
    """The state with a row that is `one`, a state of B = 1. `state` is passed on: its memory is used again."""
    lm = _put(state.model, jnp.int32(row), one.model)
    encoder, decoder = (
        jax.tree.map(partial(_put_leaf, row), old, new)
        for old, new in ((state.encoder, one.encoder), (state.decoder, one.decoder))
    )
    return State(encoder, lm, decoder)


def take_memory(state: State, row: int) -> dict[str, Any]:
    """A copy of the fast weights of one row: the TTT states by run of layers, B = 1."""
    index = np.array([row])
    return {
        name: jax.tree.map(lambda leaf: leaf.take(index, 1), run.ttt)
        for name, run in state.model.layers.items()
        if run.ttt is not None
    }


def put_memory(state: State, row: int, memory: dict[str, Any]) -> State:
    """The state with the fast weights of one row replaced by `memory`; all else goes on. `state` is passed on."""
    return state._replace(model=_put_memory(state.model, jnp.int32(row), memory))


def _over(change: Callable[..., Any], state: State) -> State:
    """`state` with leaves `change(leaf, axis of rows)`."""
    rows_first = lambda leaf: change(leaf, 0)  # noqa: E731
    lm = state.model
    layers = jax.tree.map(lambda leaf: change(leaf, 1), lm.layers)
    return State(
        jax.tree.map(rows_first, state.encoder),
        model.State(*(rows_first(leaf) for leaf in lm[:3]), layers),
        jax.tree.map(rows_first, state.decoder),
    )


def _put_leaf(row: int, old: Any, new: Any) -> Any:
    if not isinstance(old, np.ndarray):
        return _put_first(old, jnp.int32(row), new)
    held = old.copy()
    held[row] = new[0]
    return held


@partial(jax.jit, donate_argnums=0)
def _put_first(old: jax.Array, row: jax.Array, new: jax.Array) -> jax.Array:
    return jax.lax.dynamic_update_slice_in_dim(old, new, row, 0)


@partial(jax.jit, donate_argnums=0, static_argnames="cfg")
def _begin(state: model.State, row: jax.Array, key: jax.Array, cfg: MoshiConfig) -> model.State:
    return _put(state, row, model.init_state(cfg, 1)._replace(key=key))


@partial(jax.jit, donate_argnums=0)
def _put(state: model.State, row: jax.Array, one: model.State) -> model.State:
    def rows(axis: int, old: Any, new: Any) -> Any:
        return jax.tree.map(lambda a, b: jax.lax.dynamic_update_slice_in_dim(a, b, row, axis), old, new)

    return model.State(*rows(0, state[:3], one[:3]), rows(1, state.layers, one.layers))


@partial(jax.jit, donate_argnums=0)
def _put_memory(state: model.State, row: jax.Array, memory: dict[str, Any]) -> model.State:
    def replaced(name: str, run: model.RunState) -> model.RunState:
        if name not in memory:
            return run
        put = lambda a, b: jax.lax.dynamic_update_slice_in_dim(a, b, row, 1)  # noqa: E731
        return run._replace(ttt=jax.tree.map(put, run.ttt, memory[name]))

    return state._replace(layers={name: replaced(name, run) for name, run in state.layers.items()})
