"""One client: its messages become frames and commands of a talk, what the talk says becomes messages."""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from ttt_jax.errors import InputError
from ttt_jax.serve.inbox import Inbox
from ttt_jax.serve.memories import Memories
from ttt_jax.serve.metrics import Metrics
from ttt_jax.serve.opus import OpusReader, OpusWriter
from ttt_jax.serve.protocol import (
    HANDSHAKE,
    PING,
    Command,
    Control,
    Kind,
    Request,
    Words,
    error_message,
    from_pcm,
    metadata_message,
    parse_command,
    text_message,
    to_pcm,
)
from ttt_jax.serve.speech import Speech
from ttt_jax.serve.talks import Reply, Talks
from ttt_jax.serve.ticks import Seat, Ticks

if TYPE_CHECKING:
    from aiohttp import web

    from ttt_jax.data.text import Tokenizer, TokenizerInfo

log = logging.getLogger("ttt_jax")

KEEP_ALIVE = 5.0
"""Seconds without a message after which a ping is sent: Kyutai's clients close after 10."""
OUTGOING = 128
"""Messages that wait for a client that does not read, before it is closed."""
WITHOUT_FRAME = 1000
"""Messages that may come before a frame is whole, pings included: of 128 samples, 10 to 15 make a frame."""
FORK_SECONDS = 60.0
"""How long a fork waits to be taken up."""
CLOSING_SECONDS = 2.0
"""How long a client may take to say goodbye."""
SHARE = 4
"""Reading a client's messages rests this many times as long as it worked: a flood leaves time for the others."""

NORMAL, GOING_AWAY, INVALID, POLICY, TOO_BIG = 1000, 1001, 1007, 1008, 1009
"""Codes that close a websocket: the talk is over, the server stops, what came cannot be read, or breaks a limit."""


@dataclass(frozen=True)
class Limits:
    """What one client may use."""

    queue: int = 25
    """Frames that wait to be heard."""
    max_message: int = 1 << 16
    """Bytes of a message."""
    idle: float = 60.0
    """Seconds without a message."""


@dataclass
class Service:
    """What all clients share."""

    name: str
    """Of the checkpoint."""
    speech: Speech
    tokenizer: Tokenizer | TokenizerInfo
    ticks: Ticks
    metrics: Metrics
    memories: Memories
    limits: Limits
    every: int
    """Frames from one measurement that clients are sent to the next."""

    def __post_init__(self) -> None:
        self._forks: dict[str, tuple[Seat, int, asyncio.TimerHandle]] = {}
        self.stops = asyncio.Event()

    def keep_fork(self, seat: Seat, seed: int) -> str:
        """Keeps a talk until it is taken up; returns the key for `take_fork`."""
        key = secrets.token_urlsafe(24)
        expires = asyncio.get_running_loop().call_later(FORK_SECONDS, self._expire, key)
        self._forks[key] = seat, seed, expires
        return key

    def take_fork(self, key: str) -> tuple[Seat, int] | None:
        """Seat and seed of the talk that is kept under `key`, once; None if there is none."""
        seat, seed, expires = self._forks.pop(key, (None, 0, None))
        if seat is None or expires is None:
            return None
        expires.cancel()
        return seat, seed

    def _expire(self, key: str) -> None:
        self.ticks.give_back(self._forks.pop(key)[0])


class _Ends(Exception):
    """The talk is closed with a code and a sentence."""

    def __init__(self, code: int, sentence: str) -> None:
        super().__init__(sentence)
        self.code = code


class _NotReading(Exception):
    """The client does not read what is sent."""


class _Restart:
    """A command: the talk begins anew."""


