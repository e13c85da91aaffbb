"""One optimiser step: a pure function from state and batch to state and metrics.

A step reads `bptt` chunks of every row. Gradients flow through the state from chunk to chunk. They are cut in one
place, the start of the step.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from train import optim
from train.batches import Batch
from train.config import LossConfig, TrainConfig
from train.partition import shapes, split
from ttt_jax.data.text import EPAD, PAD
from ttt_jax.distributed import sharding
from ttt_jax.moshi import model
from ttt_jax.moshi.loss import score
from ttt_jax.utils.trees import Tree, merge
from ttt_jax.utils.xla import known_options


class TrainState(NamedTuple):
    """Everything that a step changes."""

    step: jax.Array
    """Steps done, int32 []."""
    skipped: jax.Array
    """Skipped steps, because something was not finite, int32 []."""
    trainable: Tree
    """The parameters that train, float32."""
    opt_state: Any
    """State of the optimiser."""
    stream: model.State
    """State of every row of the batch: KV caches, TTT states, delayed tokens."""


class Metrics(NamedTuple):
    """Metrics of a step, replicated; losses are of the weights before the step."""

    loss: jax.Array
    """The weighted mean cross-entropy that is minimised, nats."""
    streams: jax.Array
    """Unweighted mean cross-entropy of text and Moshi's codebooks, nats, [1 + Q]; NaN without targets."""
    half_variance: jax.Array
    """Half the variance of each stream's logits over its entries, mean over targets, [1 + Q]."""
    rows: jax.Array
    """Sum of each row's weighted losses by chunk, [K, B]: shows which file is not finite."""
    grad_norm: jax.Array
    """Global norm of the gradient before clipping."""
    grad_norms: dict[str, jax.Array]
    """Norm of the gradient by group of the optimiser."""
    rates: dict[str, jax.Array]
    """Learning rate by group."""
    ttt: dict[int, dict[str, jax.Array]]
    """Gates and norms by TTT layer (`model.ttt_summary`) after the step's frames, with the weights before the step."""
    skipped: jax.Array
    """Skipped steps, this one included, int32 []."""
    finite: jax.Array
    """Whether loss, gradient and the new state are finite, bool []."""
    stop: jax.Array
    """The largest number of a signal that a process got, int32 []; 0: none."""


class Sums(NamedTuple):
    """Sums over frames of one chunk or many."""

    loss: jax.Array
    """Weighted cross-entropy []."""
    weight: jax.Array
    """Weights []."""
    rows: jax.Array
    """Weighted cross-entropy by row [B]."""
    streams: jax.Array
    """Cross-entropy by stream [1 + Q]."""
    half_variance: jax.Array
    """Half the variance of the logits by stream [1 + Q]."""
    counts: jax.Array
    """Targets by stream [1 + Q]."""
    inner: jax.Array | None = None
    """Inner losses with W0, before and after the step of a frame, means over heads, by TTT layer [L, 3]; None if not
    measured."""
    frames: jax.Array | None = None
    """Valid frames []; None if not measured."""


def token_weights(targets: jax.Array, cfg: LossConfig) -> jax.Array:
    """Returns the weight of every target in the loss, float32 [B, 1 + Q, T], for targets int32 [B, 1 + Q, T]."""
    padding = (targets[:, :1] == PAD) | (targets[:, :1] == EPAD)
    text = cfg.text * jnp.where(padding, cfg.text_padding, 1.0)
    codebooks = targets.shape[1] - 1
    weights = (cfg.codebooks + codebooks * cfg.codebooks[-1:])[:codebooks]
    audio = jnp.broadcast_to(jnp.array(weights, jnp.float32)[:, None], targets[:, 1:].shape)
    return jnp.concatenate([text, audio], 1)


def chunk_sums(
    params: Tree, batch: Batch, stream: model.State, cfg: TrainConfig, block: int, measured: bool = False
) -> tuple[Sums, model.State]:
    """Returns the losses of one chunk, `batch` without its leading axis, and the state after it; `block` as in `score`.

    If `measured`, the TTT layers' inner losses are among them.
    """
    stream = model.reset_rows(stream, batch.reset, cfg.model)
    if cfg.state == "reset":
        stream = model.reset_ttt_rows(stream, jnp.ones(batch.reset.shape, bool))
    if not cfg.carry_attention:
        stream = model.clear_kv_caches(stream)
    encoded, stream = model.encode(params, batch.frames, batch.mask, stream, cfg.model, measured, cfg.remat)
    scores = score(params, encoded, cfg.model, block, cfg.remat)
    weights = token_weights(encoded.targets, cfg.loss) * encoded.target_mask
    rows = (scores.nats * weights).sum((1, 2))
    by_stream = scores.nats.sum((0, 2)), scores.half_variance.sum((0, 2)), encoded.target_mask.sum((0, 2))
    sums = Sums(rows.sum(), weights.sum(), rows, *by_stream)
    if measured:
        inner = encoded.ttt.inner if encoded.ttt else None
        losses = (
            [x.mean(-1).sum((1, 2)) for x in (inner.loss_base, inner.loss_before, inner.loss_after)] if inner else []
        )
        sums = sums._replace(inner=jnp.stack(losses, -1) if losses else None, frames=batch.mask.sum())
    return sums, stream


