"""Low-rank adapters added to the weights, row by row."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from ttt_jax.checkpoints.safetensors_reader import DTYPES, OTHER_TYPE, Piece, as_bytes, rounded
from ttt_jax.errors import InputError


class Adapter(NamedTuple):
    """The adapter of one linear map."""

    a: Piece
    """A [rank, in]."""
    b: Piece
    """B [out, rank]."""
    dtype: str
    """Type of both."""
    rank: int
    scaling: float


def merged(weight: Piece, dtype: str, adapter: Adapter, target: str, where: str, advice: str = OTHER_TYPE) -> Piece:
    """Returns W + scaling * B A of one linear map, computed in float32 and rounded once.

    Args:
      weight: W [out, in] of type `dtype`.
      target: type of the result.

    Reading it raises `InputError` with `where` and `advice` if a number is beyond the range of `target`, or of float32
    before.
    """
    kind, adapter_kind = DTYPES[dtype], DTYPES[adapter.dtype]

    def whole(piece: Piece, columns: int) -> np.ndarray:
        data = np.empty(piece.nbytes, np.uint8)
        at = 0
        for view in piece.blocks(1):
            data[at : at + len(view)] = np.frombuffer(view, np.uint8)
            at += len(view)
        return data.view(adapter_kind).reshape(-1, columns).astype(np.float32)

    def blocks(unit: int) -> Iterator[memoryview]:
        columns = adapter.a.nbytes // adapter_kind.itemsize // adapter.rank
        down, up = whole(adapter.a, columns), whole(adapter.b, adapter.rank)
        sound = np.isfinite(down).all() and np.isfinite(up).all()
        with np.errstate(over="ignore", invalid="ignore"):
            up *= np.float32(adapter.scaling)
        row = 0
        for view in weight.blocks(columns * kind.itemsize):
            block = np.frombuffer(view, kind).reshape(-1, columns).astype(np.float32)
            finite = sound and np.isfinite(block).all()
            with np.errstate(over="ignore", invalid="ignore"):
                block += up[row : row + len(block)] @ down
            if finite and not np.isfinite(block).all():
                raise InputError(f"{where} holds a number beyond the range of float32: {advice}.")
            row += len(block)
            yield as_bytes(rounded(block, target, where, advice))

    return Piece(weight.nbytes // kind.itemsize * DTYPES[target].itemsize, blocks)
