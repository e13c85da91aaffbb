"""The messages of a client, not to be trusted, as frames and commands in an inbox."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator

import numpy as np

from ttt_jax.codec import Codec
from ttt_jax.errors import InputError
from ttt_jax.serve.inbox import Inbox
from ttt_jax.serve.metrics import Metrics
from ttt_jax.serve.opus import OpusReader
from ttt_jax.serve.protocol import Command, Control, Kind, Request, from_pcm, metadata_message, parse_command
from ttt_jax.serve.service import Limits

log = logging.getLogger("ttt_jax")

WITHOUT_FRAME = 1000
"""Messages that may come before a frame is whole, pings included: of 128 samples, 10 to 15 make a frame."""

NORMAL, GOING_AWAY, INVALID, POLICY, TOO_BIG = 1000, 1001, 1007, 1008, 1009
"""Codes that close a websocket: the talk is over, the server stops, what came cannot be read, or breaks a limit."""


class Ends(Exception):
    """The talk is closed with a code and a sentence."""

    def __init__(self, code: int, sentence: str) -> None:
        super().__init__(sentence)
        self.code = code


class Restart:
    """A command: the talk begins anew."""


class Receiver:
    """Takes the messages of one client."""

    def __init__(
        self, request: Request, codec: Codec, limits: Limits, metrics: Metrics, answer: Callable[[bytes], None]
    ) -> None:
        """`answer` sends a message to the client."""
        self.inbox: Inbox[Command | Restart] = Inbox(limits.queue)
        self.dropped = 0
        """Frames that gave way to later ones."""
        self._metadata, self._limits, self._metrics, self._answer = request.metadata, limits, metrics, answer
        self._reader = OpusReader(codec.sample_rate) if request.coding == "opus" else None
        self._frame_size = codec.frame_size
        self._rest = np.zeros(0, np.float32)  # samples of a frame that is not whole
        self._paused = self._complained = False
        self._without_frame = 0

    def receive(self, message: bytes) -> Iterator[None]:
        """Takes a message in parts, which are not much work each. Raises `Ends` for what ends the talk."""
        if len(message) > self._limits.max_message:
            most = self._limits.max_message
            raise Ends(TOO_BIG, f"a message has {len(message):,} bytes: send at most {most:,}.")
        kind = message[0] if message else -1
        self._without_frame += 1
        if self._without_frame > WITHOUT_FRAME:
            raise Ends(POLICY, f"{WITHOUT_FRAME} messages have no whole frame of audio: send larger ones.")
        if kind == Kind.AUDIO:
            yield from self._receive_audio(message[1:])
        elif kind == Kind.CONTROL:
            self._receive_control(message[1:])
        elif kind == Kind.METADATA and self._metadata:
            self._receive_command(message[1:])
        elif kind not in list(Kind) and not self._complained:
            self._complained = True
            log.warning(f"a client sends messages of the unknown kind {kind}: they are passed over.")
        yield

    def _receive_audio(self, payload: bytes) -> Iterator[None]:
        size = self._frame_size
        try:
            for piece in [from_pcm(payload)] if self._reader is None else self._reader.append(payload):
                samples = np.concatenate([self._rest, piece])
                whole = len(samples) // size * size
                self._rest = samples[whole:]
                for frame in samples[:whole].reshape(-1, size):
                    self._receive_frame(frame)
                yield
        except InputError as error:
            raise Ends(INVALID, str(error)) from None

    def _receive_frame(self, frame: np.ndarray) -> None:
        self._without_frame = 0
        if self._paused:
            return
        if not np.isfinite(frame).all():
            raise Ends(INVALID, "a frame of the audio is not finite: give finite samples.")
        dropped = self.inbox.put(frame)
        self.dropped += dropped
        self._metrics.dropped += dropped

    def _receive_control(self, payload: bytes) -> None:
        control = payload[0] if payload else -1
        if control not in (Control.START, Control.PAUSE, Control.RESTART):
            return
        self._paused = control == Control.PAUSE
        self._rest = self._rest[:0]
        if control == Control.RESTART:
            self.inbox.clear()
            self._order(Restart())

    def _receive_command(self, payload: bytes) -> None:
        try:
            command = parse_command(payload)
        except InputError as error:
            self._answer(metadata_message({"type": "error", "command": None, "message": str(error)}))
        else:
            self._order(command)

    def _order(self, command: Command | Restart) -> None:
        try:
            self.inbox.put(command)
        except InputError as error:
            raise Ends(POLICY, str(error)) from None
