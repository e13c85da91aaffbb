"""The contract of a module that runs over a stream in calls, checked in one call: `verify`.

The idea is that of sequence-layers' contract test: a module that takes a state and returns one keeps the same laws,
whatever it computes. All calls have a length of `parts`, so that a module compiles once for each length and not once
for each law.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import numpy as np

from tests.helpers.drawing import assert_close, assert_same_bits, digest, pieces


@dataclasses.dataclass(frozen=True)
class Module:
    """What `verify` needs of a module; B rows, T frames, inputs and outputs [B, T, ...]."""

    call: Callable
    """(params, x, mask, state) -> (outputs, state)."""
    gradients: Callable
    """(params, x, mask, state, (weights of outputs, weights of `carried`)) -> gradients (params, x or (),
    `carried`)."""
    scored: Callable
    """Outputs -> the arrays [B, T, ...] that the loss of `gradients` weighs."""
    carried: Callable
    """State -> the part of it that has gradients."""
    fresh: Callable
    """(state) -> a state of as many rows that has seen nothing."""
    reset: Callable
    """(state, rows) -> the state with these rows fresh."""
    row: Callable
    """(state or a part of it, index) -> that row's part."""
    spoil: Callable
    """(state) -> the state with every float of row 1 NaN."""
    draw: Callable
    """(x, rng) -> other inputs of the same shape."""
    garbage: Callable
    """(x, rng) -> what a masked frame may hold, of the same shape."""
    batch_axis: int = 0
    """Of the arrays of `carried`."""
    tolerance: float = 1e-10


def run(module: Module, params: Any, x: np.ndarray, mask: np.ndarray, state: Any, parts: Sequence[int]) -> tuple:
    """Outputs of consecutive calls of these lengths joined along time, and the state at the end."""
    outs = []
    for piece in pieces(parts):
        out, state = module.call(params, x[:, piece], mask[:, piece], state)
        outs.append(jax.tree.map(np.asarray, out))
    return jax.tree.map(lambda *leaves: np.concatenate(leaves, 1), *outs), jax.tree.map(np.asarray, state)


def gradients(module: Module, params: Any, x, mask, state: Any, weights: tuple, parts: Sequence[int]) -> tuple:
    """Gradients of a loss over consecutive calls, by the chain rule from the last call to the first."""
    starts = [state]
    for piece in pieces(parts)[:-1]:
        starts.append(module.call(params, x[:, piece], mask[:, piece], starts[-1])[1])
    of_params, of_x, of_carried = None, [], weights[1]
    for piece, start in zip(pieces(parts)[::-1], starts[::-1], strict=True):
        ahead = jax.tree.map(lambda leaf, piece=piece: leaf[:, piece], weights[0])
        here, frames, of_carried = module.gradients(params, x[:, piece], mask[:, piece], start, (ahead, of_carried))
        here = jax.tree.map(np.asarray, here)
        of_params = here if of_params is None else jax.tree.map(np.add, of_params, here)
        of_x.insert(0, jax.tree.map(np.asarray, frames))
    of_x = jax.tree.map(lambda *leaves: np.concatenate(leaves, 1), *of_x)
    return of_params, of_x, jax.tree.map(np.asarray, of_carried)


def valid(tree: Any, mask: np.ndarray) -> Any:
    """Arrays [B, T, ...] at valid frames only."""
    return jax.tree.map(lambda leaf: np.asarray(leaf)[mask], tree)


def normal_like(tree: Any, rng: np.random.Generator) -> Any:
    """Standard normal numbers in the shapes of a tree."""
    return jax.tree.map(lambda leaf: rng.standard_normal(leaf.shape), tree)


