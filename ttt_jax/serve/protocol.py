"""Messages and URL parameters of the websocket: Kyutai's protocol (their `rust/protocol.md`), and what is ours.

The first byte of a message is its kind.
"""

from __future__ import annotations

import codecs
import json
import math
import re
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, Literal

import numpy as np

from ttt_jax.data.text import EPAD, PAD, Tokenizer, TokenizerInfo
from ttt_jax.errors import InputError
from ttt_jax.moshi.generate import Sampling
from ttt_jax.serve.talks import FirstFrame, TalkSettings

PATH = "/api/chat"
HANDSHAKE = b"\x00"
PING = b"\x06"

Coding = Literal["opus", "pcm"]


class Kind(IntEnum):
    """First byte of a message."""

    HANDSHAKE = 0
    AUDIO = 1
    TEXT = 2
    CONTROL = 3
    METADATA = 4
    ERROR = 5
    PING = 6


class Control(IntEnum):
    """Second byte of a message of kind `CONTROL`."""

    START = 0
    END_OF_TURN = 1
    PAUSE = 2
    RESTART = 3


@dataclass(frozen=True)
class Request:
    """What the URL of a client asks for."""

    settings: TalkSettings
    seed: int
    first_frame: FirstFrame
    coding: Coding
    """Of the audio, both ways."""
    metadata: bool
    """Whether messages of kind `METADATA` are sent."""
    fork: str | None
    """Key of the talk to go on with."""
    ignored: tuple[str, ...]
    """Parameters that have no effect here and are not at their defaults."""


_IGNORED = {
    "pad_mult": ("", "0", "0.0"),
    "repetition_penalty": ("", "1", "1.0"),
    "repetition_penalty_context": ("", "64"),
    "email": ("",),
    "worker_addr": ("",),
    "worker_auth_id": ("",),
    "text_prompt": ("",),
    "voice_prompt": ("",),
}
"""Parameters of Kyutai's and others' servers that have no effect here, and values that mean nothing."""


def parse_query(query: Mapping[str, str]) -> Request:
    """Returns what the parameters of a URL ask for; unknown ones are passed over.

    The seed of a talk is audio_seed, or else text_seed, or else drawn. Raises `InputError` for a value that cannot be.
    """
    usual = Sampling()
    sampling = Sampling(
        temperature=_number(query, "audio_temperature", usual.temperature),
        top_k=_whole(query, "audio_topk", usual.top_k),
        text_temperature=_number(query, "text_temperature", usual.text_temperature),
        text_top_k=_whole(query, "text_topk", usual.text_top_k),
    )
    gate = query.get("gate", "none")
    settings = TalkSettings(
        sampling,
        memory=_one_of(query, "memory", ("on", "frozen", "off")),
        gate=None if gate == "none" else _number(query, "gate", 0.0),
    )
    drawn = secrets.randbits(32)
    return Request(
        settings,
        seed=_whole(query, "audio_seed" if "audio_seed" in query else "text_seed", drawn),
        first_frame=_one_of(query, "first_frame", ("once", "twice")),
        coding=_one_of(query, "audio", ("opus", "pcm")),
        metadata=_one_of(query, "metadata", ("0", "1")) == "1",
        fork=query.get("fork"),
        ignored=tuple(name for name, usual in _IGNORED.items() if query.get(name, "") not in usual),
    )


def _number(query: Mapping[str, str], name: str, usual: float) -> float:
    text = query.get(name, str(usual))
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise InputError(f"{name}={text[:40]!r} in the URL is no number: give one, or leave it out.")
    return value


def _whole(query: Mapping[str, str], name: str, usual: int) -> int:
    text = query.get(name, str(usual))
    if not re.fullmatch("[0-9]{1,10}", text) or int(text) >= 1 << 32:
        raise InputError(f"{name}={text[:40]!r} in the URL is no whole number from 0 to 2^32 - 1: give one.")
    return int(text)


