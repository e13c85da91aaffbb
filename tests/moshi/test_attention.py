"""cuDNN's attention equals the plain form; without a GPU its XLA twin runs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.helpers.drawing import quick_jit
from ttt_jax.config import MoshiConfig, TTTConfig
from ttt_jax.moshi import attention
from ttt_jax.moshi.blocks import Attention
from ttt_jax.moshi.sink import Sink
from ttt_jax.nn.linear import Kernel, linear

SLOTS, HEADS, WIDTH, ROWS = 8, 2, 4, 3
library = jax.nn.dot_product_attention


def setting(monkeypatch, frames, starts, masked):
    """Starts, mask, queries with keys and values, a cache, and a function that draws more; cuDNN is replaced by XLA."""
    monkeypatch.setattr(jax.nn, "dot_product_attention", lambda *args, implementation, **rest: library(*args, **rest))
    rng = np.random.default_rng(frames)
    draw = lambda *shape: rng.normal(size=shape).astype(np.float32)  # noqa: E731
    mask = rng.random((ROWS, frames)) < 0.6 if masked else np.ones((ROWS, frames), bool)
    inputs = [draw(ROWS, frames, HEADS, WIDTH) for _ in range(3)]
    kv_cache = attention.KVCache(draw(ROWS, HEADS, SLOTS, WIDTH), draw(ROWS, HEADS, SLOTS, WIDTH))
    return np.array(starts, np.int32), mask, inputs, kv_cache, draw


@quick_jit
def both_forms(q, k, v, kv_cache, start, mask):
    """Where the frames lie, the read values and the cache: of the fused form, of the plain one."""
    where, line = attention.positions(start, mask, SLOTS), attention.line_up(start, mask, SLOTS)
    written = attention.write(jax.tree.map(lambda leaf: leaf[None], kv_cache), k[None], v[None], start, mask)
    fused, plain = attention.attend_fused(q, k, v, kv_cache, line), attention.attend(q, k, v, kv_cache, where)
    return (where, line), fused, (plain, written)


@pytest.mark.parametrize(
    ("frames", "starts", "masked"),
    [(20, (0, 3, 30), False), (5, (0, 3, 30), True), (20, (0, 3, 30), True), (20, (8, 100, 7), True)],
)
def test_fused_attention_equals_the_plain_form(monkeypatch, frames, starts, masked):
    start, mask, (q, k, v), kv_cache, _ = setting(monkeypatch, frames, starts, masked)
    (where, line), (read, kept), (expected, written) = both_forms(q, k, v, kv_cache, start, mask)
    np.testing.assert_array_equal(line.query, where.query)
    np.testing.assert_allclose(
        np.where(mask[..., None, None], read, 0), np.where(mask[..., None, None], expected, 0), atol=1e-6
    )
    for row, seen in enumerate(start + mask.sum(1)):
        held = (seen - 1 - np.arange(min(seen, SLOTS))) % SLOTS
        for new, old in zip(kept, written, strict=True):
            np.testing.assert_array_equal(np.asarray(new)[row][:, held], np.asarray(old)[0, row][:, held])


@pytest.mark.parametrize(("frames", "masked"), [(20, False), (5, True), (20, True)])
def test_fused_attention_has_the_gradients_of_the_plain_form(monkeypatch, frames, masked):
    """Of queries, keys, values and the cache, through the read values and through the cache after the call."""
    start, mask, inputs, kv_cache, draw = setting(monkeypatch, frames, (0, 3, 30), masked)
    of_read, of_cache = draw(ROWS, frames, HEADS, WIDTH), draw(ROWS, HEADS, SLOTS, WIDTH)
    held = np.arange(SLOTS)[None] < (start + mask.sum(1))[:, None]  # slots that hold anything after the call

    def loss(inputs, kv_cache, fused):
        where, line = attention.positions(start, mask, SLOTS), attention.line_up(start, mask, SLOTS)
        if fused:
            read, kept = attention.attend_fused(*inputs, kv_cache, line)
        else:
            read = attention.attend(*inputs, kv_cache, where)
            kept = attention.write(
                jax.tree.map(lambda x: x[None], kv_cache), *(x[None] for x in inputs[1:]), start, mask
            )
            kept = attention.KVCache(*(x[0] for x in kept))
        seen = jnp.where(mask[..., None, None], read, 0)
        return (of_read * seen).sum() + sum((jnp.where(held[:, None, :, None], x, 0) * of_cache).sum() for x in kept)

    gradients = quick_jit(jax.grad(loss, argnums=(0, 1)), static_argnums=2)
    found, expected = (gradients(inputs, kv_cache, fused) for fused in (True, False))
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert float(jnp.abs(b).max()) > 0.1
        np.testing.assert_allclose(a, b, atol=1e-5)


@pytest.mark.parametrize(
    ("frames", "context", "width", "dtype", "fits"),
    [
        (1250, 3000, 128, "bfloat16", True),
        (1250, 3000, 128, "float32", False),
        (1250, 3000, 256, "bfloat16", False),
        (100, 3000, 128, "bfloat16", False),
    ],
)
def test_the_library_serves_long_calls_in_its_types_on_a_gpu(monkeypatch, frames, context, width, dtype, fits):
    assert not attention.can_fuse(frames, context, width, jnp.dtype(dtype))  # tests run on a CPU
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert attention.can_fuse(frames, context, width, jnp.dtype(dtype)) == fits
    assert not attention.can_fuse(frames, context, width, jnp.dtype(dtype), Sink(4, 10000.0))


def test_queries_and_keys_turn_by_the_period_of_the_configuration():
    cfg = MoshiConfig(dim=8, num_heads=1, num_layers=1, max_period=100.0, ttt=TTTConfig(layers="none"))
    w = np.random.default_rng(0).normal(size=(3, 1, 8, 8)).astype(np.float32)
    x, position = np.ones((1, 2, 8), np.float32), np.array([[0, 7]], np.int32)
    _, (q, k) = Attention(cfg).apply({"params": {"qkv": w, "out": w[0, 0]}}, x, position, lambda q, k, v: (v, (q, k)))
    turn = np.exp(7j * 100.0 ** (-np.arange(4) / 4))
    for turned, plain in ((q, w[0, 0].sum(-1)), (k, w[1, 0].sum(-1))):
        np.testing.assert_allclose(turned[0, 0, 0], plain, rtol=1e-5)
        pairs = turn * (plain[::2] + 1j * plain[1::2])
        np.testing.assert_allclose(turned[0, 1, 0, ::2], pairs.real, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(turned[0, 1, 0, 1::2], pairs.imag, rtol=1e-4, atol=1e-5)


@pytest.fixture
def gpu_branches(monkeypatch):
    """Programs take the branch that a GPU takes."""

    def choose(*args, default, cuda=None, cpu=None):
        return (cuda or default)(*args)

    monkeypatch.setattr(jax.lax, "platform_dependent", choose)


def one_frame(rows, sink=None):
    draw = np.random.default_rng(rows).normal
    kv_caches = attention.KVCache(*draw(size=(2, 2, rows, HEADS, SLOTS, WIDTH)).astype(np.float32))
    inputs = draw(size=(3, rows, 1, HEADS, WIDTH)).astype(np.float32)
    position, mask = jnp.array([3, 30, 0], jnp.int32)[:rows], jnp.array([True, True, False])[:rows]
    return attention.attend_one(*inputs, jax.tree.map(jnp.asarray, kv_caches), 1, position, mask, sink)


@pytest.mark.parametrize(("rows", "sink"), [(1, None), (3, None), (3, Sink(2, 100.0))])
def test_one_frame_on_a_gpu_reads_and_writes_the_same(request, rows, sink):
    read, kept = one_frame(rows, sink)
    request.getfixturevalue("gpu_branches")
    found, now = one_frame(rows, sink)
    np.testing.assert_allclose(found, read, rtol=1e-5, atol=1e-6)
    for a, b in zip(now, kept, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("rows", [1, 3])
def test_a_product_of_few_rows_on_a_gpu_is_the_product(gpu_branches, rows):
    rng = np.random.default_rng(rows)
    x, w = rng.normal(size=(rows, 1, 6)).astype(np.float32), rng.normal(size=(3, 2, 6)).astype(np.float32)
    expected = np.einsum("rti,abi->rtab", x, w)
    np.testing.assert_allclose(linear(jnp.asarray(x), Kernel(jnp.asarray(w))), expected, rtol=1e-5, atol=1e-6)
