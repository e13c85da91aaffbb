"""The text row of a stream and the SentencePiece wrapper."""

import hashlib
import io

import numpy as np
import pytest

from ttt_jax.data.manifest import Word
from ttt_jax.data.text import EPAD, PAD, load_tokenizer, text_stream
from ttt_jax.errors import InputError

RATE = 12.5


class Spelling:
    """A tokenizer with one id per letter: a is 10, b is 11, ..."""

    cardinality = 40

    def encode(self, word):
        """Return the ids of the letters."""
        return [ord(letter) - ord("a") + 10 for letter in word if "a" <= letter <= "z"]


def row(words, frames=8, speaker="SPEAKER_MAIN"):
    words = [Word(text, start, start + 0.1, speaker) for text, start in words]
    return text_stream(words, frames, Spelling(), RATE).tolist()


def test_a_word_takes_one_token_a_frame_after_an_epad():
    assert row([("abc", 2.5 / RATE)]) == [PAD, EPAD, 10, 11, 12, PAD, PAD, PAD]


def test_a_word_in_the_first_frame_has_no_epad():
    assert row([("ab", 0.0)], 4) == [10, 11, PAD, PAD]


def test_a_start_on_a_frame_boundary_belongs_to_the_later_frame():
    assert row([("a", 2 / RATE)], 4) == [PAD, EPAD, 10, PAD]
    assert row([("a", 1.99 / RATE)], 4) == [EPAD, 10, PAD, PAD]


def test_a_new_word_replaces_unfinished_tokens_and_needs_no_epad():
    assert row([("abcdef", 1 / RATE), ("xyz", 3 / RATE)]) == [EPAD, 10, 11, 33, 34, 35, PAD, PAD]


def test_a_word_right_after_the_last_token_has_no_epad():
    assert row([("ab", 1 / RATE), ("c", 3 / RATE)], 5) == [EPAD, 10, 11, 12, PAD]


def test_one_frame_between_words_becomes_epad():
    assert row([("a", 1 / RATE), ("c", 3 / RATE)], 5) == [EPAD, 10, EPAD, 12, PAD]


def test_of_two_words_in_one_frame_the_later_stays():
    assert row([("ab", 2.1 / RATE), ("c", 2.8 / RATE)], 5) == [PAD, EPAD, 12, PAD, PAD]


def test_a_word_without_tokens_still_ends_the_one_before():
    assert row([("abc", 1 / RATE), ("...", 2 / RATE)], 5) == [EPAD, 10, PAD, PAD, PAD]


def test_tokens_past_the_end_are_dropped():
    assert row([("abc", 3 / RATE), ("d", 9 / RATE)], 5) == [PAD, PAD, EPAD, 10, 11]


def test_other_speakers_are_left_out():
    assert row([("abc", 1 / RATE)], 4, speaker="SPEAKER_01") == [PAD] * 4


def test_no_words_give_padding_of_the_asked_type():
    stream = text_stream([], 5, Spelling(), RATE)
    assert stream.dtype == np.int32
    assert stream.tolist() == [PAD] * 5


def test_words_of_an_unknown_script_are_refused():
    with pytest.raises(InputError, match="no token for any of 2 words .*'шум'"):
        row([("шум", 0.0), ("дом", 0.3)])


@pytest.fixture(scope="module")
def fitted(tmp_path_factory):
    """Path of a SentencePiece model fitted to a few words, with Moshi's special ids."""
    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(
            ["please enter your number", "please press the pound key", "your call is important"] * 5
        ),
        model_writer=model,
        vocab_size=28,
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=3,
        minloglevel=2,
    )
    path = tmp_path_factory.mktemp("spm") / "small.model"
    path.write_bytes(model.getvalue())
    return path


def test_words_survive_encoding_and_decoding(fitted):
    tokenizer = load_tokenizer(fitted)
    ids = [token for word in ["please", "press", "your", "key"] for token in tokenizer.encode(word)]
    assert all(PAD < token < tokenizer.cardinality for token in ids)
    assert tokenizer.decode([PAD, EPAD, *ids, 1, 2, -1, PAD]) == "please press your key"


def test_blanks_around_a_word_change_nothing(fitted):
    tokenizer = load_tokenizer(fitted)
    assert tokenizer.encode("  key ") == tokenizer.encode("key") != []


def test_unknown_characters_give_no_token(fitted):
    tokenizer = load_tokenizer(fitted)
    assert tokenizer.encode("keyж") == tokenizer.encode("key")


def test_the_tokenizer_states_its_size_and_digest(fitted):
    tokenizer = load_tokenizer(fitted)
    assert tokenizer.cardinality == 28
    assert tokenizer.digest == hashlib.sha256(fitted.read_bytes()).hexdigest()


@pytest.mark.parametrize("content", [b"", b"not a model at all", bytes(100)])
def test_a_file_that_is_no_model_is_refused(tmp_path, content):
    (tmp_path / "t.model").write_bytes(content)
    with pytest.raises(InputError, match=r"t\.model is not a usable SentencePiece model"):
        load_tokenizer(tmp_path / "t.model")


def test_a_missing_model_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"t\.model cannot be read"):
        load_tokenizer(tmp_path / "t.model")
