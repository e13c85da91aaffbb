"""Parameters, memory and operations of a run, from shapes alone: no weights and no devices are needed.

The memory of arrays is exact. The memory of a step beside them is an estimate: the values that are stored for the
backward pass, and the largest part that is computed at once, before XLA fuses and orders operations.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend.core import Literal
from jax.sharding import AbstractMesh, AxisType

from train.config import TrainConfig
from train.flops import Flops, flops_per_frame
from train.partition import shapes, split
from train.step import state_like
from ttt_jax.checkpoints.parameter_counts import TTT, lora_rank_like_ttt, parameter_counts
from ttt_jax.config import FRAME_RATE, LoRAConfig
from ttt_jax.distributed import sharding
from ttt_jax.errors import InputError
from ttt_jax.moshi import model
from ttt_jax.moshi.loss import score
from ttt_jax.utils.trees import Tree, merge

Shape = jax.ShapeDtypeStruct
Leaf = Any  # an array, its shape or its abstract value
ARRAYS = ("frozen weights", "weights that train", "optimiser", "streams")
STEP = ("gradients", "kept for the backward pass", "worked on at a time")


NO_MEMORY = ("resource_exhausted", "out_of_memory", "out of memory")
"""Parts of XLA's messages when memory does not suffice, in lower case."""


class Plan(NamedTuple):
    """Parameters, memory and operations of a run of `cfg`."""

    cfg: TrainConfig
    mesh: dict[str, int]
    """Devices by axis."""
    parameters: dict[str, int]
    """Number of parameters by part of the model."""
    trainable: int
    """Number of parameters that train."""
    memory: dict[str, int]
    """Bytes on a device: `ARRAYS` are exact, `STEP` is an estimate."""
    flops: Flops
    """Operations of a frame."""
    frames: int
    """Frames of a step, on all devices."""


def plan(cfg: TrainConfig, devices: int | None = None) -> Plan:
    """Returns the plan of a configuration from `train.partition.fit`.

    `devices` is their number; None: as many as `cfg.mesh` names, or all local ones if it has -1. Raises `InputError` if
    the mesh does not fit devices, rows or model.
    """
    mesh = _mesh(cfg, devices)
    trainable, frozen = split(shapes(cfg.model), cfg)
    frozen = jax.tree.map(lambda leaf, dtype: Shape(leaf.shape, dtype), frozen, _types(frozen, cfg))
    state = state_like(cfg, mesh)
    place = lambda leaf, where: Shape(leaf.shape, leaf.dtype, sharding=where)  # noqa: E731
    placed = jax.tree.map(place, frozen, sharding.params_shardings(mesh, frozen))
    arrays = [_on_device(tree) for tree in (placed, state.trainable, state.opt_state, state.stream)]
    gradients = _on_device(state.trainable) * (2 if cfg.accumulate > 1 else 1)  # of a part and of the sum
    return Plan(
        cfg=cfg,
        mesh=dict(mesh.shape),
        parameters=parameter_counts(cfg.model),
        trainable=sum(leaf.size for leaf in jax.tree.leaves(trainable)),
        memory=dict(zip(ARRAYS + STEP, (*arrays, gradients, *_activations(cfg, mesh, trainable, frozen)), strict=True)),
        flops=flops_per_frame(cfg),
        frames=cfg.bptt * cfg.data.batch * cfg.data.chunk,
    )


def lines(plan: Plan) -> list[str]:
    """Returns the plan as text."""
    cfg, total = plan.cfg, sum(plan.parameters.values())
    devices = math.prod(plan.mesh.values())
    mesh = ", ".join(f"{axis} {size}" for axis, size in plan.mesh.items())
    forward, backward = plan.flops
    parts = f" in {cfg.accumulate} parts" if cfg.accumulate > 1 else ""
    chunks = f"{cfg.bptt} chunks of " if cfg.bptt > 1 else ""
    rank = ""
    if cfg.model.ttt_layers and cfg.model.lora.maps:
        rank = f"   as many as adapters of rank {lora_rank_like_ttt(cfg.model)} on model.lora.maps"
    return [
        f"parameters: {total / 1e6:,.2f} M, of which {plan.trainable / 1e6:,.2f} M train,"
        f" {(total - plan.trainable) / 1e6:,.2f} M are frozen",
        *(f"  {part:25}{n / 1e6:10,.2f} M{rank if part == TTT else ''}" for part, n in plan.parameters.items() if n),
        f"memory of a device: {sum(plan.memory.values()) / 1e9:.2f} GB, with {devices} of them ({mesh})",
        *(f"  {part:28}{size / 1e9:7.2f} GB{'   estimate' * (part in STEP[1:])}" for part, size in plan.memory.items()),
        f"operations of a frame: {_si(forward + backward)}FLOP, {_si(forward)}FLOP forward and {_si(backward)}FLOP"
        " backward (recomputation apart)",
        f"a step: {cfg.data.batch} rows{parts} x {chunks}{cfg.data.chunk} frames ="
        f" {_si((forward + backward) * plan.frames)}FLOP, {plan.frames / FRAME_RATE:,.0f} s of speech",
    ]


