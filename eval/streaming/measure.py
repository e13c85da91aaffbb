"""One file under one checkpoint: from its scores by frame to means by arm, stream, position and layer. Imports no
jax."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from eval.results.schema import CheckpointInfo, FileInfo, scores_path
from eval.stats.estimates import file_mean, slope, windows
from eval.streaming.results import ALL, BEYOND, LAST, LATER, TREND, Setting
from eval.streaming.scores import FileScores, Inner, load
from eval.streaming.weighting import WEIGHTINGS, aggregate
from ttt_jax.errors import InputError

PER_FRAMES = 1000
"""Slopes are changes per so many frames."""

Rows = dict[str, np.ndarray]
"""Values by stream, then by weighting of the codebooks."""


def load_scores(folder: Path, checkpoint: CheckpointInfo, file: FileInfo, setting: Setting) -> FileScores:
    """Returns the scores of a file. Raises `InputError` if they are missing, damaged, or those of another file."""
    path = scores_path(folder, checkpoint.name, file)
    scores = load(path)
    shape, inner_shape = (len(setting.streams), file.frames), (len(checkpoint.ttt_layers), file.frames)
    for arm, values in scores.arms.items():
        if values.nats.shape != shape or (values.inner and values.inner.rate.shape != inner_shape):
            raise InputError(
                f"{path} holds {values.nats.shape} scores for {arm}, but {file.name} has {shape} under"
                f" {checkpoint.name}: run python -m eval stream again."
            )
    return scores


def measure(scores: FileScores, setting: Setting, checkpoint: CheckpointInfo) -> dict[str, Any]:
    """Returns the numbers of `CheckpointResults` for one file, before they are averaged over files.

    Returns:
      Nested by name; leaves are float64 arrays, [] or [windows]; NaN was not measured.
    """
    arms = {arm: scores.arms[arm] for arm in setting.arms if arm in scores.arms}
    weighting, window = setting.weighting, setting.window
    nats = {arm: _rows(values.nats, setting) for arm, values in arms.items()}
    unigram = {} if scores.unigram is None else {"unigram": _rows(scores.unigram, setting)}
    minus_persist = {
        arm: minus(rows, nats["persist"]) for arm, rows in nats.items() if "persist" in nats and arm != "persist"
    }
    off = {
        arm: {name: aggregate(values, weighting) for name, values in scored.against_off._asdict().items()}
        for arm, scored in arms.items()
        if scored.against_off is not None
    }
    inner = {arm: values.inner for arm, values in arms.items() if values.inner is not None}
    parts = {ALL: 0, LATER: setting.reset_every, BEYOND: checkpoint.context}
    headline = {
        name: {arm: rows[weighting] for arm, rows in by_arm.items()}
        for name, by_arm in {"losses": nats, "against_persist": minus_persist}.items()
    }
    by_arm = headline | {"kl": {arm: values["kl"] for arm, values in off.items()}}
    by_layer = {
        name: {
            arm: dict(zip(map(str, checkpoint.ttt_layers), getattr(values, name), strict=True))
            for arm, values in inner.items()
        }
        for name in ("displacement", "rate")
    }
    return {
        "losses": {arm: _means(rows) for arm, rows in (nats | unigram).items()},
        "losses_later": {arm: _means(rows, setting.reset_every) for arm, rows in nats.items()},
        "entropy": {arm: _means(_rows(values.entropy, setting)) for arm, values in arms.items()},
        "accuracy": {arm: _means(_rows(_is_top(values.rank), setting)) for arm, values in arms.items()},
        "against_unigram": _means(minus(unigram["unigram"], nats[main_arm(list(arms))])) if unigram else {},
        "against_persist": {
            arm: {part: _means(rows, start) for part, start in parts.items()} for arm, rows in minus_persist.items()
        },
        "against_off": {arm: _means(values) for arm, values in off.items()},
        "by_position": _in_windows(by_arm | by_layer, window),
        "slopes": {
            name: {arm: _slope(values, window) for arm, values in by_arm.items()} for name, by_arm in headline.items()
        },
        "inner": {arm: _inner(values, window, checkpoint.ttt_layers) for arm, values in inner.items()},
    }


def main_arm(arms: Sequence[str]) -> str:
    """Returns the arm that stands for a checkpoint."""
    return next(arm for arm in ("persist", "off", *arms) if arm in arms)


def minus(values: Rows, subtracted: Rows) -> Rows:
    """Returns the differences, row by row."""
    return {name: values[name] - subtracted[name] for name in values}


def inner_losses(inner: Inner) -> dict[str, np.ndarray]:
    """Returns the three inner losses and the gain of the memory, float64 [L, T] each."""
    losses = {name: getattr(inner, name).astype(np.float64) for name in ("loss_base", "loss_before", "loss_after")}
    return losses | {"gain": losses["loss_base"] - losses["loss_before"]}


def _inner(inner: Inner, window: int, layers: Sequence[int]) -> dict[str, Any]:
    """Returns means over the file by layer and quantity; of the gain also the last window and the slope."""
    losses = inner_losses(inner)
    last = losses["gain"][:, -window:]
    quantities = {name: file_mean(values) for name, values in losses.items()}
    quantities[LAST] = file_mean(last) if last.shape[1] == window else np.full(len(layers), np.nan)
    quantities[TREND] = _slope(losses["gain"], window)
    return {str(layer): {name: values[i] for name, values in quantities.items()} for i, layer in enumerate(layers)}


def _in_windows(tree: Any, size: int) -> Any:
    """Returns a nested dictionary with the means in windows, [T] -> [windows]."""
    if isinstance(tree, dict):
        return {name: _in_windows(values, size) for name, values in tree.items()}
    return windows(tree, size)


def _rows(values: np.ndarray, setting: Setting) -> Rows:
    """Returns frames by stream and by weighting: [S, T] -> float64 [T] each."""
    streams = dict(zip(setting.streams, values.astype(np.float64), strict=True))
    return streams | {weighting: aggregate(values, weighting) for weighting in WEIGHTINGS}


def _means(rows: Rows, start: int = 0) -> Rows:
    """Returns means over the frames from `start` on."""
    return {name: file_mean(values[start:]) for name, values in rows.items()}


def _is_top(rank: np.ndarray) -> np.ndarray:
    """Returns 1 where the right token was the top-1 token, 0 where not, NaN where nothing was scored."""
    return np.where(np.isfinite(rank), rank == 0, np.nan)


def _slope(values: np.ndarray, window: int) -> np.ndarray:
    """Returns the change per 1,000 frames, [..., T] -> [...]; NaN of less than two windows."""
    if values.shape[-1] < 2 * window:
        return np.full(values.shape[:-1], np.nan)
    return PER_FRAMES * slope(values)
