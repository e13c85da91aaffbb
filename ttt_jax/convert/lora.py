"""Low-rank adapters added to the weights, row by row."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from ttt_jax.tensorfile import DTYPES, Piece, Ring, as_bytes, rounded


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
) -> Piece:
    """W + scaling * B A of one linear map, computed in float32 and rounded once.

    Args:
      weight: W [out, in] of type `dtype`.
      a, b: A [rank, in] and B [out, rank] of type `adapter_dtype`.
      target: type of the result; where: what it is called in the message if a number is beyond its range.
    """
    kind = DTYPES[dtype]

    def whole(piece: Piece, columns: int) -> np.ndarray:
        data = np.empty(piece.nbytes, np.uint8)
        at, ring = 0, Ring()
        for view in piece.blocks(ring, 1):
            data[at : at + len(view)] = np.frombuffer(view, np.uint8)
            at += len(view)
        return data.view(DTYPES[adapter_dtype]).reshape(-1, columns).astype(np.float32)

    def blocks(ring: Ring, unit: int) -> Iterator[memoryview]:
        columns = a.nbytes // DTYPES[adapter_dtype].itemsize // rank
        down, up = whole(a, columns), np.float32(scaling) * whole(b, rank)
        row = 0
        for view in weight.blocks(ring, columns * kind.itemsize):
            block = np.frombuffer(view, kind).reshape(-1, columns).astype(np.float32)
            block += up[row : row + len(block)] @ down
            row += len(block)
            yield as_bytes(rounded(block, target, where))

    return Piece(weight.nbytes // kind.itemsize * DTYPES[target].itemsize, blocks)