def step_sums(
    params: Tree, batch: Batch, stream: model.State, cfg: TrainConfig, block: int
) -> tuple[Sums, model.State]:
    """Returns the sums over all chunks of a step, with `rows` [K, B], and the state; gradients flow between chunks."""
    if batch.reset.shape[0] == 1:
        sums, stream = chunk_sums(params, jax.tree.map(lambda x: x[0], batch), stream, cfg, block)
        return sums._replace(rows=sums.rows[None]), stream

    def body(stream: model.State, chunk: Batch):
        sums, stream = chunk_sums(params, chunk, stream, cfg, block)
        return stream, sums

    stream, sums = jax.lax.scan(jax.checkpoint(body, prevent_cse=False), stream, batch)
    return jax.tree.map(lambda leaf: leaf.sum(0), sums)._replace(rows=sums.rows), stream


def gradient(
    trainable: Tree, frozen: Tree, batch: Batch, stream: model.State, cfg: TrainConfig, block: int
) -> tuple[Tree, Sums, model.State]:
    """Returns the gradient of the weighted mean loss, float32, the sums of the step, and the state after it.

    With `cfg.accumulate` = A, part i has the rows i, i + A, i + 2A ... The sum over parts is divided once by the weight
    of the whole batch, so parts change the order of additions alone.
    """

    def loss(trainable: Tree, batch: Batch, stream: model.State):
        # The one place where gradients through time are cut. The state is an input of a step, so this matters only if
        # steps are chained under one gradient.
        sums, stream = step_sums(merge(trainable, frozen), batch, jax.lax.stop_gradient(stream), cfg, block)
        return sums.loss, (sums, stream)

    differentiate = jax.grad(loss, has_aux=True)
    parts = cfg.accumulate
    if parts == 1:
        grads, (sums, stream) = differentiate(trainable, batch, stream)
    else:

        def part(carry: tuple[Tree, model.State], i: jax.Array):
            total, stream = carry
            rows = Batch(*(_take(x, 1, parts, i) for x in batch))
            before = _map_rows(lambda x, axis: _take(x, axis, parts, i), stream)
            grads, (sums, after) = differentiate(trainable, rows, before)
            stream = _map_rows(lambda x, axis, new: _put(x, axis, parts, i, new), stream, after)
            return (jax.tree.map(jnp.add, total, grads), stream), sums

        zeros = jax.tree.map(jnp.zeros_like, trainable)
        (grads, stream), sums = jax.lax.scan(part, (zeros, stream), jnp.arange(parts))
        rows = jnp.moveaxis(sums.rows, 0, 2).reshape(batch.reset.shape)
        sums = jax.tree.map(lambda leaf: leaf.sum(0), sums)._replace(rows=rows)
    weight = jnp.maximum(sums.weight, 1e-8)
    return jax.tree.map(lambda g: g / weight, grads), sums, stream


def make_train_step(cfg: TrainConfig, mesh: Mesh) -> Callable:
    """Returns the jitted step: (`TrainState`, frozen, `Batch`, stop int32 [devices]) -> (`TrainState`, `Metrics`).

    `stop` holds for every device the signal that its process got, so that all processes learn of it. The state is
    donated. If `cfg.optim.skips` > 0, a step whose loss, gradient or state is not finite changes the counters alone.
    """
    one = _train_step(cfg, cfg.loss.block * mesh.shape["data"] * mesh.shape["fsdp"])

    def train_step(*args: Any) -> tuple[TrainState, Metrics]:
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return one(*args)

    shardings = jax.tree.map(lambda leaf: leaf.sharding, state_like(cfg, mesh))
    return jax.jit(train_step, donate_argnums=0, out_shardings=(shardings, sharding.replicated(mesh)))


