"""What a benchmark of pairs is: pairs of recordings with labels. Knows no model and imports no jax."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from eval.results.schema import Skipped


class Pair(NamedTuple):
    """Two recordings, of which a model should find the first more likely."""

    key: str
    """Unique in its task, from the official key: its parts joined by "/"."""
    right: Path
    wrong: Path
    item: str
    """What it shares with other pairs (a word in several voices): the unit of statistics."""
    labels: dict[str, str]
    """Groups that accuracies are also reported for, such as voice, frequency, type; "" belongs to no group."""


class Task(NamedTuple):
    """The pairs of a benchmark as they lie on disk."""

    name: str
    """swuggy, sblimp, sstorycloze, tstorycloze, salmon/PART; made by `python -m eval make-mini`: with mini- before."""
    split: str
    """dev or test; "" where the benchmark has one split only."""
    pairs: list[Pair]
    labels: tuple[str, ...]
    """Names of the labels, in the order of reports."""
    problems: list[Skipped]
    """Items that make no pair, and why: never scored, always counted."""
    about: dict[str, Any]
    """Facts that results store: folder, SHA-256 of gold.csv, numbers of pairs and items before a limit."""
