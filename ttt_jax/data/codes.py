"""Code files: the codes of a stream of speech, with what they were made of.

A safetensors file with one tensor ``codes``, int [K, T] (written as int16 where that fits, else int32). For a codec of 8
codebooks K is 8 (the model's voice), 16 (both voices) or 17 (the text as row 0, then both voices); -1 stands for a token
that is not known. Metadata, all strings:

    frame_rate    frames a second, "12.5": those of all models; files of another rate are refused
    codec         the codec's digest; its name would not do, as two fits may share it
    codec_name    for messages
    cardinality   entries of a codebook
    tokenizer     digest of the tokenizer, where there is a text row
    voice         "own" or "other": where the left or only channel of the recordings went
    sources       JSON list of `Source`s: the recordings, in order
    joints        JSON list: the frames at which each recording but the first begins
    input         what `python -m eval prepare` knows the file by when it runs again
    format        "ttt_jax.codes/1"
    checksum      SHA-256, hex, over the codes and all other metadata

Only ``frame_rate`` and ``codec`` need to be there; `python -m eval prepare` writes all of them.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import safetensors
import safetensors.numpy

from ttt_jax.config import FRAME_RATE
from ttt_jax.errors import InputError
from ttt_jax.utils.files import write_atomically

FORMAT = "ttt_jax.codes/1"


class Source(NamedTuple):
    """A recording in a code file."""

    path: str
    """As it was given."""
    sha256: str
    """Of the audio file's content, hex."""
    seconds: float
    """Length of the audio; up to a frame less than its frames last."""
    frames: int
    start: int
    """The frame at which it begins."""


class Codes(NamedTuple):
    """What a code file holds; see the module's docstring. None or empty: the file does not say."""

    codes: np.ndarray
    """int32 [K, T], T > 0."""
    frame_rate: float
    codec: str | None
    codec_name: str | None = None
    cardinality: int | None = None
    tokenizer: str | None = None
    voice: str | None = None
    sources: tuple[Source, ...] = ()
    joints: tuple[int, ...] = ()
    input: str | None = None

    @property
    def rows(self) -> int:
        """K."""
        return self.codes.shape[0]

    @property
    def num_frames(self) -> int:
        """T."""
        return self.codes.shape[1]

    @property
    def seconds(self) -> float:
        """Duration of the frames."""
        return self.num_frames / self.frame_rate

    @property
    def has_text(self) -> bool:
        """Whether row 0 is the text: two voices of equally many rows and one more."""
        return len(self.codes) % 2 == 1


class Header(NamedTuple):
    """What a code file says of itself: its size, and the fields of `Codes` that decide whether it can be used."""

    rows: int
    """K."""
    num_frames: int
    """T, above 0."""
    frame_rate: float
    codec: str | None
    codec_name: str | None
    cardinality: int | None
    tokenizer: str | None
    checksum: str | None
    """As stated; whether it is that of the codes shows only when they are read."""

    @property
    def seconds(self) -> float:
        """Duration of the frames."""
        return self.num_frames / self.frame_rate


def write_codes(path: str | Path, codes: Codes) -> None:
    """Write a code file, all of it or nothing; its folder is made if need be. Raises `OSError` if it cannot be written."""
    fields = {
        "format": FORMAT,
        "frame_rate": repr(codes.frame_rate),
        "codec": codes.codec,
        "codec_name": codes.codec_name,
        "cardinality": None if codes.cardinality is None else str(codes.cardinality),
        "tokenizer": codes.tokenizer,
        "voice": codes.voice,
        "sources": json.dumps([source._asdict() for source in codes.sources]),
        "joints": json.dumps(codes.joints),
        "input": codes.input,
    }
    metadata = {key: value for key, value in fields.items() if value is not None}
    metadata["checksum"] = _checksum(codes.codes, metadata)
    small = codes.codes.min() >= -(1 << 15) and codes.codes.max() < 1 << 15
    tensor = np.ascontiguousarray(codes.codes, np.int16 if small else np.int32)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, safetensors.numpy.save({"codes": tensor}, metadata=metadata))


