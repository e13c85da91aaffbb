"""Parameters, state and the one `forward` of Moshi's language model.

`forward` serves training (a segment), evaluation (a scan over chunks) and streaming (one frame): all of a running stream is
in the state, which it takes and returns. Parameters and states of equal layers are stacked run by run (`MoshiConfig.runs`).
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ttt_jax.config import MoshiConfig, Run
from ttt_jax.init import embedding, linear_kernel
from ttt_jax.moshi import attention
from ttt_jax.moshi.blocks import Block
from ttt_jax.moshi.delays import columns, init_history
from ttt_jax.moshi.depth import DepthTransformer
from ttt_jax.moshi.embed import lookup
from ttt_jax.norms import rms_norm
from ttt_jax.ttt import inner
from ttt_jax.ttt import layer as ttt_layer

Params = dict[str, Any]


class RunState(NamedTuple):
    """State of a run of L equal layers, leaves [L, B, ...]."""

    ring: attention.Ring
    ttt: inner.TTTState | None


class State(NamedTuple):
    """All of a running stream, row by row. Save it, load it, fork it, compare it: it is a value."""

    history: jax.Array
    """Last max_delay + 1 frames, int32 [B, K, max_delay + 1]: what the delays still need."""
    position: jax.Array
    """Valid frames seen, int32 [B]."""
    layers: dict[str, RunState]
    """By name of the run."""


class Outputs(NamedTuple):
    """Predictions on the delayed grid, with what they are scored against; nothing is scored twice."""

    text_logits: jax.Array
    """float32 [B, T, text_card]."""
    audio_logits: jax.Array
    """float32 [B, T, Q, card]."""
    targets: jax.Array
    """Tokens of the predicted column, int32 [B, 1 + Q, T]: text, own codebooks."""
    target_mask: jax.Array
    """bool [B, 1 + Q, T]: valid frame, stream begun, token present."""
    hidden: jax.Array
    """Output of the temporal transformer after its norm, [B, T, dim]."""
    ttt: ttt_layer.Measurement | None
    """By TTT layer in the order of `MoshiConfig.ttt_layers`, leaves [L, B, T, ...]; None if not asked for."""


@partial(jax.jit, static_argnames="cfg")
def init_params(cfg: MoshiConfig, key: jax.Array) -> Params:
    """Moshi's initialisation, float32 (float64 with a float64 model)."""
    text, audio, head, depth, *layers = jax.random.split(key, 4 + cfg.num_layers)
    layers = jnp.stack(layers)
    batch, frames = 1, 1
    state = init_state(cfg, batch)
    x = jnp.zeros((batch, frames, cfg.dim), cfg.dtype)
    mask = jnp.ones((batch, frames), bool)

    def init_block(run: Run, key: jax.Array) -> Params:
        run_state = jax.tree.map(lambda leaf: leaf[0], state.layers[run.name])
        where = attention.positions(state.position, mask, run.context)
        return Block(cfg, run.has_ttt).init(key, x, mask, run_state.ring, where, run_state.ttt)["params"]

    tokens = jnp.zeros((batch, cfg.dep_q), jnp.int32)
    params = {
        "text_emb": embedding(text, (cfg.text_card + 1, cfg.dim)),
        "audio_emb": embedding(audio, (cfg.n_q, cfg.card + 1, cfg.dim)),
        "layers": {
            run.name: jax.vmap(lambda key, run=run: init_block(run, key))(layers[run.start : run.stop])
            for run in cfg.runs
        },
        "out_norm": jnp.ones((cfg.dim,)),
        "text_head": linear_kernel(head, (cfg.dim, cfg.text_card)),
        "depth": DepthTransformer(cfg).init(depth, x[:, 0], tokens[:, 0], tokens)["params"],
    }
    return jax.tree.map(lambda p: p.astype(jnp.promote_types(cfg.dtype, jnp.float32)), params)


