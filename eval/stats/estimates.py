"""Means with intervals. The unit is the file (or the speaker), never the frame: frames of one file are not independent."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

PER_FRAMES = 1000
"""Slopes are changes per this many frames."""


class Estimate(NamedTuple):
    """Mean over units with its 95 % interval (Student's t); the interval is NaN where a single unit was measured."""

    mean: float
    low: float
    high: float
    n: int


class Band(NamedTuple):
    """Estimates side by side: arrays of one shape."""

    mean: np.ndarray
    low: np.ndarray
    high: np.ndarray
    n: np.ndarray


def band(values: np.ndarray) -> Band:
    """Means and intervals over the first axis, [U, ...] -> arrays [...]; NaN entries (nothing measured) are left out."""
    from scipy import stats

    values = np.asarray(values, np.float64)
    present = np.isfinite(values)
    n = present.sum(0)
    with np.errstate(invalid="ignore", divide="ignore"):  # 0 / 0 where nothing, or one unit, was measured
        mean = np.where(present, values, 0).sum(0) / n
        variance = np.where(present, (values - mean) ** 2, 0).sum(0) / np.where(n > 1, n - 1, np.nan)
        half = stats.t.ppf(0.975, n - 1) * np.sqrt(variance / n)
    return Band(mean, mean - half, mean + half, n)


def group_means(values: np.ndarray, groups: Sequence[str]) -> np.ndarray:
    """Means within each group, [F, ...] -> [G, ...]: groups in the order of their first file; NaN entries are left out.

    Files of one speaker are not independent of each other, so an interval over files that share speakers takes one value
    per speaker.
    """
    values = np.asarray(values, np.float64)
    members = np.array(groups)
    return np.stack([file_mean(np.moveaxis(values[members == group], 0, -1)) for group in dict.fromkeys(groups)])


def slope(values: np.ndarray) -> np.ndarray:
    """Change per 1,000 frames, [..., T] -> [...]: least squares against position; NaN frames are left out.

    NaN where fewer than two frames are left.
    """
    values = np.asarray(values, np.float64)
    present = np.isfinite(values)
    position = np.where(present, np.arange(values.shape[-1]) / PER_FRAMES, np.nan)
    position = np.where(present, position - file_mean(position)[..., None], 0)
    spread = (position**2).sum(-1)
    product = (position * np.where(present, values, 0)).sum(-1)
    return np.where(spread > 0, product / np.where(spread > 0, spread, 1), np.nan)


def windows(values: np.ndarray, size: int) -> np.ndarray:
    """Means over windows of `size` frames, [..., T] -> [..., windows]; NaN frames are left out, empty windows are NaN.

    The frames of a last window that is less than half full count nowhere: so few are no measure of a window.
    """
    frames = values.shape[-1]
    count = frames // size + (2 * (frames % size) >= size)
    padded = np.full((*values.shape[:-1], count * size), np.nan)
    padded[..., :frames] = values[..., : count * size]
    return file_mean(padded.reshape(*values.shape[:-1], count, size))


def smooth(values: np.ndarray, size: int, period: int | None = None) -> np.ndarray:
    """Moving average over the `size` frames around each, [..., T] -> [..., T]; fewer at the ends, NaN frames are left out.

    With `period`, no average goes over the start of a period: what jumps there is seen to jump.
    """
    values = np.asarray(values, np.float64)
    frames = values.shape[-1]
    present = np.isfinite(values)
    period = period or max(1, frames)
    at = np.arange(frames)
    first = at // period * period
    start = at - (size - 1) // 2
    low, high = np.maximum(start, first), np.minimum(start + size, np.minimum(first + period, frames))

    def sums(x: np.ndarray) -> np.ndarray:
        total = np.concatenate([np.zeros((*x.shape[:-1], 1)), np.cumsum(x, -1, dtype=np.float64)], -1)
        return total[..., high] - total[..., low]

    count = sums(present)
    return np.where(count > 0, sums(np.where(present, values, 0)) / np.maximum(count, 1), np.nan)


def file_mean(values: np.ndarray) -> np.ndarray:
    """Mean over the last axis without its NaN entries; NaN where there is no other."""
    present = np.isfinite(values)
    count = present.sum(-1)
    return np.where(count > 0, np.where(present, values, 0).sum(-1) / np.maximum(count, 1), np.nan)


def interval(value: Estimate, digits: int, signed: bool = False) -> str:
    """`value` for people: mean [low, high]; the mean alone of one unit; "-" where nothing was measured."""
    if value.n == 0:
        return "-"
    form = f"{'+' if signed else ''}z.{digits}f"  # no "-0.00"
    bounds = f" [{value.low:{form}}, {value.high:{form}}]" if value.n > 1 else ""
    return f"{value.mean:{form}}{bounds}"
