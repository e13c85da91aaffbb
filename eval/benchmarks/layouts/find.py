"""Finds the benchmarks that lie in a folder, and checks their recordings before a model is loaded."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from eval.benchmarks.layouts import salmon, storycloze, zerospeech
from eval.benchmarks.pairs import Task
from eval.results.schema import Skipped
from ttt_jax.errors import InputError
from ttt_jax.utils.paths import printable, whole_name

LONGEST = 300
"""Seconds. No benchmark has recordings of minutes, so a longer one is a damaged header or another file."""


class Found(NamedTuple):
    """What lies in a folder."""

    tasks: list[Task]
    absent: list[Skipped]
    """Benchmarks that are not there, and what was looked for."""
    broken: list[Skipped]
    """Benchmarks that are there but cannot be read, and why."""


class _Benchmark(NamedTuple):
    name: str
    folder: str
    """By whose name it is found."""
    part: str
    """Folder of the benchmark within `folder`."""
    read: Callable[[Path], Task]


def find(root: Path, split: str | None = None, names: Sequence[str] = ()) -> Found:
    """Returns the benchmarks whose folder (lexical, syntactic, sSC, tSC, salmon_benchmark) is `root`, lies in it, or in
    a folder of it, such as root/sLM21-dataset/lexical.

    Args:
      split: of `lexical` and `syntactic`: dev or test; None for dev where it exists, else test.
      names: of the benchmarks that are looked for, such as salmon; empty for all.

    Raises `InputError` if `root` is no folder, or two folders hold the same benchmark.
    """
    if not root.is_dir() or not os.access(root, os.R_OK | os.X_OK):
        raise InputError(f"{root} is no folder that can be read: give one that holds benchmarks.")
    folders, tasks = _folders(root), {}
    absent, broken = [], []
    for benchmark in _benchmarks(split, names):
        holders = [folder for folder in folders if whole_name(folder) == benchmark.folder]
        places = [folder / benchmark.part for folder in holders if (folder / benchmark.part).is_dir()]
        if not places:
            absent.append(_absent(benchmark, root, bool(holders)))
        for place in places:
            try:
                task = benchmark.read(place)
            except InputError as error:
                broken.append(Skipped(benchmark.name, str(error)))
                continue
            if other := tasks.get(task.name):
                both = f"{other.about['folder']} and {place}"
                raise InputError(f"{both} both hold {task.name}: give a folder that holds it once.")
            tasks[task.name] = task
    return Found(list(tasks.values()), list(dict.fromkeys(absent)), broken)


def check(task: Task) -> list[Skipped]:
    """Returns the recordings of the pairs of `task` that will not do, by the key of their pair, and why.

    Reads their headers: unreadable, not mono, without samples, or longer than `LONGEST`.
    """
    found = []
    for pair in task.pairs:
        for path in (pair.right, pair.wrong):
            if problem := _problem(path):
                found.append(Skipped(printable(pair.key), printable(f"{path.name} {problem}")))
    return found


def _problem(path: Path) -> str:
    import soundfile

    try:
        sound = soundfile.info(path)
    except soundfile.SoundFileError as error:
        return f"is unreadable ({getattr(error, 'error_string', str(error)).strip().rstrip('.')})"
    if not sound.frames:
        return "holds no samples"
    if sound.channels != 1:
        return f"has {sound.channels} channels, not one"
    return f"lasts {sound.duration:.0f} s, more than {LONGEST} s" if sound.duration > LONGEST else ""


def _benchmarks(split: str | None, names: Sequence[str]) -> list[_Benchmark]:
    known = [
        _Benchmark("swuggy", zerospeech.LEXICAL, "", lambda folder: zerospeech.lexical(folder, split)),
        _Benchmark("sblimp", zerospeech.SYNTACTIC, "", lambda folder: zerospeech.syntactic(folder, split)),
        *(_Benchmark(name, folder, "", _only(storycloze.read)) for folder, name in storycloze.TASKS.items()),
        *(_Benchmark(f"salmon/{part}", salmon.FOLDER, part, _only(salmon.read)) for part in salmon.PARTS),
    ]
    return [benchmark for benchmark in known if not names or benchmark.name.partition("/")[0] in names]


def _only(read: Callable[[Path], list[Task]]) -> Callable[[Path], Task]:
    return lambda folder: read(folder)[0]


def _absent(benchmark: _Benchmark, root: Path, holds_others: bool) -> Skipped:
    """Names the benchmark, or all parts of its folder at once if `root` holds none of them."""
    name, folder = benchmark.name.partition("/")[0], benchmark.folder
    if holds_others:
        name, folder = benchmark.name, f"{folder}/{benchmark.part}"
    return Skipped(name, f"there is no folder {folder} in {printable(str(root))} or in a folder of it")


def _folders(root: Path) -> list[Path]:
    """Returns `root`, its folders, and theirs, but for hidden ones."""
    level = found = [root]
    for _ in range(2):
        level = [folder for parent in level for folder in _folders_in(parent)]
        found = found + level
    return found


def _folders_in(folder: Path) -> list[Path]:
    try:
        with os.scandir(folder) as entries:
            names = sorted(entry.name for entry in entries if entry.is_dir() and not entry.name.startswith("."))
    except OSError:  # a folder that may not be read, and need not be
        return []
    return [folder / name for name in names]
