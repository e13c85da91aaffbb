"""Items of recall: what is the same and what differs between the streams of an item, and where speech comes from."""

import numpy as np
import pytest

from eval.recall import pools
from eval.recall.items import CALL, LEAD_IN, build
from eval.recall.results import HEARD, WHO
from tests.helpers.recall_players import speech, voice

EXCERPT = 25


def made(files, kinds=(HEARD,), gaps=(25,), count=6, seed=0):
    return build(files, kinds, EXCERPT, gaps, count, seed)


def arrays(items):
    return [stream.tobytes() for item in items for stream in item.streams()]


def occurrences(part, whole):
    """Frames of `whole` [17, T] at which `part` begins."""
    length = part.shape[1]
    return [t for t in range(whole.shape[1] - length + 1) if np.array_equal(whole[:, t : t + length], part)]


def frame_of(file, place):
    name, at = place.rsplit("@", 1)
    assert name == file.name
    return int(at)


@pytest.fixture(scope="module")
def files():
    return [speech(400, 0), speech(700, 1)]


@pytest.mark.parametrize("gap", [25, 60, 125])
def test_streams_of_an_item_differ_in_the_playings_alone(files, gap):
    items, dropped = made(files, gaps=(gap,))
    assert not dropped
    assert len(items) == 6
    for item in items:
        streams = item.streams()
        a, b = item.firsts
        lead = item.lead_in.shape[1]
        assert lead >= LEAD_IN
        assert item.start % CALL == 0
        assert item.start == lead + EXCERPT + gap
        for stream, (first, second) in zip(streams, [(a, a), (a, b), (b, a), (b, b)], strict=True):
            assert stream.shape == (17, item.start + EXCERPT)
            np.testing.assert_array_equal(stream[:, lead : lead + EXCERPT], first)
            np.testing.assert_array_equal(stream[:, item.start :], second)
            np.testing.assert_array_equal(stream[:, :lead], streams[0][:, :lead])
            between = slice(lead + EXCERPT, item.start)
            np.testing.assert_array_equal(stream[:, between], streams[0][:, between])


def test_excerpts_stand_where_the_item_says_and_not_in_the_filler(files):
    by_name = {file.name: file for file in files}
    for item in made(files, gaps=(60,), count=10)[0]:
        for place, excerpt in zip(item.excerpts, item.firsts, strict=True):
            file = by_name[place.split("@")[0]]
            assert file.group == item.unit
            start = frame_of(file, place)
            np.testing.assert_array_equal(file.frames[:, start : start + EXCERPT], excerpt)
            rest = np.concatenate([item.lead_in, item.filler], 1)
            frames = {column.tobytes() for column in excerpt.T}
            assert not any(column.tobytes() in frames for column in rest.T)
        assert abs(np.diff([frame_of(by_name[item.unit], place) for place in item.excerpts])[0]) >= EXCERPT


def test_the_filler_repeats_nothing(files):
    for item in made(files, gaps=(250,), count=10)[0]:
        columns = [column.tobytes() for column in np.concatenate([item.lead_in, item.filler], 1).T]
        assert len(set(columns)) == len(columns)


def test_a_recording_that_is_there_twice_is_no_filler_of_itself():
    once = speech(200, 0, "a", "s")
    files = [once, speech(300, 1, "b", "s"), once._replace(name="again")]
    items, _ = made(files, gaps=(25,), count=20)
    assert items
    for item in items:
        rest = np.concatenate([item.lead_in, item.filler], 1)
        for excerpt in item.firsts:
            for begin in range(0, EXCERPT - 12):
                assert not occurrences(excerpt[:, begin : begin + 12], rest)
    doubled = [once, once._replace(name="again")]
    assert made(doubled, gaps=(250,))[1][0].reason == "no filler without a repetition of the excerpts was found"


def test_seeds_decide_and_larger_counts_begin_alike(files):
    assert arrays(made(files)[0]) == arrays(made(files)[0])
    assert arrays(made(files)[0]) != arrays(made(files, seed=1)[0])
    assert arrays(made(files, count=9)[0])[: len(arrays(made(files)[0]))] == arrays(made(files)[0])


