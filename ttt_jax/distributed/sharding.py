"""Where arrays lie on a mesh of devices: one table for parameters, one rule for states and batches.

The axes are `data` (copies of the weights, each with rows of its own), `fsdp` (devices that share a copy and gather a layer when they
need it, each with rows of its own) and `tensor` (devices that share heads and hidden units and work on the same rows). Fast weights
are states: rows over `data` and `fsdp`, heads over `tensor`, so the inner loop of a TTT layer talks to no other device.
"""

from __future__ import annotations

import math
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from ttt_jax.errors import InputError

AXES = ("data", "fsdp", "tensor")
ROWS = ("data", "fsdp")
"""Mesh axes that rows are spread over."""

RULES: tuple[tuple[str, tuple[Any, ...]], ...] = (
    (r".*(norm\d?|post_norm_(scale|bias)|gate|out_bias)", ()),
    (r".*/ttt/(q|k|v)_kernel", ("tensor", "fsdp")),
    (r".*/ttt/out_kernel", ("fsdp", "tensor")),
    (r".*/ttt/(q|k|v)_bias", ("tensor",)),
    (r".*/ttt/(inner_w\d+)", ("tensor", None, None)),
    (r".*/ttt/(inner_b\d+|ln_scale|ln_bias|rate_weight)", ("tensor", None)),
    (r".*/ttt/rate_bias", ("tensor",)),
    (r".*/qkv", (None, "tensor", None, "fsdp")),
    (r".*/gate_up", (None, "tensor", "fsdp")),
    (r".*/(out|down)", ("fsdp", "tensor")),
    (r"(.*/)?(text_head|heads|input)", ("tensor", "fsdp")),
    (r"(.*/)?(text_emb|audio_emb)", (None, "fsdp")),
    (r"(.*/)?(extra_heads|text_emb_up|audio_emb_up)", (None, "fsdp")),
)
"""(pattern of a parameter's path, mesh axes of its last dimensions); the first that matches the whole path decides, dimensions
before those named are stacks and stay whole. Adapters follow from their map (`spec`)."""


