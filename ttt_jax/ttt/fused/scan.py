"""The inner loop with a fused chain (`kernels`): what `inner.inner_scan` computes, without a bound, for the linear
network and the 2-layer MLP."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from ttt_jax.config import TTTConfig
from ttt_jax.distributed.sharding import ROWS
from ttt_jax.kernels import plain
from ttt_jax.kernels.chain import Affine as ChainAffine
from ttt_jax.kernels.chain import C, Factors, Weights, outer
from ttt_jax.ttt.fused.chained import Arguments, Marks, Opened, run
from ttt_jax.ttt.fused.groups import turned
from ttt_jax.ttt.fused.slots import Frames, Places, place, plan_of, rearrange
from ttt_jax.ttt.measure import InnerMeasurement
from ttt_jax.ttt.network import Affine, Descent, Inputs, Network
from ttt_jax.ttt.state import TTTState

CHUNK_BYTES = 16e9
"""Bytes that the backward pass may hold of one layer: weights of every mini-batch and hidden activations. A longer call
goes in chunks, each of which runs its forward pass again. 8 rows of 2,048 frames through 32 heads of width 128 with b =
16 make one chunk."""


def fused_scan(
    base: Network,
    scale: jax.Array,
    bias: jax.Array,
    state: TTTState,
    inputs: Inputs,
    mask: jax.Array,
    cfg: TTTConfig,
    measured: bool = False,
    chain: Any = plain,
) -> tuple[TTTState, jax.Array, InnerMeasurement | None]:
    """Runs the inner loop over a call of any length; arguments and results as of `inner.inner_scan`.

    Products multiply float16 numbers, sums are float32; with float64 inputs all is float64. The measurement has no
    gradient. `cfg.remat_group` has no effect: `CHUNK_BYTES` bounds memory. Over a mesh every device runs its own rows
    and heads.

    Args:
      chain: module with the functions of `kernels.plain`.
    """
    local = partial(_local, cfg=cfg, measured=measured, chain=chain)
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return local(base, scale, bias, state, inputs, mask)
    rows = ROWS if mask.shape[0] % math.prod(mesh.shape[axis] for axis in ROWS) == 0 else None
    heads = "tensor" if len(scale) % mesh.shape["tensor"] == 0 else None
    by_head, by_row, by_frame = (PartitionSpec(*axes) for axes in ((heads,), (rows, heads), (rows, None, heads)))
    of_state = TTTState(by_row, by_row, PartitionSpec(rows))
    return jax.shard_map(
        local,
        in_specs=(by_head, by_head, by_head, of_state, by_frame, PartitionSpec(rows)),
        out_specs=(of_state, by_frame, by_frame),
        check_vma=False,
    )(base, scale, bias, state, inputs, mask)


def _local(
    base: Network,
    scale: jax.Array,
    bias: jax.Array,
    state: TTTState,
    inputs: Inputs,
    mask: jax.Array,
    cfg: TTTConfig,
    measured: bool,
    chain: Any,
) -> tuple[TTTState, jax.Array, InnerMeasurement | None]:
    b, heads, rows = cfg.mini_batch, len(scale), len(mask)
    plan, chunks, batches = plan_of(mask.shape[1], b, _keep(cfg), _held(base, cfg, rows * heads), CHUNK_BYTES)
    places = place(mask, state.count, b, chunks * batches)
    by_chunk = partial(_by_chunk, chunks=chunks, heads=heads)
    frames = Frames(*(by_chunk(rearrange(x, places.frame, places.slot), b) for x in inputs))
    marks, here = _marks(places, b, chunks, heads)

    base = _weights(base)
    displacement = _weights(jax.tree.map(_flat, state.displacement))
    opened = _opened(state, displacement, marks.held[0])
    # Reading takes the keys of earlier steps from the call's frames.
    held = marks.held[0][:, None, :, None]
    k = frames.k.at[0, :, :1].set(jnp.where(held, jnp.swapaxes(opened.k, 1, 2)[:, None], frames.k[0, :, :1]))
    total = jax.tree.map(jnp.add, displacement, _sum(opened))

    def chunk(carry: tuple[Weights, Weights], x: tuple[Frames, Marks]):
        arguments = Arguments(base, scale, bias, *carry, opened, x[0])
        # The barrier keeps results that nobody uses: having removed some, JAX (up to 0.12) fails under a
        # `jax.checkpoint` around another one (rule of `optimize_remat`, `_remat_opt_dce`).
        z, end, last, measurement = jax.lax.optimization_barrier(run(chain, plan, measured, arguments, x[1]))
        # An open mini-batch stays out of the displacement, but `total` held its earlier steps.
        closes = x[1].closes[:, 0]
        end = jax.tree.map(lambda w, d: jnp.where(closes.reshape(-1, *(1,) * (w.ndim - 1)), w, d), end, carry[0])
        return (end, end), (z, _left(last, *x), measurement)

    xs = frames._replace(k=k), marks
    if chunks == 1:
        (end, _), ys = chunk((displacement, total), jax.tree.map(lambda x: x[0], xs))
        z, last, measurement = jax.tree.map(lambda y: y[None], ys)
    else:
        (end, _), (z, last, measurement) = jax.lax.scan(
            jax.checkpoint(chunk, prevent_cse=False), (displacement, total), xs
        )

    z, measurement = jax.tree.map(lambda y: rearrange(_by_row(y, rows), places.slot, places.frame), (z, measurement))
    count = state.count + mask.sum(1, dtype=jnp.int32)
    return TTTState(_network(end, rows), _open_steps(state, last, here, places.reached < b), count), z, measurement


def _keep(cfg: TTTConfig) -> float:
    return 1.0 if cfg.horizon is None else math.exp(-cfg.mini_batch / cfg.horizon)


def _held(base: Network, cfg: TTTConfig, lanes: int) -> int:
    """Bytes that the backward pass holds of a mini-batch: float16 weights of maps behind the first; of every output of
    the first map and slot four float16 numbers, and about as many float32 ones while it reads."""
    weights = sum(of.w[0].size for of in base[1:])
    return lanes * (2 * weights + 24 * base[0].w.shape[-1] * C * -(-cfg.mini_batch // C))


def _marks(places: Places, b: int, chunks: int, heads: int) -> tuple[Marks, jax.Array]:
    """`Marks` of every chunk, and whether the chunk has the row's last mini-batch, bool [chunks, N]."""
    of_heads = lambda x: jnp.repeat(x, heads, 0)  # noqa: E731
    closes = of_heads(places.closes)
    closes = jnp.moveaxis(closes.reshape(len(closes), chunks, -1), 1, 0)
    held = of_heads(jnp.arange(b) < places.phase[:, None])
    first = jnp.arange(chunks)[:, None, None] == 0
    last = of_heads(places.reached // b) - jnp.arange(chunks)[:, None] * closes.shape[2]
    here = (last >= 0) & (last < closes.shape[2])
    return Marks(closes, held & first, jnp.clip(last, 0, closes.shape[2] - 1)), here


def _opened(state: TTTState, displacement: Weights, held: jax.Array) -> Opened:
    """The state's open mini-batch as the chain knows it; zeros with b = 1."""
    if not state.open_steps:
        outputs = tuple(jnp.zeros((*of.b.shape, 1), of.b.dtype) for of in displacement)
        return Opened(outputs[-1], Factors(outputs[:-1], outputs))
    steps = jax.tree.map(lambda x: jnp.where(held[:, None], jnp.swapaxes(_flat(x), 1, 2), 0), state.open_steps)
    k, *inputs = steps.inputs
    return Opened(k, Factors(tuple(inputs), tuple(-x for x in steps.steps)))


def _left(last: Opened, frames: Frames, marks: Marks) -> tuple[Descent, jax.Array]:
    """Steps of the frames of the mini-batch `Marks.last`, [N, b, X], and whether a slot has one, bool [N, b, 1]. As in
    `network.put`, a frame with a rate of 0 leaves none."""
    k, (inputs, steps) = jax.tree.map(lambda x: jnp.swapaxes(x, 1, 2), last)
    eta = jnp.take_along_axis(frames.eta, marks.last[:, None, None], 1)[:, 0, :, None]
    return Descent((k, *inputs), tuple(-x for x in steps)), eta != 0


def _open_steps(
    state: TTTState, last: tuple[Descent, jax.Array], here: jax.Array, first: jax.Array
) -> Descent | tuple[()]:
    """The new state's open mini-batch.

    Args:
      last: of `_left` for each chunk; here: whether the chunk has the row's last mini-batch, bool [chunks, N].
      first: rows whose first mini-batch is the last one, bool [B].
    """
    if not state.open_steps:
        return ()
    steps, there = last
    there = there & here[:, :, None, None]

    def of_state(old: jax.Array, new: jax.Array) -> jax.Array:
        of_row = lambda x: x.reshape(*old.shape[:3], -1)  # noqa: E731
        new = of_row(jnp.where(there, new, 0).sum(0))
        return jnp.where(of_row(there.any(0)), new, jnp.where(first[:, None, None, None], old, 0))

    return jax.tree.map(of_state, state.open_steps, steps)


def _sum(opened: Opened) -> Weights:
    """The sum of the steps."""
    pairs = zip(outer(*opened), opened.factors.steps, strict=True)
    return tuple(ChainAffine(jnp.einsum("nib,njb->nij", *pair), step.sum(-1)) for pair, step in pairs)


def _flat(x: jax.Array) -> jax.Array:
    """[B, H, ...] -> [N, ...]."""
    return x.reshape(-1, *x.shape[2:])


def _weights(network: Network) -> Weights:
    return turned(tuple(ChainAffine(*of) for of in network))


def _network(weights: Weights, rows: int) -> Network:
    weights = jax.tree.map(lambda x: x.reshape(rows, -1, *x.shape[1:]), weights)
    return tuple(Affine(*of) for of in turned(weights))


def _by_chunk(x: jax.Array, b: int, chunks: int, heads: int) -> jax.Array:
    """[B, chunks M b, H, ...] -> [chunks, N, M, b, ...]."""
    x = jnp.moveaxis(x, 2, 1).reshape(x.shape[0] * heads, chunks, -1, b, *x.shape[3:])
    return jnp.moveaxis(x, 1, 0)


def _by_row(x: jax.Array, rows: int) -> jax.Array:
    """[chunks, N, M, b, ...] -> [B, chunks M b, H, ...]."""
    heads = x.shape[1] // rows
    x = jnp.moveaxis(x, 0, 1).reshape(rows, heads, -1, *x.shape[4:])
    return jnp.moveaxis(x, 1, 2)
