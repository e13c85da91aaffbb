"""Recordings through a model that talks: aligned, by hand, independent of each other, carried on, and their arms."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from eval.generating.inputs import Input
from eval.generating.talk import Made, Plan, generate
from eval.results.schema import Skipped
from tests.helpers import micro
from tests.helpers.eval_models import params
from ttt_jax.codec import load_codec
from ttt_jax.errors import InputError
from ttt_jax.moshi import generate as moshi
from ttt_jax.moshi import model
from ttt_jax.moshi.generate import Sampling
from ttt_jax.serve import saved
from ttt_jax.serve.speech import Speech
from ttt_jax.serve.talks import Talks, TalkSettings

HOT = Sampling(temperature=1.3, top_k=40, text_temperature=1.2, text_top_k=20)
PLAN = Plan(TalkSettings(HOT))
ROWS = 2
DELAYS = {0: (0,) * 17, 1: micro.MODEL.delays, 2: (0, *2 * (0, 1, 1, 1, 2, 2, 2, 2))}
OTHERS = ((0, "once"), (2, "twice"), (2, "once"))


@functools.cache
def speech(delay: int = 1) -> Speech:
    return Speech(params(), dataclasses.replace(micro.MODEL, delays=DELAYS[delay]), load_codec(), HOT)


SIZE = load_codec().frame_size


def sound(samples: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    level = np.repeat(10 ** rng.uniform(-2, -0.5, -(-samples // SIZE)), SIZE)[:samples]
    return (level * rng.standard_normal(samples)).astype(np.float32)


LENGTHS = {"a": 9 * SIZE, "b": 5 * SIZE + 7, "c": 1, "d": 12 * SIZE - 1, "e": 4 * SIZE}
SOUNDS = {name: sound(length, seed) for seed, (name, length) in enumerate(LENGTHS.items())}


def inputs(names: str) -> list[Input]:
    return [Input(Path(name), name, hashlib.sha256(name.encode()).hexdigest()) for name in names]


def read(source: Input) -> np.ndarray:
    if source.name not in SOUNDS:
        raise InputError(f"{source.path} is no sound.")
    return SOUNDS[source.name]


def talk(names: str, plan: Plan = PLAN, delay: int = 1) -> dict[str, Made | Skipped]:
    talks = Talks(speech(delay), ROWS, measured=True)
    made = list(generate(talks, inputs(names), read, plan))
    assert talks.free == ROWS
    return {getattr(one, "source", one).name: one for one in made}


def bits(made: Made) -> list[np.ndarray]:
    return [np.asarray(leaf) for leaf in jax.tree.leaves(made._replace(source=0, seed=0, latency=0, talk=None))]


def same(a: Made, b: Made) -> bool:
    return all(np.array_equal(x, y, equal_nan=True) for x, y in zip(bits(a), bits(b), strict=True))


@pytest.mark.parametrize(
    ("delay", "first_frame"),
    [(1, "twice"), (1, "once"), (0, "twice"), *(pytest.param(*case, marks=pytest.mark.slow) for case in OTHERS)],
)
def test_a_file_is_codec_and_stream_step_by_hand(delay, first_frame):
    """Frame f of Moshi lies in frame f of the file; with "once" the model's frames are one later."""
    cfg, codec = speech(delay).cfg, speech(delay).codec
    made = talk("b", PLAN._replace(first_frame=first_frame), delay)["b"]
    frames = math.ceil(LENGTHS["b"] / SIZE)
    lost = 1 if first_frame == "once" else 0
    fed = np.zeros((frames + delay) * SIZE, np.float32)
    fed[: LENGTHS["b"]] = SOUNDS["b"]

    user, _ = codec.encode_step(fed[None, lost * SIZE :], codec.init_encoder(1))
    state, said = model.init_state(cfg, 1, seeds=[made.seed]), []
    calls = np.concatenate([user[..., :1], user], 2)
    for call in range(frames - lost + delay):
        tokens, state = moshi.stream_step(speech(delay).params, calls[..., call], jnp.ones(1, bool), state, cfg, HOT)
        said.append(np.asarray(tokens)[0])
    said = np.stack(said[delay:], 1)
    assert said.shape[1] == frames - lost
    np.testing.assert_array_equal(made.moshi[:, lost:], said)
    np.testing.assert_array_equal(made.codes[:, lost:], user[0, :, : frames - lost])
    voice = codec.decode(said[1:])
    np.testing.assert_array_equal(made.voice, np.pad(voice, (lost * SIZE, 0))[: LENGTHS["b"]])
    assert len(made.voice) == len(made.user) == LENGTHS["b"]
    if lost:
        assert (made.moshi[:, 0] == -1).all()
        assert (made.codes[:, 0] == -1).all()
    # Every token of the file has its probability, and no other.
    assert np.isnan(made.log_probs[:, :lost]).all()
    assert (made.log_probs[:, lost:] < 0).all()
    assert made.inner.loss_base.shape == (frames, 1)
    assert len(made.latency) == frames


