"""How the codebooks of a frame become one number."""

from __future__ import annotations

from typing import Literal

import numpy as np

Weighting = Literal["equal", "kyutai", "semantic", "acoustic"]

WEIGHTINGS: dict[str, str] = {
    "equal": "all codebooks alike",
    "kyutai": "100 on the first codebook, 1 on the others (the audio loss of arXiv 2410.00037)",
    "semantic": "the first codebook only",
    "acoustic": "all codebooks but the first, alike",
}
"""Meaning by name. The text is never part of it: it has a row of its own."""


def weights(weighting: str, codebooks: int) -> np.ndarray:
    """Returns the weight of each codebook, float64 [codebooks]."""
    first = np.arange(codebooks) == 0
    by_name = {"equal": first | True, "kyutai": np.where(first, 100, 1), "semantic": first, "acoustic": ~first}
    return by_name[weighting].astype(np.float64)


def aggregate(values: np.ndarray, weighting: str) -> np.ndarray:
    """Returns the weighted mean over the codebooks of each frame, [1 + Q, T] (text first) -> float64 [T].

    NaN where a codebook with a weight is not scored: a mean over fewer codebooks would not compare.
    """
    weight = weights(weighting, len(values) - 1)
    used = weight > 0
    if not used.any():
        return np.full(values.shape[-1], np.nan)
    return weight[used] @ values[1:][used].astype(np.float64) / weight.sum()
