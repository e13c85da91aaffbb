"""Shardings of arrays over a mesh of devices: a table for parameters, one rule for states and batches.

The axes are `data` (copies of the weights, each for other rows), `fsdp` (devices that share a copy, gather a layer when
they need it, and work on other rows) and `tensor` (devices that share heads and hidden units and work on the same
rows). Fast weights are states, with rows over `data` and `fsdp` and heads over `tensor`, so the inner loop of a TTT
layer needs no communication.
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
"""Mesh axes of rows."""

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
"""(pattern of a parameter's path, mesh axes of its last dimensions). The first match of the whole path decides. Earlier
dimensions are stacks and stay whole. Adapters follow their map (`spec`)."""


def sizes(data: int, fsdp: int, tensor: int, devices: int) -> tuple[int, int, int]:
    """Returns the sizes of the mesh axes over `devices`; one may be given as -1 for all remaining devices.

    Raises `InputError` if their product is not `devices`.
    """
    given = math.prod(size for size in (data, fsdp, tensor) if size != -1)
    shape = tuple(devices // given if size == -1 else size for size in (data, fsdp, tensor))
    if math.prod(shape) != devices:
        raise InputError(
            f"mesh.data={data}, mesh.fsdp={fsdp} and mesh.tensor={tensor} do not make up the {devices} devices that are"
            f" there: choose sizes whose product is {devices}, or -1 for one of them."
        )
    return shape


def make_mesh(data: int, fsdp: int, tensor: int) -> Mesh:
    """Returns the mesh of all devices of all processes, process after process. Raises `InputError` as `sizes`."""
    # In this order the rows of a process are a range for all sizes; in the order of the wiring they might not be.
    devices = sorted(jax.devices(), key=lambda device: (device.process_index, device.id))
    shape = sizes(data, fsdp, tensor, len(devices))
    return Mesh(np.array(devices).reshape(shape), AXES, axis_types=(AxisType.Auto,) * 3)


def check_rows(mesh: Mesh | AbstractMesh, batch: int, accumulate: int) -> None:
    """Raises `InputError` unless all devices get equally many rows of each of `accumulate` parts of a batch."""
    data, fsdp = (mesh.shape[axis] for axis in ROWS)
    if batch // accumulate % (data * fsdp):
        parts = f" in accumulate={accumulate} parts" if accumulate > 1 else ""
        raise InputError(
            f"data.batch={batch}{parts} does not divide among mesh.data={data} x mesh.fsdp={fsdp}: choose a multiple of"
            f" {data * fsdp * accumulate}{', or lower accumulate' if accumulate > 1 else ''}."
        )


def by_rows(x: jax.Array, *axes: str | None) -> jax.Array:
    """Constrains the rows of `x` [B, ...] to `ROWS` and its next dimensions to `axes`; without a mesh returns `x`."""
    if jax.sharding.get_abstract_mesh().empty:
        return x
    return jax.lax.with_sharding_constraint(x, P(ROWS, *axes))


def per_row(tree: Any, rows: int) -> Any:
    """Repeats leaves [H, ...] as [B, H, ...] if rows are spread over devices; otherwise returns `tree`."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or all(mesh.shape[axis] == 1 for axis in ROWS):
        return tree
    return jax.tree.map(lambda x: by_rows(jnp.broadcast_to(x, (rows, *x.shape)), "tensor"), tree)


def spec(path: str, ndim: int) -> P:
    """Returns the mesh axes of the parameter at `path`. Raises `ValueError` if no rule covers it."""
    name, _, half = path.partition("_lora_")
    for pattern, axes in RULES:
        if re.fullmatch(pattern, name):
            if half == "a":
                axes = (None, axes[-1])
            elif half == "b":  # the inner axis is the rank, which may not divide, so the output axis takes both
                shared = ("tensor", "fsdp") if axes[-1] == "fsdp" else "tensor"
                axes = (*(shared if axis == "tensor" else axis for axis in axes[:-1]), None)
            return P(*(None,) * (ndim - len(axes)), *axes) if axes else P()
    raise ValueError(f"no rule says how the parameter {path} is spread: add it to ttt_jax.distributed.sharding.RULES.")


def params_shardings(mesh: Mesh, params: Any) -> Any:
    """Returns the shardings of a tree of parameters. Raises `InputError` if a dimension does not divide."""

    def one(path: Any, leaf: Any) -> NamedSharding:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        axes_of = spec(name, len(leaf.shape))
        for size, axes in zip(leaf.shape, axes_of, strict=False):
            over = [axis for axis in (axes if isinstance(axes, tuple) else (axes,)) if axis and mesh.shape[axis] > 1]
            parts = math.prod(mesh.shape[axis] for axis in over)
            if size % parts:
                product = " x ".join(f"mesh.{axis}={mesh.shape[axis]}" for axis in over)
                raise InputError(
                    f"{product} does not divide the {size} of {name} {tuple(leaf.shape)}: choose a divisor of {size},"
                    " or 1."
                )
        return NamedSharding(mesh, axes_of)

    return jax.tree_util.tree_map_with_path(one, params)


def state_shardings(mesh: Mesh, state: Any) -> Any:
    """Returns the shardings of a `moshi.model.State`: rows over `ROWS`, heads of its layers over `tensor`."""

    def layer(leaf: Any) -> NamedSharding:  # [L, B], or [L, B, H, ...]
        return NamedSharding(mesh, P(None, ROWS, *(("tensor",) if len(leaf.shape) > 2 else ())))

    layers = jax.tree.map(layer, state.layers)
    rows = NamedSharding(mesh, P(ROWS))
    return type(state)(*(rows for _ in state[:3]), layers)


def rows_sharding(mesh: Mesh, lead: int = 0) -> NamedSharding:
    """Returns the sharding of an array whose axis `lead` is rows."""
    return NamedSharding(mesh, P(*(None,) * lead, ROWS))


def devices_sharding(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of an array with an entry for each device."""
    return NamedSharding(mesh, P(AXES))


def replicated(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of an array that every device holds whole."""
    return NamedSharding(mesh, P())


def local_rows(mesh: Mesh, batch: int) -> range:
    """Returns the rows of a batch on devices of this process; they are a range since `make_mesh` goes by process."""
    slices = rows_sharding(mesh).addressable_devices_indices_map((batch,)).values()
    starts, stops, _ = zip(*(rows.indices(batch) for (rows,) in slices), strict=True)
    return range(min(starts), max(stops))