def too_large(error: Exception, cfg: TrainConfig) -> InputError | None:
    """Returns an `InputError` if `error` reports too little memory for a program or for arrays, else None."""
    text = str(error)
    if not isinstance(error, MemoryError) and not any(part in text.lower() for part in NO_MEMORY):
        return None
    reason = text.splitlines()[0].rstrip(".") if text else "out of memory"
    return InputError(
        f"the run does not fit into the memory of a device ({reason}): {', then '.join(_remedies(cfg))}; --dry-run"
        " shows what takes how much."
    )


def _remedies(cfg: TrainConfig) -> list[str]:
    """What to change, cheapest first."""
    mesh = cfg.mesh
    rows = cfg.data.batch // cfg.accumulate // (max(1, mesh.data) * max(1, mesh.fsdp))  # -1: at least one device
    remedies = {"none": ["set --remat dots", "--remat layers"], "dots": ["set --remat layers"], "layers": []}[cfg.remat]
    if rows > 1:
        remedies.append(f"raise --accumulate above {cfg.accumulate}")
    remedies.append(f"lower --loss.block below {min(cfg.loss.block, rows * cfg.data.chunk)}")
    if cfg.data.batch > 1:
        remedies.append(f"--data.batch below {cfg.data.batch}")
    remedies.append(f"--data.chunk below {cfg.data.chunk}")
    if cfg.model.ttt_layers and cfg.model.ttt.remat_group > 1:
        remedies.append(f"--model.ttt.remat-group below {cfg.model.ttt.remat_group}")
    remedies.append(f"with more devices raise --mesh.fsdp above {mesh.fsdp}" if mesh.fsdp > 0 else "take more devices")
    return remedies


def _mesh(cfg: TrainConfig, devices: int | None) -> AbstractMesh:
    sizes = (cfg.mesh.data, cfg.mesh.fsdp, cfg.mesh.tensor)
    devices = devices or (len(jax.devices()) if -1 in sizes else math.prod(sizes))
    mesh = AbstractMesh(sharding.sizes(*sizes, devices), sharding.AXES, axis_types=(AxisType.Auto,) * 3)
    sharding.check_rows(mesh, cfg.data.batch, cfg.accumulate)
    return mesh


def _types(frozen: Tree, cfg: TrainConfig) -> Tree:
    """Types of the frozen leaves: that of the model for the base, float32 for TTT layers and adapters."""

    def one(path: Any, _: Leaf) -> jnp.dtype:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        return jnp.dtype("float32" if "/ttt/" in name or "_lora_" in name else cfg.model.dtype)

    return jax.tree_util.tree_map_with_path(one, frozen)


