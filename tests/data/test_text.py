"""The text row of a stream, the words of a recording in it, and the SentencePiece wrapper."""

import hashlib
import io
import json

import numpy as np
import pytest
import sentencepiece

from ttt_jax.data.alignments import Word
from ttt_jax.data.corpus import EMBEDDED
from ttt_jax.data.text import ABSENT, EPAD, PAD, load_tokenizer, read_text, text_stream
from ttt_jax.errors import InputError

RATE = 12.5
TOKENIZER = load_tokenizer(EMBEDDED / "tokenizer" / "spm512.model")


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], [PAD] * 8),
        ([([10, 11, 12], 2.5, 1)], [PAD, EPAD, 10, 11, 12, PAD, PAD, PAD]),  # one token a frame after an EPAD
        ([([10, 11], 0, 1)], [10, 11, PAD, PAD, PAD, PAD, PAD, PAD]),  # the first frame has none before it
        ([([10], 2, 1)], [PAD, EPAD, 10, PAD, PAD, PAD, PAD, PAD]),  # a boundary belongs to the later frame
        ([([10], 1.99, 1)], [EPAD, 10, PAD, PAD, PAD, PAD, PAD, PAD]),
        ([([10, 11, 12, 13], 1, 2), ([33, 34, 35], 3, 2)], [EPAD, 10, 11, 33, 34, 35, PAD, PAD]),  # it ends the first
        ([([10, 11], 1, 1), ([12], 3, 1)], [EPAD, 10, 11, 12, PAD, PAD, PAD, PAD]),  # no frame is left for an EPAD
        ([([10], 1, 1), ([12], 3, 1)], [EPAD, 10, EPAD, 12, PAD, PAD, PAD, PAD]),
        ([([10, 11], 2.1, 0.5), ([12], 2.8, 1)], [PAD, EPAD, 12, PAD, PAD, PAD, PAD, PAD]),  # two words in one frame
        ([([10, 11, 12], 6, 1), ([13], 9, 1)], [PAD, PAD, PAD, PAD, PAD, EPAD, 10, 11]),  # the row ends
        # words without tokens
        ([([], 2, 3)], [PAD, -1, -1, -1, -1, PAD, PAD, PAD]),  # frame 1 would be EPAD, were the word known
        ([([], 0, 2)], [-1, -1, PAD, PAD, PAD, PAD, PAD, PAD]),
        ([([], 2.9, 0.01)], [PAD, -1, -1, PAD, PAD, PAD, PAD, PAD]),
        ([([], 2.5, 1)], [PAD, -1, -1, -1, PAD, PAD, PAD, PAD]),
        ([([], 6, 9)], [PAD, PAD, PAD, PAD, PAD, -1, -1, -1]),
        ([([10, 11, 12], 1, 1), ([], 2, 2)], [EPAD, 10, -1, -1, PAD, PAD, PAD, PAD]),  # it ends the word before it
        ([([], 1, 5), ([10], 3, 1)], [-1, -1, -1, 10, PAD, PAD, PAD, PAD]),  # the word after it ends it
        ([([], 1, 1), ([10], 4, 1)], [-1, -1, PAD, EPAD, 10, PAD, PAD, PAD]),
        ([([10], 1, 1), ([], 3, 1), ([11], 5, 1)], [EPAD, 10, -1, -1, EPAD, 11, PAD, PAD]),
        ([([], 1, 1), ([10], 2, 1)], [-1, -1, 10, PAD, PAD, PAD, PAD, PAD]),  # the frame before it is unknown, no EPAD
    ],
)
def test_tokens_follow_one_a_frame_after_an_epad_and_a_word_without_any_is_unknown_while_it_lasts(words, expected):
    assert ABSENT == -1
    spoken = [Word("a word", start / RATE, (start + length) / RATE, "SPEAKER_MAIN") for _, start, length in words]
    row = text_stream(spoken, [tokens for tokens, _, _ in words], 8, RATE)
    assert row.dtype == np.int32
    assert row.tolist() == expected


UNWRITABLE = "もしもし 你好 你好？ مرحبا नमस्ते नमस्ते! 😀 δ 中。 € — \u200b ▁ ßø \0"


@pytest.mark.parametrize("word", ["", *UNWRITABLE.split(" ")])
def test_what_the_tokenizer_cannot_write_has_no_tokens(word):
    assert TOKENIZER.encode(word) == []