def init_state(cfg: MoshiConfig, batch: int) -> State:
    """A fresh stream in each of `batch` rows. Needs no parameters."""

    def run_state(run: Run) -> RunState:
        one = RunState(
            attention.init_ring(batch, run.context, cfg.num_heads, cfg.head_dim, cfg.dtype),
            ttt_layer.init_state(cfg, batch) if run.has_ttt else None,
        )
        return jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (run.stop - run.start, *leaf.shape)), one)

    state = State(
        init_history(cfg, batch), jnp.zeros((batch,), jnp.int32), {run.name: run_state(run) for run in cfg.runs}
    )
    return jax.tree.map(jnp.array, state)  # buffers of its own, so that a step can donate it


def reset_rows(state: State, rows: jax.Array, cfg: MoshiConfig) -> State:
    """The state with the rows where `rows` (bool [B]) is true as fresh as in `init_state`."""
    fresh = init_state(cfg, rows.shape[0])
    layers = _select(rows, fresh.layers, state.layers, axis=1)
    return State(*_select(rows, fresh[:2], state[:2], axis=0), layers)


def reset_ttt_rows(state: State, rows: jax.Array) -> State:
    """The state with the TTT states of `rows` (bool [B]) fresh and all else kept: rings, delayed tokens, positions."""

    def reset(run: RunState) -> RunState:
        return run._replace(ttt=_select(rows, jax.tree.map(jnp.zeros_like, run.ttt), run.ttt, axis=1))

    return state._replace(layers={name: reset(run) for name, run in state.layers.items()})


def _select(rows: jax.Array, new: Any, old: Any, axis: int) -> Any:
    def one(a: jax.Array, b: jax.Array) -> jax.Array:
        return jnp.where(rows.reshape((1,) * axis + (-1,) + (1,) * (b.ndim - axis - 1)), a, b)

    return jax.tree.map(one, new, old)


def temporal(
    params: Params, tokens: jax.Array, mask: jax.Array, state: State, cfg: MoshiConfig, measured: bool = False
) -> tuple[jax.Array, State, ttt_layer.Measurement | None]:
    """The temporal transformer over columns of the delayed grid.

    Args:
      tokens: int32 [B, T, K], the column that each position reads; mask: bool [B, T]; measured: as in `forward`.

    Returns:
      Hidden vectors after the output norm [B, T, dim], the state with rings, TTT states and positions moved on, and
      `Outputs.ttt`.
    """
    text = lookup(params["text_emb"][None], tokens[..., :1], cfg.dtype)
    x = text.sum(2) + lookup(params["audio_emb"], tokens[..., 1:], cfg.dtype).sum(2)
    layers, measurements = {}, []
    for run in cfg.runs:
        old = state.layers[run.name]
        where = attention.positions(state.position, mask, run.context)
        block = Block(cfg, run.has_ttt)

        def body(x: jax.Array, layer, block: Block = block, where: attention.Positions = where):
            params, ring, ttt = layer
            return block.apply({"params": params}, x, mask, ring, where, ttt, measured)

        x, ((k, v), ttt, measurement) = _over_layers(
            body, x, (params["layers"][run.name], *old), run.stop - run.start, tokens.shape[1]
        )
        layers[run.name] = RunState(attention.write(old.ring, k, v, state.position, mask), ttt)
        if measurement is not None:
            measurements.append(measurement)
    position = state.position + mask.sum(1, dtype=jnp.int32)
    measurement = jax.tree.map(lambda *ys: jnp.concatenate(ys), *measurements) if measurements else None
    return rms_norm(x, params["out_norm"]), State(state.history, position, layers), measurement


def _over_layers(body, x: jax.Array, layers, length: int, frames: int):
    """Runs `body` over stacked layers: a scan over many frames (compiles one layer), unrolled over one.

    Scanned weights are copied out of their stack by library matrix products; at one frame that copy is all the time.
    """
    if frames > 1 and length > 1:
        return jax.lax.scan(body, x, layers)
    ys = []
    for i in range(length):
        x, y = body(x, jax.tree.map(lambda leaf, i=i: leaf[i], layers))
        ys.append(y)
    return x, jax.tree.map(lambda *leaves: jnp.stack(leaves), *ys)


