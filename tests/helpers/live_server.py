"""A live server in a thread of the tests, and clients for it."""

from __future__ import annotations

import asyncio
import dataclasses
import functools
import json
import threading
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import aiohttp
import numpy as np
from aiohttp import web

from tests.helpers import micro
from tests.helpers.eval_models import params
from ttt_jax.codec import load_codec
from ttt_jax.data.corpus import EMBEDDED
from ttt_jax.data.text import load_tokenizer
from ttt_jax.serve.access import Access, access
from ttt_jax.serve.app import make_app
from ttt_jax.serve.memories import Memories
from ttt_jax.serve.metrics import Metrics
from ttt_jax.serve.protocol import Words, from_pcm, to_pcm
from ttt_jax.serve.server import warm_up
from ttt_jax.serve.service import Limits, Service
from ttt_jax.serve.speech import Speech
from ttt_jax.serve.talks import Talks, TalkSettings
from ttt_jax.serve.ticks import Ticks

ROWS = 6
QUEUE = 25


@functools.cache
def speech() -> Speech:
    """The smallest model with the embedded codec."""
    return Speech(params(), micro.MODEL, load_codec())


@functools.cache
def tokenizer():
    """The embedded one."""
    return load_tokenizer(EMBEDDED / "tokenizer" / "spm512.model")


class Live:
    """One server's talks, in a thread; `start` opens further ports with other rules for them."""

    def __init__(self, folder: Path, rows: int = ROWS) -> None:
        self.rows = rows
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self.loop.run_forever, daemon=True)
        self._thread.start()
        self._runners: list[web.AppRunner] = []
        self.folder = folder
        self.run(self._make())

    async def _make(self) -> None:
        metrics = Metrics()
        ticks = Ticks(Talks(speech(), self.rows, measured=True), metrics)
        memories = Memories(self.folder, 3, speech(), "digest of weights")
        self.service = Service("a run", speech(), tokenizer(), ticks, metrics, memories, Limits(QUEUE), 5)
        await ticks.call(warm_up)
        self._steps = asyncio.create_task(ticks.run())

    def run(self, job: Awaitable):
        """Runs a coroutine in the server's thread."""
        return asyncio.run_coroutine_threadsafe(job, self.loop).result(60)

    def start(self, rules: Access | None = None, **changes) -> str:
        """Opens a port; returns its address. `changes` are of the `Limits`."""
        page = self.folder.parent / "page"
        page.mkdir(exist_ok=True)
        (page / "index.html").write_text("<p>a page</p>")
        (page / "main.js").write_text("1")

        async def begin() -> str:
            service = dataclasses.replace(self.service, limits=dataclasses.replace(self.service.limits, **changes))
            runner = web.AppRunner(make_app(service, rules or access("127.0.0.1", None, ()), page))
            await runner.setup()
            self._runners.append(runner)
            site = web.TCPSite(runner, "127.0.0.1", 0)
            await site.start()
            return f"http://127.0.0.1:{site._server.sockets[0].getsockname()[1]}"

        return self.run(begin())

    def empty(self, seconds: float = 10.0) -> bool:
        """Whether all rows are free, or are soon."""

        async def wait() -> bool:
            for _ in range(int(seconds / 0.01)):
                free = await self.service.ticks.call(lambda talks: talks.free)
                if free == self.rows and self.service.ticks.taken == 0:
                    return True
                await asyncio.sleep(0.01)
            return False

        return self.run(wait())

    def close(self) -> None:
        """Ends the server; raises what ended its steps."""

        async def end() -> None:
            for runner in self._runners:
                await runner.cleanup()
            assert not self._steps.done(), self._steps
            self._steps.cancel()
            self.service.ticks.close()

        self.run(end())
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join()


@contextmanager
def live(folder: Path, rows: int = ROWS) -> Iterator[Live]:
    """A server, closed at the end."""
    server = Live(folder / "memories", rows)
    try:
        yield server
    finally:
        server.close()


