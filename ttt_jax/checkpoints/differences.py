"""Describes how stored tensors differ from those expected. Imports no jax."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any


def differences(expected: Mapping[str, tuple[int, ...]], stored: Mapping[str, tuple[int, ...]]) -> Iterator[str]:
    """Describes keys and shapes that `stored` lacks, has in excess or has wrong."""
    if missing := [key for key in expected if key not in stored]:
        yield f"lacks {group(missing)}"
    if unexpected := [key for key in stored if key not in expected]:
        yield f"has {group(unexpected)}, which the model does not have"
    wrong: dict[tuple[Any, Any], list[str]] = {}
    for key, shape in expected.items():
        if key in stored and stored[key] != shape:
            wrong.setdefault((stored[key], shape), []).append(key)
    for (has, should), keys in wrong.items():
        yield f"has {group(keys)} of shape {list(has)} instead of {list(should)}"


def wrong_types(types: Mapping[str, str], *allowed: str) -> Iterator[str]:
    """Describes tensors whose type, by name, is not one of `allowed`."""
    for key, dtype in types.items():
        if dtype not in allowed:
            yield f"has {key} as {dtype} instead of {', '.join(allowed)}"


def group(keys: Iterable[str]) -> str:
    """Returns keys in short: those that differ in numbers only become one, with the numbers in braces."""
    patterns: dict[tuple[str, ...], list[tuple[int, ...]]] = {}
    for key in keys:
        words = key.split(".")
        numbers = tuple(int(word) for word in words if word.isdigit())
        patterns.setdefault(tuple("*" if word.isdigit() else word for word in words), []).append(numbers)
    short = []
    for pattern, rows in patterns.items():
        columns = [sorted(set(column)) for column in zip(*rows, strict=True)]
        full = len(rows) == math.prod(len(column) for column in columns)
        for braces in [[_ranges(column) for column in columns]] if full else [list(map(str, row)) for row in rows]:
            rest = iter(braces)
            short.append(".".join(next(rest) if word == "*" else word for word in pattern))
    return ", ".join(short)


def _ranges(numbers: list[int]) -> str:
    """Returns sorted numbers as "3", or in braces as "{0-2,5}"."""
    if len(numbers) == 1:
        return str(numbers[0])
    starts = [n for n in numbers if n - 1 not in numbers]
    stops = [n for n in numbers if n + 1 not in numbers]
    parts = (str(a) if a == b else f"{a}-{b}" for a, b in zip(starts, stops, strict=True))
    return "{" + ",".join(parts) + "}"
