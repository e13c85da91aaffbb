"""Messages and URL parameters, without a server."""

from __future__ import annotations

import json

import numpy as np
import pytest

from tests.helpers.live_server import tokenizer
from ttt_jax.data.text import TokenizerInfo
from ttt_jax.errors import InputError
from ttt_jax.moshi.generate import Sampling
from ttt_jax.serve import protocol
from ttt_jax.serve.protocol import Command, Words, from_pcm, parse_command, parse_query, to_pcm
from ttt_jax.serve.talks import TalkSettings

KYUTAIS = {
    "text_temperature": "0.7",
    "text_topk": "25",
    "audio_temperature": "0.8",
    "audio_topk": "250",
    "pad_mult": "0",
    "text_seed": "123",
    "audio_seed": "456",
    "repetition_penalty_context": "64",
    "repetition_penalty": "1.0",
}
"""As their page sends them."""


def test_kyutais_parameters_are_their_defaults():
    asked = parse_query(KYUTAIS)
    assert asked.settings == parse_query({}).settings == TalkSettings(Sampling())
    assert (asked.seed, asked.first_frame, asked.coding, asked.metadata, asked.fork) == (
        456,
        "once",
        "opus",
        False,
        None,
    )
    assert asked.ignored == ()


def test_seeds():
    assert parse_query({"text_seed": "5"}).seed == 5
    assert parse_query({"text_seed": "5", "audio_seed": "6"}).seed == 6
    assert parse_query({"audio_seed": "4294967295"}).seed == 2**32 - 1
    assert len({parse_query({}).seed for _ in range(5)}) > 1


def test_our_parameters():
    asked = parse_query(
        {"audio": "pcm", "metadata": "1", "memory": "off", "gate": "-0.5", "fork": "k", "first_frame": "twice"}
    )
    assert (asked.settings.memory, asked.settings.gate) == ("off", -0.5)
    assert (asked.coding, asked.metadata, asked.fork, asked.first_frame) == ("pcm", True, "k", "twice")


def test_parameters_without_effect_are_named():
    asked = parse_query({**KYUTAIS, "pad_mult": "2", "voice_prompt": "a", "email": "", "unheard_of": "1"})
    assert asked.ignored == ("pad_mult", "voice_prompt")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("text_temperature", "inf"),
        ("text_temperature", "-1"),
        ("audio_temperature", ""),
        ("text_topk", "1.5"),
        ("audio_topk", "-1"),
        ("audio_topk", "٣"),
        ("audio_seed", "4294967296"),
        ("audio_seed", "9" * 10000),
        ("text_seed", "-1"),
        ("memory", "ON"),
        ("gate", "1.01"),
        ("gate", "nan"),
        ("audio", "wav"),
        ("metadata", "true"),
        ("first_frame", ""),
    ],
)
def test_impossible_parameters_are_named_in_one_short_sentence(name, value):
    with pytest.raises(InputError, match=name.replace("audio_temperature", "audio_temp").split("_t")[0]) as error:
        parse_query({name: value})
    assert len(str(error.value)) < 150


def test_commands():
    def given(**fields):
        return parse_command(json.dumps(fields).encode())

    assert given(command="memory", value="frozen") == Command("memory", "frozen")
    assert given(command="gate", value=0.3) == Command("gate", 0.3)
    assert given(command="gate", value=None) == Command("gate")
    assert given(command="save", name="a-B_9") == Command("save", name="a-B_9")
    assert given(command="fork", more=1) == Command("fork")


@pytest.mark.parametrize(
    "payload",
    [
        b"",
        b"\xff\xfe",
        b"[]",
        b"1",
        b"[" * 100000,
        b'{"command": 1}',
        b'{"command": "die"}',
        b'{"command": "memory"}',
        b'{"command": "memory", "value": ["on"]}',
        b'{"command": "gate", "value": NaN}',
        b'{"command": "gate", "value": true}',
        b'{"command": "gate", "value": "\\ud800"}',
        b'{"command": "gate", "value": 1e999}',
        b'{"command": "save"}',
        b'{"command": "save", "name": ""}',
        b'{"command": "save", "name": "../x"}',
        b'{"command": "save", "name": "a\\n"}',
        b'{"command": "load", "name": "\\u00e4"}',
        b'{"command": "load", "name": "' + b"x" * 65 + b'"}',
    ],
)
def test_what_is_no_command_is_refused_in_a_sentence_that_can_be_sent(payload):
    with pytest.raises(InputError) as error:
        parse_command(payload)
    assert len(str(error.value)) < 200
    protocol.metadata_message({"message": str(error.value)})
    protocol.error_message(str(error.value))


class Pieces:
    """A tokenizer's pieces by number."""

    def __init__(self, *pieces):
        self.piece = pieces.__getitem__


def test_text_is_pieces_with_spaces(monkeypatch):
    monkeypatch.setattr(protocol, "Tokenizer", Pieces)
    words = Words(Pieces("EPAD", "\u2581a", "b", "PAD", "<0xC3>", "<0xA4>", "\u2581"))
    assert [words.next(token) for token in (1, 2, 0, 3, -1, 4, 5, 1, 6)] == [" a", "b", "", "", "", "", "ä", " a", " "]
    assert [words.next(token) for token in (4, 1, 5)] == ["", "\ufffd a", "\ufffd"]  # half a character


def test_text_of_the_embedded_tokenizer():
    words, tokens = Words(tokenizer()), tokenizer().encode("hello") + tokenizer().encode("world")
    assert "".join(words.next(token) for token in tokens) == " hello world"


def test_without_a_tokenizer_there_is_no_text():
    assert Words(TokenizerInfo(cardinality=10)).next(5) == ""


def test_pcm():
    audio = np.array([0, 0.5, -0.5, 1, -1, 7, -7], np.float32)
    coded = to_pcm(audio)
    assert coded == np.array([0, 16384, -16384, 32767, -32767, 32767, -32768], "<i2").tobytes()
    np.testing.assert_allclose(from_pcm(coded), np.clip(audio, -1, 1), atol=1e-4)
    every = np.arange(-32768, 32768, dtype="<i2")
    assert np.abs(np.frombuffer(to_pcm(from_pcm(every.tobytes())), "<i2").astype(int) - every).max() <= 1
    with pytest.raises(InputError, match="even"):
        from_pcm(b"123")
