"""Recordings that a layout describes become the pairs of a task: joined by key, and what does not fit is named."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from eval.benchmarks.layouts import MINI_PREFIX, mini
from eval.benchmarks.pairs import Pair, Task
from eval.results.schema import Skipped
from ttt_jax.errors import InputError
from ttt_jax.utils.paths import file_name, missing, printable


class Recording(NamedTuple):
    """One recording of a pair."""

    key: tuple[str, ...]
    """Parts of the official key, which its partner shares."""
    item: tuple[str, ...]
    """Parts of the key without the voice."""
    path: Path
    is_right: bool
    labels: dict[str, str]
    """Of the pair; those of the right recording count."""
    problem: str = ""
    """What is wrong with its description, if anything."""


def task(
    name: str,
    split: str,
    labels: tuple[str, ...],
    recordings: Iterable[Recording],
    problems: Iterable[Skipped],
    data: Path,
    about: dict[str, Any],
) -> Task:
    """Returns the task that `recordings` make, in the order of their keys.

    Args:
      problems: what makes no recording; data: folder of the recordings; about: facts of the layout.

    Raises `InputError`, with the first problem, if there is no pair.
    """
    pairs, unpaired = _join(recordings)
    problems = sorted(Skipped(printable(name), printable(reason)) for name, reason in (*problems, *unpaired))
    if not pairs:
        first = f"{problems[0].name}: {problems[0].reason}" if problems else "it holds no recordings of this benchmark"
        raise InputError(f"{data} has no usable pair ({first}): give a whole set (docs/evaluation/benchmark_data.md).")
    made = mini(data)
    counts = {"pairs": len(pairs), "items": len({pair.item for pair in pairs}), "problems": len(problems)}
    about = {**about, **counts} | ({} if made is None else {"mini": made})
    return Task(name if made is None else MINI_PREFIX + name, split, pairs, labels, problems, about)


def wavs(folder: Path) -> list[str]:
    """Returns the sorted names of the wav files in `folder`; no hidden ones, which macOS leaves beside real ones.

    Raises `InputError` if the folder cannot be read.
    """
    try:
        names = os.listdir(folder)
    except OSError as error:
        raise InputError(f"{folder} cannot be read ({error.strerror}): give a folder of recordings.") from None
    return sorted(name for name in names if name.endswith(".wav") and not name.startswith("."))


def names_digest(names: Sequence[str]) -> str:
    """Returns the SHA-256, hex, of sorted file names: what a layout without a table is known by."""
    return hashlib.sha256("\n".join(sorted(names)).encode("utf-8", "surrogateescape")).hexdigest()


def _join(recordings: Iterable[Recording]) -> tuple[list[Pair], list[Skipped]]:
    by_key: dict[tuple[str, ...], list[Recording]] = {}
    for recording in recordings:
        by_key.setdefault(recording.key, []).append(recording)
    pairs, problems = [], []
    for key, group in sorted(by_key.items()):
        if problem := _problem(group):
            problems.append(Skipped(_joined(key), problem))
            continue
        right, wrong = sorted(group, key=lambda recording: not recording.is_right)
        pairs.append(Pair(_joined(key), right.path, wrong.path, _joined(right.item), right.labels))
    return pairs, problems


def _problem(group: Sequence[Recording]) -> str:
    """Returns why recordings of one key make no pair; "" if they do."""
    group = sorted(group, key=lambda recording: recording.path)
    if problem := next((recording.problem for recording in group if recording.problem), ""):
        return problem
    for is_right, side in ((True, "right"), (False, "wrong")):
        names = [recording.path.name for recording in group if recording.is_right == is_right]
        if not names:
            return f"one side only: no {side} recording beside {group[0].path.name}"
        if len(names) > 1:
            return f"duplicate: {len(names)} {side} recordings ({', '.join(names)})"
    return next((problem for recording in group if (problem := _file_problem(recording.path))), "")


def _file_problem(path: Path) -> str:
    if absent := missing(path):
        return f"{path.name} {absent.problem}"
    return "" if path.stat().st_size else f"{path.name} is empty (0 bytes)"


def _joined(parts: tuple[str, ...]) -> str:
    return "/".join(map(file_name, parts))
