"""Checksums that show whether stored arrays and JSON values are those that were saved.

Orbax and TensorStore check their indices, not the numbers: of 40 single flipped bits in the file that holds an array,
39 gave other numbers without an error. They also accept the sound files of another checkpoint (tests/checkpoints).

The sum of an array is that of `mix(bits ^ mix(i))` over its elements i, mod 2^32. `mix` permutes the 32-bit numbers, so
another value of one element always gives another sum; other damage goes unseen once in 2^32. Addition mod 2^32 has no
order: the sum does not depend on how the array lies on devices and processes.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ttt_jax.utils.trees import named

Record = dict[str, Any]


class Damaged(Exception):
    """A stored value is not the one that was saved. The message names it."""


def listing(tree: Any) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Returns type and shape of every leaf by its path."""
    return {name: (str(leaf.dtype), tuple(leaf.shape)) for name, leaf in named(tree).items()}


def sums(tree: Any) -> dict[str, jax.Array]:
    """Returns a uint32 scalar for every array of `tree` by its path. Does not wait for the devices."""
    groups: dict[frozenset[Any], dict[str, jax.Array]] = {}
    for name, leaf in named(tree).items():
        groups.setdefault(frozenset(leaf.sharding.device_set), {})[name] = leaf
    return {name: total for group in groups.values() for name, total in _sums_of_group(group).items()}


def entries(tree: Any, totals: Mapping[str, jax.Array]) -> dict[str, list[Any]]:
    """Returns type, shape and sum of every array by its path, as JSON. Waits for the sums."""
    numbers = jax.device_get(dict(totals))
    return {name: [dtype, list(shape), int(numbers[name])] for name, (dtype, shape) in listing(tree).items()}


def crc(value: Any) -> int:
    """Returns the CRC-32 of a JSON value, whatever its layout in a file."""
    plain = json.loads(json.dumps(value))  # as reading gives it back: keys are strings, tuples are lists
    return zlib.crc32(json.dumps(plain, sort_keys=True).encode())


def seal(content: Record) -> Record:
    """Returns `content` with its own CRC-32."""
    return {"content": content, "crc": crc(content)}


def unseal(sealed: Any) -> Record:
    """Returns the content of `seal`. Raises `Damaged`."""
    if not isinstance(sealed, dict) or sealed.keys() != {"content", "crc"} or sealed["crc"] != crc(sealed["content"]):
        raise Damaged("the record of its sums does not match its own CRC-32")
    return sealed["content"]


def compare(stored: Mapping[str, int], loaded: Mapping[str, Any]) -> None:
    """Raises `Damaged` with the names of the arrays unless the sums `loaded` are those `stored`."""
    totals = jax.device_get(dict(loaded))
    if wrong := [name for name, total in totals.items() if stored[name] != int(total)]:
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise Damaged(f"other bits than were saved in {', '.join(wrong[:3])}{more}")


@jax.jit
def _sums_of_group(arrays: dict[str, jax.Array]) -> dict[str, jax.Array]:
    return {name: sum_of(array) for name, array in arrays.items()}


def sum_of(array: jax.Array) -> jax.Array:
    """Returns a uint32 scalar in one pass over `array`. On CPU XLA keeps a uint32 for every element meanwhile."""
    bits = _bits(array)
    index, stride = jnp.zeros(bits.shape, jnp.uint32), 1
    for axis in reversed(range(bits.ndim)):
        index += jax.lax.broadcasted_iota(jnp.uint32, bits.shape, axis) * np.uint32(stride % 2**32)
        stride *= bits.shape[axis]
    return jnp.sum(_mix(bits ^ _mix(index)), dtype=jnp.uint32)


def _bits(array: jax.Array) -> jax.Array:
    """Returns uint32, another number for every value. An element of 8 bytes becomes two, on a new last axis."""
    if array.dtype == jnp.bool_:
        return array.astype(jnp.uint32)
    unsigned = {1: jnp.uint8, 2: jnp.uint16}.get(array.dtype.itemsize, jnp.uint32)
    return jax.lax.bitcast_convert_type(array, unsigned).astype(jnp.uint32)


def _mix(x: jax.Array) -> jax.Array:
    """The finaliser of MurmurHash3 (A. Appleby, public domain)."""
    x = (x ^ (x >> 16)) * np.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * np.uint32(0xC2B2AE35)
    return x ^ (x >> 16)