def verify(
    module: Module,
    params: Any,
    x: np.ndarray,
    mask: np.ndarray,
    state: Any,
    rng: np.random.Generator,
    parts: Sequence[Sequence[int]],
) -> None:
    """Asserts that a module keeps its contract, from the state of a stream under way.

    Laws: state keeps structure, shapes and types; any split gives the same outputs, state and gradients; masked frames
    are as if they were not there, whatever they hold; rows are independent; a reset row is a fresh one; a frame changes
    nothing before it; parameters keep their bits.

    Args:
      x, mask: of the whole stream; row 0 is all valid.
      parts: splits of the stream into calls, the first one the split that the others are compared with.
    """
    whole, tol, params_before = parts[0], module.tolerance, digest(params)
    out, new = expected = run(module, params, x, mask, state, whole)
    kinds = lambda tree: jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), tree)  # noqa: E731
    assert kinds(new) == kinds(jax.tree.map(np.asarray, state))

    # Splits.
    weights = normal_like((module.scored(out), module.carried(new)), rng)
    slopes = gradients(module, params, x, mask, state, weights, whole)
    for split in parts[1:]:
        got, moved = run(module, params, x, mask, state, split)
        assert_close((valid(got, mask), moved), (valid(out, mask), new), tol)
        assert_close(gradients(module, params, x, mask, state, weights, split), slopes, tol)

    # Masked frames: content, place, and a call of nothing else.
    hidden = np.where(mask.reshape(*mask.shape, *(1,) * (x.ndim - 2)), x, module.garbage(x, rng))
    got, moved = run(module, params, hidden, mask, state, whole)
    assert_same_bits((valid(got, mask), moved), (valid(out, mask), new))
    poisoned = gradients(module, params, hidden, mask, state, weights, whole)
    assert_same_bits(poisoned, slopes)
    assert all((np.asarray(leaf)[~mask] == 0).all() for leaf in jax.tree.leaves(poisoned[1]))
    order = np.argsort(~mask, 1, kind="stable")
    packed_x = np.take_along_axis(x, order.reshape(*order.shape, *(1,) * (x.ndim - 2)), 1)
    packed_mask = np.take_along_axis(mask, order, 1)
    got, moved = run(module, params, packed_x, packed_mask, state, whole)
    assert_close((valid(got, packed_mask), moved), (valid(out, mask), new), tol)
    first = slice(0, whole[0])
    nothing = module.call(params, hidden[:, first], np.zeros_like(mask[:, first]), state)[1]
    assert_same_bits(nothing, state)

    # Rows, beside a neighbour whose frames, mask and state are others, NaN included.
    row = lambda tree, index: jax.tree.map(lambda leaf: leaf[index], tree)  # noqa: E731
    other, other_mask = module.draw(x, rng), rng.random(mask.shape) < 0.5
    other[0], other_mask[0] = x[0], mask[0]
    for neighbour in (state, module.spoil(state)):
        got, moved = run(module, params, other, other_mask, neighbour, whole)
        assert_same_bits((row(got, 0), module.row(moved, 0)), (row(out, 0), module.row(new, 0)))
        of_other = gradients(module, params, other, other_mask, neighbour, weights, whole)
        assert_same_bits(
            (row(of_other[1], 0), module.row(of_other[2], 0)), (row(slopes[1], 0), module.row(slopes[2], 0))
        )

    def only(leaf, axis):
        return leaf * (np.arange(len(mask)) == 0).reshape(-1, *(1,) * (leaf.ndim - axis - 1))

    alone = (
        jax.tree.map(partial(only, axis=0), weights[0]),
        jax.tree.map(partial(only, axis=module.batch_axis), weights[1]),
    )
    a, b = (
        gradients(module, params, *neighbour, state, alone, whole)[0] for neighbour in ((x, mask), (other, other_mask))
    )
    assert_close(a, b, tol)
    assert all(np.isnan(leaf[1][other_mask[1]]).any() for leaf in jax.tree.leaves(module.scored(got)))  # NaN is seen

    # A reset leaves nothing of a row, NaN included, and leaves its neighbour alone.
    reset, fresh = module.reset(module.spoil(state), np.array([False, True])), module.fresh(state)
    assert_same_bits((module.row(reset, 0), module.row(reset, 1)), (module.row(state, 0), module.row(fresh, 1)))
    (got, moved), (begun, begun_state) = (run(module, params, x, mask, s, whole) for s in (reset, fresh))
    assert_same_bits((row(got, 1), module.row(moved, 1)), (row(begun, 1), module.row(begun_state, 1)))
    assert_same_bits((row(got, 0), module.row(moved, 0)), (row(out, 0), module.row(new, 0)))

    # Causality: a frame of row 0 changes nothing before it, and everything from it on.
    frame, later = int(rng.integers(1, x.shape[1] - 1)), x.copy()
    later[0, frame] = module.draw(x, rng)[0, frame]
    before, after = (jax.tree.leaves(module.scored(run(module, params, y, mask, state, whole)[0])) for y in (x, later))
    for a, b in zip(before, after, strict=True):
        assert_same_bits(b[:, :frame], a[:, :frame])
        assert (b[0, frame:] != a[0, frame:]).any(tuple(range(1, a.ndim - 1))).all()

    assert digest(params) == params_before
    assert digest(expected[1]) != digest(state)
