"""Attention with a sink equals a plain reference, whatever the split into calls; the first frames stay in sight."""

import dataclasses
from functools import partial

import jax
import numpy as np
import pytest

from tests.helpers.contract import valid
from tests.helpers.drawing import assert_close, pieces, quick_jit, random_mask
from tests.helpers.small_moshi import FRAMES, PARTS, SMALL, TOL, forward, fresh, setting
from ttt_jax.moshi import generate

SINK, ROWS = 2, 2
PLAIN = dataclasses.replace(
    SMALL,
    num_layers=2,
    layer_context=((1, 4),),
    delays=(0,) * SMALL.num_streams,
    ttt=dataclasses.replace(SMALL.ttt, layers="none"),
)
"""No delays and no TTT layers, which the reference need not know; windows of 6 and 4 frames."""
CFG = dataclasses.replace(PLAIN, attention_sink=SINK)


def is_seen(query, key, context, sink):
    """The rule, for positions that broadcast."""
    return (key <= query) & ((key < sink) | (query - key < context - sink))


def reference(params, frames, cfg, sink=SINK, bounded=True):
    """Hidden vectors [N, dim] of one row's valid frames [K, N]; scores depend on distances, which are `bounded` for the
    sink's keys."""
    begin = np.array([cfg.text_card] + cfg.n_q * [cfg.card])[:, None]
    columns = np.concatenate([begin, frames[:, :-1]], 1)
    x = params["text_emb"][columns[0]] + sum(t[c] for t, c in zip(params["audio_emb"], columns[1:], strict=True))
    norm = lambda x, scale: x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-8) * scale  # noqa: E731
    at = np.arange(len(x))
    speeds = cfg.max_period ** (-np.arange(cfg.head_dim // 2) / (cfg.head_dim // 2))
    for run in cfg.runs:
        layer = jax.tree.map(lambda leaf: leaf[0], params["layers"][run.name])
        q, k, v = np.einsum("td,ahkd->athk", norm(x, layer["norm1"]), layer["attention"]["qkv"])
        pairs = lambda y: y[..., ::2] + 1j * y[..., 1::2]  # noqa: E731
        query = np.broadcast_to(at[:, None], (len(at), len(at)))
        place = np.where(at < sink, np.minimum(query, run.context - 1), query) if bounded else query
        turn = np.exp(1j * (place - at)[..., None] * speeds)
        scores = np.einsum("thp,shp,tsp->hts", pairs(q), pairs(k).conj(), turn).real * cfg.head_dim**-0.5
        weights = np.exp(scores) * is_seen(query, at, run.context, sink)
        read = np.einsum("hts,shk->thk", weights / weights.sum(-1, keepdims=True), v)
        x = x + read.reshape(len(x), -1) @ layer["attention"]["out"].T
        gate, up = np.einsum("td,ahd->ath", norm(x, layer["norm2"]), layer["ffn"]["gate_up"])
        x = x + (gate / (1 + np.exp(-gate)) * up) @ layer["ffn"]["down"].T
    return norm(x, params["out_norm"])


def streamed(params, frames, mask, cfg, parts):
    """Hidden vectors of all frames [B, T, dim], and the state at the end."""
    state, hidden = fresh(cfg, len(frames)), []
    for piece in pieces(parts):
        (out, _), state = forward(params, frames[:, :, piece], mask[:, piece], state, cfg=cfg)
        hidden.append(out.hidden)
    return np.concatenate(hidden, 1), jax.tree.map(np.asarray, state)


def rows_with_pauses(rng):
    """Row 0 has all frames; row 1 begins late and pauses between, in and behind the frames of its sink."""
    mask = random_mask(rng, (ROWS, FRAMES))
    mask[0], mask[1, :6], mask[1, -6:] = True, (False, False, True, False, True, False), True
    return mask


@pytest.mark.parametrize("sink", [0, SINK])
def test_any_calls_give_the_reference(x64, sink):
    """Row 0 goes past both windows; a call of 8 frames is longer than either and may hold the whole sink."""
    cfg = dataclasses.replace(CFG, attention_sink=sink)
    params, frames, rng = setting(cfg, 1)
    mask = rows_with_pauses(rng)
    expected = [reference(params, frames[row][:, mask[row]], cfg, sink) for row in range(ROWS)]
    whole, end = streamed(params, frames, mask, cfg, PARTS[0])
    for parts in PARTS:
        hidden, state = streamed(params, frames, mask, cfg, parts)
        for row in range(ROWS):
            np.testing.assert_allclose(hidden[row, mask[row]], expected[row], atol=TOL)
        assert_close((valid(hidden, mask), state), (valid(whole, mask), end), TOL)


def test_the_reference_tells_other_rules_apart(x64):
    """What the test above would not notice if numbers were too small."""
    params, frames, _ = setting(CFG, 1)
    expected = reference(params, frames[0], CFG)
    others = {
        "no sink": reference(params, frames[0], CFG, sink=0),
        "a shorter one": reference(params, frames[0], CFG, sink=SINK - 1),
        "distances that grow": reference(params, frames[0], CFG, bounded=False),
    }
    for name, other in others.items():
        off = np.abs(other - expected).max(-1)
        assert off[: min(CFG.contexts)].max() < TOL, name  # all is seen, by any rule
        assert off[max(CFG.contexts) :].min() > 1e-3, name


@pytest.mark.parametrize("parts", [(8, 8), (1,) * FRAMES], ids=["chunks", "streaming"])
def test_a_layer_sees_the_sink_and_the_last_frames_and_nothing_between(x64, parts):
    """Row r has another frame r - 1, which position r reads."""
    cfg = dataclasses.replace(CFG, num_layers=1, layer_context=())
    params, frames, rng = setting(cfg, 2, rows=1)
    changed = np.repeat(frames, FRAMES, 0)
    for position in range(1, FRAMES):
        changed[position, :, position - 1] = (changed[position, :, position - 1] + 1) % SMALL.card
    hidden, _ = streamed(params, changed, np.ones((FRAMES, FRAMES), bool), cfg, parts)
    differs = (hidden[1:] != hidden[0]).any(-1)
    at = np.arange(FRAMES)
    np.testing.assert_array_equal(differs, is_seen(at, at[1:, None], cfg.context, SINK))
    assert differs[0, 1:].all()  # position 1 is the sink's
    assert not differs[1, cfg.context :].any()  # position 2 is not


def test_single_frames_go_on_after_a_prompt(x64):
    """`stream_step` with forced tokens leaves the caches that `forward` leaves."""
    params, frames, _ = setting(CFG, 3)
    mask, prompt, own = np.ones((ROWS, FRAMES), bool), 8, 1 + CFG.dep_q
    _, end = streamed(params, frames, mask, CFG, PARTS[0])
    _, state = streamed(params, frames[..., :prompt], mask[:, :prompt], CFG, (prompt,))
    step = quick_jit(partial(generate.stream_step.__wrapped__, cfg=CFG))
    for s in range(prompt, FRAMES):
        _, state = step(params, frames[:, own:, s - 1], mask[:, s], state, forced=frames[:, :own, s])
    assert_close(state.layers, end.layers, TOL)