def sizes(data: int, fsdp: int, tensor: int, devices: int) -> tuple[int, int, int]:
    """Sizes of the mesh axes over so many devices; one may be given as -1: what the others leave. Raises `InputError`."""
    given = math.prod(size for size in (data, fsdp, tensor) if size != -1)
    found = tuple(devices // given if size == -1 else size for size in (data, fsdp, tensor))
    if math.prod(found) != devices:
        raise InputError(
            f"mesh.data={data}, mesh.fsdp={fsdp} and mesh.tensor={tensor} do not make up the {devices} devices that are there: choose"
            f" sizes whose product is {devices}, or -1 for one of them."
        )
    return found


def make_mesh(data: int, fsdp: int, tensor: int) -> Mesh:
    """The mesh of all devices of all processes, of `sizes`, process after process. Raises `InputError`."""
    # In this order, and not in one that follows the wiring, the rows of a process are a range whatever the sizes.
    devices = sorted(jax.devices(), key=lambda device: (device.process_index, device.id))
    shape = sizes(data, fsdp, tensor, len(devices))
    return Mesh(np.array(devices).reshape(shape), AXES, axis_types=(AxisType.Auto,) * 3)


def check_rows(mesh: Mesh | AbstractMesh, batch: int, accumulate: int) -> None:
    """Raise `InputError` unless every device gets as many rows of each of `accumulate` parts of a batch."""
    data, fsdp = (mesh.shape[axis] for axis in ROWS)
    if batch // accumulate % (data * fsdp):
        parts = f" in accumulate={accumulate} parts" if accumulate > 1 else ""
        raise InputError(
            f"data.batch={batch}{parts} does not divide among mesh.data={data} x mesh.fsdp={fsdp}: choose a multiple of"
            f" {data * fsdp * accumulate}{', or lower accumulate' if accumulate > 1 else ''}."
        )


def by_rows(x: jax.Array, *axes: str | None) -> jax.Array:
    """`x` [B, ...] with its rows spread over the mesh, and `axes` those of the dimensions that follow; as it is where there is no mesh."""
    if jax.sharding.get_abstract_mesh().empty:
        return x
    return jax.lax.with_sharding_constraint(x, P(ROWS, *axes))


def per_row(tree: Any, rows: int) -> Any:
    """Leaves [H, ...] as [B, H, ...], a copy for each of `rows`, where rows are spread over devices; as they are where they are not."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or all(mesh.shape[axis] == 1 for axis in ROWS):
        return tree
    return jax.tree.map(lambda x: by_rows(jnp.broadcast_to(x, (rows, *x.shape)), "tensor"), tree)


def spec(path: str, ndim: int) -> P:
    """Mesh axes of the parameter at `path`. Raises `ValueError` for one that no rule covers."""
    name, _, half = path.partition("_lora_")
    for pattern, axes in RULES:
        if re.fullmatch(pattern, name):
            if half == "a":
                axes = (None, axes[-1])
            elif half == "b":  # its inner axis is the rank, which may divide by nothing: the output axis takes both
                shared = ("tensor", "fsdp") if axes[-1] == "fsdp" else "tensor"
                axes = (*(shared if axis == "tensor" else axis for axis in axes[:-1]), None)
            return P(*(None,) * (ndim - len(axes)), *axes) if axes else P()
    raise ValueError(f"no rule says how the parameter {path} is spread: add it to ttt_jax.distributed.sharding.RULES.")


def params_shardings(mesh: Mesh, params: Any) -> Any:
    """The sharding of every leaf of a (part of a) parameter tree. Raises `InputError` where a dimension does not divide."""

    def one(path: Any, leaf: Any) -> NamedSharding:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        found = spec(name, len(leaf.shape))
        for size, axes in zip(leaf.shape, found, strict=False):
            over = [axis for axis in (axes if isinstance(axes, tuple) else (axes,)) if axis and mesh.shape[axis] > 1]
            parts = math.prod(mesh.shape[axis] for axis in over)
            if size % parts:
                told = " x ".join(f"mesh.{axis}={mesh.shape[axis]}" for axis in over)
                raise InputError(
                    f"{told} does not divide the {size} of {name} {tuple(leaf.shape)}: choose a divisor of {size}, or 1."
                )
        return NamedSharding(mesh, found)

    return jax.tree_util.tree_map_with_path(one, params)


def state_shardings(mesh: Mesh, state: Any) -> Any:
    """The shardings of a `ttt_jax.moshi.model.State`: rows over the mesh, heads of rings and fast weights over `tensor`."""

    def layer(leaf: Any) -> NamedSharding:  # [L, B], or [L, B, H, ...]
        return NamedSharding(mesh, P(None, ROWS, *(("tensor",) if len(leaf.shape) > 2 else ())))

    layers = jax.tree.map(layer, state.layers)
    rows = NamedSharding(mesh, P(ROWS))
    return type(state)(*(rows for _ in state[:3]), layers)


def rows_sharding(mesh: Mesh, lead: int = 0) -> NamedSharding:
    """The sharding of an array whose axis `lead` counts rows."""
    return NamedSharding(mesh, P(*(None,) * lead, ROWS))


def devices_sharding(mesh: Mesh) -> NamedSharding:
    """The sharding of an array with an entry for each device."""
    return NamedSharding(mesh, P(AXES))


def replicated(mesh: Mesh) -> NamedSharding:
    """The sharding of what every device holds."""
    return NamedSharding(mesh, P())


def local_rows(mesh: Mesh, batch: int) -> range:
    """The rows of a batch that lie on devices of this process, a range since `make_mesh` goes process by process."""
    held = rows_sharding(mesh).addressable_devices_indices_map((batch,)).values()
    starts, stops, _ = zip(*(rows.indices(batch) for (rows,) in held), strict=True)
    return range(min(starts), max(stops))
