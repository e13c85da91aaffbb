"""The measurement of a TTT layer: equal to the written-out descent, in any split, and free where not measured."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given

from tests.helpers.drawing import assert_close, assert_same_bits, few, pieces, quick_jit, random_mask, seeds
from tests.helpers.small_ttt import (
    HEADS,
    ROWS,
    TOL,
    VARIANTS,
    carried_state,
    config,
    init_shapes,
    measure,
    measured_call,
    measured_reference,
    pairs,
    setting,
    shallow_networks,
)
from ttt_jax.ttt import inner
from ttt_jax.ttt.layer import init_state

FRAMES = 12
"""Of every call but those of one frame: each length compiles anew."""


def assert_measured(params, x, mask, state, cfg):
    """The measurement of a call, compared with the reference like the output and the state beside it."""
    out, new, got = measured_call(params, x, mask, state, cfg=cfg)
    expected, expected_state, (*losses, displacement) = measured_reference(params, x, mask, state, cfg)
    assert_close((out, new), (expected, expected_state), TOL)
    assert_close((got.inner.loss_base, got.inner.loss_before, got.inner.loss_after), tuple(losses), TOL)
    assert_close(got.inner.displacement, displacement, 1e-7)  # a root: of an error of 1e-15 near 0 it makes 3e-8
    return got


@pairs
@given(seed=seeds)
@few
def test_measured_losses_are_those_of_the_written_out_descent(hidden, mini_batch, impl, x64, seed):
    cfg = config(hidden, mini_batch, impl=impl)
    params, x, rng = setting(cfg, seed, FRAMES)
    assert_measured(params, x, random_mask(rng, (ROWS, FRAMES)), carried_state(cfg, rng), cfg)


@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)
@pytest.mark.parametrize("hidden", [(), pytest.param((4,), marks=pytest.mark.slow)], ids=["linear", "mlp2"])
def test_measured_losses_of_every_variant(hidden, variant, x64):
    cfg = config(hidden, 5, **variant)
    params, x, rng = setting(cfg, 1, FRAMES)
    assert_measured(params, x, random_mask(rng, (ROWS, FRAMES)), carried_state(cfg, rng), cfg)


def test_measurement_does_not_depend_on_the_split(x64):
    cfg = config()
    params, x, rng = setting(cfg, 8, 2 * FRAMES)
    start, mask = carried_state(cfg, rng), random_mask(rng, (ROWS, 2 * FRAMES))

    def measured(parts):
        state, measurements = start, []
        for piece in pieces(parts):
            _, state, measurement = measured_call(params, x[:, piece], mask[:, piece], state, cfg=cfg)
            measurements.append(measurement)
        return jax.tree.map(lambda *leaves: np.concatenate(leaves, 1), *measurements)

    whole = measured((FRAMES, FRAMES))
    for parts in ((1,) * 2 * FRAMES, (*(1,) * 5, FRAMES, *(1,) * 7)):
        assert_close(measured(parts), whole, 1e-7)


def test_masked_frames_measure_0_whatever_they_hold(x64):
    cfg = config()
    params, x, rng = setting(cfg, 2, FRAMES)
    mask = random_mask(rng, (ROWS, FRAMES))
    poisoned = np.where(mask[..., None], x, np.nan)
    got, clean = (measured_call(params, y, mask, init_state(cfg, ROWS), cfg=cfg)[2] for y in (poisoned, x))
    assert_same_bits(got, clean)
    assert all((np.asarray(leaf)[~mask] == 0).all() and (np.asarray(leaf)[mask] != 0).all() for leaf in got[1:])


def test_what_is_read_and_put_out_is_what_the_layer_adds(x64):
    cfg = config()
    params, x, _ = setting(cfg, 3, FRAMES)
    out, _, got = measured_call(params, x, np.ones((ROWS, FRAMES), bool), init_state(cfg, ROWS), cfg=cfg)
    np.testing.assert_array_equal(got.read, x)
    np.testing.assert_allclose(x + np.tanh(params["gate"]) * got.output, out, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose((out - x) / np.tanh(params["gate"]), got.output, rtol=1e-6, atol=1e-6)
    assert got.rate.shape == (ROWS, FRAMES, HEADS)
    assert (got.rate > 0).all()
    assert (got.rate < cfg.inner_lr / cfg.head_dim).all()


@shallow_networks
def test_no_rate_measures_the_same_before_and_after(hidden, x64):
    cfg = config(hidden, base_lr=0.0)
    params, x, _ = setting(cfg, 4, FRAMES)
    _, state, got = measured_call(params, x, np.ones((ROWS, FRAMES), bool), init_state(cfg, ROWS), cfg=cfg)
    got = got.inner
    assert all((leaf == 0).all() for leaf in jax.tree.leaves(state[:2]))
    assert_close((got.loss_before, got.loss_after), (got.loss_base, got.loss_base), TOL)
    assert (got.displacement == 0).all()


def test_a_state_reset_on_every_frame_shows(x64):
    cfg = config()
    params, x, _ = setting(cfg, 5, FRAMES)
    for frame in range(4):
        piece = x[:, frame : frame + 1]
        got = measured_call(params, piece, np.ones((ROWS, 1), bool), init_state(cfg, ROWS), cfg=cfg)[2].inner
        assert_close(got.loss_before, got.loss_base, TOL)
        assert (got.loss_after < got.loss_base).all()
    kept = measured_call(params, x, np.ones((ROWS, FRAMES), bool), init_state(cfg, ROWS), cfg=cfg)[2].inner
    assert (np.abs(kept.loss_before - kept.loss_base)[:, 1:] > 1e-3).all()


def test_the_loss_at_the_base_is_finite_beside_a_state_of_nan(x64):
    cfg = config()
    params, x, rng = setting(cfg, 7, FRAMES)
    state, mask = carried_state(cfg, rng), np.ones((ROWS, FRAMES), bool)
    spoilt = state._replace(displacement=jax.tree.map(lambda d: d * jnp.nan, state.displacement))
    got, sound = (measured_call(params, x, mask, s, cfg=cfg)[2].inner for s in (spoilt, state))
    assert np.isnan(got.loss_before).all()
    assert_same_bits(got.loss_base, sound.loss_base)


def test_what_repeats_is_learned(x64):
    cfg = config()
    params, x, _ = setting(cfg, 6, FRAMES)
    repeated = np.broadcast_to(x[:, :1], x.shape)
    got = measured_call(params, repeated, np.ones((ROWS, FRAMES), bool), init_state(cfg, ROWS), cfg=cfg)[2].inner
    assert_close(got.loss_base, np.broadcast_to(got.loss_base[:, :1], got.loss_base.shape), TOL)
    assert (got.loss_before[:, -1] < 0.5 * got.loss_base[:, -1]).all()


def test_not_measuring_computes_nothing_of_it(monkeypatch):
    cfg = config((), 1, dtype="float32")
    x, mask = jax.ShapeDtypeStruct((ROWS, FRAMES, cfg.dim), jnp.float32), jax.ShapeDtypeStruct((ROWS, FRAMES), bool)
    arguments = init_shapes(cfg), x, mask, jax.eval_shape(lambda: init_state(cfg, ROWS))

    def program(measured):
        return quick_jit(lambda *args: measure(*args, cfg, measured)).lower(*arguments).as_text()

    def never(*_):
        raise AssertionError("measured without need")

    off, on = program(False), program(True)
    assert len(off) < len(on)
    monkeypatch.setattr(inner, "measure", never)
    assert program(False) == off
    with pytest.raises(AssertionError, match="without need"):
        program(True)
