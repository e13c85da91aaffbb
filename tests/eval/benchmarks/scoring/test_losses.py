"""From codes to losses: the numbers are those of the one forward pass, whatever else is scored beside."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from eval.benchmarks.scoring import losses as losses_
from eval.benchmarks.scoring.losses import Entry, call_frames, call_rows, check, score
from eval.streaming import runner
from eval.streaming.weighting import weights
from tests.helpers import micro, quick
from tests.helpers.eval_models import params
from ttt_jax.config import TTTConfig
from ttt_jax.data.text import PAD
from ttt_jax.errors import InputError
from ttt_jax.moshi import model
from ttt_jax.moshi.loss import token_losses

ARMS = ("persist", "frozen", "off")
CFG = micro.MODEL
BOTH = dataclasses.replace(CFG, dep_q=16)
"""Predicts the user's stream, too."""
SILENCE = np.full((8, 200), 7, np.int32)


@pytest.fixture(scope="module", autouse=True)
def compiled_quickly():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runner, "scan_calls", quick.scan_calls)
        yield


def codes(*lengths):
    rng = np.random.default_rng(3)
    return [rng.integers(0, 64, (8, length), np.int32) for length in lengths]


def scored(entries, cfg=CFG, arms=ARMS, batch=4):
    found = {}
    for call in score(params(cfg), cfg, entries, SILENCE, arms, batch):
        found |= dict(call)
    assert sorted(found) == list(range(len(entries)))
    return [found[i] for i in range(len(entries))]


def by_hand(recording, text, voice, cfg):
    """Sums of the losses of the voice's codebooks, [8], by one `forward` over the recording and a frame of nothing."""
    length = recording.shape[1]
    frames = np.full((1, 17, length + cfg.max_delay), -1, np.int32)
    if text == "padding":
        frames[:, 0] = PAD
    speaks, silent = (1, 9) if voice == "moshi" else (9, 1)
    frames[0, speaks : speaks + 8, :length] = recording
    frames[0, silent : silent + 8, :length] = SILENCE[:, :length]
    mask = jnp.ones((1, frames.shape[2]), bool)
    outputs, _ = model.forward(params(cfg), jnp.asarray(frames), mask, model.init_state(cfg, 1), cfg)
    assert outputs.target_mask[0, speaks : speaks + 8].sum(1).tolist() == [length] * 8  # each code once
    return np.asarray(token_losses(outputs)[0, speaks : speaks + 8], np.float64).sum(1)


@pytest.mark.parametrize(("text", "voice"), [("absent", "moshi"), ("padding", "moshi"), ("absent", "user")])
def test_losses_are_those_of_one_forward_pass(text, voice):
    cfg = CFG if voice == "moshi" else BOTH
    recordings = codes(5, 37)  # longer than the attention window
    found = scored([Entry(recording, text, voice) for recording in recordings], cfg, ("persist",))
    for losses, recording in zip(found, recordings, strict=True):
        assert losses.frames == recording.shape[1]
        np.testing.assert_allclose(losses.nats["persist"], by_hand(recording, text, voice, cfg), rtol=1e-5)


def test_every_recording_starts_from_a_fresh_state_whatever_is_beside_it():
    entries = [Entry(recording, "absent", "moshi") for recording in codes(20, 31, 7, 31, 12, 25)]
    together, turned = scored(entries), scored(entries[::-1])[::-1]
    alone = [scored([entry])[0] for entry in entries]
    for one, other, single in zip(together, turned, alone, strict=True):
        for arm in ARMS:
            np.testing.assert_allclose(one.nats[arm], other.nats[arm], rtol=1e-6)
            np.testing.assert_allclose(one.nats[arm], single.nats[arm], rtol=1e-6)


def test_what_is_known_is_left_out_and_the_rest_keeps_its_bits():
    entries = [Entry(recording, "absent", "moshi") for recording in codes(20, 31, 7, 31, 12, 25, 9, 14, 3)]
    whole, known = scored(entries), {0, 1, 2, 3, 5, 8}  # the first call, and parts of the others
    calls = list(score(params(CFG), CFG, entries, SILENCE, ARMS, 4, known.__contains__))
    assert [[i for i, _ in call] for call in calls] == [[4, 5, 6, 7]]
    for i, losses in calls[0]:
        for arm in ARMS:
            np.testing.assert_array_equal(losses.nats[arm], whole[i].nats[arm])


def test_the_batch_changes_scores_by_rounding_only():
    entries = [Entry(recording, "absent", "moshi") for recording in codes(20, 31, 7)]
    for one, other in zip(scored(entries, batch=4), scored(entries, batch=1), strict=True):
        for arm in ARMS:
            np.testing.assert_allclose(one.nats[arm], other.nats[arm], rtol=1e-5)


