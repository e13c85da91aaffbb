"""Seeded, stratified subsets of a task."""

from __future__ import annotations

import hashlib

from eval.benchmarks.pairs import Pair, Task
from ttt_jax.errors import InputError

VOICE = "voice"
"""The label that tells apart pairs of one item; all others are strata."""


def limit(task: Task, count: int, seed: int) -> Task:
    """Returns `task` with at most `count` items, each with all of its voices.

    Groups of items with the same labels but the voice keep their shares, to about one item. Items are drawn by digests
    of the seed and their names: the order on disk changes nothing, a missing item hardly anything, and a larger count
    adds items to a smaller one.

    Args:
      count: items, at least 1; seed: of the draw.

    Raises `InputError` if `count` is below 1.
    """
    if count < 1:
        raise InputError(f"the limit is {count} items: give at least 1, or no limit.")
    strata = tuple(label for label in task.labels if label != VOICE)
    groups: dict[tuple[str, ...], list[str]] = {}
    firsts: dict[str, Pair] = {}
    for pair in sorted(task.pairs):
        firsts.setdefault(pair.item, pair)
    for item, pair in firsts.items():
        groups.setdefault(tuple(pair.labels[label] for label in strata), []).append(item)
    order: list[tuple[float, str]] = []
    for stratum, items in groups.items():
        items.sort(key=lambda item: _draw(seed, "item", item))
        # Items of n stand 1/n apart, so any first part of the order holds the group's share.
        start = _draw(seed, "stratum", *stratum)
        order += [((rank + start) / len(items), item) for rank, item in enumerate(items)]
    chosen = {item for _, item in sorted(order)[:count]}
    pairs = [pair for pair in task.pairs if pair.item in chosen]
    about = {**task.about, "limit": {"items": len(chosen), "pairs": len(pairs), "seed": seed, "strata": list(strata)}}
    return task._replace(pairs=pairs, about=about)


def _draw(seed: int, *names: str) -> float:
    """Returns a number in [0, 1) that only the arguments decide."""
    digest = hashlib.sha256("\n".join((str(seed), *names)).encode("utf-8", "surrogateescape")).digest()
    return int.from_bytes(digest[:6], "big") / 2**48