def read_codes(path: str | Path) -> Codes:
    """Return what a code file holds.

    Raises:
        InputError: as `read_header`, or a checksum that does not match. Whether rows and values suit a codec is left to
            the caller.
    """
    path = Path(path)
    with _opened(path) as file:
        metadata = file.metadata() or {}
        codes = file.get_tensor("codes")
    _check_shape(path, codes.shape, str(codes.dtype), codes.dtype.kind in "iu")
    if "checksum" in metadata and metadata["checksum"] != _checksum(codes, metadata):
        raise InputError(f"{path} is damaged (its checksum does not match its content): make it again.")
    return Codes(codes.astype(np.int32), **_parse(path, codes.shape[1], metadata))


def read_header(path: str | Path) -> Header:
    """Return what a code file says of itself, without reading its codes.

    Raises:
        InputError: no such file, not safetensors with integers ``codes`` [K, T], T > 0, no frame_rate of `FRAME_RATE`, or
            metadata that make no sense.
    """
    path = Path(path)
    with _opened(path) as file:
        metadata = file.metadata() or {}
        tensor = file.get_slice("codes")
        shape, kind = tuple(tensor.get_shape()), tensor.get_dtype()
    _check_shape(path, shape, kind, kind[0] in "IU")
    fields = _parse(path, shape[1], metadata)
    stated = {name: fields[name] for name in ("frame_rate", "codec", "codec_name", "cardinality", "tokenizer")}
    return Header(rows=shape[0], num_frames=shape[1], checksum=metadata.get("checksum"), **stated)


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        with safetensors.safe_open(str(path), framework="numpy") as file:
            yield file
    except (OSError, safetensors.SafetensorError) as error:
        raise InputError(
            f"{path} cannot be read as codes ({error}): expected a safetensors file with a tensor 'codes', int [K, T]."
        ) from error


def _check_shape(path: Path, shape: tuple[int, ...], kind: str, is_integer: bool) -> None:
    if len(shape) != 2 or not is_integer or not shape[0]:
        raise InputError(
            f"{path} holds codes of type {kind} and shape {list(shape)}, expected integers [K, T]: write them so."
        )
    if not shape[1]:
        raise InputError(f"{path} holds no frames (shape {list(shape)}), less than one frame: leave it out.")


def _parse(path: Path, num_frames: int, metadata: dict[str, str]) -> dict[str, Any]:
    """The fields of `Codes` that metadata give."""
    rate = metadata.get("frame_rate")
    try:
        frame_rate = float(rate if rate is not None else "nan")
    except ValueError:
        frame_rate = float("nan")
    if frame_rate != FRAME_RATE:
        raise InputError(
            f"{path} states frame_rate {rate!r} in its metadata, but models read {FRAME_RATE} frames a second: make the codes"
            f" with a codec of {FRAME_RATE} frames a second and state frame_rate '{FRAME_RATE}'."
        )
    try:
        cardinality = int(metadata["cardinality"]) if "cardinality" in metadata else None
        sources = tuple(_source(source) for source in json.loads(metadata.get("sources", "[]")))
        joints = tuple(int(joint) for joint in json.loads(metadata.get("joints", "[]")))
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise InputError(
            f"{path} has metadata that cannot be read ({type(error).__name__}: {error}), expected a number under"
            " 'cardinality' and JSON lists under 'sources' and 'joints': write them so or leave them out."
        ) from None
    bounds = (0, *joints, num_frames)
    if any(after <= before for before, after in zip(bounds, bounds[1:], strict=False)):
        raise InputError(
            f"{path} states joints {list(joints)} in its metadata, expected growing frames between 0 and its"
            f" {num_frames} frames: write them so or leave them out."
        )
    names = ("codec", "codec_name", "tokenizer", "voice", "input")
    return {
        "frame_rate": frame_rate,
        "cardinality": cardinality,
        "sources": sources,
        "joints": joints,
        **{name: metadata.get(name) for name in names},
    }


def _source(fields: dict[str, Any]) -> Source:
    return Source(
        str(fields["path"]),
        str(fields["sha256"]),
        float(fields["seconds"]),
        int(fields["frames"]),
        int(fields["start"]),
    )


def _checksum(codes: np.ndarray, metadata: dict[str, str]) -> str:
    rest = sorted((key, value) for key, value in metadata.items() if key != "checksum")
    digest = hashlib.sha256(json.dumps([rest, list(codes.shape)]).encode())
    digest.update(np.ascontiguousarray(codes, "<i4").tobytes())
    return digest.hexdigest()
