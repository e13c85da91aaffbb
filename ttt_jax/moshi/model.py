"""Parameters, state and the one `forward` of Moshi's language model.

`forward` serves training (a segment), evaluation (a scan over chunks) and streaming (one frame): it takes and returns
the state, which holds all of a running stream. Parameters and states of equal layers are stacked run by run
(`MoshiConfig.runs`).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ttt_jax.config import MoshiConfig, Run
from ttt_jax.distributed.sharding import by_rows
from ttt_jax.errors import InputError
from ttt_jax.moshi import attention, depth
from ttt_jax.moshi.blocks import REMAT, Block, Remat
from ttt_jax.moshi.delays import columns, init_history
from ttt_jax.moshi.embed import lookup
from ttt_jax.moshi.sink import Sink
from ttt_jax.nn.init import embedding, linear_kernel
from ttt_jax.nn.linear import init_kernel, kernel, linear
from ttt_jax.nn.norms import rms_norm
from ttt_jax.ttt import layer as ttt_layer
from ttt_jax.ttt.state import TTTState, close

Params = dict[str, Any]
PRNG = "threefry2x32"


class RunState(NamedTuple):
    """State of a run of L equal layers, leaves [L, B, ...]."""

    kv_cache: attention.KVCache
    ttt: TTTState | None


class State(NamedTuple):
    """All of a running stream, row by row. Save it, load it, fork it, compare it: it is a value.

    `forward` continues a state of `forward`; `generate.stream_step` continues a state of both. `forward` cannot
    continue a state of `stream_step`: its newest frame lacks the user's codes, which the next step brings.
    """

    history: jax.Array
    """Last max_delay + 1 frames, int32 [B, K, max_delay + 1]: frames that delayed streams still read."""
    position: jax.Array
    """Valid frames seen, int32 [B]."""
    key: jax.Array
    """Key data of the row's random draws, uint32 [B, 2]; each draw folds in the position."""
    layers: dict[str, RunState]
    """By name of the run."""


class Encoded(NamedTuple):
    """Hidden vectors and targets on the delayed grid; each token is scored once."""

    hidden: jax.Array
    """Output of the temporal transformer after its norm, [B, T, dim]."""
    targets: jax.Array
    """Tokens of the predicted column, int32 [B, 1 + Q, T]: text, Moshi's codebooks."""
    target_mask: jax.Array
    """bool [B, 1 + Q, T]: valid frame, stream begun, token present."""
    ttt: ttt_layer.Measurement | None
    """By TTT layer in the order of `MoshiConfig.ttt_layers`, leaves [L, B, T, ...]; None unless measured."""


class Outputs(NamedTuple):
    """Predictions, with the fields of `Encoded`."""

    text_logits: jax.Array
    """float32 [B, T, text_card]."""
    audio_logits: jax.Array
    """float32 [B, T, Q, card]."""
    targets: jax.Array
    target_mask: jax.Array
    hidden: jax.Array
    ttt: ttt_layer.Measurement | None


@partial(jax.jit, static_argnames="cfg")
def init_params(cfg: MoshiConfig, key: jax.Array) -> Params:
    """Moshi's initialisation, float32 (float64 with a float64 model)."""
    text, audio, head, codebooks, *layers = jax.random.split(key, 4 + cfg.num_layers)
    layers = jnp.stack(layers)
    batch, frames = 1, 1
    state = init_state(cfg, batch)
    x = jnp.zeros((batch, frames, cfg.dim), cfg.dtype)
    mask = jnp.ones((batch, frames), bool)

    def init_block(run: Run, key: jax.Array) -> Params:
        ttt = jax.tree.map(lambda leaf: leaf[0], state.layers[run.name].ttt)
        position = jnp.zeros((batch, frames), jnp.int32)
        return Block(cfg, run.has_ttt).init(key, x, mask, position, lambda q, k, v: (v, None), ttt)["params"]

    params = {
        "text_emb": embedding(text, (cfg.text_card + 1, cfg.dim)),
        "audio_emb": embedding(audio, (cfg.n_q, cfg.card + 1, cfg.dim)),
        "layers": {
            run.name: jax.vmap(lambda key, run=run: init_block(run, key))(layers[run.start : run.stop])
            for run in cfg.runs
        },
        "out_norm": jnp.ones((cfg.dim,)),
        **init_kernel(head, "text_head", linear_kernel, cfg.lora.of("heads"), (cfg.text_card,), cfg.dim),
        "depth": depth.init_params(cfg, codebooks),
    }
    if cfg.extra_heads:
        key, lora, out = jax.random.fold_in(head, 2), cfg.lora.of("heads"), (cfg.extra_heads_dim,)
        params |= init_kernel(key, "extra_heads", linear_kernel, lora, out, cfg.dim, (cfg.extra_heads,))
    return jax.tree.map(lambda p: p.astype(jnp.promote_types(cfg.dtype, jnp.float32)), params)