class Session:
    """The talk of one client, from the handshake on."""

    def __init__(self, ws: web.WebSocketResponse, request: Request, seed: int, seat: Seat, service: Service) -> None:
        """`seat` is that of a talk which has joined; `seed` is for when it begins anew."""
        self._ws, self._request, self._seed, self._seat, self._service = ws, request, seed, seat, service
        codec = service.speech.codec
        opus = request.coding == "opus"
        self._reader = OpusReader(codec.sample_rate) if opus else None
        self._writer = OpusWriter(codec.sample_rate) if opus else None
        self._words = Words(service.tokenizer)
        self._inbox: Inbox[Command | _Restart] = Inbox(service.limits.queue)
        self._outbox: asyncio.Queue[bytes] = asyncio.Queue(OUTGOING)
        self._rest = np.zeros(0, np.float32)  # samples of a frame that is not whole
        self._paused = self._complained = False
        self._without_frame = 0
        self._heard = self._dropped = 0

    async def run(self) -> None:
        """Talks until the client goes, breaks a limit, or the server stops."""
        self._send(HANDSHAKE)
        if self._request.metadata:
            self._send(await self._hello())
        parts = (self._receive_all, self._talk, self._send_all, self._until_stop)
        tasks = [asyncio.create_task(part()) for part in parts]
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        for task in done:
            task.result()

    async def _until_stop(self) -> None:
        await self._service.stops.wait()
        raise _Ends(GOING_AWAY, "the server stops.")

    # From the client

    async def _receive_all(self) -> None:
        from aiohttp import WSMsgType

        idle = self._service.limits.idle
        while True:
            try:
                async with asyncio.timeout(idle):
                    message = await self._ws.receive()
            except TimeoutError:
                raise _Ends(POLICY, f"no message came for {idle:g} s: the talk is closed.") from None
            if message.type == WSMsgType.BINARY:
                parts = self._receive(message.data)
            elif message.type == WSMsgType.TEXT:
                parts = self._receive(b"\xff")  # no kind of message
            else:
                return
            start = time.thread_time()
            for _ in parts:
                await asyncio.sleep(SHARE * (time.thread_time() - start))
                start = time.thread_time()

    def _receive(self, message: bytes) -> Iterator[None]:
        """Takes a message in parts, which are not much work each."""
        if len(message) > self._service.limits.max_message:
            most = self._service.limits.max_message
            raise _Ends(TOO_BIG, f"a message has {len(message):,} bytes: send at most {most:,}.")
        kind = message[0] if message else -1
        self._without_frame += 1
        if self._without_frame > WITHOUT_FRAME:
            raise _Ends(POLICY, f"{WITHOUT_FRAME} messages have no whole frame of audio: send larger ones.")
        if kind == Kind.AUDIO:
            yield from self._receive_audio(message[1:])
        elif kind == Kind.CONTROL:
            self._receive_control(message[1:])
        elif kind == Kind.METADATA and self._request.metadata:
            self._receive_command(message[1:])
        elif kind not in list(Kind) and not self._complained:
            self._complained = True
            log.warning(f"a client sends messages of the unknown kind {kind}: they are passed over.")
        yield

    def _receive_audio(self, payload: bytes) -> Iterator[None]:
        size = self._service.speech.codec.frame_size
        try:
            for piece in [from_pcm(payload)] if self._reader is None else self._reader.append(payload):
                samples = np.concatenate([self._rest, piece])
                whole = len(samples) // size * size
                self._rest = samples[whole:]
                for frame in samples[:whole].reshape(-1, size):
                    self._receive_frame(frame)
                yield
        except InputError as error:
            raise _Ends(INVALID, str(error)) from None

    def _receive_frame(self, frame: np.ndarray) -> None:
        self._without_frame = 0
        if self._paused:
            return
        if not np.isfinite(frame).all():
            raise _Ends(INVALID, "a frame of the audio is not finite: give finite samples.")
        dropped = self._inbox.put(frame)
        self._dropped += dropped
        self._service.metrics.dropped += dropped

    def _receive_control(self, payload: bytes) -> None:
        control = payload[0] if payload else -1
        if control not in (Control.START, Control.PAUSE, Control.RESTART):
            return
        self._paused = control == Control.PAUSE
        self._rest = self._rest[:0]
        if control == Control.RESTART:
            self._inbox.clear()
            self._order(_Restart())

    def _receive_command(self, payload: bytes) -> None:
        try:
            command = parse_command(payload)
        except InputError as error:
            self._send(metadata_message({"type": "error", "command": None, "message": str(error)}))
        else:
            self._order(command)

    def _order(self, command: Command | _Restart) -> None:
        try:
            self._inbox.put(command)
        except InputError as error:
            raise _Ends(POLICY, str(error)) from None

    # The talk

    async def _talk(self) -> None:
        ticks = self._service.ticks
        while True:
            item = await self._inbox.get()
            if isinstance(item, np.ndarray):
                replies = await ticks.step(self._row, item, hurries=self._inbox.frames > 0)
                self._heard += 1
                for reply in replies:
                    self._say(reply)
                if self._request.metadata and self._heard % self._service.every == 0:
                    self._send(self._measurement(replies[-1]))
            elif isinstance(item, _Restart):
                await ticks.call(self._restart)
                self._words, self._heard = Words(self._service.tokenizer), 0
            else:
                await self._obey(item)

    @property
    def _row(self) -> int:
        assert self._seat.row is not None
        return self._seat.row

    def _restart(self, talks: Talks) -> None:
        settings = talks.settings(self._row)
        talks.leave(self._row)
        self._seat.row = None
        self._seat.row = talks.join(settings, self._seed, self._request.first_frame)

    async def _obey(self, command: Command) -> None:
        try:
            done = await self._do(command)
        except InputError as error:
            self._send(metadata_message({"type": "error", "command": command.command, "message": str(error)}))
        else:
            names = await asyncio.to_thread(self._service.memories.names)
            answer = {"type": "done", "command": command.command, **done, "memories": names}
            self._send(metadata_message(answer))

    async def _do(self, command: Command) -> dict[str, Any]:
        """Does it; returns what the answer says of it. Raises `InputError` if it cannot be done."""
        service, ticks = self._service, self._service.ticks
        if command.command in ("memory", "gate"):
            changed = {command.command: command.value}
            await ticks.call(
                lambda talks: talks.change(self._row, replace(talks.settings(self._row), **changed))  # type: ignore
            )
            return {"value": command.value}
        if command.command == "reset":
            await ticks.call(lambda talks: talks.put_memory(self._row, None))
        elif command.command == "save":
            talk = await ticks.call(lambda talks: talks.take(self._row))
            await service.memories.save(command.name, talk)
            return {"name": command.name}
        elif command.command == "load":
            memory = await service.memories.load(command.name)
            await ticks.call(lambda talks: talks.put_memory(self._row, memory))
            return {"name": command.name}
        else:
            return {"key": await self._fork()}
        return {}

    async def _fork(self) -> str:
        ticks = self._service.ticks
        seat = ticks.seat()
        if seat is None:
            raise InputError(
                f"all {ticks.rows} talks are taken: wait until one ends, or start the server with more rows."
            )

        def join(talks: Talks) -> None:
            seat.row = talks.join(talks.settings(self._row), talk=talks.take(self._row))

        try:
            await ticks.call(join)
            return self._service.keep_fork(seat, self._seed)
        except BaseException:
            ticks.give_back(seat)
            raise

    # To the client

    def _send(self, message: bytes) -> None:
        try:
            self._outbox.put_nowait(message)
        except asyncio.QueueFull:
            raise _NotReading from None

    async def _send_all(self) -> None:
        while True:
            try:
                async with asyncio.timeout(KEEP_ALIVE):
                    message = await self._outbox.get()
            except TimeoutError:
                message = PING
            try:
                await self._ws.send_bytes(message)
            except ConnectionError:  # the client is gone
                return

    def _say(self, reply: Reply) -> None:
        if reply.audio is not None:
            coded = to_pcm(reply.audio) if self._writer is None else self._writer.append(reply.audio)
            if coded:
                self._send(bytes([Kind.AUDIO]) + coded)
        if text := self._words.next(reply.text):
            self._send(text_message(text))

    def _measurement(self, reply: Reply) -> bytes:
        cfg, inner = self._service.speech.cfg, reply.inner
        layers = []
        if inner is not None:
            names = ("loss_base", "loss_before", "loss_after", "displacement")
            layers = [
                {"layer": layer, **{name: _finite(getattr(inner, name)[i]) for name in names}}
                for i, layer in enumerate(cfg.ttt_layers)
            ]
        waits = {"queue": self._inbox.frames, "dropped": self._dropped}
        return metadata_message({"type": "frame", "frame": self._heard, "layers": layers, **waits})

    async def _hello(self) -> bytes:
        service, codec, cfg = self._service, self._service.speech.codec, self._service.speech.cfg
        settings = await service.ticks.call(lambda talks: talks.settings(self._row))
        return metadata_message(
            {
                "type": "hello",
                "sample_rate": codec.sample_rate,
                "frame_size": codec.frame_size,
                "frame_rate": codec.frame_rate,
                "checkpoint": service.name,
                "codec": codec.name,
                "ttt_layers": list(cfg.ttt_layers),
                "context": cfg.context,
                "every": service.every,
                "memories": await asyncio.to_thread(service.memories.names),
                "memory": settings.memory,
                "gate": settings.gate,
            }
        )


def _finite(value: Any) -> float | None:
    return float(value) if np.isfinite(value) else None


async def serve(
    ws: web.WebSocketResponse, abort: Callable[[], None], request: Request, seed: int, seat: Seat, service: Service
) -> None:
    """Runs a session over a websocket that is open, gives its seat back, and closes the websocket.

    `abort` drops the connection of a client that does not read, with what waits to be sent.
    """
    code, sentence, reads = NORMAL, "", True
    try:
        await Session(ws, request, seed, seat, service).run()
    except _Ends as end:
        code, sentence = end.code, str(end)
    except _NotReading:
        reads = False
    finally:
        service.ticks.give_back(seat)
    if reads:
        await _close(ws, code, sentence)
    else:
        abort()


async def _close(ws: web.WebSocketResponse, code: int, sentence: str) -> None:
    """Says why and closes; a client that does not answer is left."""
    try:
        async with asyncio.timeout(CLOSING_SECONDS):
            if sentence and not ws.closed:
                await ws.send_bytes(error_message(sentence))
            await ws.close(code=code, message=sentence[:120].encode("ascii", "replace"))
    except (TimeoutError, ConnectionError):
        pass
