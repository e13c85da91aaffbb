"""How the losses of a recording's tokens become its score. Imports no jax.

A rule is a weighting of the codebooks (`eval.streaming.weighting`) and a normalisation: the sum over the frames, or the
mean. All rules come from the same losses.
"""

from __future__ import annotations

from typing import Literal

import numpy as np

from eval.streaming.weighting import WEIGHTINGS, weights

Voice = Literal["moshi", "user"]
"""The stream that speaks the recording and is scored; the other one is silent."""
Text = Literal["absent", "padding"]
"""What the model reads in the text stream, which is never scored: nothing (-1), or padding in every frame."""
NORMS = ("mean", "sum")
RULES = tuple(f"{weighting} {norm}" for weighting in WEIGHTINGS for norm in NORMS)
"""Names of all rules, such as "kyutai mean"."""
DEFAULT = "kyutai mean"
"""The rule of Moshi's paper (arXiv 2410.00037, section 5.4): 100 on the semantic codebook, 1 on the others, divided by
the length."""


def score(nats: np.ndarray, frames: np.ndarray, rule: str) -> np.ndarray:
    """Returns scores, minus the loss in nats; the higher, the more likely.

    Args:
      nats: sums over the frames of each codebook's losses, float64 [..., Q]; NaN was not scored.
      frames: number of frames, int [...]; rule: one of `RULES`.

    Returns:
      float64 [...]; NaN where a codebook with a weight was not scored, or there is none.
    """
    weighting, norm = rule.rsplit(" ", 1)
    weight = weights(weighting, nats.shape[-1])
    used = weight > 0
    if not used.any():  # of one codebook there is no acoustic one
        return np.full(nats.shape[:-1], np.nan)
    loss = nats[..., used] @ weight[used] / weight.sum()
    return -loss / frames if norm == "mean" else -loss
