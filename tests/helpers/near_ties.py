"""Codes that differ from a reference's only where two entries are equally near, as far as float32 can tell."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

BOUND = 1e-5
"""Largest difference of two squared distances that counts as a tie, as a share of the squared lengths of vector and
entry. Float32 leaves some 1e-6 of it to the order of sums; the rest is for latents that differ by their rounding."""


class Differences(NamedTuple):
    """How codes differ from the reference's."""

    ties: int
    """Codes that differ where the reference had two equally near entries."""
    excluded: int
    """Codes after such a one in their frame: they quantise another residual."""
    proven: int
    """Codes that are equal or ties."""
    widest: float
    """Largest difference of squared distances among the ties, as a share (`BOUND`)."""


def compare(params: dict[str, np.ndarray], latents: np.ndarray, expected: np.ndarray, got: np.ndarray) -> Differences:
    """Proves that every first difference of a frame is a near-tie, in float64 and from the reference's own residuals.

    params: by the names of `ttt_jax.codec.mimi.config.shapes`; latents [B, n, D] and expected [B, Q, n]: the
    reference's; got [B, Q, n]. The semantic codebook and the acoustic ones read the latent independently.
    Raises AssertionError at a code that is no tie.
    """
    assert got.shape == expected.shape
    ties = excluded = proven = 0
    widest, latents = 0.0, latents.astype(np.float64)
    for part, rows in (("semantic", slice(0, 1)), ("acoustic", slice(1, None))):
        rest = latents @ params[f"quantizer/{part}/input"].astype(np.float64).T
        open_ = np.ones(rest.shape[:2], bool)
        for q, (theirs, ours) in enumerate(zip(*(np.moveaxis(c[:, rows], 1, 0) for c in (expected, got)), strict=True)):
            entries = params[f"quantizer/{part}/codebooks"][q].astype(np.float64)
            excluded += int((~open_).sum())
            proven += int(open_.sum())
            new = open_ & (theirs != ours)
            one, other = (np.square(rest - entries[codes]).sum(-1)[new] for codes in (theirs, ours))
            size = np.square(rest).sum(-1)[new] + np.square(entries[theirs]).sum(-1)[new]
            gaps = np.abs(one - other) / size
            assert (gaps <= BOUND).all(), f"{part} codebook {q}: distances differ by {gaps.max():.1e}"
            ties, widest = ties + int(new.sum()), max(widest, gaps.max(initial=0))
            open_ &= theirs == ours
            rest = rest - entries[theirs]
    return Differences(ties, excluded, proven, float(widest))


def assert_equal_but_for_ties(
    params: dict[str, np.ndarray], latents: np.ndarray, expected: np.ndarray, got: np.ndarray, share: float = 1e-3
) -> Differences:
    """`compare`, with at most a `share` of ties."""
    found = compare(params, latents, expected, got)
    assert found.ties <= share * found.proven, found
    return found
