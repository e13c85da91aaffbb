"""`python -m eval diagnose`: what the TTT layers do beside attention, a record every N frames of a recording.

Between two records the stream goes on in longer calls that measure nothing; the frame of the record goes alone and measured.
The state is carried through all of it, and memory does not grow with the recording.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from eval.diagnose import records as report
from ttt_jax.config import FRAME_RATE, MoshiConfig
from ttt_jax.moshi import model
from ttt_jax.moshi.model import Params, State

SMALL = 0.01
"""What counts as open of a gate and as near zero of a channel: the size of tanh(alpha), and of a channel's value."""
CHUNK = 128
"""Frames of a call between records, where nothing else is asked for."""

Record = dict[str, Any]
"""Figures of one frame and layer by name (`report.FIGURES`), with "checkpoint", "frame", "seconds" and "layer"; None: undefined."""


class Vectors(NamedTuple):
    """What the TTT layers read (the stream after attention) and put out at a record, [L, dim] each."""

    stream: jax.Array
    ttt: jax.Array


def walk(
    params: Params, frames: np.ndarray, cfg: MoshiConfig, every: int, chunk: int | None = None
) -> Iterator[Record]:
    """Streams a recording from a fresh state and measures every `every`-th frame.

    Args:
      params: of a model with TTT layers; frames: int32 [K, T]; every: frames from one record to the next.
      chunk: most frames of a call between records; unset: `CHUNK`. It changes figures by rounding only; 1 is a live stream.

    Yields:
      The record of each TTT layer, layer by layer, frame by frame.
    """
    size = min(chunk or CHUNK, max(1, every - 1))
    state, previous = fresh(cfg)
    for start in range(0, frames.shape[1] - every + 1, every):
        last = start + every - 1
        for first in range(start, last, size):
            piece = frames[None, :, first : min(first + size, last)]
            mask = np.arange(size)[None] < piece.shape[2]
            state = advance(params, np.pad(piece, ((0, 0), (0, 0), (0, size - piece.shape[2]))), mask, state, cfg)
        figures, previous, state = measure(params, frames[None, :, last : last + 1], state, previous, cfg)
        yield from _records(np.asarray(figures), last + 1, cfg.ttt_layers)


def fresh(cfg: MoshiConfig) -> tuple[State, Vectors]:
    """The state of a stream before its first frame, on the device for good, and no vectors of a record before (NaN)."""
    nothing = Vectors(*(jnp.full((len(cfg.ttt_layers), cfg.dim), jnp.nan, jnp.float32) for _ in range(2)))
    return jax.device_put((model.init_state(cfg, 1), nothing), jax.devices()[0])


@partial(jax.jit, static_argnames="cfg", donate_argnames="state")
def advance(params: Params, frames: jax.Array, mask: jax.Array, state: State, cfg: MoshiConfig) -> State:
    """The state after a call that measures nothing; frames int32 [1, K, T], mask bool [1, T]. The state is donated."""
    return model.forward(params, frames, mask, state, cfg)[1]


@partial(jax.jit, static_argnames="cfg", donate_argnames=("state", "previous"))
def measure(
    params: Params, frame: jax.Array, state: State, previous: Vectors, cfg: MoshiConfig
) -> tuple[jax.Array, Vectors, State]:
    """One frame, int32 [1, K, 1], and its figures. State and vectors are donated.

    Returns:
      The figures in the order of `report.FIGURES`, [figures, L] (one array: it reaches the host in one piece); the vectors that the
      next record compares with; the state.
    """
    outputs, state = model.forward(params, frame, jnp.ones((1, 1), bool), state, cfg, measured=True)
    ttt = jax.tree.map(lambda leaf: leaf[:, 0, 0].astype(jnp.promote_types(leaf.dtype, jnp.float32)), outputs.ttt)
    now = Vectors(ttt.read, ttt.output)
    gate, base = learned(params, cfg)
    moved = ttt.inner.displacement * base  # by head: of the norm, the measurement gives the ratio
    inner = {name: getattr(ttt.inner, name).mean(-1) for name in ("loss_base", "loss_before", "loss_after")}
    figures = {
        **of_vectors(now, gate),
        **of_change(now, previous),
        **of_heads("displacement", moved),
        **of_heads("base", base),
        **of_heads("displacement_to_base", ttt.inner.displacement),
        **inner,
        "inner_rate": ttt.rate.mean(-1),
    }
    return jnp.stack([figures[name] for name in report.FIGURES]), now, state


