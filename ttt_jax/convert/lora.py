"""Low-rank adapters added to the weights, row by row."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from ttt_jax.checkpoints.safetensors_reader import DTYPES, OTHER_TYPE, Piece, as_bytes, rounded
from ttt_jax.errors import InputError


def merged(
    weight: Piece,
    dtype: str,
    a: Piece,
    b: Piece,
    adapter_dtype: str,
    rank: int,
    scaling: float,
    target: str,
    where: str,
    mend: str = OTHER_TYPE,
) -> Piece:
    """W + scaling * B A of one linear map, computed in float32 and rounded once.

    Args:
      weight: W [out, in] of type `dtype`.
      a, b: A [rank, in] and B [out, rank] of type `adapter_dtype`.
      target: type of the result; where: what it is called in the message if a number is beyond its range, or beyond that of
        float32 in between; mend: what to do then.
    """
    kind = DTYPES[dtype]

    def whole(piece: Piece, columns: int) -> np.ndarray:
        data = np.empty(piece.nbytes, np.uint8)
        at = 0
        for view in piece.blocks(1):
            data[at : at + len(view)] = np.frombuffer(view, np.uint8)
            at += len(view)
        return data.view(DTYPES[adapter_dtype]).reshape(-1, columns).astype(np.float32)

    def blocks(unit: int) -> Iterator[memoryview]:
        columns = a.nbytes // DTYPES[adapter_dtype].itemsize // rank
        down, up = whole(a, columns), whole(b, rank)
        sound = np.isfinite(down).all() and np.isfinite(up).all()
        with np.errstate(over="ignore", invalid="ignore"):
            up *= np.float32(scaling)
        row = 0
        for view in weight.blocks(columns * kind.itemsize):
            block = np.frombuffer(view, kind).reshape(-1, columns).astype(np.float32)
            finite = sound and np.isfinite(block).all()
            with np.errstate(over="ignore", invalid="ignore"):
                block += up[row : row + len(block)] @ down
            if finite and not np.isfinite(block).all():
                raise InputError(f"{where} holds a number beyond the range of float32: {mend}.")
            row += len(block)
            yield as_bytes(rounded(block, target, where, mend))

    return Piece(weight.nbytes // kind.itemsize * DTYPES[target].itemsize, blocks)