@pytest.mark.parametrize("word", ["привет", "ящик", "don't", "naïve", "1234", "...", "?", "'", "ça", "Ёлка"])
def test_what_it_can_write_comes_back(word):
    assert TOKENIZER.decode(TOKENIZER.encode(word)) == word.lower()
    assert min(TOKENIZER.encode(word)) > PAD


@pytest.mark.parametrize(
    ("word", "left"), [("naïve中", "naïve"), ("don’t", "dont"), ("a中b", "ab"), ("中3", "3"), ("κafé", "afé")]
)
def test_a_word_partly_known_keeps_what_is_known(word, left):
    assert TOKENIZER.decode(TOKENIZER.encode(word)) == left


def read(folder, words, frames=25, **more):
    (folder / "talk.json").write_text(json.dumps({"alignments": words}), encoding="utf-8")
    return read_text(folder / "talk.json", frames / RATE, frames, TOKENIZER, RATE, **more)


def spoken(text, start, speaker="SPEAKER_MAIN", end=None):
    return [text, [start, start + 0.2 if end is None else end], speaker]


def test_words_of_the_voice_are_the_text_and_nothing_is_reported(tmp_path):
    text = read(tmp_path, [spoken("no", 1.6, "SPEAKER_OTHER"), spoken("привет", 0.4), spoken("", 1.0)])
    tokens = TOKENIZER.encode("привет")
    assert text.notice is None
    assert text.row.tolist() == [PAD] * 4 + [EPAD, *tokens] + [PAD] * (20 - len(tokens))
    words, tokens = [spoken("no", 0.4, "SPEAKER_OTHER"), spoken("中", 1.0)], TOKENIZER.encode("no")
    other = read(tmp_path, words, speaks=lambda word: word.speaker != "SPEAKER_MAIN")
    assert other.notice is None
    assert other.row.tolist() == [PAD] * 4 + [EPAD, *tokens] + [PAD] * (20 - len(tokens))


@pytest.mark.parametrize("word", ["もしもし", "مرحبا", "नमस्ते", "😀"])
def test_words_of_another_script_are_counted_and_masked(tmp_path, word):
    text = read(tmp_path, [spoken("yes", 0.0), spoken(word, 0.8), spoken("no", 1.6, "SPEAKER_OTHER")])
    assert text.notice == f"1 of 2 words dropped, 1 without a token (such as {word!r})."
    tokens = TOKENIZER.encode("yes")
    assert text.row.tolist() == [*tokens, *[PAD] * (9 - len(tokens)), *[-1] * 4, *[PAD] * 12]


def test_all_that_was_dropped_is_one_sentence(tmp_path):
    words = [spoken("a", 0.0), spoken("b", 0.1, end=0.1), spoken("c", 0.3), spoken("d", 0.5, end=0.4)]
    words += [spoken("中", 0.6), spoken("e", 1.0), ["f", [None, None], "SPEAKER_MAIN"], spoken("g", 9.0)]
    words += [spoken("h", 9.0, "SPEAKER_OTHER")]
    assert read(tmp_path, words).notice == (
        "5 of 8 words dropped, 1 without duration (such as 'b'), 1 with the end before the start (such as 'd'),"
        " 1 without times (such as 'f'), 1 outside the audio (such as 'g'), 1 without a token (such as '中')."
    )


LOST = ["7", [None, None], "SPEAKER_MAIN"]


@pytest.mark.parametrize(
    ("words", "unknown"),
    [
        ([spoken("a", 0.4), LOST, spoken("a", 1.6)], range(6, 20)),  # and the frame before it, which would be EPAD
        ([spoken("a", 0.4), LOST, LOST, ["8", None, "SPEAKER_MAIN"], spoken("a", 1.6)], range(6, 20)),
        ([LOST, spoken("a", 0.4)], range(5)),
        ([spoken("a", 0.4), LOST], range(6, 25)),
        ([spoken("a", 0.4), LOST, spoken("b", 0.9, end=0.9), spoken("a", 1.6)], range(6, 20)),  # b has no place either
        ([spoken("a", 0.4), spoken("x", 0.7, "SPEAKER_OTHER"), LOST, spoken("a", 1.6)], range(6, 20)),
        ([spoken("a", 0.4, end=1.6), LOST, spoken("a", 1.6)], ()),  # there is no room for it
        ([spoken("a", 1.6), LOST, spoken("a", 0.4)], ()),  # the file has no order
        ([spoken("a", 0.4), ["x", None, "SPEAKER_OTHER"], spoken("a", 1.6)], ()),
    ],
)
def test_where_a_word_without_times_may_be_spoken_the_text_is_not_known(tmp_path, words, unknown):
    row = read(tmp_path, words).row
    assert np.flatnonzero(row == -1).tolist() == list(unknown)
    kept = read(tmp_path, [word for word in words if word is not LOST and word[1] is not None]).row
    np.testing.assert_array_equal(row[row != -1], kept[row != -1])


