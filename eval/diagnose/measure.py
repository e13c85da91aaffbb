"""Measures the TTT layers on a stream: a record every N frames of a recording.

Between two records the stream goes on in longer calls that measure nothing; the frame of a record goes through alone.
The state is carried through all calls, and memory does not grow with the recording.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from eval.diagnose.records import FIGURES, SMALL, Record
from ttt_jax.config import FRAME_RATE, MoshiConfig
from ttt_jax.moshi import model
from ttt_jax.moshi.model import Params, State


class Vectors(NamedTuple):
    """Inputs (the stream after attention) and outputs of the TTT layers at a record, [L, dim] each."""

    stream: jax.Array
    ttt: jax.Array


def walk(params: Params, frames: np.ndarray, cfg: MoshiConfig, every: int, chunk: int = 128) -> Iterator[Record]:
    """Streams a recording, int32 [K, T], from a fresh state; yields a record of each TTT layer every `every` frames.

    Calls between records have at most `chunk` frames, which changes figures by rounding only.
    """
    size = min(chunk, max(1, every - 1))
    state, previous = fresh(cfg)
    for start in range(0, frames.shape[1] - every + 1, every):
        last = start + every - 1
        for first in range(start, last, size):
            piece = frames[None, :, first : min(first + size, last)]
            mask = np.arange(size)[None] < piece.shape[2]
            state = advance(params, np.pad(piece, ((0, 0), (0, 0), (0, size - piece.shape[2]))), mask, state, cfg)
        figures, previous, state = measure(params, frames[None, :, last : last + 1], state, previous, cfg)
        seconds = round((last + 1) / FRAME_RATE, 2)
        for layer, values in zip(cfg.ttt_layers, np.asarray(figures).T.tolist(), strict=True):
            defined = (value if math.isfinite(value) else None for value in values)
            yield {"frame": last + 1, "seconds": seconds, "layer": layer, **dict(zip(FIGURES, defined, strict=True))}


def fresh(cfg: MoshiConfig) -> tuple[State, Vectors]:
    """Returns the state before the first frame, committed to the device, and NaN as the vectors before it."""
    nothing = Vectors(*(jnp.full((len(cfg.ttt_layers), cfg.dim), jnp.nan, jnp.float32) for _ in range(2)))
    return jax.device_put((model.init_state(cfg, 1), nothing), jax.devices()[0])


@partial(jax.jit, static_argnames="cfg", donate_argnames="state")
def advance(params: Params, frames: jax.Array, mask: jax.Array, state: State, cfg: MoshiConfig) -> State:
    """Returns the state after a call without measurement; frames int32 [1, K, T], mask [1, T]. Donates the state."""
    return model.forward(params, frames, mask, state, cfg)[1]


@partial(jax.jit, static_argnames="cfg", donate_argnames=("state", "previous"))
def measure(
    params: Params, frame: jax.Array, state: State, previous: Vectors, cfg: MoshiConfig
) -> tuple[jax.Array, Vectors, State]:
    """Measures one frame, int32 [1, K, 1]. Donates state and vectors.

    Returns figures in the order of `FIGURES`, [figures, L], in one array so that the host waits for one transfer; the
    vectors, for the next record; the state.
    """
    outputs, state = model.forward(params, frame, jnp.ones((1, 1), bool), state, cfg, measured=True)
    ttt = jax.tree.map(lambda leaf: leaf[:, 0, 0].astype(jnp.promote_types(leaf.dtype, jnp.float32)), outputs.ttt)
    now = Vectors(ttt.read, ttt.output)
    gate, base = learned(params, cfg)
    figures = {
        **vector_figures(now, previous, gate),
        "displacement": (ttt.inner.displacement * base).mean(-1),  # inner.displacement is the ratio to the base
        "base": base.mean(-1),
        "displacement_to_base": ttt.inner.displacement.mean(-1),
        **{name: getattr(ttt.inner, name).mean(-1) for name in ("loss_base", "loss_before", "loss_after")},
    }
    return jnp.stack([figures[name] for name in FIGURES]), now, state


def learned(params: Params, cfg: MoshiConfig) -> tuple[jax.Array, jax.Array]:
    """Returns tanh(alpha) of each TTT layer, [L, dim], and the norm of its base W0 by head, [L, H]."""
    ttts = [params["layers"][run.name]["ttt"] for run in cfg.runs if run.has_ttt]
    gate = jnp.concatenate([jnp.tanh(ttt["gate"]) for ttt in ttts])
    squares = [
        sum((leaf**2).sum(tuple(range(2, leaf.ndim))) for name, leaf in ttt.items() if name.startswith("inner_"))
        for ttt in ttts
    ]
    return gate, jnp.sqrt(jnp.concatenate(squares))


def vector_figures(now: Vectors, previous: Vectors, gate: jax.Array) -> dict[str, jax.Array]:
    """Returns the figures of vectors and gate, [L, dim] each, by name, [L]; NaN for the cosine of a zero vector."""
    gated = gate * now.ttt
    combined = now.stream + gated
    norm = partial(jnp.linalg.norm, axis=-1)

    def cosine(a: jax.Array, b: jax.Array) -> jax.Array:
        return (a * b).sum(-1) / (norm(a) * norm(b))

    return {
        "stream_norm": norm(now.stream),
        "ttt_norm": norm(now.ttt),
        "combined_norm": norm(combined),
        "ttt_to_stream": norm(now.ttt) / norm(now.stream),
        "gated_to_stream": norm(gated) / norm(now.stream),
        "gate_mean_abs": jnp.abs(gate).mean(-1),
        "cosine_stream_ttt": cosine(now.stream, now.ttt),
        "cosine_stream_combined": cosine(now.stream, combined),
        "cosine_ttt_combined": cosine(now.ttt, combined),
        "ttt_mean": now.ttt.mean(-1),
        "ttt_std": now.ttt.std(-1),
        "ttt_near_zero_percent": 100 * (jnp.abs(now.ttt) < SMALL).mean(-1),
        "stream_change_relative": norm(now.stream - previous.stream) / norm(now.stream),
        "ttt_change_relative": norm(now.ttt - previous.ttt) / norm(now.ttt),
    }