def test_neither_order_nor_row_nor_other_files_change_a_talk():
    alone = {name: talk(name)[name] for name in "abcde"}
    for order in ("abcde", "edcba", "cxadbey"):
        made = talk(order)
        assert set(made) == set(order)
        for name in set(order) & set(alone):
            assert same(made[name], alone[name]), (order, name)
            assert made[name].seed == alone[name].seed
    assert not same(alone["a"], talk("a", PLAN._replace(seed=1))["a"])
    assert len({made.seed for made in alone.values()}) == 5


def test_an_unusable_file_is_named_and_takes_no_row():
    made = talk("xaybz")
    assert made["x"] == Skipped("x", "x is no sound.")
    assert isinstance(made["z"], Skipped)
    assert isinstance(made["b"], Made)


@pytest.mark.parametrize("delay", [1, 0, pytest.param(2, marks=pytest.mark.slow)])
def test_files_in_one_talk_are_parts_of_one_recording(delay):
    whole = np.concatenate([SOUNDS["a"], np.pad(SOUNDS["b"], (0, -LENGTHS["b"] % SIZE)), SOUNDS["e"]])
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(SOUNDS, "w", whole)
        one = talk("w", PLAN._replace(begin=first_talk(delay)), delay)["w"]
    parts = talk("axbe", PLAN._replace(begin=first_talk(delay), keep=True), delay)
    assert isinstance(parts.pop("x"), Skipped)
    made = list(parts.values())
    for field in ("moshi", "codes", "log_probs"):
        joined = np.concatenate([getattr(part, field) for part in made], 1)
        np.testing.assert_array_equal(joined, getattr(one, field))
    np.testing.assert_array_equal(np.concatenate([part.inner.displacement for part in made]), one.inner.displacement)
    np.testing.assert_array_equal(made[0].voice, one.voice[: LENGTHS["a"]])
    np.testing.assert_array_equal(made[2].voice, one.voice[-LENGTHS["e"] :])


@functools.cache
def first_talk(delay: int = 1):
    """A talk that has begun."""
    return talk("c", PLAN._replace(save=True), delay)["c"].talk


def test_a_saved_talk_goes_on_to_the_bit(tmp_path):
    kept = talk("ae", PLAN._replace(keep=True, save=True))
    saved.save(tmp_path / "a.safetensors", kept["a"].talk, speech(), "digest")
    begin = saved.load(tmp_path / "a.safetensors", speech(), "digest")
    taken_up = talk("e", PLAN._replace(begin=begin, save=True))["e"]
    assert taken_up.seed is None
    for field in ("voice", "moshi", "codes"):
        np.testing.assert_array_equal(getattr(taken_up, field), getattr(kept["e"], field))
    for a, b in zip(jax.tree.leaves(taken_up.talk), jax.tree.leaves(kept["e"].talk), strict=True):
        np.testing.assert_array_equal(a, b)
    assert not np.array_equal(talk("e")["e"].moshi, taken_up.moshi)


def test_arms():
    def inner(**changes):
        settings = TalkSettings(HOT, changes.pop("memory", "on"))
        return talk("d", PLAN._replace(settings=settings, **changes))["d"].inner

    persist, frozen, reset = inner(), inner(memory="frozen"), inner(reset_every=5)
    assert (persist.displacement[4:] > 0).all()
    assert (frozen.displacement == 0).all()
    np.testing.assert_allclose(frozen.loss_before, frozen.loss_base, rtol=1e-5)
    fresh = np.flatnonzero(np.isclose(reset.loss_before, reset.loss_base, rtol=1e-5, atol=0).all(1))
    assert list(fresh) == [5, 10]
    off = talk("d", PLAN._replace(settings=TalkSettings(HOT, "off")))["d"]
    closed = talk("d", PLAN._replace(settings=TalkSettings(HOT, gate=0)))["d"]
    np.testing.assert_array_equal(off.moshi, closed.moshi)
    assert not np.array_equal(off.moshi, talk("d")["d"].moshi)
