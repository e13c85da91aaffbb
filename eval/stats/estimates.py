"""Means with intervals over units: files or speakers, never frames, since frames of one file are not independent."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


class Estimate(NamedTuple):
    """Mean over `n` units with its 95 % interval (Student's t); bounds are NaN of one unit."""

    mean: float
    low: float
    high: float
    n: int


class Band(NamedTuple):
    """`Estimate`s as arrays of one shape."""

    mean: np.ndarray
    low: np.ndarray
    high: np.ndarray
    n: np.ndarray


def band(values: np.ndarray) -> Band:
    """Returns means and intervals over the first axis, [U, ...] -> arrays [...], without NaN entries (not measured)."""
    from scipy import stats

    values = np.asarray(values, np.float64)
    present = np.isfinite(values)
    n = present.sum(0)
    with np.errstate(invalid="ignore", divide="ignore"):  # 0 / 0 of no unit or one
        mean = np.where(present, values, 0).sum(0) / n
        variance = np.where(present, (values - mean) ** 2, 0).sum(0) / np.where(n > 1, n - 1, np.nan)
        half = stats.t.ppf(0.975, n - 1) * np.sqrt(variance / n)
    return Band(mean, mean - half, mean + half, n)


def group_means(values: np.ndarray, groups: Sequence[str]) -> np.ndarray:
    """Returns means within groups without NaN entries, [F, ...] -> [G, ...], groups in the order of their first file.

    Files of one speaker are not independent, so intervals take one value per speaker.
    """
    values = np.asarray(values, np.float64)
    members = np.array(groups)
    return np.stack([file_mean(np.moveaxis(values[members == group], 0, -1)) for group in dict.fromkeys(groups)])


def unit_means(values: np.ndarray, groups: Sequence[str]) -> np.ndarray:
    """Returns one number for each group that has one, [F] -> [U]."""
    means = group_means(values, groups)
    return means[np.isfinite(means)]


def slope(values: np.ndarray, weight: np.ndarray | float = 1.0) -> np.ndarray:
    """Returns the change per step of the last axis by weighted least squares, [..., T] -> [...]; NaN entries are left
    out.

    NaN where fewer than two entries are left.
    """
    values = np.asarray(values, np.float64)
    used = np.isfinite(values) & (weight > 0)
    weight = np.where(used, weight, 0.0)
    step = np.arange(values.shape[-1])
    with np.errstate(invalid="ignore", divide="ignore"):  # 0 / 0 of no entry or one
        step = step - (weight * step).sum(-1, keepdims=True) / weight.sum(-1, keepdims=True)
        change = (weight * step * np.where(used, values, 0)).sum(-1) / (weight * step**2).sum(-1)
    return np.where(used.sum(-1) > 1, change, np.nan)


def windows(values: np.ndarray, size: int) -> np.ndarray:
    """Returns means over windows of `size` frames without NaN frames, [..., T] -> [..., windows]; NaN if empty.

    A last window that is less than half full is left out.
    """
    frames = values.shape[-1]
    count = frames // size + (2 * (frames % size) >= size)
    padded = np.full((*values.shape[:-1], count * size), np.nan)
    padded[..., :frames] = values[..., : count * size]
    return file_mean(padded.reshape(*values.shape[:-1], count, size))


def smooth(values: np.ndarray, size: int, reset_every: int | None = None) -> np.ndarray:
    """Returns the moving average over `size` frames, [..., T] -> [..., T]; fewer at the ends, NaN frames are left out.

    With `reset_every`, no average crosses a reset, so that a jump there stays a jump.
    """
    values = np.asarray(values, np.float64)
    frames = values.shape[-1]
    present = np.isfinite(values)
    reset_every = reset_every or max(1, frames)
    at = np.arange(frames)
    first = at // reset_every * reset_every
    start = at - (size - 1) // 2
    low, high = np.maximum(start, first), np.minimum(start + size, np.minimum(first + reset_every, frames))

    def sums(x: np.ndarray) -> np.ndarray:
        total = np.concatenate([np.zeros((*x.shape[:-1], 1)), np.cumsum(x, -1, dtype=np.float64)], -1)
        return total[..., high] - total[..., low]

    count = sums(present)
    return np.where(count > 0, sums(np.where(present, values, 0)) / np.maximum(count, 1), np.nan)


def file_mean(values: np.ndarray) -> np.ndarray:
    """Returns the mean over the last axis without NaN entries; NaN where all are."""
    present = np.isfinite(values)
    count = present.sum(-1)
    return np.where(count > 0, np.where(present, values, 0).sum(-1) / np.maximum(count, 1), np.nan)


def interval(value: Estimate, digits: int, signed: bool = False) -> str:
    """Returns `value` as text: mean [low, high]; the mean of one unit; "-" of none."""
    if value.n == 0:
        return "-"
    form = f"{'+' if signed else ''}z.{digits}f"  # no "-0.00"
    bounds = f" [{value.low:{form}}, {value.high:{form}}]" if value.n > 1 else ""
    return f"{value.mean:{form}}{bounds}"