def test_arms_differ_and_the_user_s_silence_is_read():
    (losses,) = scored([Entry(codes(31)[0], "absent", "moshi")])
    persist, frozen, off = (losses.nats[arm] for arm in ARMS)
    assert abs(persist - frozen).max() > 1e-3
    assert abs(persist - off).max() > 1e-3
    global SILENCE
    before, SILENCE = SILENCE, SILENCE + 1
    (other,) = scored([Entry(codes(31)[0], "absent", "moshi")])
    SILENCE = before
    assert abs(other.nats["persist"] - persist).max() > 1e-3


def test_equal_recordings_have_one_key_and_all_that_matters_is_in_it():
    one, other = codes(5, 5)
    entries = [Entry(one, "absent", "moshi"), Entry(one.copy(), "absent", "moshi")]
    assert entries[0].key == entries[1].key
    others = [Entry(other, "absent", "moshi"), Entry(one, "padding", "moshi"), Entry(one, "absent", "user")]
    others += [Entry(one.reshape(4, 10), "absent", "moshi")]
    assert len({entry.key for entry in [entries[0], *others]}) == 5


def test_a_model_that_diverges_gives_no_number():
    broken = jax.tree.map(lambda leaf: leaf, params(CFG))
    broken["out_norm"] = jnp.full_like(broken["out_norm"], jnp.nan)
    ((found,),) = [call for call in score(broken, CFG, [Entry(codes(6)[0], "absent", "moshi")], SILENCE, ARMS, 4)]
    assert np.isnan(found[1].nats["persist"]).all()


def test_the_user_s_voice_needs_its_heads():
    check(BOTH, ("absent", "padding"), ("moshi", "user"), "both")
    check(CFG, ("absent",), ("moshi",), "one")
    with pytest.raises(InputError, match="one predicts 8 of 16 codebooks, .* give --voice moshi"):
        check(CFG, ("absent",), ("user",), "one")


def test_padding_needs_its_id():
    small = dataclasses.replace(CFG, text_card=PAD)  # whose initial token has that id
    check(small, ("absent",), ("moshi",), "one")
    with pytest.raises(InputError, match="one has 3 text pieces and so no padding .*: give --text absent"):
        check(small, ("absent", "padding"), ("moshi",), "one")


def test_calls_have_few_lengths_and_waste_little():
    lengths = [call_frames(n) for n in range(1, 1000)]
    assert lengths == sorted(lengths)
    assert all(n <= length for n, length in enumerate(lengths, 1))
    assert all(length <= 1.52 * n for n, length in enumerate(lengths, 1) if n > 32)
    assert len(set(lengths)) <= 11
    assert call_rows(48, 1, None) > call_rows(48, 3, None) >= 1
    assert call_rows(100_000, 1, None) == 1
    assert call_rows(48, 3, 5) == 5


def test_short_windows_change_no_prediction(monkeypatch):
    cfg = dataclasses.replace(CFG, context=300)
    entry = Entry(codes(40)[0], "absent", "moshi")
    short = scored([entry], cfg)[0]
    monkeypatch.setattr(losses_, "_short", lambda cfg, frames: cfg)
    whole = scored([entry], cfg)[0]
    for arm in ARMS:
        np.testing.assert_allclose(short.nats[arm], whole.nats[arm], rtol=1e-5)


def test_windows_stay_as_they_are_where_the_layers_would_be_stacked_otherwise():
    cfg = dataclasses.replace(CFG, num_layers=4, context=300, layer_context=((0, 100),), ttt=TTTConfig(layers="3"))
    assert losses_._short(cfg, 48) == cfg
    assert losses_._short(dataclasses.replace(cfg, layer_context=()), 48).contexts == (48,) * 4


def test_rules_are_weighted_sums_and_means():
    from eval.benchmarks.rules import RULES
    from eval.benchmarks.rules import score as by_rule

    nats, frames = np.random.default_rng(0).uniform(1, 5, (3, 8)), np.array([2, 5, 10])
    for rule in RULES:
        weighting, norm = rule.split()
        weight = weights(weighting, 8)
        expected = -(nats * weight).sum(1) / weight.sum() / (frames if norm == "mean" else 1)
        np.testing.assert_allclose(by_rule(nats, frames, rule), expected)
    nats[0, 3] = np.nan  # a codebook that was not scored
    assert np.isnan(by_rule(nats, frames, "equal mean")).tolist() == [True, False, False]
    assert not np.isnan(by_rule(nats, frames, "semantic mean")).any()
    with np.errstate(all="raise"):
        assert np.isnan(by_rule(np.ones((3, 1)), np.full(3, 2), "acoustic sum")).all()  # of one codebook: none is