def init_state(cfg: MoshiConfig, batch: int, seeds: Sequence[int] | None = None) -> State:
    """A fresh stream in each of `batch` rows. Needs no parameters.

    Args:
      seeds: one for the random draws of each row (`generate`); rows with equal seeds draw equally, whatever else is in
        the batch.
        Unset: 0, 1, 2 and so on.

    Raises:
      InputError: `seeds` are not one number of 0 to 2^32 - 1 for each row.
    """

    def run_state(run: Run) -> RunState:
        one = RunState(
            attention.init_kv_cache(batch, run.context, cfg.num_heads, cfg.head_dim, cfg.dtype),
            ttt_layer.init_state(cfg, batch) if run.has_ttt else None,
        )
        return jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (run.stop - run.start, *leaf.shape)), one)

    return State(
        init_history(cfg, batch),
        jnp.zeros((batch,), jnp.int32),
        init_keys(range(batch) if seeds is None else seeds, batch),
        {run.name: run_state(run) for run in cfg.runs},
    )


def init_keys(seeds: Sequence[int], batch: int) -> jax.Array:
    """Key data of the draws of `batch` rows, one seed each: uint32 [B, 2]. Raises `InputError` as `init_state`."""
    if len(seeds) != batch or not all(0 <= seed < 2**32 for seed in seeds):
        raise InputError(f"seeds={list(seeds)} cannot be: give one of 0 to 2^32 - 1 for each of the {batch} rows.")
    keys = jnp.array(seeds, jnp.uint32)
    return jax.vmap(lambda seed: jax.random.key_data(jax.random.key(seed, impl=PRNG)))(keys)


def reset_rows(state: State, rows: jax.Array, cfg: MoshiConfig, seeds: Sequence[int] | None = None) -> State:
    """The state with the rows where `rows` (bool [B]) is true as fresh as in `init_state`.

    They keep their random key, and so repeat their draws, unless `seeds` (one for every row) gives new ones.
    """
    batch = rows.shape[0]
    fresh = init_state(cfg, batch)._replace(key=state.key if seeds is None else init_keys(seeds, batch))
    layers = _select(rows, fresh.layers, state.layers, axis=1)
    return State(*_select(rows, fresh[:3], state[:3], axis=0), layers)


def fork_rows(state: State, rows: Sequence[int], seeds: Sequence[int] | None = None) -> State:
    """A new state whose row i is a copy of row `rows[i]` of `state`; [0, 0, 0] copies the first row three times.

    Copies share their random key, and so draw the same, unless `seeds` (one for every new row) gives new ones.
    """
    held = state.position.shape[0]
    if not all(0 <= row < held for row in rows):
        raise InputError(f"rows {list(rows)} cannot be forked from a state of {held} rows: name rows 0 to {held - 1}.")
    index = jnp.array(rows, jnp.int32)
    layers = jax.tree.map(lambda leaf: leaf[:, index], state.layers)
    forked = State(*(leaf[index] for leaf in state[:3]), layers)
    return forked if seeds is None else forked._replace(key=init_keys(seeds, len(rows)))


def clear_kv_caches(state: State) -> State:
    """The state with empty KV caches; fast weights, delayed tokens and random keys stay.

    Positions start again at 0, by which attention knows which slots are filled; rotary positions are relative.
    """
    return state._replace(position=jnp.zeros_like(state.position))


def reset_ttt_rows(state: State, rows: jax.Array) -> State:
    """The state with the TTT states of `rows` (bool [B]) fresh; KV caches, delayed tokens and positions stay."""

    def reset(run: RunState) -> RunState:
        return run._replace(ttt=_select(rows, jax.tree.map(jnp.zeros_like, run.ttt), run.ttt, axis=1))

    return state._replace(layers={name: reset(run) for name, run in state.layers.items()})


def _select(rows: jax.Array, new: Any, old: Any, axis: int) -> Any:
    def one(a: jax.Array, b: jax.Array) -> jax.Array:
        return jnp.where(rows.reshape((1,) * axis + (-1,) + (1,) * (b.ndim - axis - 1)), a, b)

    return jax.tree.map(one, new, old)


