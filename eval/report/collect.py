"""Finds result folders and reads them. Imports no jax."""

from __future__ import annotations

import dataclasses
import importlib
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from eval.results import schema
from eval.results.schema import FRAMES, RESULTS, CheckpointInfo
from ttt_jax.errors import InputError
from ttt_jax.utils.files import CHECKPOINTS
from ttt_jax.utils.paths import local

STREAM, COMPARE = "python -m eval stream", "python -m eval compare"
CHECK_STATE, DIAGNOSE = "python -m eval check-state", "python -m eval diagnose"
PAIRS, RECALL = "python -m eval suite", "python -m eval recall"
KINDS = {
    STREAM: ("eval.streaming.results", "Results"),
    COMPARE: ("eval.compare.results", "Results"),
    CHECK_STATE: ("eval.check_state.results", "Results"),
    DIAGNOSE: ("eval.diagnose.records", "Results"),
    PAIRS: ("eval.benchmarks.results", "BenchmarkResults"),
    RECALL: ("eval.recall.results", "RecallResults"),
}
"""Module and class of the results of each command that the page shows."""
NOT_SHOWN = ("python -m eval generate",)
"""Commands whose results are recordings: no part of the page shows them."""
METRICS = "metrics.jsonl"
"""File of a run's training, which tells its folder."""


class Source(NamedTuple):
    """The results of a folder."""

    folder: Path
    command: str
    results: Any
    """Of the class that `KINDS` names."""
    about: dict[str, Any]
    """Further entries at the top of results.json: versions and device, cost."""

    @property
    def checkpoints(self) -> list[CheckpointInfo]:
        """The checkpoints that they are of."""
        if self.command in (STREAM, RECALL):
            return [checkpoint.info for checkpoint in self.results.checkpoints]
        return [self.results.checkpoint] if self.command == CHECK_STATE else self.results.checkpoints


class LeftOut(NamedTuple):
    """Results that are not on the page, or only in part."""

    path: str
    reason: str
    """One sentence."""
    wrong: bool = True
    """Whether something is to be mended; else the page has no part for them."""


class Collected(NamedTuple):
    """What was found."""

    sources: list[Source]
    runs: list[Path]
    """Folders of runs, real paths."""
    left_out: list[LeftOut]


def collect(paths: Sequence[str]) -> Collected:
    """Reads all results at and below `paths`.

    Raises `InputError` if a path is not there, or nothing usable is in any of them.
    """
    sources, runs, left_out, seen = list[Source](), list[Path](), list[LeftOut](), set[str]()
    for name in paths:
        path = local(name)
        if not path.is_dir():
            raise InputError(f"{path} is no folder: give folders of runs or of results.")
        found = False
        for folder, files in _walk(path, left_out):
            found |= RESULTS in files or METRICS in files
            if (real := os.path.realpath(folder)) in seen:
                continue
            seen.add(real)
            if METRICS in files:
                runs.append(Path(real))
            if RESULTS in files:
                read = _read(folder)
                (left_out if isinstance(read, LeftOut) else sources).append(read)
        if not found:
            left_out.append(LeftOut(str(path), f"neither {RESULTS} nor {METRICS} is in it or below it."))
    if not sources and not runs:
        why = "; ".join(f"{entry.path}: {entry.reason.rstrip('.')}" for entry in left_out[:3])
        raise InputError(f"there are no results to show ({why}): give folders of runs or of results.")
    return Collected(sources, runs, left_out)


def _walk(path: Path, left_out: list[LeftOut]) -> Iterator[tuple[Path, list[str]]]:
    """Yields folders and their files, by name; not those of checkpoints and scores, nor hidden ones."""

    def report(error: OSError) -> None:
        left_out.append(LeftOut(str(error.filename), f"the folder cannot be read ({error.strerror})."))

    for folder, folders, files in os.walk(path, onerror=report):
        folders[:] = sorted(name for name in folders if name not in (CHECKPOINTS, FRAMES) and name[0] != ".")
        yield Path(folder), files


def _read(folder: Path) -> Source | LeftOut:
    path = folder / RESULTS
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        return LeftOut(str(path), f"it cannot be read ({getattr(error, 'strerror', None) or error}).")
    command = (schema.command_of(content) or ("", 0))[0]
    if command in NOT_SHOWN:
        return LeftOut(str(path), f"the page has no part for results of {command}.", wrong=False)
    if command not in KINDS:
        return LeftOut(str(path), "it is of no command that the page knows.")
    module, name = KINDS[command]
    kind = getattr(importlib.import_module(module), name)
    try:
        results = schema.read(folder, kind)
    except InputError as error:
        return LeftOut(str(path), str(error))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        return LeftOut(str(path), f"its content is not as {command} writes it ({type(error).__name__}: {error}).")
    fields = {field.name for field in dataclasses.fields(kind)}
    return Source(folder, command, results, {key: value for key, value in content.items() if key not in fields})
