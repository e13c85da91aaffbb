"""What the streams of all controlled tasks share."""

from __future__ import annotations

import numpy as np

from ttt_jax.data.frames import ABSENT
from ttt_jax.data.text import PAD

CARDINALITY = 64
TEXT, MOSHI, USER = 0, 1, 9
"""Rows of a stream: the text, codebook 1 of Moshi, codebook 1 of the user."""
CODEBOOKS = 8


def empty(frames: int) -> np.ndarray:
    """Returns a stream in which nobody speaks and the text is padding, int32 [17, T]."""
    stream = np.full((1 + 2 * CODEBOOKS, frames), ABSENT, np.int32)
    stream[TEXT] = PAD
    return stream
