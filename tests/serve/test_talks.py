"""Talks as rows of a batch: each equals the parts by hand, none notices another, and each is a value."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from tests.helpers import micro, tiny_mimi
from tests.helpers.eval_models import params
from ttt_jax.codec import load_codec
from ttt_jax.errors import InputError
from ttt_jax.moshi import generate, model
from ttt_jax.moshi.generate import Sampling
from ttt_jax.serve import saved
from ttt_jax.serve.speech import Speech
from ttt_jax.serve.talks import Reply, Talks, TalkSettings

ROWS, FRAMES = 4, 14
SMALL = dataclasses.replace(micro.MODEL, n_q=8, dep_q=4, card=32, delays=(0, 0, 1, 1, 1, 0, 1, 1, 1))
HOT = Sampling(temperature=1.3, top_k=40, text_temperature=1.2, text_top_k=20)
PLAIN = TalkSettings(HOT)


@functools.cache
def kmeans() -> Speech:
    return Speech(params(), micro.MODEL, load_codec(), HOT)


@functools.cache
def mimi() -> Speech:
    return Speech(params(SMALL), SMALL, tiny_mimi.codec(), HOT)


def sound(speech: Speech, frames: int = FRAMES, seed: int = 0) -> np.ndarray:
    """The user's voice, float32 [frames, S]."""
    rng = np.random.default_rng(seed)
    level = 10 ** rng.uniform(-2, -0.5, (frames, 1))
    return (level * rng.standard_normal((frames, speech.codec.frame_size))).astype(np.float32)


def talk(talks: Talks, row: int, frames: np.ndarray) -> list[Reply]:
    """Replies of one talk alone."""
    return [reply for frame in frames for reply in talks.step({row: frame})]


def same(a: list[Reply], b: list[Reply]) -> bool:
    """Whether replies have equal bits, rows aside."""

    def leaves(reply: Reply) -> list[np.ndarray | None]:
        return [np.asarray(leaf) for leaf in jax.tree.leaves(reply._replace(row=0))]

    return len(a) == len(b) and all(
        len(leaves(x)) == len(leaves(y))
        and all(np.array_equal(p, q) for p, q in zip(leaves(x), leaves(y), strict=True))
        for x, y in zip(a, b, strict=True)
    )


@pytest.mark.parametrize("first_frame", ["twice", "once"])
@pytest.mark.parametrize("kind", [kmeans, mimi])
def test_a_talk_is_codec_and_stream_step_by_hand(kind, first_frame):
    speech = kind()
    cfg, codec, frames = speech.cfg, speech.codec, sound(speech)
    talks = Talks(speech, ROWS)
    talks.join(PLAIN, seed=3)
    row = talks.join(PLAIN, seed=7, first_frame=first_frame)
    replies = talk(talks, row, frames)

    heard = frames if first_frame == "twice" else frames[1:]
    user, _ = codec.encode_step(heard.reshape(1, -1), codec.init_encoder(1))
    state, moshi = model.init_state(cfg, 1, seeds=[7]), []
    calls = np.concatenate([user[..., :1], user], 2)  # the first call of a fresh row ignores its frame
    for call in range(calls.shape[2]):
        tokens, state = generate.stream_step(speech.params, calls[..., call], jnp.ones(1, bool), state, cfg, HOT)
        moshi.append(np.asarray(tokens)[0])
    np.testing.assert_array_equal([reply.moshi for reply in replies], moshi)
    np.testing.assert_array_equal(np.stack([reply.user for reply in replies[1:]], 1), user[0])
    assert replies[0].audio is None

    codes = np.stack(moshi, 1)[1:, cfg.max_delay :]
    assert len(np.unique(codes)) > 10
    expected = codec.decode(codes)
    spoken = np.concatenate([reply.audio for reply in replies[cfg.max_delay :]])
    if kind is kmeans:
        np.testing.assert_array_equal(spoken, expected)
    else:
        np.testing.assert_allclose(spoken, expected, atol=1e-5 * np.abs(expected).max())


def test_log_probs_and_inner_losses_are_those_of_forward():
    speech = kmeans()
    talks = Talks(speech, ROWS, measured=True)
    row = talks.join(PLAIN, seed=1)
    replies = talk(talks, row, sound(speech))
    moshi = np.stack([reply.moshi for reply in replies[1:]], 1)
    user = np.stack([reply.user for reply in replies[1:]], 1)
    frames = jnp.asarray(np.concatenate([moshi, user])[None])
    cfg, count = speech.cfg, frames.shape[2]
    outputs, _ = model.forward(
        params(), frames, jnp.ones((1, count), bool), model.init_state(cfg, 1), cfg, measured=True
    )
    text = jax.nn.log_softmax(outputs.text_logits)[0]
    audio = jax.nn.log_softmax(outputs.audio_logits)[0]
    for call, reply in enumerate(replies[:count]):
        targets = np.asarray(outputs.targets[0, :, call])
        there = np.asarray(outputs.target_mask[0, :, call])
        expected = [text[call, targets[0]], *(audio[call, k, t] for k, t in enumerate(targets[1:]))]
        np.testing.assert_array_equal(reply.column[there], targets[there])
        np.testing.assert_allclose(reply.log_probs[there], np.asarray(expected)[there], atol=1e-4)
        assert (reply.log_probs[~there] == 0).all()
        for name in ("loss_base", "loss_before", "loss_after", "displacement"):
            of_forward = np.asarray(getattr(outputs.ttt.inner, name))[:, 0, call].mean(-1)
            np.testing.assert_allclose(getattr(reply.inner, name), of_forward, rtol=1e-4, atol=1e-5)
    assert replies[-1].inner.displacement.min() > 0


