"""One file under one checkpoint: from its scores by frame to means by arm, stream, position and layer. Imports no
jax."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from eval.results.schema import CheckpointInfo, FileInfo, scores_path
from eval.stats.estimates import file_mean, slope, windows
from eval.streaming.results import ALL, BEYOND, FIRST, LAST, LATER, TREND, Setting
from eval.streaming.scores import FileScores, Inner, load
from eval.streaming.weighting import WEIGHTINGS, aggregate
from ttt_jax.errors import InputError

PER_FRAMES = 1000
"""Slopes are changes per so many frames."""


def load_scores(folder: Path, checkpoint: CheckpointInfo, file: FileInfo, setting: Setting) -> FileScores:
    """Returns the scores of a file. Raises `InputError` if they are missing, damaged, or those of another file."""
    path = scores_path(folder, checkpoint.name, file)
    scores = load(path)
    shape = (len(setting.streams), file.frames)
    for arm, own in scores.arms.items():
        if own.nats.shape != shape or (own.inner and own.inner.rate.shape != (len(checkpoint.ttt_layers), shape[1])):
            raise InputError(
                f"{path} holds {own.nats.shape} scores for {arm}, but {file.name} has {shape} under"
                f" {checkpoint.name}: run python -m eval stream again."
            )
    return scores


def measure(scores: FileScores, setting: Setting, checkpoint: CheckpointInfo) -> dict[str, Any]:
    """Returns the numbers of `CheckpointResults` for one file, before they are averaged over files.

    Args:
      scores: of the file, S streams and T frames; setting, checkpoint: of the evaluation.

    Returns:
      Nested by name; leaves are float64 arrays, [] or [windows]; NaN was not measured.
    """
    arms = {arm: scores.arms[arm] for arm in setting.arms if arm in scores.arms}
    head, size = setting.weighting, setting.window
    nats = {arm: _rows(own.nats, setting) for arm, own in arms.items()}
    main = main_arm(list(arms))
    persist = nats.get("persist")
    difference = {
        arm: {row: rows[row] - persist[row] for row in rows}
        for arm, rows in nats.items()
        if persist is not None and arm != "persist"
    }
    unigram = {} if scores.unigram is None else {"unigram": _rows(scores.unigram, setting)}
    better = {row: values - nats[main][row] for row, values in unigram.get("unigram", {}).items()}
    parts = {ALL: 0, LATER: setting.reset_every, BEYOND: checkpoint.context}
    against_off = {arm: own.against_off for arm, own in arms.items() if own.against_off is not None}
    off = {
        name: {arm: aggregate(getattr(own, name), head) for arm, own in against_off.items()}
        for name in ("kl", "changed")
    }
    inner = {arm: own.inner for arm, own in arms.items() if own.inner is not None}

    def slopes(by_arm: dict[str, np.ndarray]) -> dict[str, Any]:
        return {arm: _slope(values, size) for arm, values in by_arm.items()}

    def positions(by_arm: dict[str, np.ndarray]) -> dict[str, Any]:
        return {arm: windows(values, size) for arm, values in by_arm.items()}

    def by_layer(name: str) -> dict[str, Any]:
        return {
            arm: {
                str(layer): windows(values, size)
                for layer, values in zip(checkpoint.ttt_layers, getattr(own, name), strict=True)
            }
            for arm, own in inner.items()
        }

    headline = {arm: rows[head] for arm, rows in nats.items()}
    minus_persist = {arm: rows[head] for arm, rows in difference.items()}
    return {
        "losses": {arm: _means(rows) for arm, rows in (nats | unigram).items()},
        "losses_later": {
            arm: _means({row: values[setting.reset_every :] for row, values in rows.items()})
            for arm, rows in nats.items()
        },
        "entropy": {arm: _means(_rows(own.entropy, setting)) for arm, own in arms.items()},
        "accuracy": {arm: _means(_rows(_first(own.rank), setting)) for arm, own in arms.items()},
        "against_unigram": _means(better | ({"mean": better[head]} if better else {})),
        "against_persist": {
            arm: {part: _means({row: values[start:] for row, values in rows.items()}) for part, start in parts.items()}
            for arm, rows in difference.items()
        },
        "against_off": {arm: {name: file_mean(by_arm[arm]) for name, by_arm in off.items()} for arm in against_off},
        "by_position": {
            "losses": positions(headline),
            "against_persist": positions(minus_persist),
            **{name: positions(by_arm) for name, by_arm in off.items()},
            "displacement": by_layer("displacement"),
            "rate": by_layer("rate"),
        },
        "slopes": {"losses": slopes(headline), "against_persist": slopes(minus_persist)},
        "inner": {arm: _inner(own, setting, checkpoint) for arm, own in inner.items()},
    }


def main_arm(arms: Sequence[str]) -> str:
    """Returns the arm that stands for a checkpoint."""
    return next(arm for arm in ("persist", "off", *arms) if arm in arms)


def inner_losses(inner: Inner) -> dict[str, np.ndarray]:
    """Returns the three inner losses, the gain of the memory and that of the frame's own step, float64 [L, T] each."""
    base, before, after = (getattr(inner, f"loss_{name}").astype(np.float64) for name in ("base", "before", "after"))
    return {
        "loss_base": base,
        "loss_before": before,
        "loss_after": after,
        "gain": base - before,
        "immediate": before - after,
    }


def _inner(inner: Inner, setting: Setting, checkpoint: CheckpointInfo) -> dict[str, Any]:
    """Returns numbers by layer, quantity and part of the file."""
    parts: dict[str, Any] = {str(layer): {} for layer in checkpoint.ttt_layers}
    for name, values in inner_losses(inner).items():
        for layer, row in zip(checkpoint.ttt_layers, values, strict=True):
            long_enough = len(row) >= setting.window
            parts[str(layer)][name] = {
                ALL: file_mean(row),
                FIRST: row[0],
                LAST: file_mean(row[-setting.window :]) if long_enough else np.float64("nan"),
                TREND: _slope(row, setting.window),
            }
    return parts


def _rows(values: np.ndarray, setting: Setting) -> dict[str, np.ndarray]:
    """Returns frames by stream and by weighting: [S, T] -> float64 [T] each."""
    own = {name: values[i].astype(np.float64) for i, name in enumerate(setting.streams)}
    return own | {weighting: aggregate(values, weighting) for weighting in WEIGHTINGS}


def _means(rows: dict[str, np.ndarray]) -> dict[str, Any]:
    return {name: file_mean(values) for name, values in rows.items()}


def _first(rank: np.ndarray) -> np.ndarray:
    """Returns 1 where the right token was the top-1 token, 0 where not, NaN where nothing was scored."""
    return np.where(np.isfinite(rank), rank == 0, np.nan)


def _slope(values: np.ndarray, window: int) -> np.ndarray:
    return PER_FRAMES * slope(values) if len(values) >= 2 * window else np.float64("nan")
