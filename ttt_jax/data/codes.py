"""Code files: the codes of a stream of speech, a safetensors file with one tensor ``codes``, int [K, T], and metadata.

docs/data/codes.md describes rows and metadata. Only ``frame_rate`` and ``codec`` need to be there.
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

FORMAT = "ttt_jax.codes/2"


class Source(NamedTuple):
    """A recording in a code file."""

    path: str  # as given by the user
    sha256: str  # of the audio file, hex
    seconds: float  # of audio; the frames last up to a frame longer
    frames: int
    start: int  # the frame at which it begins


class Codes(NamedTuple):
    """Content of a code file, as docs/data/codes.md describes it; None or empty if the file does not state it."""

    codes: np.ndarray  # int32 [K, T], T > 0
    frame_rate: float
    codec: str | None
    codec_name: str | None = None
    cardinality: int | None = None
    tokenizer: str | None = None
    voice: str | None = None
    sources: tuple[Source, ...] = ()
    boundaries: tuple[int, ...] = ()
    input: str | None = None

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
        """Whether row 0 is the text: the number of rows is odd."""
        return len(self.codes) % 2 == 1


class Header(NamedTuple):
    """Size and metadata of a code file."""

    rows: int  # K
    num_frames: int  # T, above 0
    frame_rate: float
    codec: str | None
    codec_name: str | None
    cardinality: int | None
    tokenizer: str | None
    boundaries: tuple[int, ...]
    checksum: str | None  # as stated; `read_codes` checks it

    @property
    def seconds(self) -> float:
        """Duration of the frames."""
        return self.num_frames / self.frame_rate


def write_codes(path: str | Path, codes: Codes) -> None:
    """Writes a code file atomically and makes its folder. Raises `OSError` if it cannot be written."""
    fields = {
        "format": FORMAT,
        "frame_rate": repr(codes.frame_rate),
        "codec": codes.codec,
        "codec_name": codes.codec_name,
        "cardinality": None if codes.cardinality is None else str(codes.cardinality),
        "tokenizer": codes.tokenizer,
        "voice": codes.voice,
        "sources": json.dumps([source._asdict() for source in codes.sources]),
        "boundaries": json.dumps(codes.boundaries),
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
    """Returns the content of a code file. The caller checks rows and values against a codec. Raises `InputError`."""
    with _opened(Path(path)) as (file, metadata):
        codes = file.get_tensor("codes")
    if "checksum" in metadata and metadata["checksum"] != _checksum(codes, metadata):
        raise InputError(f"{path} is damaged (its checksum does not match its content): make it again.")
    return Codes(codes.astype(np.int32), **_parse(path, codes.shape[1], metadata))


def read_header(path: str | Path) -> Header:
    """Returns the size and metadata of a code file without reading its codes. Raises `InputError`."""
    with _opened(Path(path)) as (file, metadata):
        shape = file.get_slice("codes").get_shape()
    fields = _parse(path, shape[1], metadata)
    stated = {name: fields[name] for name in Header._fields if name in fields}
    return Header(rows=shape[0], num_frames=shape[1], checksum=metadata.get("checksum"), **stated)


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[tuple[Any, dict[str, str]]]:
    """Yields a file with codes, and its metadata."""
    try:
        with safetensors.safe_open(str(path), framework="numpy") as file:
            tensor = file.get_slice("codes")
            shape, kind = tensor.get_shape(), tensor.get_dtype()
            if len(shape) != 2 or kind[0] not in "IU" or not shape[0]:
                raise InputError(
                    f"{path} holds codes of type {kind} and shape {shape}, expected integers [K, T]: write them so."
                )
            if not shape[1]:
                raise InputError(f"{path} holds no frames (shape {shape}), less than one frame: leave it out.")
            yield file, file.metadata() or {}
    except (OSError, safetensors.SafetensorError) as error:
        raise InputError(
            f"{path} cannot be read as codes ({error}): expected a safetensors file with a tensor 'codes', int [K, T]."
        ) from error


def _parse(path: str | Path, num_frames: int, metadata: dict[str, str]) -> dict[str, Any]:
    """Returns the fields of `Codes` in the metadata."""
    if metadata.get("format", FORMAT) != FORMAT:
        raise InputError(
            f"{path} has the format {metadata['format']!r}, but this version reads {FORMAT!r}: make the file again"
            " (python -m eval prepare)."
        )
    rate = metadata.get("frame_rate")
    try:
        is_right = rate is not None and float(rate) == FRAME_RATE
    except ValueError:
        is_right = False
    if not is_right:
        raise InputError(
            f"{path} states frame_rate {rate!r} in its metadata, but models read {FRAME_RATE} frames a second: make the"
            f" codes with a codec of {FRAME_RATE} frames a second and state frame_rate '{FRAME_RATE}'."
        )
    try:
        cardinality = int(metadata["cardinality"]) if "cardinality" in metadata else None
        sources = tuple(Source(**source) for source in json.loads(metadata.get("sources", "[]")))
        boundaries = tuple(int(frame) for frame in json.loads(metadata.get("boundaries", "[]")))
    except (ValueError, TypeError, RecursionError) as error:
        raise InputError(
            f"{path} has metadata that cannot be read ({type(error).__name__}: {error}), expected a number under"
            " 'cardinality' and JSON lists under 'sources' and 'boundaries': write them so or leave them out."
        ) from None
    bounds = (0, *boundaries, num_frames)
    if any(after <= before for before, after in zip(bounds, bounds[1:], strict=False)):
        raise InputError(
            f"{path} states boundaries {list(boundaries)} in its metadata, expected growing frames between 0 and its"
            f" {num_frames} frames: write them so or leave them out."
        )
    names = ("codec", "codec_name", "tokenizer", "voice", "input")
    return {
        "frame_rate": FRAME_RATE,
        "cardinality": cardinality,
        "sources": sources,
        "boundaries": boundaries,
        **{name: metadata.get(name) for name in names},
    }


def _checksum(codes: np.ndarray, metadata: dict[str, str]) -> str:
    rest = sorted((key, value) for key, value in metadata.items() if key != "checksum")
    digest = hashlib.sha256(json.dumps([rest, list(codes.shape)]).encode())
    digest.update(np.ascontiguousarray(codes, "<i4").tobytes())
    return digest.hexdigest()