# What a client sends, and what it should hear


def voice(frames: int, seed: int = 0) -> list[bytes]:
    """The user's voice, a message of PCM for each frame."""
    rng = np.random.default_rng(seed)
    level = 10 ** rng.uniform(-2, -0.5, (frames, 1))
    return [to_pcm(frame) for frame in level * rng.standard_normal((frames, speech().codec.frame_size))]


class ByHand:
    """A talk without a server: what it says to frames of PCM."""

    def __init__(self, seed: int, settings: TalkSettings | None = None, first_frame="once", rows=ROWS) -> None:
        self.talks = Talks(speech(), rows, measured=True)
        self.row = self.talks.join(settings or TalkSettings(), seed, first_frame)
        self._words = Words(tokenizer())
        self.text = ""

    def hear(self, frames: list[bytes]) -> bytes:
        """The answer as PCM."""
        replies = [reply for frame in frames for reply in self.talks.step({self.row: from_pcm(frame)})]
        self.text += "".join(self._words.next(reply.text) for reply in replies)
        return b"".join(to_pcm(reply.audio) for reply in replies if reply.audio is not None)


class Client:
    """A websocket, what has come over it sorted by kind."""

    def __init__(self, ws: aiohttp.ClientWebSocketResponse) -> None:
        self.ws = ws
        self.audio, self.text, self.metadata, self.errors = b"", "", [], []
        self.kinds: list[int] = []

    async def send(self, *messages: bytes, kind: int = 1) -> None:
        for message in messages:
            await self.ws.send_bytes(bytes([kind]) + message)

    async def order(self, command: str, **fields) -> dict:
        """Sends a command; returns the answer."""
        await self.ws.send_bytes(b"\x04" + json.dumps({"command": command, **fields}).encode())
        answered = lambda: [m for m in self.metadata if m["type"] in ("done", "error")]  # noqa: E731
        before = len(answered())
        await self.until(lambda: len(answered()) > before)
        return answered()[-1]

    async def until(self, enough: Callable[[], bool]) -> None:
        """Reads until `enough()`, or the server closes."""
        while not enough():
            message = await asyncio.wait_for(self.ws.receive(), 20)
            if message.type != aiohttp.WSMsgType.BINARY:
                return
            kind, payload = message.data[0], message.data[1:]
            self.kinds.append(kind)
            if kind == 1:
                self.audio += payload
            elif kind == 2:
                self.text += payload.decode()
            elif kind == 4:
                self.metadata.append(json.loads(payload))
            elif kind == 5:
                self.errors.append(payload.decode())

    async def hear(self, audio: int) -> bytes:
        """Takes `audio` bytes of PCM."""
        await self.until(lambda: len(self.audio) >= audio)
        taken, self.audio = self.audio[:audio], self.audio[audio:]
        return taken

    async def end(self) -> int:
        """Reads until the server closes; the code."""
        await self.until(lambda: False)
        return self.ws.close_code


def with_client(url: str, talk: Callable[[Client], Awaitable], headers: dict | None = None, **query):
    """Runs `talk` with a client of PCM; returns what it returns."""

    async def job():
        async with connected(url, headers, **query) as client:
            return await talk(client)

    return asyncio.run(job())


class connected:  # noqa: N801
    """A client of PCM as an asynchronous context."""

    def __init__(self, url: str, headers: dict | None = None, **query) -> None:
        self._url, self._headers, self._query = f"{url}/api/chat", headers, {"audio": "pcm", **query}

    async def __aenter__(self) -> Client:
        self._session = aiohttp.ClientSession()
        try:
            ws = await self._session.ws_connect(self._url, params=self._query, headers=self._headers, max_msg_size=0)
        except BaseException:
            await self._session.close()
            raise
        return Client(ws)

    async def __aexit__(self, *_) -> None:
        await self._session.close()