def test_excerpts_are_the_same_at_every_gap(files):
    items, _ = made(files, gaps=(25, 100))
    short, long = items[:6], items[6:]
    assert [item.excerpts for item in short] == [item.excerpts for item in long]
    assert {item.unit for item in short} == {"file0", "file1"}  # the speakers take turns


def test_excerpts_lie_in_one_recording_and_are_not_silent():
    file = speech(500, 0, boundaries=(150,))
    file.frames[1, 300:] = 7  # the semantic code stays the same: silence, whatever the other codebooks do
    other = speech(60, 1, "second", "file0")
    starts = [
        (place.split("@")[0], int(place.split("@")[1]))
        for item in made([file, other], count=200)[0]
        for place in item.excerpts
    ]
    assert {name for name, _ in starts} == {"file0", "second"}
    for name, start in starts:
        if name == "second":
            assert start + EXCERPT <= 60
        else:
            assert start + EXCERPT <= 150 or 150 <= start <= 300 - EXCERPT / 2 + 2


def test_unknown_codes_are_no_speech():
    file = speech(500, 0)
    file.frames[1] = -1
    items, dropped = made([file])
    assert not items
    assert "half of the frames change their semantic code" in dropped[0].reason


def test_gaps_that_the_speech_cannot_fill_are_dropped(files):
    items, dropped = made(files, gaps=(25, 500, 10_000))
    assert {item.gap for item in items} == {25, 500}
    assert {item.unit for item in items if item.gap == 500} == {"file1"}  # the other speaker has too little
    assert [(one.kind, one.gap) for one in dropped] == [(HEARD, 10_000)]
    assert "the most is 56 s (file1)" in dropped[0].reason


def test_who_is_it_has_three_speakers():
    files = [voice(400, seed, seed) for seed in range(3)]
    items, dropped = made(files, (WHO,), count=12)
    assert not dropped
    assert {item.unit for item in items} == {"speaker0", "speaker1", "speaker2"}
    for item in items:
        (mine,), (theirs,), (between,), (lead,) = (
            set(part[2].tolist()) for part in (*item.firsts, item.filler, item.lead_in)
        )
        assert item.unit == f"speaker{mine}"
        assert {mine, theirs, between} == {0, 1, 2}
        assert lead == between
        for first, second, number in zip(item.firsts, item.seconds, (mine, theirs), strict=True):
            assert set(second[2].tolist()) == {number}
            heard = {column.tobytes() for column in first.T}
            assert not any(column.tobytes() in heard for column in second.T)  # new words


def test_who_is_it_of_two_speakers_lets_the_other_speak_first():
    items, _ = made([voice(400, seed, seed) for seed in range(2)], (WHO,))
    for item in items:
        (mine,), (theirs,), (between,) = (set(part[2].tolist()) for part in (*item.firsts, item.filler))
        assert theirs == between != mine
        assert len(item.seconds) == 1
        assert len(item.streams()) == 2
        control = {column.tobytes() for column in item.firsts[1].T}
        assert not any(column.tobytes() in control for column in item.filler.T)


@pytest.mark.parametrize(
    ("files", "reason"),
    [
        ([voice(400, 0, 0)], "only speaker0 is named"),
        ([speech(400, 0), speech(400, 1)], "none is named"),
    ],
)
def test_who_is_it_needs_named_speakers(files, reason):
    items, dropped = made(files, (WHO,))
    assert not items
    assert reason in dropped[0].reason


def test_runs_share_a_key_only_where_they_are_the_same():
    codes = np.random.default_rng(0).integers(-1, 3, (1, 300)).astype(np.int32)
    keys = pools._keys(codes, 4)
    runs = [codes[:, t : t + 4].tobytes() for t in range(297)]
    assert len(keys) == 297
    same = np.equal.outer(keys, keys)
    assert 297 < same.sum() < 297**2
    for i, run in enumerate(runs):
        assert [runs[j] == run for j in range(297)] == same[i].tolist()
