"""Sums by which stored arrays and JSON values are recognised as those that were saved.

The sum of an array is that of `mix(bits ^ mix(i))` over its elements i, mod 2^32. `mix` permutes the 32-bit numbers (its
steps, x ^= x >> n and x *= odd, can each be undone), so another value of one element, in one bit or in many, always gives
another sum; other damage goes unseen once in 2^32. Addition of integers mod 2^32 has no rounding and no order: the sum
is the same however the array lies on devices and processes.
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
    """What is stored is not what was saved; the message says in what."""


def listing(tree: Any) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Type and shape of every leaf by its path."""
    return {name: (str(leaf.dtype), tuple(leaf.shape)) for name, leaf in named(tree).items()}


def sums(tree: Any) -> dict[str, jax.Array]:
    """uint32 scalar for every array of `tree` by its path, the same on all devices; dispatched, not waited for."""
    groups: dict[frozenset[Any], dict[str, jax.Array]] = {}
    for name, leaf in named(tree).items():
        groups.setdefault(frozenset(leaf.sharding.device_set), {})[name] = leaf
    return {name: total for group in groups.values() for name, total in _compiled(group).items()}


def entries(tree: Any, totals: Mapping[str, jax.Array]) -> dict[str, list[Any]]:
    """For JSON: type, shape and sum of every array by its path; waits for the sums."""
    found = jax.device_get(dict(totals))
    return {name: [dtype, list(shape), int(found[name])] for name, (dtype, shape) in listing(tree).items()}


def crc(value: Any) -> int:
    """CRC-32 of a JSON value, however it is laid out in a file."""
    plain = json.loads(json.dumps(value))  # keys are strings, tuples are lists, as reading gives them back
    return zlib.crc32(json.dumps(plain, sort_keys=True).encode())


def seal(content: Record) -> Record:
    """`content` with its own CRC-32."""
    return {"content": content, "crc": crc(content)}


def unseal(sealed: Any) -> Record:
    """What was sealed. Raises `Damaged`."""
    if not isinstance(sealed, dict) or sealed.keys() != {"content", "crc"} or sealed["crc"] != crc(sealed["content"]):
        raise Damaged("the record of its sums does not match its own CRC-32")
    return sealed["content"]


def compare(stored: Mapping[str, int], found: Mapping[str, Any]) -> None:
    """Raise `Damaged`, naming the arrays, unless every sum in `found` is as `stored`."""
    found = {name: int(total) for name, total in jax.device_get(dict(found)).items()}
    if wrong := [name for name, total in found.items() if stored[name] != total]:
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise Damaged(f"other bits than were saved in {', '.join(wrong[:3])}{more}")


@jax.jit
def _compiled(arrays: dict[str, jax.Array]) -> dict[str, jax.Array]:
    return {name: sum_of(array) for name, array in arrays.items()}


def sum_of(array: jax.Array) -> jax.Array:
    """uint32 scalar, in time of one pass over `array`; on CPU XLA keeps a uint32 for every element meanwhile."""
    bits = _bits(array)
    index, stride = jnp.zeros(bits.shape, jnp.uint32), 1
    for axis in reversed(range(bits.ndim)):
        index += jax.lax.broadcasted_iota(jnp.uint32, bits.shape, axis) * np.uint32(stride % 2**32)
        stride *= bits.shape[axis]
    return jnp.sum(_mix(bits ^ _mix(index)), dtype=jnp.uint32)


def _bits(array: jax.Array) -> jax.Array:
    """uint32, another number for every value; 8-byte elements are two, on a last axis."""
    if array.dtype == jnp.bool_:
        return array.astype(jnp.uint32)
    unsigned = {1: jnp.uint8, 2: jnp.uint16}.get(array.dtype.itemsize, jnp.uint32)
    return jax.lax.bitcast_convert_type(array, unsigned).astype(jnp.uint32)


def _mix(x: jax.Array) -> jax.Array:
    """The finaliser of MurmurHash3 (A. Appleby, public domain)."""
    x = (x ^ (x >> 16)) * np.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * np.uint32(0xC2B2AE35)
    return x ^ (x >> 16)
