"""The JSON beside a recording: its kind, its words, and every kind of bad input."""

import json
import math

import pytest

from ttt_jax.data.alignments import Kind, Word, read_alignments, read_beside
from ttt_jax.errors import InputError

MAIN = "SPEAKER_MAIN"


def write(tmp_path, content):
    path = tmp_path / "a.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def read(tmp_path, *rows, seconds=2.0):
    return read_alignments(write(tmp_path, {"alignments": rows}), seconds)


GOOD = [["one", [0.1, 0.3], MAIN], ["two", [0.4, 0.6], MAIN], ["three", [0.7, 1.0], MAIN]]


def test_words_come_ordered_by_start(tmp_path):
    rows = [[" two", [1.0, 1.5], MAIN], ["one", [0.25, 0.5], "other"], ["three", [1, 2], MAIN], [" ", [0, 1], MAIN]]
    found = read_alignments(write(tmp_path, {"alignments": rows, "more": 1}), 2.0)
    words = (Word("one", 0.25, 0.5, "other"), Word("two", 1.0, 1.5, MAIN), Word("three", 1.0, 2.0, MAIN))
    assert found == (words, {}, None, ())


@pytest.mark.parametrize(
    ("times", "reason"),
    [
        *((times, "without duration") for times in ([0.5, 0.5], [0, 0])),
        *((times, "with the end before the start") for times in ([0.9, 0.5], [1.5, 0])),
        *((times, "outside the audio") for times in ([-0.1, 0.5], [-3, -2], [1, 2.6], [5, 6], [6, 5], [1, 10**400])),
        *((times, "without times") for times in ([None, None], [0.5, None], [math.nan, 1], [0.5, math.inf], [], None)),
    ],
)
def test_a_word_without_a_place_in_the_audio_is_dropped_and_the_others_stay(tmp_path, times, reason):
    found = read(tmp_path, ["lost", times, MAIN], *GOOD)
    assert [word.text for word in found.words] == ["one", "two", "three"]
    assert {reason: [word.text for word in words] for reason, words in found.dropped.items()} == {reason: ["lost"]}


def test_a_word_may_pass_the_end_by_half_a_second(tmp_path):
    assert len(read(tmp_path, ["word", [1.0, 2.4], MAIN]).words) == 1


@pytest.mark.parametrize(
    "rows",
    [
        [["x", [5, 6], MAIN]],  # another recording's
        [["x", [100, 300], MAIN], ["y", [400, 600], MAIN], ["z", [0, 1], MAIN]],  # milliseconds
        [["x", [1600, 4800], MAIN], ["y", [6400, 9600], "B"]],  # samples
        [["x", [0.5, 0.2], MAIN], ["y", [0.9, 0.3], MAIN], ["z", [0.1, 0.3], MAIN]],  # start and length
        [["x", [0.5, -0.5], MAIN], ["y", [None, None], MAIN], ["z", None, MAIN]],
    ],
)
def test_times_of_another_recording_or_unit_are_refused(tmp_path, rows):
    message = r"a\.json does not match its audio of 2\.00 s: [12] of [123] words .*\"x\" from"
    with pytest.raises(InputError, match=message) as error:
        read(tmp_path, *rows)
    assert str(error.value).count(". ") == 0


@pytest.mark.parametrize(
    ("labels", "known"),
    [
        ([MAIN], True),
        ([MAIN, "SPEAKER_OTHER"], True),
        ([MAIN, "SPEAKER_01", None, 7], True),
        (["SPEAKER_OTHER"], True),
        (["SPEAKER_00", "SPEAKER_01"], False),
        (["SPEAKER_OTHER", "SPEAKER_01"], False),
        (["speaker_main"], False),
        ([None], False),
        ([""], False),
        ([0, 1, 2, 3], False),
    ],
)
def test_whose_voice_is_the_models_must_be_stated(tmp_path, labels, known):
    found = read(tmp_path, *(["word", [0.1 + i / 4, 0.2 + i / 4], label] for i, label in enumerate(labels)))
    assert (found.words is not None) is known
    assert (found.notice is None) is known
    if not known:
        name = "no label" if labels[0] is None else repr(str(labels[0]))
        more = " and 1 more)" if len(labels) > 3 else ""
        assert f"of {len(labels)} words none is of SPEAKER_MAIN (but of {name}" in found.notice
        assert f"{more}, so that the text counts as not known: give the words of Moshi's stream the" in found.notice


