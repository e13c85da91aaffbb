"""The results of `python -m eval check-state`: what results.json holds. Imports no jax."""

from __future__ import annotations

import dataclasses
from typing import ClassVar, NamedTuple

from eval.results.schema import CheckpointInfo, FileInfo


class Check(NamedTuple):
    """A property, whether it holds, and the numbers that show it."""

    what: str
    passed: bool
    figure: str


@dataclasses.dataclass(frozen=True)
class Results:
    """The checks of one checkpoint on the first frames of one file."""

    COMMAND: ClassVar[str] = "python -m eval check-state"
    FORMAT: ClassVar[int] = 1

    data: str | None
    """As the command line gave it; None: the held-out embedded speech."""
    file: FileInfo
    """What was streamed of it."""
    checkpoint: CheckpointInfo
    checks: list[Check]
    meaning: str
    """The result in one sentence."""
    passed: bool
    """Whether every check passed."""
