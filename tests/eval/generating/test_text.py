"""Words with times, subtitles and counts of what Moshi says."""

from __future__ import annotations

import numpy as np
import pytest

from eval.generating.text import Counts, Spoken, counts, subtitles, webvtt, words
from ttt_jax.data.alignments import Word
from ttt_jax.data.corpus import EMBEDDED
from ttt_jax.data.text import EPAD, PAD, TokenizerInfo, load_tokenizer, text_stream


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(EMBEDDED / "tokenizer/spm512.model")


def test_words_have_the_frames_of_their_tokens(tokenizer):
    said = [("message", 0.4), ("pour", 2.0), ("un", 2.9)]
    ids = [tokenizer.encode(word) for word, _ in said]
    row = text_stream([Word(word, start, start + 0.3, None) for word, start in said], ids, 60, 12.5)
    spoken = words(row, tokenizer)
    assert [word.text for word in spoken] == ["message", "pour", "un"]
    for word, (_, start), tokens in zip(spoken, said, ids, strict=True):
        frame = int(start * 12.5)
        assert word.start == frame / 12.5
        assert word.end == (frame + len(tokens)) / 12.5
    assert counts(row) == Counts(60 - 3 - sum(map(len, ids)), 3, sum(map(len, ids)))


def test_pieces_join_the_word_before_unless_a_pause_lies_between(tokenizer):
    first, *rest = next(ids for ids in map(tokenizer.encode, ("нажмите", "appuyez", "streorer")) if len(ids) > 1)
    for gap, count in ((0, 1), (12, 1), (13, 2)):
        row = np.array([PAD, first, *[PAD] * gap, *rest, EPAD, -1])
        assert len(words(row, tokenizer)) == count
    assert words(np.array([rest[0], PAD]), tokenizer)[0].start == 0  # a piece without a word before it


def test_without_a_tokenizer_tokens_are_words():
    assert words(np.array([EPAD, 7, 9, -1, PAD]), TokenizerInfo()) == [
        Spoken("[7]", 0.08, 0.16),
        Spoken("[9]", 0.16, 0.24),
    ]
    assert counts(np.array([-1, 7, PAD])) == Counts(1, 0, 1)


def test_subtitles_break_at_pauses_and_when_they_are_long():
    spoken = [Spoken("a", 0, 1), Spoken("b", 1.5, 2), Spoken("c", 3, 4), Spoken("d", 4, 9.5)]
    assert [line.text for line in subtitles(spoken)] == ["a b", "c", "d"]
    assert subtitles(spoken)[0] == Spoken("a b", 0, 2)
    assert [len(line.text) for line in subtitles([Spoken("x" * 50, 0, 1), Spoken("y" * 30, 1, 2)])] == [50, 30]


def test_webvtt():
    spoken = [Spoken("<a> & b", 0.08, 0.16), Spoken("c", 3599.9999, 3725.5)]
    assert webvtt(spoken) == (
        "WEBVTT\n\n00:00:00.080 --> 00:00:00.160\n&lt;a&gt; &amp; b\n\n01:00:00.000 --> 01:02:05.500\nc\n"
    )
    assert webvtt([]) == "WEBVTT\n"
