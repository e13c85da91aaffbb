"""Kyutai's tensors found in their files and checked against those that a model has: none missing, none left over."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, NoReturn

from ttt_jax.checkpoints.differences import differences, group
from ttt_jax.checkpoints.safetensors_reader import DTYPES, Piece
from ttt_jax.checkpoints.weights import Tensor
from ttt_jax.convert.kyutai_names import Key, Names
from ttt_jax.convert.tensor_view import Held
from ttt_jax.errors import InputError

Problems = dict[Path, list[str]]
"""What is wrong with each file, in words."""


class Found(NamedTuple):
    """A tensor of ours in files of theirs."""

    tensor: Tensor
    names: Names
    parts: tuple[Piece, ...]
    """The bytes of each of its maps or tables."""


class Matched(NamedTuple):
    """What was found, and what is wrong with it."""

    found: list[Found]
    dtype: str
    """The type that (most of) the tensors have."""
    problems: Problems


def match(wanted: Sequence[tuple[Tensor, Names]], held: Mapping[str, Held], path: Path) -> Matched:
    """Find the tensors `wanted` among those that are `held`, all of which must be used; what is missing counts as missing in `path`."""
    unfused = any("in_projs." in key or "out_projs." in key for key in held)
    chosen: list[tuple[Key, ...]] = []
    for _, names in wanted:
        there = tuple(key for key in names.fused if key.name in held)[:1]
        chosen.append(there or (names.fused[:1] if names.fused and not unfused else names.parts))
    problems = misfits({key.name: key.shape for keys in chosen for key in keys}, held, path)
    dtype = common_type(held)
    if problems:
        return Matched([], dtype, problems)
    found = []
    for (tensor, names), keys in zip(wanted, chosen, strict=True):
        if keys == names.parts:
            parts = [held[key.name].piece() for key in keys]
        else:
            (key,) = keys
            parts = [held[key.name].piece(i, len(names.parts)) for i in range(len(names.parts))]
        found.append(Found(tensor, names, tuple(parts)))
    return Matched(found, dtype, {})


def common_type(held: Mapping[str, Held]) -> str:
    """The type that most tensors have; "" if there are none."""
    types = Counter(one.dtype for one in held.values()).most_common(1)
    return types[0][0] if types else ""


def misfits(expected: Mapping[str, tuple[int, ...]], held: Mapping[str, Held], path: Path) -> Problems:
    """Names, shapes and types of `held` that are not those `expected`, by file; what is missing counts as missing in `path`."""
    files: dict[Path, dict[str, Held]] = {path: {}}
    for key, one in held.items():
        files.setdefault(one.path, {})[key] = one
    missing = {key: shape for key, shape in expected.items() if key not in held}
    dtype, problems = common_type(held), {}
    for file, some in files.items():
        here = {key: shape for key, shape in expected.items() if key in some} | (missing if file == path else {})
        told = list(differences(here, {key: one.shape for key, one in some.items()}))
        for other in sorted({one.dtype for one in some.values()} - {dtype}):
            keys = group(key for key, one in some.items() if one.dtype == other)
            told.append(f"has {keys} as {other} where the others are {dtype}")
        if dtype and dtype not in DTYPES and any(one.dtype == dtype for one in some.values()):
            told.append(f"has weights of type {dtype} instead of {', '.join(DTYPES)}")
        if told:
            problems[file] = told
    return problems


def refuse_misfits(problems: Problems, what: str, because: str = "", mend: str = "") -> NoReturn:
    """Raise `InputError` with `problems`; `what` the files do not fit, `because` in words, and what `mend`s it."""
    told = "; ".join(f"{path} does not fit {what}, as it {'; '.join(some)}" for path, some in problems.items())
    raise InputError(f"{told}{because}: {mend or 'give weights and a config.json that belong together'}.")
