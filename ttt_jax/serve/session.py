"""One client: frames and commands of its messages go to a talk, what the talk says becomes messages."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from ttt_jax.errors import InputError
from ttt_jax.serve.opus import OpusWriter
from ttt_jax.serve.protocol import (
    HANDSHAKE,
    PING,
    Command,
    Kind,
    Request,
    Words,
    error_message,
    metadata_message,
    text_message,
    to_pcm,
)
from ttt_jax.serve.receiver import GOING_AWAY, NORMAL, POLICY, Ends, Receiver, Restart
from ttt_jax.serve.service import Service
from ttt_jax.serve.talks import Reply, Talks
from ttt_jax.serve.ticks import Seat

if TYPE_CHECKING:
    from aiohttp import web

KEEP_ALIVE = 5.0
"""Seconds without a message after which a ping is sent: Kyutai's clients close after 10."""
OUTGOING = 128
"""Messages that wait for a client that does not read, before it is closed."""
CLOSING_SECONDS = 2.0
"""How long a client may take to say goodbye."""
SHARE = 4
"""Reading a client's messages rests this many times as long as it worked: a flood leaves time for the others."""


class _NotReading(Exception):
    """The client does not read what is sent."""


class Session:
    """The talk of one client, from the handshake on."""

    def __init__(self, ws: web.WebSocketResponse, request: Request, seed: int, seat: Seat, service: Service) -> None:
        """`seat` is that of a talk which has joined; `seed` is for when it begins anew."""
        self._ws, self._request, self._seed, self._seat, self._service = ws, request, seed, seat, service
        codec = service.speech.codec
        self._writer = OpusWriter(codec.sample_rate) if request.coding == "opus" else None
        self._words = Words(service.tokenizer)
        self._receiver = Receiver(request, codec, service.limits, service.metrics, self._send)
        self._inbox = self._receiver.inbox
        self._outbox: asyncio.Queue[bytes] = asyncio.Queue(OUTGOING)
        self._heard = 0

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
        raise Ends(GOING_AWAY, "the server stops.")

    # From the client

    async def _receive_all(self) -> None:
        from aiohttp import WSMsgType

        idle = self._service.limits.idle
        while True:
            try:
                async with asyncio.timeout(idle):
                    message = await self._ws.receive()
                    if message.type == WSMsgType.PING:
                        await self._ws.pong(message.data)
            except TimeoutError:
                raise Ends(POLICY, f"no message came for {idle:g} s: the talk is closed.") from None
            except ConnectionError:  # the client is gone
                return
            if message.type == WSMsgType.BINARY:
                parts = self._receiver.receive(message.data)
            elif message.type in (WSMsgType.PING, WSMsgType.PONG):
                parts = self._receiver.receive(PING)  # counts as one of ours
            elif message.type == WSMsgType.TEXT:
                parts = self._receiver.receive(b"\xff")  # no kind of message
            else:
                return
            start = time.thread_time()
            for _ in parts:
                await asyncio.sleep(SHARE * (time.thread_time() - start))
                start = time.thread_time()

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
            elif isinstance(item, Restart):
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
        waits = {"queue": self._inbox.frames, "dropped": self._receiver.dropped}
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
    except Ends as end:
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
