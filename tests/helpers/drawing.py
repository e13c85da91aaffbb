"""Random splits, parameters and masks for the property tests, and comparisons of trees."""

from __future__ import annotations

import hashlib

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import settings
from hypothesis import strategies as st

from ttt_jax.utils.xla import QUICK, known_options

LENGTHS = (1, 3, 8, 21)
"""Lengths of calls: within, of and across mini-batches; few, since each compiles once."""


OPTIONS = known_options(QUICK)
"""Compiler options for tests on a few small arrays, which run each program a few times only."""


def quick_jit(fun, **kwargs):
    """`jax.jit` with `OPTIONS`."""
    return jax.jit(fun, compiler_options=OPTIONS, **kwargs)


seeds = st.integers(0, 2**32 - 1)
few = settings(max_examples=max(1, settings().max_examples // 4))
"""For properties whose example makes many calls: one by default, more in slow runs."""


@st.composite
def splits(draw, total: int) -> tuple[int, ...]:
    """Lengths of consecutive calls, all of `LENGTHS`, that make up `total` frames."""
    left, parts = total, []
    for length in draw(st.lists(st.sampled_from(LENGTHS), max_size=10)):
        if length <= left:
            parts.append(length)
            left -= length
    for length in LENGTHS[::-1]:
        parts += [length] * (left // length)
        left %= length
    return tuple(draw(st.permutations(parts))) if len(parts) < 12 else tuple(parts)


def pieces(parts: tuple[int, ...]) -> list[slice]:
    """Slices along time of calls with these lengths."""
    ends = np.cumsum(parts)
    return [slice(end - part, end) for end, part in zip(ends, parts, strict=True)]


def random_mask(rng: np.random.Generator, shape: tuple[int, int], share: float = 0.7) -> np.ndarray:
    """bool mask with gaps anywhere; row 0 is all valid, so that rows differ in phase."""
    mask = rng.random(shape) < share
    mask[0] = True
    return mask


def random_params(shapes, rng: np.random.Generator, dtype=np.float64):
    """Parameters in the shapes of a tree of `ShapeDtypeStruct`: nothing 0, nothing 1, so that nothing drops out
    unseen."""

    def leaf(path, spec):
        name, noise = path[-1].key, rng.standard_normal(spec.shape)
        if "norm" in name and "bias" not in name or name == "ln_scale":
            return jnp.asarray(1 + 0.2 * noise, dtype)
        small = "bias" in name or "inner_b" in name or name == "rate_weight"
        return jnp.asarray((0.2 if small else 0.5 if name == "gate" else 0.3) * noise, dtype)

    return jax.tree_util.tree_map_with_path(leaf, shapes)


def random_like(tree, rng: np.random.Generator):
    """A tree of standard normal numbers in the shapes and types of `tree`, integers left out as 0."""

    def leaf(x):
        return jnp.asarray(
            rng.standard_normal(x.shape) if jnp.issubdtype(x.dtype, jnp.floating) else np.zeros(x.shape), x.dtype
        )

    return jax.tree.map(leaf, tree)


def digest(tree) -> str:
    """sha256 over the bytes of every leaf."""
    sha = hashlib.sha256()
    for leaf in jax.tree.leaves(tree):
        sha.update(np.asarray(leaf).tobytes())
    return sha.hexdigest()


def assert_close(got, expected, tol: float) -> None:
    """Every leaf of `got` lies within `tol` of `expected`, in units of the larger of 1 and the leaf's greatest
    magnitude."""
    assert len(jax.tree.leaves(got)) == len(jax.tree.leaves(expected))
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        assert a.shape == b.shape
        if b.size:
            error = np.abs(a - b).max() / max(1.0, np.abs(b).max())
            assert error <= tol, f"off by {error:.3g}, allowed {tol:.3g}"


def assert_same_bits(got, expected) -> None:
    """Every leaf of `got` equals `expected` bit for bit (a NaN never passes)."""
    assert len(jax.tree.leaves(got)) == len(jax.tree.leaves(expected))
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        a, b = np.asarray(a), np.asarray(b)
        assert np.isfinite(a.astype(np.float64)).all()
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)