def test_words_that_the_tokenizer_knows_none_of_are_refused(tmp_path):
    words = [spoken("もしもし", 0.4), spoken("はい。", 1.0), spoken("yes", 1.5, "SPEAKER_OTHER")]
    with pytest.raises(InputError, match=r"talk\.json: the text tokenizer has no token for any of 2 words .*'もし"):
        read(tmp_path, words)


@pytest.mark.parametrize("times", [[None, None], [0.5, 0.5], None])
def test_where_no_word_has_a_place_the_text_is_not_known(tmp_path, times):
    text = read(tmp_path, [["yes", times, "SPEAKER_MAIN"], spoken("no", 1.0, "SPEAKER_OTHER")])
    assert text.row is None
    assert text.notice.startswith("1 of 1 words dropped, 1 without ")
    assert text.notice.endswith("(such as 'yes'), so that the text counts as not known.")


def test_where_nobody_is_the_model_the_text_is_not_known(tmp_path):
    assert read(tmp_path, [spoken("yes", 0.4, "SPEAKER_00"), spoken("no", 1.0, "SPEAKER_01")]).row is None
    silent = read(tmp_path, [spoken("yes", 0.4, "SPEAKER_OTHER")])
    assert (silent.row.tolist(), silent.notice) == ([PAD] * 25, None)
    assert read(tmp_path, []).row.tolist() == [PAD] * 25


def fit(folder, sentences, vocab_size, **options):
    """The path of a SentencePiece model fitted to a few words."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences * 5), model_writer=model, vocab_size=vocab_size, minloglevel=2, **options
    )
    (folder / "small.model").write_bytes(model.getvalue())
    return folder / "small.model"


SENTENCES = ["please enter your number", "please press the pound key", "your call is important"]


@pytest.fixture(scope="module")
def fitted(tmp_path_factory):
    """A model with Moshi's special ids."""
    return fit(tmp_path_factory.mktemp("spm"), SENTENCES, 28, unk_id=0, bos_id=1, eos_id=2, pad_id=3)


def test_words_survive_encoding_and_decoding(fitted):
    tokenizer = load_tokenizer(fitted)
    assert (tokenizer.cardinality, tokenizer.digest) == (28, hashlib.sha256(fitted.read_bytes()).hexdigest())
    ids = [token for word in ["please", "press", "your", "key"] for token in tokenizer.encode(word)]
    assert all(PAD < token < tokenizer.cardinality for token in ids)
    assert tokenizer.decode([PAD, EPAD, *ids, 1, 2, -1, PAD]) == "please press your key"
    assert tokenizer.encode("  key ") == tokenizer.encode("keyж") == tokenizer.encode("key") != []


@pytest.fixture(scope="module")
def foreign(tmp_path_factory):
    """Models that number their special pieces in another way: unknown is 2; and with pieces for all bytes."""
    ids = {"pad_id": 0, "eos_id": 1, "unk_id": 2, "bos_id": -1, "hard_vocab_limit": False}
    options = ({"vocab_size": 28}, {"vocab_size": 284, "byte_fallback": True})
    return [load_tokenizer(fit(tmp_path_factory.mktemp("foreign"), SENTENCES[:2], **ids, **more)) for more in options]


@pytest.mark.parametrize("word", ["ж", "中", "😀"])
def test_the_unknown_piece_is_no_text_whatever_its_number_and_bytes_are(foreign, word):
    other, bytewise = foreign
    assert other.encode(word) == []
    assert 2 not in other.encode(f"key{word}") != []
    assert bytewise.decode(bytewise.encode(word)) == word
    assert len(bytewise.encode(word)) >= len(word.encode())


@pytest.mark.parametrize("content", [b"", b"not a model at all", bytes(100)])
def test_a_file_that_is_missing_or_no_model_is_refused(tmp_path, content):
    with pytest.raises(InputError, match=r"t\.model cannot be read"):
        load_tokenizer(tmp_path / "t.model")
    (tmp_path / "t.model").write_bytes(content)
    with pytest.raises(InputError, match=r"t\.model is not a usable SentencePiece model"):
        load_tokenizer(tmp_path / "t.model")