def _on_device(tree: Any) -> int:
    """Bytes on a device of a tree whose leaves have shardings."""
    return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def _activations(cfg: TrainConfig, mesh: AbstractMesh, trainable: Tree, frozen: Tree) -> tuple[int, int]:
    """Bytes on a device that are stored for the backward pass, and of the largest part that is computed at once.

    That part is a layer that is computed again, or the logits of a block with the depth transformer.
    """
    net, chunk = cfg.model, cfg.data.chunk
    rows = cfg.data.batch // cfg.accumulate // (mesh.shape["data"] * mesh.shape["fsdp"])
    stream = jax.eval_shape(lambda: model.init_state(net, rows))
    frames, mask = Shape((rows, net.num_streams, chunk), jnp.int32), Shape((rows, chunk), bool)
    reset = Shape((rows,), bool)

    def kept(remat: str) -> int:
        def encode(trainable: Tree, frozen: Tree, frames: Any, mask: Any, reset: Any, stream: Any) -> jax.Array:
            stream = model.reset_rows(stream, reset, net)
            return model.encode(merge(trainable, frozen), frames, mask, stream, net, remat=remat)[0].hidden

        leaves = _residuals(encode, trainable, frozen, frames, mask, reset, stream)
        return sum(_bytes_of(leaf, cfg, mesh) for leaf in leaves if not _is_fused(leaf, cfg))

    stored = kept(cfg.remat)
    layer = 0 if cfg.remat == "none" else (kept("none") - stored) // net.num_layers
    if cfg.bptt > 1:
        # The stream at the start of every chunk is stored; values inside a chunk are computed again, chunk by chunk.
        stored += cfg.bptt * sum(_bytes_of(leaf, cfg, mesh) for leaf in jax.tree.leaves(stream))
    return stored, max(layer, _head(cfg, mesh, rows))


def _head(cfg: TrainConfig, mesh: AbstractMesh, rows: int) -> int:
    """Bytes of the loss of a block: products of the depth transformer and the heads, and gradients of the logits."""
    # The product of an adapter is added to that of its map in place.
    net = dataclasses.replace(cfg.model, lora=LoRAConfig())
    blocks = min(cfg.data.chunk, -(-rows * cfg.data.chunk // cfg.loss.block))
    frames = rows * -(-cfg.data.chunk // blocks)
    params = jax.tree.map(lambda leaf: Shape(leaf.shape, jnp.dtype(net.dtype)), shapes(net))

    def loss(inputs: tuple[Tree, jax.Array], targets: jax.Array) -> jax.Array:
        encoded = model.Encoded(inputs[1], targets, targets >= 0, None)
        return score(inputs[0], encoded, net, frames).nats.sum()

    # XLA fuses entrywise operations with their readers.
    loss = jax.checkpoint(loss, policy=jax.checkpoint_policies.dots_saveable)
    hidden, targets = Shape((1, frames, net.dim), jnp.dtype(net.dtype)), Shape((1, 1 + net.dep_q, frames), jnp.int32)
    logits = [Shape((frames, cards), jnp.float32) for cards in net.target_streams.values()]
    return sum(_bytes_of(leaf, cfg, mesh) for leaf in [*_residuals(loss, (params, hidden), targets), *logits])


def _residuals(f: Callable, x: Any, *others: Any) -> list[Leaf]:
    """Values that `f` stores for its gradient in `x`, without its arguments."""
    vjp = jax.make_jaxpr(lambda x, *others: jax.tree.leaves(jax.vjp(lambda x: f(x, *others), x)[1]))(x, *others).jaxpr
    given = {id(variable) for variable in vjp.invars}
    kept = {id(variable): variable.aval for variable in vjp.outvars if not isinstance(variable, Literal)}
    return [value for name, value in kept.items() if name not in given]


def _is_fused(leaf: Leaf, cfg: TrainConfig) -> bool:
    """Whether the leaf is attention scores that cuDNN's flash attention does not store (bfloat16 on a GPU, no sink)."""
    fuses = cfg.model.dtype == "bfloat16" and not cfg.model.attention_sink
    return fuses and any(
        leaf.shape[-2:] in ((cfg.data.chunk, cfg.data.chunk), (cfg.data.chunk, context))
        for context in cfg.model.contexts
    )


def _bytes_of(leaf: Leaf, cfg: TrainConfig, mesh: AbstractMesh) -> int:
    """Bytes on a device of an activation of its rows, split over `tensor` along heads, hidden units and classes."""
    net = cfg.model
    spread = {net.num_heads, net.hidden, net.depth.num_heads, net.depth.hidden, net.card, net.text_card}
    return leaf.size * leaf.dtype.itemsize // (mesh.shape["tensor"] if spread & set(leaf.shape) else 1)


def _si(number: float) -> str:
    """Formats with three digits and a prefix: 7.69 G."""
    power = min(5, max(0, int(math.log10(max(number, 1)) // 3)))
    return f"{number / 1000**power:.3g} {' kMGTP'[power].strip()}"
