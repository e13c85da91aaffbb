"""Damage to files as disks, networks, editors and other programs do it; everything follows from a random generator."""

from __future__ import annotations

import copy
import json
from typing import Any

import numpy as np

WRONG = (None, True, -1, 0, float("nan"), float("inf"), 10**30, "", "x", "8", [], {}, [[1]], {"a": None})
"""Values that hardly any field takes."""


def of_bytes(data: bytes, rng: np.random.Generator, start: int = 0, stop: int | None = None) -> bytes:
    """`data`, not empty, with one damage in the bytes from `start` to `stop`; it always differs."""
    stop = len(data) if stop is None else min(stop, len(data))
    while True:
        at = int(rng.integers(start, max(stop, start + 1)))
        length = int(rng.integers(1, max(2, min(stop - at, 64))))
        junk = rng.integers(0, 256, length, dtype=np.uint8).tobytes()
        flipped = bytes([data[at] ^ 1 << int(rng.integers(8))])
        damages = {
            "a copy that broke off": (0.2, data[:at]),
            "a flipped bit": (0.25, data[:at] + flipped + data[at + 1 :]),
            "another file's block": (0.15, data[:at] + junk + data[at + length :]),
            "an end that the disk lost": (0.05, data[:at] + bytes(len(data) - at)),
            "bytes that were lost": (0.1, data[:at] + data[at + length :]),
            "bytes that came in between": (0.1, data[:at] + junk + data[at:]),
            "bytes behind": (0.05, data[:stop] + junk + data[stop:]),
            "nothing": (0.04, b""),
            "what a download can give instead": (0.03, b"<!DOCTYPE html><html><body>404: Not Found</body></html>\n"),
            "a pointer": (0.03, b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"),
        }
        chances, contents = zip(*damages.values(), strict=True)
        damaged = contents[int(rng.choice(len(contents), p=chances))]
        if damaged != data:
            return damaged


def of_json(content: Any, rng: np.random.Generator) -> tuple[Any, tuple[str | int, ...]]:
    """`content` with one value replaced or left out, and the path to it."""
    content = copy.deepcopy(content)
    paths = list(_paths(content))
    path = paths[int(rng.integers(len(paths)))]
    holder = content
    for step in path[:-1]:
        holder = holder[step]
    if rng.random() < 0.25:
        del holder[path[-1]]
        return content, path
    while True:
        value = WRONG[int(rng.integers(len(WRONG)))]
        if json.dumps(value) != json.dumps(holder[path[-1]]):
            holder[path[-1]] = value
            return content, path


def _paths(content: Any, before: tuple[str | int, ...] = ()):
    steps = content if isinstance(content, dict) else range(len(content)) if isinstance(content, list) else ()
    for step in steps:
        yield (*before, step)
        yield from _paths(content[step], (*before, step))