def make_steps_together(cfg: TrainConfig, runs: int) -> Callable:
    """Returns the step of many runs side by side on one device; all leaves but `stop` have a leading axis of runs."""
    return jax.jit(
        jax.vmap(_train_step(cfg, max(1, cfg.loss.block // runs)), in_axes=(0, 0, 0, None)), donate_argnums=0
    )


def _train_step(cfg: TrainConfig, block: int) -> Callable:
    optimizer = optim.make_optimizer(cfg)
    schedules = optim.schedules(cfg)

    def train_step(state: TrainState, frozen: Tree, batch: Batch, stop: jax.Array) -> tuple[TrainState, Metrics]:
        grads, sums, stream = gradient(state.trainable, frozen, batch, state.stream, cfg, block)
        groups = optim.groups(grads)
        norms = {name: _group_norm(grads, groups, name) for name in optim.GROUPS if name in jax.tree.leaves(groups)}
        norm = optax.tree.norm(grads)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.trainable)
        new = optax.apply_updates(state.trainable, updates), opt_state, stream
        skipped = state.skipped
        # A state that is not finite would make all later steps of its row so.
        finite = jnp.isfinite(sums.loss) & jnp.isfinite(norm) & _all_finite(stream)
        if cfg.optim.skips:
            # A row that began a file must not continue with the state of the file before.
            kept = *state[2:4], model.reset_rows(state.stream, batch.reset.any(0), cfg.model)
            new = jax.tree.map(lambda a, b: jnp.where(finite, a, b), new, kept)
            skipped = skipped + ~finite
        metrics = Metrics(
            loss=sums.loss / jnp.maximum(sums.weight, 1e-8),
            streams=sums.streams / sums.counts,
            half_variance=sums.half_variance / sums.counts,
            rows=sums.rows,
            grad_norm=norm,
            grad_norms=norms,
            rates={group: schedules[group](state.step - state.skipped) for group in norms},
            ttt=model.ttt_summary(merge(state.trainable, frozen), stream, cfg.model),
            skipped=skipped,
            finite=finite,
            stop=stop.max(),
        )
        return TrainState(state.step + 1, skipped, *new), metrics

    return train_step


def init_state(cfg: TrainConfig, mesh: Mesh, trainable: Tree) -> TrainState:
    """Returns the state before the first step, on the mesh."""
    shardings = jax.tree.map(lambda leaf: leaf.sharding, state_like(cfg, mesh)._replace(trainable=None))
    rest = jax.jit(partial(fresh_state, cfg), out_shardings=shardings)(trainable)
    return rest._replace(trainable=trainable)


def init_states(cfg: TrainConfig, seeds: Sequence[int]) -> tuple[TrainState, Tree]:
    """Returns states and frozen parameters of runs with `seeds` before the first step, with a leading axis of runs."""

    def one(seed: jax.Array) -> tuple[TrainState, Tree]:
        trainable, frozen = split(model.init_params(cfg.model, jax.random.key(seed)), cfg)
        return fresh_state(cfg, trainable)._replace(trainable=trainable), frozen

    # Random draws of many shapes take long to optimise and run once, as in `train.initial_params`.
    draw = jax.jit(jax.vmap(one), compiler_options=known_options({"xla_backend_optimization_level": 0}))
    return draw(jnp.array(seeds, jnp.uint32))


def state_like(cfg: TrainConfig, mesh: Mesh) -> TrainState:
    """Returns shapes, types and shardings of a run's state. Raises `InputError` if the mesh does not fit the model."""
    trainable = split(shapes(cfg.model), cfg)[0]
    fresh = jax.eval_shape(partial(fresh_state, cfg), trainable)
    of_params = sharding.params_shardings(mesh, trainable)
    whole = sharding.replicated(mesh)
    shardings = TrainState(
        step=whole,
        skipped=whole,
        trainable=of_params,
        opt_state=optax.tree.map_params(
            optim.make_optimizer(cfg), lambda _, s: s, fresh.opt_state, of_params, transform_non_params=lambda _: whole
        ),
        stream=sharding.state_shardings(mesh, fresh.stream),
    )
    return jax.tree.map(
        lambda leaf, s: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=s),
        fresh._replace(trainable=trainable),
        shardings,
    )


def fresh_state(cfg: TrainConfig, trainable: Tree) -> TrainState:
    """Returns the state before the first step, with None in place of `trainable`."""
    zero = jnp.zeros((), jnp.int32)
    return TrainState(
        zero, zero, None, optim.make_optimizer(cfg).init(trainable), model.init_state(cfg.model, cfg.data.batch)
    )


def _all_finite(tree: Any) -> jax.Array:
    return jnp.stack([jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(tree)]).all()


def _group_norm(grads: Tree, groups: Tree, name: str) -> jax.Array:
    leaves = zip(jax.tree.leaves(grads), jax.tree.leaves(groups), strict=True)
    return optax.tree.norm([leaf for leaf, group in leaves if group == name])


def _map_rows(f: Callable, stream: model.State, *others: model.State) -> model.State:
    """Applies `f` to every leaf, its axis of rows, and the leaves of `others`."""
    first = [
        jax.tree.map(lambda x, *ys: f(x, 0, *ys), *parts)
        for parts in zip(*(s[:3] for s in (stream, *others)), strict=True)
    ]
    layers = jax.tree.map(lambda x, *ys: f(x, 1, *ys), stream.layers, *(s.layers for s in others))
    return model.State(*first, layers)


def _take(x: jax.Array, axis: int, parts: int, index: jax.Array) -> jax.Array:
    """Returns rows index, index + parts, ... along `axis`, equally many of each device."""
    x = x.reshape(*x.shape[:axis], -1, parts, *x.shape[axis + 1 :])
    return jax.lax.dynamic_index_in_dim(x, index, axis + 1, keepdims=False)


def _put(x: jax.Array, axis: int, parts: int, index: jax.Array, new: jax.Array) -> jax.Array:
    """Returns `x` with `new` in the rows that `_take` returns."""
    split = x.reshape(*x.shape[:axis], -1, parts, *x.shape[axis + 1 :])
    return jax.lax.dynamic_update_index_in_dim(split, new, index, axis + 1).reshape(x.shape)