def temporal(
    params: Params,
    tokens: jax.Array,
    mask: jax.Array,
    state: State,
    cfg: MoshiConfig,
    measured: bool = False,
    remat: Remat = "none",
    control: ttt_layer.Control | None = None,
) -> tuple[jax.Array, State, ttt_layer.Measurement | None]:
    """The temporal transformer over columns of the delayed grid.

    Args:
      tokens: int32 [B, T, K], the column that each position reads; mask: bool [B, T]; measured: as in `forward`;
        remat: as in `encode`; control: of TTT layers, by row.

    Returns:
      Hidden vectors after the output norm [B, T, dim], the state after the call (except for `history`), and
      `Outputs.ttt`.
    """
    text = lookup(params["text_emb"][None], tokens[..., :1], cfg.dtype)
    x = by_rows(text.sum(2) + lookup(params["audio_emb"], tokens[..., 1:], cfg.dtype).sum(2))
    layers, measurements = {}, []
    for run in cfg.runs:
        args = params["layers"][run.name], x, mask, state.layers[run.name], state.position, run, cfg, measured, remat
        x, layers[run.name], measurement = _over_layers(*args, control)
        if measurement is not None:
            measurements.append(measurement)
    position = state.position + mask.sum(1, dtype=jnp.int32)
    measurement = jax.tree.map(lambda *ys: jnp.concatenate(ys), *measurements) if measurements else None
    return rms_norm(x, params["out_norm"]), state._replace(position=position, layers=layers), measurement


def _over_layers(
    params: Params,
    x: jax.Array,
    mask: jax.Array,
    state: RunState,
    start: jax.Array,
    run: Run,
    cfg: MoshiConfig,
    measured: bool,
    remat: Remat,
    control: ttt_layer.Control | None,
) -> tuple[jax.Array, RunState, ttt_layer.Measurement | None]:
    """Applies a run of layers to a call whose rows have seen `start` frames: x, the run's new state, its measurement.

    A call of many frames scans the layers, which compiles one layer. A call of one frame unrolls them and updates
    states in place: library products copy weights out of a scanned stack, and at one frame that copy would take nearly
    all of the time. Its mini-batches close in the stack, after the last layer, for the same reason.
    """
    block, length = Block(cfg, run.has_ttt, remat if run.has_ttt else "none"), run.stop - run.start
    sink = Sink(cfg.attention_sink, cfg.max_period) if cfg.attention_sink else None
    if x.shape[1] == 1:
        kv_caches, ttts, bases, measurements = state.kv_cache, [], [], []
        for i in range(length):
            layer = jax.tree.map(lambda leaf, i=i: leaf[i], params, is_leaf=lambda leaf: isinstance(leaf, tuple))
            attend = partial(
                attention.attend_one, kv_caches=kv_caches, layer=i, position=start, mask=mask[:, 0], sink=sink
            )
            ttt = jax.tree.map(lambda leaf, i=i: leaf[i], state.ttt)
            x, (kv_caches, ttt, measurement) = block.apply(
                {"params": layer}, x, mask, start[:, None], attend, ttt, measured, control, close=False
            )
            if run.has_ttt:
                ttts.append(ttt)
                bases.append(ttt_layer.base_of(layer["ttt"]))
            measurements.append(measurement)
        stack = lambda *leaves: jnp.stack(leaves)  # noqa: E731
        ttt = close(state.ttt, jax.tree.map(stack, *ttts), bases, cfg.ttt) if run.has_ttt else None
        return x, RunState(kv_caches, ttt), jax.tree.map(stack, *measurements)

    fused = attention.can_fuse(x.shape[1], run.context, cfg.head_dim, x.dtype, sink)
    if fused:
        where = attention.line_up(start, mask, run.context)
    else:
        where = attention.positions(start, mask, run.context, sink)

    def body(x: jax.Array, layer: tuple[Params, RunState]):
        params, (kv_cache, ttt) = layer

        def attend(q: jax.Array, k: jax.Array, v: jax.Array):
            if fused:
                return attention.attend_fused(q, k, v, kv_cache, where)
            first = attention.view_sink(q, k, v, kv_cache, start, where, sink) if sink else None
            return attention.attend(q, k, v, kv_cache, where, first), (k, v)

        x, kept = block.apply({"params": params}, x, mask, where.query, attend, ttt, measured, control)
        return by_rows(x), kept

    if remat != "none" and not run.has_ttt:
        # In a scan nothing could merge what is computed twice; outside of one that must be forbidden.
        body = jax.checkpoint(body, policy=REMAT[remat], prevent_cse=length == 1)
    if length == 1:
        x, ys = body(x, jax.tree.map(lambda leaf: leaf[0], (params, state)))
        kept, ttt, measurement = jax.tree.map(lambda leaf: leaf[None], ys)
    else:
        x, (kept, ttt, measurement) = jax.lax.scan(body, x, (params, state))
    kv_cache = kept if fused else attention.write(state.kv_cache, *kept, start, mask, sink)
    return x, RunState(kv_cache, ttt), measurement


