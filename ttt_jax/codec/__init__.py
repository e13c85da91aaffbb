"""Audio to codes and back.

ttt_jax.codec.base                     the interface of codecs
ttt_jax.codec.kmeans                   the embedded codec: residual k-means over log-mel frames
ttt_jax.codec.spectrogram_inversion    a waveform from log-mel energies, for its decoder
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ttt_jax.codec.base import Codec
from ttt_jax.config import FRAME_RATE
from ttt_jax.errors import InputError
from ttt_jax.utils.paths import local

DEFAULT_FILE = Path(__file__).resolve().parents[2] / "corpus" / "codec" / "melkmeans-8x64.safetensors"


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
