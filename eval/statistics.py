"""Means with intervals. The unit is the file, never the frame: frames of one file are not independent."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np


class Estimate(NamedTuple):
    """Mean over files with its 95 % interval (Student's t); the interval is NaN where a single file was measured."""

    mean: float
    low: float
    high: float
    n: int


def estimate(values: np.ndarray) -> Estimate:
    """Mean and interval of one value per file; NaN entries (nothing measured) are left out."""
    from scipy import stats

    values = np.asarray(values, np.float64)
    values = values[np.isfinite(values)]
    n = len(values)
    mean = float(values.mean()) if n else float("nan")
    if n < 2:
        return Estimate(mean, float("nan"), float("nan"), n)
    half = float(stats.t.ppf(0.975, n - 1) * values.std(ddof=1) / np.sqrt(n))
    return Estimate(mean, mean - half, mean + half, n)


def windows(values: np.ndarray, size: int) -> np.ndarray:
    """Means over windows of `size` frames, [..., T] -> [..., ceil(T / size)]; NaN frames are left out, empty windows are NaN."""
    count = -(-values.shape[-1] // size)
    padded = np.full((*values.shape[:-1], count * size), np.nan)
    padded[..., : values.shape[-1]] = values
    return file_mean(padded.reshape(*values.shape[:-1], count, size))


def file_mean(values: np.ndarray) -> np.ndarray:
    """Mean over the last axis without its NaN entries; NaN where there is no other."""
    present = np.isfinite(values)
    count = present.sum(-1)
    return np.where(count > 0, np.where(present, values, 0).sum(-1) / np.maximum(count, 1), np.nan)
