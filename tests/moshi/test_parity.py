"""The model against traces of PyTorch `moshi` on shared random weights (window 8, so 24 frames wrap the KV cache
twice)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from tests.helpers.drawing import digest
from tests.helpers.places import FIXTURES
from ttt_jax.checkpoints import weights
from ttt_jax.convert import kyutai
from ttt_jax.moshi import generate, model

ATOL = 1e-4
GREEDY = generate.Sampling(temperature=0, text_temperature=0)


@pytest.fixture(scope="module")
def fixture(tmp_path_factory):
    """Configuration, parameters and traces of the small random model that PyTorch `moshi` ran."""
    folder = tmp_path_factory.mktemp("moshi") / "ours"
    kyutai(FIXTURES / "moshi.weights.safetensors", folder, config=FIXTURES / "moshi.config.json")
    found = weights.load(folder)
    return found.cfg, found.params, load_file(FIXTURES / "moshi.trace.safetensors")


def _run(cfg, params, codes, splits):
    """Outputs over all calls, time on axis 1."""
    forward = jax.jit(model.forward, static_argnames="cfg")
    state, outputs = model.init_state(cfg, codes.shape[0]), []
    for start, stop in zip(splits[:-1], splits[1:], strict=True):
        mask = jnp.ones((codes.shape[0], stop - start), bool)
        out, state = forward(params, jnp.asarray(codes[:, :, start:stop], jnp.int32), mask, state, cfg=cfg)
        outputs.append(out._replace(targets=out.targets.swapaxes(1, 2), target_mask=out.target_mask.swapaxes(1, 2)))
    return jax.tree.map(lambda *x: np.concatenate(x, 1), *outputs)


@pytest.mark.parametrize(
    "splits",
    [
        pytest.param((0, 24), id="whole"),
        pytest.param(tuple(range(25)), id="frames"),
        pytest.param((0, 5, 6, 17, 24), id="mixed", marks=pytest.mark.slow),
    ],
)
def test_teacher_forced_logits_equal_pytorch(fixture, splits):
    cfg, params, trace = fixture
    out = _run(cfg, params, trace["codes"], splits)
    np.testing.assert_allclose(out.text_logits, trace["text_logits_delayed_grid"][:, 0], atol=ATOL)
    np.testing.assert_allclose(out.hidden, trace["transformer_out"], atol=ATOL)
    # These logits reach 20: PyTorch's own float32 rounding puts them up to 1.4e-4 from a float64 evaluation. Hence 1e-5
    # of
    # the largest.
    expected = trace["audio_logits_delayed_grid"]
    np.testing.assert_allclose(out.audio_logits.swapaxes(1, 2), expected, atol=1e-5 * np.abs(expected).max())


def test_targets_and_masks_equal_pytorch(fixture):
    cfg, params, trace = fixture
    out = _run(cfg, params, trace["codes"], (0, 24))
    predicted = 1 + cfg.dep_q
    np.testing.assert_array_equal(out.targets, trace["delayed"][:, :predicted, 1:].swapaxes(1, 2))
    # PyTorch reports masks undelayed: entry t of codebook k speaks of column t + delay.
    for k in range(cfg.dep_q):
        delay = cfg.delays[k + 1]
        np.testing.assert_array_equal(out.target_mask[:, delay:, k + 1], trace["fwd_mask"][:, k, : 24 - delay])
        assert not out.target_mask[:, :delay, k + 1].any()
    np.testing.assert_array_equal(out.target_mask[:, :, 0], trace["fwd_text_mask"][:, 0])


def _generate(cfg, params, frames, active):
    """Greedy tokens of every call, [B, 1 + Q, calls]; frames [B, n_q - dep_q, calls], active bool [B, calls]."""
    state, outs = model.init_state(cfg, frames.shape[0]), []
    for call in range(frames.shape[2]):
        user = jnp.asarray(frames[:, :, call], jnp.int32)
        moshi, state = generate.stream_step(params, user, jnp.asarray(active[:, call]), state, cfg, GREEDY)
        outs.append(np.asarray(moshi))
    return np.stack(outs, -1)


def test_greedy_stream_equals_pytorch_token_for_token(fixture):
    cfg, params, trace = fixture
    user, expected, delay = trace["free_user"], trace["free_out"], cfg.max_delay
    frames = np.concatenate([user[:, :, :1], user], 2)  # the first frame is handed in twice, as Kyutai's tools do
    got = _generate(cfg, params, frames, np.ones((2, frames.shape[2]), bool))
    np.testing.assert_array_equal(got[:, :, delay:], expected[:, :, delay:])
    assert (got[:, :, :delay] == -1).all()


def test_paused_row_equals_pytorch(fixture):
    cfg, params, trace = fixture
    expected = trace["mask_out"]
    active = np.ones((2, 24), bool)
    active[1, 1::2] = False
    got = _generate(cfg, params, trace["free_user"], active)
    given = active & (np.cumsum(active, 1) > cfg.max_delay)
    for row in range(2):
        np.testing.assert_array_equal(got[row][:, given[row]], expected[row][:, given[row]])
    assert (got[1][:, ~active[1]] == -1).all()


def test_stream_step_donates_its_state_and_compiles_once(fixture):
    cfg, params, trace = fixture

    def kinds(state):
        return jax.tree.map(lambda x: (x.shape, x.dtype, x.weak_type), state)

    state, sizes, before = model.init_state(cfg, 2), [], digest(params)
    fresh = kinds(state)
    for call in range(3):
        old, user = state, jnp.asarray(trace["free_user"][:, :, call], jnp.int32)
        _, state = generate.stream_step(params, user, jnp.ones(2, bool), state, cfg, GREEDY)
        assert all(leaf.is_deleted() for leaf in jax.tree.leaves(old))
        assert kinds(state) == fresh
        sizes.append(generate.stream_step._cache_size())
    assert sizes[0] == sizes[2]
    assert digest(params) == before
