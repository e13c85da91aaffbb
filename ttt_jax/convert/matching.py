"""Kyutai's tensors found in their files and checked against those that a model has: none missing, none left over."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from ttt_jax.convert.names import Key, Names
from ttt_jax.differences import differences, group
from ttt_jax.tensorfile import DTYPES, Piece, TensorFile
from ttt_jax.weights import Tensor


class Found(NamedTuple):
    """A tensor of ours in files of theirs."""

    tensor: Tensor
    names: Names
    parts: tuple[Piece, ...]
    """The bytes of each of its maps or tables."""


class Matched(NamedTuple):
    """What was found, and what is wrong with it, in words."""

    found: list[Found]
    dtype: str
    """The type that (most of) the tensors have."""
    problems: list[str]


def match(wanted: Sequence[tuple[Tensor, Names]], files: Sequence[tuple[TensorFile, Iterable[str]]]) -> Matched:
    """Find the tensors `wanted` among those of `files`.

    Args:
      wanted: tensors with their names.
      files: with the keys that count, all of which must be used; where two files have a key, the later one's is taken.
    """
    holder = {key: file for file, keys in files for key in keys}
    infos = {key: file.tensors[key] for key, file in holder.items()}
    unfused = any("in_projs." in key or "out_projs." in key for key in infos)
    chosen: list[tuple[Key, ...]] = []
    for _, names in wanted:
        there = tuple(key for key in names.fused if key.name in infos)[:1]
        chosen.append(there or (names.fused[:1] if names.fused and not unfused else names.parts))
    expected = {key.name: key.shape for keys in chosen for key in keys}
    problems = list(differences(expected, {key: info.shape for key, info in infos.items()}))
    types = Counter(info.dtype for info in infos.values())
    dtype = types.most_common(1)[0][0] if types else ""
    for other in types:
        if other != dtype:
            keys = group(key for key, info in infos.items() if info.dtype == other)
            problems.append(f"has {keys} as {other} where the others are {dtype}")
    if dtype and dtype not in DTYPES:
        problems.append(f"has weights of type {dtype} instead of {', '.join(DTYPES)}")
    if problems:
        return Matched([], dtype, problems)
    found = []
    for (tensor, names), keys in zip(wanted, chosen, strict=True):
        if keys == names.parts:
            parts = [holder[key.name].piece(key.name) for key in keys]
        else:
            (key,) = keys
            parts = [holder[key.name].piece(key.name, i, len(names.parts)) for i in range(len(names.parts))]
        found.append(Found(tensor, names, tuple(parts)))
    return Matched(found, dtype, [])