@pytest.mark.parametrize("kind", [kmeans, mimi])
def test_no_talk_notices_another(kind):
    """One talk alone, and again in another row beside talks that come, go, pause, change and fork."""
    speech = kind()
    frames = sound(speech)
    alone = Talks(speech, ROWS, measured=True)
    expected = talk(alone, alone.join(PLAIN, seed=5), frames)

    talks = Talks(speech, ROWS, measured=True)
    dropped, paused = talks.join(PLAIN, seed=1), talks.join(TalkSettings(HOT, "frozen"), seed=2)
    for frame in sound(speech, 3, seed=9):
        talks.step({dropped: frame, paused: frame})
    mine, got = talks.join(PLAIN, seed=5), []
    assert mine == 2
    loud = 1e4 * sound(speech, seed=4)
    for i, frame in enumerate(frames):
        step = {mine: frame}
        if i < 6:
            step[dropped] = loud[i]
        if i == 6:
            talks.leave(dropped)
        if i % 3 == 0:
            step[paused] = loud[i]
        if i == 8:
            fork = talks.join(TalkSettings(HOT, "off", 0.5), talk=talks.take(paused))
            talks.put_memory(paused, None)
            talks.change(paused, TalkSettings(Sampling(temperature=0, top_k=1, text_top_k=1)))
        if i > 8:
            step[fork] = loud[i]
        got += [reply for reply in talks.step(step) if reply.row == mine]
    assert same(got, expected)


def test_a_row_does_not_remember_the_talk_before():
    speech, frames = kmeans(), sound(kmeans())
    talks = Talks(speech, 1)
    first = talk(talks, talks.join(PLAIN, seed=3), frames)
    talks.leave(0)
    talk(talks, talks.join(TalkSettings(HOT, "frozen"), seed=4), 10 * frames)
    talks.leave(0)
    assert same(talk(talks, talks.join(PLAIN, seed=3), frames), first)
    talks.leave(0)
    assert not same(talk(talks, talks.join(PLAIN, seed=4), frames), first)


@pytest.mark.parametrize("kind", [kmeans, mimi])
def test_a_talk_goes_on_from_a_copy_and_from_a_file(kind, tmp_path):
    speech, frames = kind(), sound(kind())
    talks = Talks(speech, ROWS, measured=True)
    row = talks.join(PLAIN, seed=5)
    talk(talks, row, frames[:6])
    saved.save(tmp_path / "talk.safetensors", talks.take(row), speech, "digest")
    fork = talks.join(PLAIN, talk=talks.take(row))
    expected = talk(talks, row, frames[6:])
    assert same(talk(talks, fork, frames[6:]), expected)
    others = Talks(speech, ROWS, measured=True)
    others.join(PLAIN)
    stored = saved.load(tmp_path / "talk.safetensors", speech, "digest")
    assert same(talk(others, others.join(PLAIN, talk=stored), frames[6:]), expected)


def test_files_that_are_no_talk_of_this_model(tmp_path):
    speech, path = kmeans(), tmp_path / "talk.safetensors"
    talks = Talks(speech, 1)
    saved.save(path, talks.take(talks.join(PLAIN)), speech, "digest")
    with pytest.raises(InputError, match=r"other weights \(digest digest, here another\)"):
        saved.load(path, speech, "another")
    with pytest.raises(InputError, match="is the state of another model"):
        saved.load(path, mimi(), "digest")
    with pytest.raises(InputError, match=r"none\.safetensors is not a file: give the path of a talk that was saved"):
        saved.load(tmp_path / "none.safetensors", speech, "digest")
    whole = path.read_bytes()
    path.write_bytes(whole[:-9] + b"\x01" + whole[-8:])
    with pytest.raises(InputError, match="checksum does not match"):
        saved.load(path, speech, "digest")
    older = r"has the format 'ttt_jax.talk/1', not 'ttt_jax.talk/2', in which TTT states hold the steps .* give a talk"
    for version, message in (("something", "has the format 'something'"), ("ttt_jax.talk/1", older)):
        save_file(load_file(path), path, {"format": version})
        with pytest.raises(InputError, match=message):
            saved.load(path, speech, "digest")