@pytest.mark.parametrize(
    "row",
    [
        *("word", "abc", 7, None, {"word": "x", "start": 0, "end": 1}),
        *(["word", times, MAIN] for times in ([0], [0, 1, 2], "01", ["0", "1"], [True, False], {"start": 0, "end": 1})),
        *(["word", [0, 1], label] for label in (["MAIN"], 1.5)),
        *(["word", [0, 1]], ["word", 0, 1], [5, [0, 1], MAIN], [None, [0, 1], MAIN], ["word", [0, 1], MAIN, 0.9]),
    ],
)
def test_a_row_of_another_shape_is_refused(tmp_path, row):
    with pytest.raises(InputError, match=r"a\.json, alignments\[3\] is .*expected \[word, \[start, end\], speaker\]"):
        read(tmp_path, *GOOD, row)


@pytest.mark.parametrize("value", ["{}", "null", '"words"', "3", "true"])
def test_what_is_meant_as_alignments_must_be_a_list(tmp_path, value):
    with pytest.raises(InputError, match='has .* under "alignments", expected a list'):
        read_alignments(write(tmp_path, f'{{"alignments": {value}}}'), 2.0)


NO_JSON = (b"", b'{"alignments": [["wo', b"no", b"\xff\xfe\x00\x81", b"[" * 100_000, b"1" * 5000, b'{"a": []} x')


@pytest.mark.parametrize("content", NO_JSON)
def test_what_is_no_json_is_refused(tmp_path, content):
    with pytest.raises(InputError, match=r"a\.json cannot be read"):
        read_alignments(tmp_path / "a.json", 2.0)
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(InputError, match=r"a\.json is not JSON"):
        read_alignments(tmp_path / "a.json", 2.0)


@pytest.mark.parametrize(
    ("content", "kind", "warned"),
    [
        ({"speaker": "64", "book_meta": {"title": "T"}, "voice_activity": [[0.1, 5.0]]}, Kind.BOOK, False),
        ({"id": "X", "wav": "a.mp3", "text": "hello", "speaker": "S1", "dnsmos": 3.2}, Kind.METADATA, False),  # Emilia
        ({}, Kind.METADATA, False),
        ([], Kind.METADATA, False),
        (["tag", "tag"], Kind.METADATA, False),
        (3, Kind.METADATA, False),
        (None, Kind.METADATA, False),
        ({"segments": "two"}, Kind.METADATA, False),
        ({"text": "hello", "segments": [{"start": 0, "end": 1, "text": "hello"}]}, Kind.OTHER_WORDS, True),  # Whisper
        ({"word_segments": [{"word": "hello", "start": 0, "end": 1}]}, Kind.OTHER_WORDS, True),  # WhisperX
        ({"alignment": GOOD}, Kind.OTHER_WORDS, True),  # misspelt
        (GOOD, Kind.OTHER_WORDS, True),
    ],
)
def test_other_json_is_no_alignment_and_its_words_are_reported(tmp_path, content, kind, warned):
    path = write(tmp_path, content)
    found = read_alignments(path, 2.0)
    assert read_beside(path)[0] is kind
    assert found.words is None
    assert (found.notice is not None) is warned
    assert not warned or "holds words that are not read" in found.notice


def test_alignments_beside_other_data_are_alignments(tmp_path):
    both = {"book_meta": {}, "segments": [], "alignments": GOOD}
    assert len(read_alignments(write(tmp_path, both), 2.0).words) == 3
    (tmp_path / "b.json").write_bytes(json.dumps(both).encode("utf-8-sig"))
    assert len(read_alignments(tmp_path / "b.json", 2.0).words) == 3


def test_half_a_character_is_left_out(tmp_path):
    path = write(tmp_path, '{"alignments": [["ok\\ud83d", [0, 1], "SPEAKER_MAIN\\udc00"]]}')
    assert read_alignments(path, 2.0).words == (Word("ok", 0.0, 1.0, MAIN),)
    with pytest.raises(InputError, match="udc00") as error:
        read_alignments(write(tmp_path, '{"alignments": ["\\udc00"]}'), 2.0)
    assert str(error.value).encode()
