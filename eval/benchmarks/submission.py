"""Scores as files that the ZeroSpeech toolkit (`zrc`) evaluates, so that accuracies can be checked with it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

from eval.benchmarks.layouts import MINI_PREFIX, zerospeech
from eval.benchmarks.pairs import Task
from ttt_jax.errors import InputError
from ttt_jax.utils.files import write_atomically

FOLDERS = {"swuggy": zerospeech.LEXICAL, "sblimp": zerospeech.SYNTACTIC}


def write(folder: Path, task: Task, scores: Mapping[str, float]) -> Path:
    """Writes `lexical/{split}.txt` or `syntactic/{split}.txt` in `folder`; returns its path.

    A line is "filename score", in full precision. Files without a score, and those whose score is NaN, have no line;
    `zrc` takes complete files only.

    Args:
      scores: by the name of the recording without `.wav`; the higher, the more likely.

    Raises `InputError` if the toolkit does not know the task.
    """
    name = task.name.removeprefix(MINI_PREFIX)
    if name not in FOLDERS:
        raise InputError(f"there are no submission files of {task.name}: ZeroSpeech has {' and '.join(FOLDERS)}.")
    files = sorted(path.stem for pair in task.pairs for path in (pair.right, pair.wrong))
    lines = [f"{file} {float(scores[file])!r}\n" for file in files if not math.isnan(scores.get(file, math.nan))]
    path = folder / FOLDERS[name] / f"{task.split}.txt"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, "".join(lines).encode())
    return path