def _one_of(query: Mapping[str, str], name: str, values: tuple[str, ...]) -> Any:
    """The parameter's value; the first of `values` if it is not given."""
    value = query.get(name, values[0])
    if value not in values:
        raise InputError(f"{name}={value[:40]!r} in the URL is none of {', '.join(values)}: give one of these.")
    return value


@dataclass(frozen=True)
class Command:
    """A message of kind `METADATA` from the client."""

    command: Literal["memory", "gate", "reset", "save", "load", "fork"]
    value: str | float | None = None
    """Of memory, gate."""
    name: str = ""
    """Of save, load: that of a file in the folder of memories."""


NAME = re.compile("[A-Za-z0-9_-]{1,64}")


def parse_command(payload: bytes) -> Command:
    """Returns the command in the JSON of a message. Raises `InputError` if it is none."""
    try:
        given = json.loads(payload)
    except (ValueError, RecursionError):
        given = None
    if not isinstance(given, dict) or not isinstance(given.get("command"), str):
        raise InputError('the message is no command: give a JSON object such as {"command": "reset"}.')
    command = given["command"]
    if command == "memory":
        if given.get("value") not in ("on", "frozen", "off"):
            raise InputError(f"memory={str(given.get('value'))[:40]!r} cannot be: give on, frozen or off.")
        return Command("memory", given["value"])
    if command == "gate":
        value = given.get("value")
        if value is not None and (
            isinstance(value, bool) or not isinstance(value, int | float) or not -1 <= value <= 1
        ):
            raise InputError(f"gate={str(value)[:40]!r} cannot be: give -1 to 1, or null to take that of the weights.")
        return Command("gate", value)
    if command in ("save", "load"):
        name = given.get("name")
        if not isinstance(name, str) or not NAME.fullmatch(name):
            raise InputError(f"{str(name)[:70]!r} is no name: give 1 to 64 letters, digits, - and _.")
        return Command(command, name=name)
    if command in ("reset", "fork"):
        return Command(command)
    raise InputError(f"{command[:40]!r} is no command: give memory, gate, reset, save, load or fork.")


def text_message(text: str) -> bytes:
    """A message of kind `TEXT`."""
    return bytes([Kind.TEXT]) + text.encode()


def metadata_message(content: dict[str, Any]) -> bytes:
    """A message of kind `METADATA`: a JSON object."""
    return bytes([Kind.METADATA]) + json.dumps(content, allow_nan=False).encode()


def error_message(sentence: str) -> bytes:
    """A message of kind `ERROR`."""
    return bytes([Kind.ERROR]) + sentence.encode(errors="backslashreplace")


class Words:
    """The text of a stream of tokens, piece by piece."""

    def __init__(self, tokenizer: Tokenizer | TokenizerInfo) -> None:
        self._piece = tokenizer.piece if isinstance(tokenizer, Tokenizer) else None
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def next(self, token: int) -> str:
        """The text that the token adds; "" for one without text, and within a character of several tokens."""
        if self._piece is None or token in (EPAD, PAD) or token < 0:
            return ""
        piece = self._piece(token)
        if byte := re.fullmatch("<0x([0-9A-F]{2})>", piece):
            return self._utf8.decode(bytes.fromhex(byte[1]))
        return self._utf8.decode(b"", final=True) + piece.replace("\u2581", " ")


# Raw audio: int16, little-endian, mono


def to_pcm(audio: np.ndarray) -> bytes:
    """float [S], full scale 1, as int16; louder samples are clipped."""
    return np.clip(np.rint(audio * 32767), -32768, 32767).astype("<i2").tobytes()


def from_pcm(payload: bytes) -> np.ndarray:
    """float32 [S], full scale 1. Raises `InputError` for half a sample."""
    if len(payload) % 2:
        raise InputError(f"a message has {len(payload)} bytes of int16 samples: give an even number.")
    return np.frombuffer(payload, "<i2").astype(np.float32) / 32768