def text_logits(params: Params, hidden: jax.Array, cfg: MoshiConfig) -> jax.Array:
    """float32 (or wider) text logits [..., text_card] of hidden vectors [..., dim]."""
    return linear(hidden, kernel(params, "text_head"), cfg.lora.scaling, wide=True)


def extra_logits(params: Params, hidden: jax.Array, cfg: MoshiConfig) -> jax.Array:
    """float32 (or wider) logits [..., extra_heads, extra_heads_dim] of hidden vectors [..., dim], such as
    `Outputs.hidden`."""
    heads = [kernel(params, "extra_heads").at(i) for i in range(cfg.extra_heads)]
    return jnp.stack([linear(hidden, head, cfg.lora.scaling, wide=True) for head in heads], -2)


def encode(
    params: Params,
    frames: jax.Array,
    mask: jax.Array,
    state: State,
    cfg: MoshiConfig,
    measured: bool = False,
    remat: Remat = "none",
) -> tuple[Encoded, State]:
    """`forward` up to the hidden vectors; `predict` computes the logits of any of their frames.

    Args: those of `forward`, and
      remat: the part that the backward pass computes again (`REMAT`).
    """
    grid, history = columns(state.history, frames, mask, cfg)
    hidden, state, measurement = temporal(params, grid.inputs, mask, state, cfg, measured, remat)
    targets = grid.targets[..., : 1 + cfg.dep_q].swapaxes(1, 2)
    cards = jnp.array([*cfg.target_streams.values()], jnp.int32)[None, :, None]
    present = (targets >= 0) & (targets < cards)  # masked frames have absent targets
    return Encoded(hidden, targets, present, measurement), state._replace(history=history)


def predict(params: Params, hidden: jax.Array, targets: jax.Array, cfg: MoshiConfig) -> tuple[jax.Array, jax.Array]:
    """Teacher-forced logits, float32 or wider: text [B, T, text_card], codebooks [B, T, Q, card].

    Args:
      hidden: [B, T, dim]; targets: int32 [B, 1 + Q, T], both of `Encoded`.
    """
    rows, length = hidden.shape[:2]
    grid_tokens = targets.swapaxes(1, 2).reshape(rows * length, 1 + cfg.dep_q)
    audio = depth.teacher_forced(
        params["depth"], hidden.reshape(rows * length, cfg.dim), grid_tokens[:, 0], grid_tokens[:, 1:], cfg
    )
    return text_logits(params, hidden, cfg), audio.reshape(rows, length, cfg.dep_q, cfg.card)


@partial(jax.jit, static_argnames=("cfg", "measured"))
def forward(
    params: Params, frames: jax.Array, mask: jax.Array, state: State, cfg: MoshiConfig, measured: bool = False
) -> tuple[Outputs, State]:
    """Moshi with teacher-forced tokens, for any number of frames.

    Position s reads column s - 1 of the delayed grid and predicts column s. Any split of a stream into calls gives the
    same outputs and state.

    Args:
      params: of `init_params`.
      frames: undelayed tokens, int32 [B, K, T]: text, Moshi's codebooks, the user's codebooks; -1 is absent.
      mask: bool [B, T]; masked frames are skipped; their outputs have no meaning.
      state: of `init_state` or of the previous call of `forward`.
      cfg: the architecture; static.
      measured: whether to measure the TTT layers, too (`Outputs.ttt`); static.

    Returns:
      Predictions with their targets, and the state after the call.
    """
    encoded, state = encode(params, frames, mask, state, cfg, measured)
    logits = predict(params, encoded.hidden, encoded.targets, cfg)
    return Outputs(*logits, encoded.targets, encoded.target_mask, encoded.hidden, encoded.ttt), state


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
    """By TTT layer: mean and mean absolute gate tanh(alpha), norm of the base, of the displacement (mean over rows),
    ratio."""
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
