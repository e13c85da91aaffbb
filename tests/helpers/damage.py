"""Damage to files as disks, networks, editors and other programs do it, and what tests of damaged inputs share.

All damage follows from a random generator.
"""

from __future__ import annotations

import contextlib
import copy
import itertools
import json
import logging
import shutil
import signal
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ttt_jax.errors import InputError

WRONG = (None, True, -1, 0, float("nan"), float("inf"), 10**30, "", "x", "8", [], {}, [[1]], {"a": None})
"""Values that hardly any field takes."""


def of_bytes(data: bytes, rng: np.random.Generator, start: int = 0, stop: int | None = None) -> bytes:
    """Returns `data`, not empty, with one damage in the bytes from `start` to `stop`; it always differs."""
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
    """Returns `content` with one value replaced or left out, and the path to that value."""
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


SECONDS = 20
"""CPU time after which a case counts as hanging."""


def attempt(call, *arguments):
    """Returns what a call returns, or None if it ended in one sentence for the user."""
    try:
        return call(*arguments)
    except InputError as error:
        message = str(error)
        assert message.endswith("."), message
        assert "\n" not in message
        return None


@contextlib.contextmanager
def warnings():
    """Collects the library's warnings as log records."""
    records = []
    handler = logging.Handler()
    handler.emit = records.append
    logging.getLogger("ttt_jax").addHandler(handler)
    try:
        yield records
    finally:
        logging.getLogger("ttt_jax").removeHandler(handler)


def one_file(folder: Path, rng: np.random.Generator) -> Path:
    """Returns one of the files below a folder that are not empty."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.stat().st_size]
    return files[int(rng.integers(len(files)))]


def spoil(path: Path, rng: np.random.Generator) -> None:
    """Damages a file: a value of its JSON, or its bytes."""
    if path.suffix == ".json" and rng.random() < 0.6:
        path.write_text(json.dumps(of_json(json.loads(path.read_text()), rng)[0]))
    else:
        path.write_bytes(of_bytes(path.read_bytes(), rng))


def copied(sound: Path, folder: Path) -> Path:
    """Copies a sound input into `folder`, to be damaged."""
    return Path(shutil.copytree(sound, folder / sound.name))


@contextlib.contextmanager
def time_limit(seconds: int):
    """Raises `TimeoutError` in what takes more CPU time of this process. A busy machine does not trip it."""

    def stop(*_):
        raise TimeoutError(f"more than {seconds} s of CPU time")

    before = signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


FEW, MANY, PARTS = 7, 63, 4
"""Cases of each kind of input by default and more with -m slow, in parts."""


def cases(*kinds, first: int = 0):
    """Parametrises a test by the number of a kind of input (from `first`), the kind, and the seeds of its damage."""
    bounds = [0, *(FEW + part * MANY // PARTS for part in range(PARTS + 1))]
    return pytest.mark.parametrize(
        ("number", "kind", "seeds"),
        [
            pytest.param(number, kind, range(start, stop), id=f"{kind.__name__}-{start}", marks=marks)
            for number, kind in enumerate(kinds, first)
            for start, stop in itertools.pairwise(bounds)
            for marks in [pytest.mark.slow if start else ()]
        ],
    )


def try_cases(number: int, kind, seeds: Iterable[int], root: Path, folder: Path) -> None:
    """Calls `kind` with a generator that number and seed decide, `root` with the sound inputs, and a new folder."""
    for seed in seeds:
        case = folder / str(seed)
        case.mkdir()
        with time_limit(SECONDS):
            try:
                kind(np.random.default_rng([number, seed]), root, case)
            except BaseException as error:
                error.add_note(f"{kind.__name__}, seed {seed}")
                raise
        shutil.rmtree(case)
