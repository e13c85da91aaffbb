"""The task replay: excerpts that come again, and its best possible loss."""

import itertools
import math

import numpy as np
import pytest

from eval.tasks import replay
from eval.tasks.streams import MOSHI, TEXT, USER
from ttt_jax.config import MoshiConfig
from ttt_jax.moshi import delays

EVERY, FRAMES = 20, 512


def streams(count, frames=FRAMES, every=EVERY, seed=0):
    return [replay.replay(np.random.default_rng((seed, i)), frames, every) for i in range(count)]


def parts(stream, every=EVERY):
    """The parts of a stream, those of full length."""
    spoken = stream[MOSHI]
    return [tuple(spoken[start : start + every]) for start in range(0, len(spoken) - every + 1, every)]


def test_moshi_speaks_in_one_codebook_and_the_user_s_stream_is_its_echo():
    for stream in streams(4):
        assert ((stream[MOSHI] >= 0) & (stream[MOSHI] < replay.VOCABULARY)).all()
        np.testing.assert_array_equal(stream[USER + 1], stream[MOSHI])
        assert (np.delete(stream, (TEXT, MOSHI, USER + 1), 0) == -1).all()


def test_columns_of_the_delayed_grid_hold_a_token_beside_the_one_before():
    (stream,) = streams(1)
    cfg = MoshiConfig(card=64, text_card=512)  # with Moshi's own delays
    columns, _ = delays.columns(delays.init_history(cfg, 1), stream[None], np.ones((1, FRAMES), bool), cfg)
    inputs = np.asarray(columns.inputs[0])
    np.testing.assert_array_equal(inputs[2:, USER + 1], inputs[1:-1, MOSHI])


def test_parts_come_again_after_the_gap_and_not_later_than_the_furthest():
    lags, replayed, possible = [], 0, 0
    for stream in streams(40, frames=4096):
        last = {}
        for i, part in enumerate(parts(stream)):
            possible += any(replay.NEAREST <= EVERY * (i - j) <= replay.FURTHEST for j in last.values())
            if part in last:
                lags.append(EVERY * (i - last[part]))
                replayed += 1
            last[part] = i
    assert min(lags) >= replay.NEAREST
    assert max(lags) <= replay.FURTHEST
    assert max(lags) > 1000
    assert abs(replayed / possible - replay.REPLAYED) < 0.03


def test_no_two_streams_share_a_part():
    seen = [set(parts(stream)) for stream in streams(20)]
    assert all(not one & other for one, other in itertools.combinations(seen, 2))


def test_tokens_are_uniform():
    counts = np.bincount(np.concatenate([part for stream in streams(60) for part in set(parts(stream))]))
    expected = counts.sum() / replay.VOCABULARY
    assert len(counts) == replay.VOCABULARY
    assert ((counts - expected) ** 2 / expected).sum() < replay.VOCABULARY - 1 + 4 * math.sqrt(2 * replay.VOCABULARY)


def playings(stream, every, stop):
    """Start of the last playing of each part before `stop`, by the start of its first; whether all could come again."""
    spoken, last, legal = stream[MOSHI], {}, True
    for start in range(0, stop, every):
        part = spoken[start : start + every]
        first = next((source for source in last if (spoken[source : source + every] == part).all()), start)
        legal &= first == start or replay.NEAREST <= start - last[first] <= replay.FURTHEST
        last[first] = start
    return last, legal


def by_enumeration(stream, every, start, reach):
    """Nats of the tokens of the part at `start`, by Bayes' rule over all that Moshi might say there."""
    spoken, vocabulary = stream[MOSHI], replay.VOCABULARY
    last, _ = playings(stream, every, start)
    sources = [source for source, at in last.items() if replay.NEAREST <= start - at <= replay.FURTHEST]
    stories = {}
    for story in itertools.product(range(vocabulary), repeat=every):
        new = vocabulary**-every * ((1 - replay.REPLAYED) if sources else 1)
        again = 0.0
        for source in sources:
            seen = start - last[source] <= reach
            again += float((spoken[source : source + every] == story).all()) if seen else vocabulary**-every
        stories[story] = new + again * replay.REPLAYED / max(1, len(sources))
    nats, said, before = [], (), 1.0
    for token in spoken[start : start + every]:
        said += (int(token),)
        now = sum(chance for story, chance in stories.items() if story[: len(said)] == said)
        nats.append(-math.log(now / before))
        before = now
    return nats


@pytest.mark.parametrize("reach", [5, 9, 100])
def test_best_losses_are_those_of_bayes_rule(reach, monkeypatch):
    for name, value in {"VOCABULARY": 5, "NEAREST": 8, "FURTHEST": 30}.items():
        monkeypatch.setattr(replay, name, value)
    # Two new parts that are equal by chance would look like a replay.
    clear = [stream for stream in streams(6, frames=64, every=4) if playings(stream, 4, 64)[1]]
    assert len(clear) >= 3
    for stream in clear:
        expected = [by_enumeration(stream, 4, start, reach) for start in range(0, 64, 4)]
        np.testing.assert_allclose(replay.best(stream, 4, reach), np.concatenate(expected), atol=1e-9)


def test_what_memory_is_worth():
    for stream in streams(8):
        whole, within = replay.best(stream, EVERY, FRAMES), replay.best(stream, EVERY, replay.NEAREST - 1)
        np.testing.assert_allclose(within, math.log(replay.VOCABULARY))
        again = [i for i, part in enumerate(parts(stream)) if part in parts(stream)[:i]]
        assert again
        for i in again:
            assert (whole[EVERY * i + 3 : EVERY * (i + 1)] < 0.01).all()  # which part it is, its first tokens tell
