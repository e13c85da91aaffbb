"""Audio to codes and back.

ttt_jax.codec.kmeans        the embedded codec: residual k-means over log-mel frames
ttt_jax.codec.griffin_lim   a waveform from log-mel energies, for its decoder
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from ttt_jax.config import FRAME_RATE
from ttt_jax.errors import InputError
from ttt_jax.utils.paths import local

DEFAULT_FILE = Path(__file__).resolve().parents[2] / "corpus" / "codec" / "melkmeans-8x64.safetensors"


class Codec(Protocol):
    """The interface of every codec; data, training and evaluation use nothing beyond it.

    The embedded codec runs at 16 kHz with 64 entries a codebook, Mimi at 24 kHz with 2048. Neural codecs hold jax
    parameters and return NumPy codes; their state is a pytree.
    """

    name: str  # stored with every result, e.g. "melkmeans-8x64"
    digest: str  # SHA-256, hex, of the parameters: equal digests mean equal codes
    sample_rate: int  # samples a second that `encode` takes and `decode` returns
    frame_rate: float  # frames a second: `ttt_jax.config.FRAME_RATE`
    frame_size: int  # samples of a frame, sample_rate / frame_rate
    num_codebooks: int  # rows of the codes: 8, the coarsest first
    cardinality: int  # entries of a codebook; codes lie in [0, cardinality)

    def encode(self, audio: np.ndarray) -> np.ndarray:
        """float [samples], one channel -> int32 [num_codebooks, T], T = ceil(samples / frame_size).

        The last frame is filled up with zeros.
        """
        ...

    def init_state(self) -> Any:
        """The state of a stream before its first sample."""
        ...

    def encode_step(self, audio: np.ndarray, state: Any) -> tuple[np.ndarray, Any]:
        """The next whole frames of a stream, float [frame_size * n], and the state before them
        -> int32 [num_codebooks, n] and the state after them.

        The state is never changed in place. Codes depend on no later sample. Any split of a recording into blocks gives
        the codes of `encode`.
        """
        ...

    def decode(self, codes: np.ndarray) -> np.ndarray:
        """int [num_codebooks, T] in [0, cardinality) -> float32 [T * frame_size]."""
        ...


@dataclass(frozen=True)
class CodecInfo:
    """A codec that is not here, as code files state it: enough to read their codes, not to encode or decode audio."""

    name: str
    digest: str | None
    cardinality: int | None = None  # None if no file states it
    num_codebooks: int = 8
    frame_rate: float = FRAME_RATE


def load_codec(name_or_path: str | Path = "kmeans") -> Codec:
    """Returns the embedded codec of a checkout ("kmeans"), or that in a file written by `KMeansCodec.save`.

    Raises `InputError` for an unknown name, a file that is not a codec, or a codec of another frame rate.
    """
    from ttt_jax.codec.kmeans import KMeansCodec

    name = str(name_or_path)
    if name == "mimi":
        raise InputError("codec 'mimi' is not available in this version: use codec 'kmeans'.")
    if name == "kmeans" and not DEFAULT_FILE.is_file():
        raise InputError(
            f"codec 'kmeans' is expected at {DEFAULT_FILE}, which does not exist: run from a checkout of the project,"
            " or give the path of a codec file."
        )
    path = DEFAULT_FILE if name == "kmeans" else local(name_or_path)
    if not path.is_file():
        raise InputError(
            f"codec {name!r} is neither a codec nor a file: use 'kmeans' or the path of a codec file (.safetensors)."
        )
    codec = KMeansCodec.load(path)
    if codec.frame_rate != FRAME_RATE:
        raise InputError(
            f"the codec {path} gives {codec.frame_rate:g} frames a second ({codec.sample_rate} Hz, {codec.frame_size}"
            f" samples a frame), but models read {FRAME_RATE}: give a codec of {FRAME_RATE} frames a second."
        )
    return codec