def text_logits(params: Params, hidden: jax.Array) -> jax.Array:
    """float32 (or wider) logits [..., text_card] of hidden vectors [..., dim]."""
    wide = jnp.promote_types(hidden.dtype, jnp.float32)
    return jnp.matmul(hidden, params["text_head"].astype(hidden.dtype), preferred_element_type=wide)


@partial(jax.jit, static_argnames=("cfg", "measured"))
def forward(
    params: Params, frames: jax.Array, mask: jax.Array, state: State, cfg: MoshiConfig, measured: bool = False
) -> tuple[Outputs, State]:
    """Moshi with teacher-forced tokens, for any number of frames.

    Position s reads column s - 1 of the delayed grid and predicts column s. Any split of a stream into calls gives the same
    outputs and state.

    Args:
      params: of `init_params`.
      frames: undelayed tokens, int32 [B, K, T]: text, own codebooks, other voice's codebooks; -1 is absent.
      mask: bool [B, T]; a masked frame is skipped as if it were not there, and its outputs mean nothing.
      state: of `init_state` or the call before.
      cfg: the architecture; static.
      measured: whether to measure the TTT layers as well (`Outputs.ttt`); static, and free where not asked for.

    Returns:
      Predictions with their targets, and the state after the call.
    """
    grid, history = columns(state.history, frames, mask, cfg)
    hidden, state, measurement = temporal(params, grid.inputs, mask, state, cfg, measured)
    own = grid.targets[..., : 1 + cfg.dep_q]
    rows, length = mask.shape
    flat = own.reshape(rows * length, 1 + cfg.dep_q)
    audio = DepthTransformer(cfg).apply(
        {"params": params["depth"]}, hidden.reshape(rows * length, cfg.dim), flat[:, 0], flat[:, 1:]
    )
    targets = own.swapaxes(1, 2)
    cards = jnp.array([*cfg.target_streams.values()], jnp.int32)[None, :, None]
    outputs = Outputs(
        text_logits(params, hidden),
        audio.reshape(rows, length, cfg.dep_q, cfg.card),
        targets,
        (targets >= 0) & (targets < cards),  # masked frames have absent targets
        hidden,
        measurement,
    )
    return outputs, state._replace(history=history)


def displacement_ratios(params: Params, state: State, cfg: MoshiConfig) -> jax.Array:
    """Norm of each TTT layer's displacement over that of its base, [B, number of TTT layers]."""
    ratios = [
        _norms(state.layers[run.name].ttt.displacement, 2) / _base_norms(params, run)[:, None]
        for run in cfg.runs
        if run.has_ttt
    ]
    rows = state.position.shape[0]
    return jnp.concatenate(ratios).T if ratios else jnp.zeros((rows, 0))


def ttt_summary(params: Params, state: State, cfg: MoshiConfig) -> dict[int, dict[str, jax.Array]]:
    """By TTT layer: mean and mean absolute gate tanh(alpha), norm of the base, of the displacement (mean over rows), ratio."""
    summary = {}
    for run in (run for run in cfg.runs if run.has_ttt):
        gates = jnp.tanh(params["layers"][run.name]["ttt"]["gate"])
        bases = _base_norms(params, run)
        moved = _norms(state.layers[run.name].ttt.displacement, 2).mean(1)
        for i in range(run.stop - run.start):
            summary[run.start + i] = {
                "gate": gates[i].mean(),
                "gate_abs": jnp.abs(gates[i]).mean(),
                "base_norm": bases[i],
                "displacement_norm": moved[i],
                "displacement_ratio": moved[i] / bases[i],
            }
    return summary


def _base_norms(params: Params, run: Run) -> jax.Array:
    ttt = params["layers"][run.name]["ttt"]
    return _norms([leaf for name, leaf in ttt.items() if name.startswith("inner_")], 1)


def _norms(leaves: Any, lead: int) -> jax.Array:
    """Euclidean norm over all leaves, keeping their `lead` leading axes."""
    return jnp.sqrt(sum((leaf**2).sum(tuple(range(lead, leaf.ndim))) for leaf in jax.tree.leaves(leaves)))
