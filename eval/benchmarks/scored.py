"""Scores of the pairs of a task, as scoring leaves them and statistics read them. Imports no jax."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from eval.benchmarks.rules import Text, Voice


class View(NamedTuple):
    """One way to ask a model: what scores are told apart by, beside the rule."""

    checkpoint: str
    """Name of the checkpoint."""
    arm: str
    """Memory within an item: persist, frozen or off (`eval.streaming.arms`)."""
    text: Text
    voice: Voice


class Scored(NamedTuple):
    """Scores of the n pairs of a task in one view, by the name of the rule, float64 [n] each; NaN was not scored."""

    right: dict[str, np.ndarray]
    wrong: dict[str, np.ndarray]
