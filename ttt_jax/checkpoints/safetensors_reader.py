"""Reads safetensors files tensor by tensor, in blocks, so that a large model never lies in memory.

Files are read, not mapped: touched pages of a map count as resident memory of the process.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import math
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import ml_dtypes
import numpy as np

from ttt_jax.errors import InputError

_log = logging.getLogger("ttt_jax")

BLOCK = 16 << 20  # bytes that are read, hashed and written together
LARGEST_HEADER = 100_000_000  # bytes; the bound of the format's own library

DTYPES = {"BF16": np.dtype(ml_dtypes.bfloat16), "F16": np.dtype(np.float16), "F32": np.dtype(np.float32)}
"""Types of weights by their name in a file."""
NAMES = {name: dtype.name for name, dtype in DTYPES.items()}
"""Names for people."""
SIZES = {"BOOL": 1, "U8": 1, "I8": 1, "F8_E5M2": 1, "F8_E4M3": 1, "I16": 2, "U16": 2, "I32": 4, "U32": 4, "I64": 8}
SIZES |= {"U64": 8, "F64": 8} | {name: dtype.itemsize for name, dtype in DTYPES.items()}


class Info(NamedTuple):
    """Type, shape and place of a tensor in its file."""

    dtype: str
    """As files name it: "BF16", "F16", "F32", ..."""
    shape: tuple[int, ...]
    start: int
    """First byte in the file."""
    stop: int
    """Byte after the last."""


class Piece(NamedTuple):
    """Bytes to be written, which are not read yet."""

    nbytes: int
    blocks: Callable[[int], Iterator[memoryview]]
    """Yields the bytes in blocks of multiples of the argument. A block is valid until the next one."""


class TensorFile(contextlib.ExitStack):
    """A safetensors file open for reading. Its header is checked against its size when it is opened."""

    def __init__(self, path: Path):
        """Raises `InputError` if `path` is no whole safetensors file."""
        super().__init__()
        self.path = Path(path)
        if not self.path.is_file():
            raise InputError(f"{path} is not a file: give the path of a safetensors file.")
        with contextlib.ExitStack() as stack:
            self._file = stack.enter_context(self.path.open("rb", buffering=0))
            self.tensors = _header(self.path, self._file)
            self.push(stack.pop_all())

    def read_into(self, start: int, view: memoryview) -> None:
        """Fills `view` with the bytes from `start` on. Raises `InputError` if the file ends before."""
        self._file.seek(start)
        done = 0
        while done < len(view):
            count = self._file.readinto(view[done:])
            if not count:
                raise InputError(f"{self.path} became shorter while it was read: leave it alone and run again.")
            done += count

    def array(self, name: str) -> np.ndarray:
        """Returns the tensor `name`, of a type in `DTYPES`, in its shape."""
        info = self.tensors[name]
        array = np.empty(info.shape, DTYPES[info.dtype])
        self.read_into(info.start, as_bytes(array))
        return array

    def piece(self, name: str, part: int = 0, parts: int = 1) -> Piece:
        """Returns number `part` of `parts` equal consecutive shares of the bytes of the tensor `name`."""
        info = self.tensors[name]
        size = (info.stop - info.start) // parts
        start = info.start + part * size

        def blocks(unit: int) -> Iterator[memoryview]:
            step = max(1, BLOCK // unit) * unit
            buffer = memoryview(np.empty(min(step, size), np.uint8))
            for at in range(0, size, step):
                view = buffer[: size - at]
                self.read_into(start + at, view)
                yield view

        return Piece(size, blocks)


def as_bytes(array: np.ndarray) -> memoryview:
    """Returns the bytes of a contiguous array, in place."""
    return memoryview(array.reshape(-1).view(np.uint8))


def of_array(nbytes: int, make: Callable[[], np.ndarray]) -> Piece:
    """Returns the bytes of the array that `make` returns when the piece is read."""

    def blocks(unit: int) -> Iterator[memoryview]:
        view = as_bytes(np.ascontiguousarray(make()))
        step = max(1, BLOCK // unit) * unit
        for at in range(0, len(view), step):
            yield view[at : at + step]

    return Piece(nbytes, blocks)


_INFINITY = {"BF16": 0x7F80, "F16": 0x7C00, "F32": 0x7F800000}
"""Bits of infinity by type. Without their sign, NaN has larger bits and every finite value smaller ones."""


def watched(piece: Piece, dtype: str, where: str, warned: set[str]) -> Piece:
    """Returns `piece` of type `dtype` unchanged. Reading it logs a warning if a number is NaN or infinite, unless its
    name `where` is in `warned`, which then holds it."""
    bits = np.dtype(f"u{DTYPES[dtype].itemsize}")
    unsigned = np.array(np.iinfo(bits).max >> 1, bits)

    def blocks(unit: int) -> Iterator[memoryview]:
        for view in piece.blocks(max(unit, bits.itemsize)):
            if where not in warned and (np.frombuffer(view, bits) & unsigned).max(initial=0) >= _INFINITY[dtype]:
                warned.add(where)
                _log.warning("%s holds NaN or infinite numbers, which are kept: the model may give no others.", where)
            yield view

    return Piece(piece.nbytes, blocks)


OTHER_TYPE = "write another type, such as float32"


def cast(piece: Piece, source: str, target: str, where: str, advice: str = OTHER_TYPE) -> Piece:
    """Returns `piece` of type `source` as type `target`, rounded to the nearest value.

    Reading it raises `InputError` with `where` and `advice` if a number is beyond the range of `target`.
    """
    if source == target:
        return piece
    old, new = DTYPES[source], DTYPES[target]

    def blocks(unit: int) -> Iterator[memoryview]:
        for view in piece.blocks(max(1, unit // new.itemsize) * old.itemsize):
            yield as_bytes(rounded(np.frombuffer(view, old), target, where, advice))

    return Piece(piece.nbytes // old.itemsize * new.itemsize, blocks)


def rounded(values: np.ndarray, target: str, where: str, advice: str) -> np.ndarray:
    """Returns `values` as type `target`, rounded to nearest. Raises `InputError` as `cast` does."""
    with np.errstate(over="ignore"):
        result = values.astype(DTYPES[target])
    if (np.isinf(result) & np.isfinite(values)).any():
        raise InputError(f"{where} holds a number beyond the range of {NAMES[target]}: {advice}.")
    return result


def _header(path: Path, file: io.FileIO) -> dict[str, Info]:
    """Returns the tensors by name. Raises `InputError` unless the header lists exactly the bytes of the file."""
    size = os.fstat(file.fileno()).st_size
    length = int.from_bytes(file.read(8), "little")
    if size < 8 or not 2 <= length <= LARGEST_HEADER:
        raise InputError(f"{path} does not start with a safetensors header: give a whole safetensors file.")
    if size < 8 + length:
        raise InputError(f"{path} is cut off within its header: copy or download it again.")
    try:
        entries = json.loads(file.read(length))
        entries.pop("__metadata__", None)
        tensors = {name: _info(entry, 8 + length) for name, entry in entries.items()}
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        raise InputError(f"{path} has a header that cannot be read: give a whole safetensors file.") from None
    end = 8 + length
    for name, info in sorted(tensors.items(), key=lambda item: (item[1].start, item[1].stop)):
        expected = math.prod(info.shape) * SIZES.get(info.dtype, 0)
        sound = info.dtype in SIZES and min(info.shape, default=0) >= 0
        if not sound or info.start != end or info.stop - info.start != expected:
            place = f"{info.dtype} of shape {list(info.shape)} in bytes {info.start} to {info.stop}"
            raise InputError(f"{path} lists {name} as {place}, which does not fit: write the file again.")
        end = info.stop
    if size != end:
        raise InputError(f"{path} has {size} bytes instead of {end}, so it is cut off or damaged: copy it again.")
    return tensors


def _info(entry: dict[str, object], data: int) -> Info:
    """Returns one tensor of a header whose data begin at byte `data`. Raises any error for other JSON types."""
    dtype, shape, (start, stop) = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or any(type(number) is not int for number in (*shape, start, stop)):
        raise TypeError
    return Info(dtype, tuple(shape), data + start, data + stop)