def test_memory_on_frozen_and_off():
    speech, frames = kmeans(), sound(kmeans())
    talks = Talks(speech, ROWS, measured=True)

    def run(settings: TalkSettings) -> tuple[list[np.ndarray], np.ndarray]:
        row = talks.join(settings, seed=5)
        replies = talk(talks, row, frames)
        talks.leave(row)
        return [reply.column for reply in replies], replies[-1].inner.displacement

    on, frozen, off = (run(TalkSettings(HOT, memory)) for memory in ("on", "frozen", "off"))
    assert on[1].min() > 0
    assert frozen[1].max() == 0
    assert off[1].min() > 0
    closed = params()
    closed = closed | {"layers": {name: run_ for name, run_ in closed["layers"].items()}}
    for name, run_ in closed["layers"].items():
        if "ttt" in run_:
            closed["layers"][name] = run_ | {"ttt": run_["ttt"] | {"gate": 0 * run_["ttt"]["gate"]}}
    without = Talks(Speech(closed, micro.MODEL, load_codec(), HOT), ROWS, measured=True)
    expected = talk(without, without.join(TalkSettings(HOT), seed=5), frames)
    np.testing.assert_array_equal(off[0], [reply.column for reply in expected])
    assert not np.array_equal(on[0], off[0])
    assert not np.array_equal(run(TalkSettings(HOT, gate=1.0))[0], off[0])
    np.testing.assert_array_equal(run(TalkSettings(HOT, gate=0.0))[0], off[0])


def test_freezing_in_the_middle_keeps_what_was_learned():
    speech, frames = kmeans(), sound(kmeans())
    talks = Talks(speech, 1, measured=True)
    row = talks.join(PLAIN, seed=5)
    talk(talks, row, frames[:6])
    talks.change(row, TalkSettings(HOT, "frozen"))
    memory = jax.tree.leaves(talks.take_memory(row))
    learned = talk(talks, row, frames[6:10])[-1].inner
    assert all(np.array_equal(a, b) for a, b in zip(jax.tree.leaves(talks.take_memory(row)), memory, strict=True))
    assert learned.displacement.min() > 0
    np.testing.assert_array_equal(learned.loss_before, learned.loss_after)
    talks.put_memory(row, None)
    assert talk(talks, row, frames[10:])[-1].inner.displacement.max() == 0
    talks.change(row, PLAIN)
    assert talk(talks, row, frames)[-1].inner.displacement.min() > 0


def test_taking_up_the_memory_of_another_talk():
    speech, frames = kmeans(), sound(kmeans())
    talks = Talks(speech, 2, measured=True)
    mine, other = talks.join(PLAIN, seed=5), talks.join(PLAIN, seed=6)
    talk(talks, other, frames)
    talk(talks, mine, frames[:2])
    talks.put_memory(mine, talks.take_memory(other))
    pairs = (jax.tree.leaves(talks.take_memory(row)) for row in (mine, other))
    assert all(np.array_equal(a, b) for a, b in zip(*pairs, strict=True))
    assert talks.take(mine).state.model.position[0] == 3


def test_rows_sample_by_their_own_settings():
    speech, frames = kmeans(), sound(kmeans())
    talks = Talks(speech, ROWS)
    greedy = [talks.join(TalkSettings(HOT._replace(temperature=0, text_temperature=0)), seed=seed) for seed in (1, 2)]
    first = talks.join(TalkSettings(HOT._replace(top_k=1, text_top_k=1)), seed=3)
    hot = talks.join(PLAIN, seed=4)
    columns = {row: [] for row in (*greedy, first, hot)}
    for frame in frames:
        for reply in talks.step(dict.fromkeys(columns, frame)):
            columns[reply.row].append(reply.column)
    np.testing.assert_array_equal(columns[greedy[0]], columns[greedy[1]])
    np.testing.assert_array_equal(columns[greedy[0]], columns[first])
    assert not np.array_equal(columns[hot], columns[first])


def test_what_cannot_be():
    speech = kmeans()
    talks = Talks(speech, 1)
    with pytest.raises(InputError, match="0 talks at once cannot be"):
        Talks(speech, 0)
    with pytest.raises(InputError, match="sampling top_k=41 is more than is computed here: give 1 to 40"):
        talks.join(TalkSettings(HOT._replace(top_k=41)))
    with pytest.raises(InputError, match="sampling temperature=nan cannot be"):
        TalkSettings(Sampling(temperature=float("nan")))
    with pytest.raises(InputError, match="sampling top_k=2147483648 cannot be"):
        TalkSettings(Sampling(top_k=2**31))
    with pytest.raises(InputError, match="memory='maybe' cannot be"):
        TalkSettings(memory="maybe")
    with pytest.raises(InputError, match="gate=nan cannot be"):
        TalkSettings(gate=float("nan"))
    with pytest.raises(InputError, match="row 0 has no talk"):
        talks.step({0: np.zeros(1280)})
    row = talks.join(TalkSettings(HOT))
    with pytest.raises(InputError, match="all 1 talks are taken"):
        talks.join()
    frames = sound(speech)
    talk(talks, row, frames[:3])
    before = jax.tree.leaves(talks.take(row))
    for frame in (np.zeros(1279), np.full(1280, np.nan), np.full(1280, np.inf)):
        with pytest.raises(InputError, match="row 0 has a frame of shape"):
            talks.step({row: frame})
    assert all(np.array_equal(a, b) for a, b in zip(jax.tree.leaves(talks.take(row)), before, strict=True))