def learned(params: Params, cfg: MoshiConfig) -> tuple[jax.Array, jax.Array]:
    """tanh(alpha) of each TTT layer [L, dim], and the norm of its learned start by head [L, H]."""
    ttts = [params["layers"][run.name]["ttt"] for run in cfg.runs if run.has_ttt]
    gate = jnp.concatenate([jnp.tanh(ttt["gate"]) for ttt in ttts])
    squares = [
        sum((leaf**2).sum(tuple(range(2, leaf.ndim))) for name, leaf in ttt.items() if name.startswith("inner_"))
        for ttt in ttts
    ]
    return gate, jnp.sqrt(jnp.concatenate(squares))


def of_vectors(now: Vectors, gate: jax.Array) -> dict[str, jax.Array]:
    """Figures of one frame's vectors and the gate, [L, dim] each: by name, [L]; NaN where there is no direction."""
    gated = gate * now.ttt
    combined = now.stream + gated
    norm = partial(jnp.linalg.norm, axis=-1)

    def cosine(a: jax.Array, b: jax.Array) -> jax.Array:
        return (a * b).sum(-1) / (norm(a) * norm(b))

    vectors = {"stream": now.stream, "ttt": now.ttt, "combined": combined}
    distribution = {}
    for name, x in vectors.items():
        near = 100 * (jnp.abs(x) < SMALL).mean(-1)
        distribution |= {f"{name}_mean": x.mean(-1), f"{name}_std": x.std(-1), f"{name}_near_zero_percent": near}
    return {
        **{f"{name}_norm": norm(x) for name, x in {**vectors, "gated": gated}.items()},
        "ttt_to_stream": norm(now.ttt) / norm(now.stream),
        "gated_to_stream": norm(gated) / norm(now.stream),
        "gated_share_percent": 100 * norm(gated) / (norm(gated) + norm(now.stream)),
        "gate_mean": gate.mean(-1),
        "gate_mean_abs": jnp.abs(gate).mean(-1),
        "gate_std": gate.std(-1),
        "gate_min": gate.min(-1),
        "gate_max": gate.max(-1),
        "gate_open_percent": 100 * (jnp.abs(gate) > SMALL).mean(-1),
        "cosine_stream_ttt": cosine(now.stream, now.ttt),
        "cosine_stream_combined": cosine(now.stream, combined),
        "cosine_ttt_combined": cosine(now.ttt, combined),
        **distribution,
    }


def of_change(now: Vectors, previous: Vectors) -> dict[str, jax.Array]:
    """How far the vectors are from those of the record before, also relative to their length now; NaN where there was none."""
    found = {}
    for name, new, old in zip(Vectors._fields, now, previous, strict=True):
        change = jnp.linalg.norm(new - old, axis=-1)
        found |= {f"{name}_change": change, f"{name}_change_relative": change / jnp.linalg.norm(new, axis=-1)}
    return found


def of_heads(name: str, values: jax.Array) -> dict[str, jax.Array]:
    """Mean over heads and the largest of [L, H]."""
    return {name: values.mean(-1), f"{name}_largest_head": values.max(-1)}


def _records(figures: np.ndarray, frame: int, layers: Sequence[int]) -> Iterator[Record]:
    for layer, values in zip(layers, figures.T.tolist(), strict=True):
        named = {
            name: value if math.isfinite(value) else None for name, value in zip(report.FIGURES, values, strict=True)
        }
        yield {"frame": frame, "seconds": round(frame / FRAME_RATE, 2), "layer": layer, **named}
