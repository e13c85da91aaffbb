"""Seeded clients that send anything and go at any moment: a talk beside them hears the same bits."""

from __future__ import annotations

import asyncio
import json
import logging

import aiohttp
import numpy as np
import pytest

from tests.helpers.live_server import ROWS, ByHand, connected, live, speech, voice
from ttt_jax.serve import service
from ttt_jax.serve.opus import OpusWriter

FRAMES = 12
QUERIES = {
    "audio": ["pcm", "opus", "opus", "mp3"],
    "metadata": ["0", "1", "1", "yes"],
    "memory": ["on", "off", "frozen", "x"],
    "gate": ["none", "0.5", "-1", "nan"],
    "audio_temperature": ["0", "0.8", "1e30", "-3", "1e-30"],
    "audio_topk": ["0", "1", "250", "100000", "2147483648", "x"],
    "audio_seed": ["0", "4294967295", "-5", ""],
    "first_frame": ["once", "twice"],
    "fork": ["no-such-key"],
    "token": ["x"],
}
ORDERS = [
    {"command": "memory", "value": "frozen"},
    {"command": "memory", "value": 3},
    {"command": "gate", "value": -0.5},
    {"command": "gate", "value": [[]]},
    {"command": "reset"},
    {"command": "save", "name": "a"},
    {"command": "save", "name": "../../x"},
    {"command": "load", "name": "a"},
    {"command": "load", "name": "b"},
    {"command": "fork"},
    {"command": None},
    [],
    "reset",
]


def message(rng: np.random.Generator, ogg: list[bytes]) -> bytes:
    """Something to send; `ogg`: pieces of an Ogg-Opus stream that are still to be sent."""
    match rng.integers(9):
        case 0:
            return rng.bytes(rng.integers(0, 300))
        case 1:
            return b"\x01" + rng.bytes(rng.integers(0, 5000))
        case 2:
            return b"\x01" + b"".join(voice(int(rng.integers(1, 12)), int(rng.integers(100))))
        case 3 | 4 if ogg:
            piece = bytearray(ogg.pop(0))
            if piece and rng.random() < 0.3:
                piece[rng.integers(len(piece))] ^= 1 << rng.integers(8)
            return b"\x01" + bytes(piece)
        case 5:
            return bytes([3, rng.integers(5)][: rng.integers(1, 3)])
        case 6 | 7:
            text = json.dumps(ORDERS[rng.integers(len(ORDERS))]).encode()
            return b"\x04" + (text if rng.random() < 0.8 else text[: rng.integers(len(text))])
        case _:
            return bytes([rng.integers(256)]) + rng.bytes(rng.integers(0, 30))


async def hostile(url: str, seed: int) -> bool:
    """One case; returns whether there was a talk."""
    rng = np.random.default_rng(seed)
    query = {name: str(rng.choice(values)) for name, values in QUERIES.items() if rng.random() < 0.12}
    query.setdefault("audio", str(rng.choice(["pcm", "opus"])))
    writer = OpusWriter(speech().codec.sample_rate)
    sound = rng.standard_normal((8, speech().codec.frame_size)).astype(np.float32) / 10
    ogg = [piece for piece in map(writer.append, sound) if piece]
    try:
        async with connected(url, **query) as client:
            for _ in range(rng.integers(1, 25)):
                await client.ws.send_bytes(message(rng, ogg))
                if rng.random() < 0.05:
                    await client.ws.send_bytes(bytes(140000 if rng.random() < 0.5 else 70000))
                if rng.random() < 0.05:
                    await client.ws.ping(rng.bytes(rng.integers(0, 126)))
                if rng.random() < 0.2:
                    await asyncio.sleep(0.002)
            match rng.integers(4):
                case 0:
                    client.ws._response.connection.transport.abort()
                case 1:
                    client.ws._response.connection.transport.write(rng.bytes(200))  # no frame of a websocket
                case 2:
                    await client.ws.close(code=int(rng.choice([1000, 1001, 4000])))
    except aiohttp.WSServerHandshakeError as error:
        if error.status not in (400, 404, 503):
            raise
        return False
    except (aiohttp.ClientError, ConnectionError, AttributeError):  # closed by the server in the middle
        pass
    return True


async def good(url: str, seed: int) -> None:
    """A talk that goes on beside them."""
    frames = voice(FRAMES, seed)
    expected = ByHand(seed).hear(frames)
    async with connected(url, audio_seed=str(seed)) as client:
        heard = b""
        for i, frame in enumerate(frames):
            await client.send(frame)
            if i:
                heard += await client.hear(len(expected) // (FRAMES - 1))
            await asyncio.sleep(0.01)
    assert heard == expected


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with live(tmp_path_factory.mktemp("fuzz")) as server, pytest.MonkeyPatch.context() as patch:
        patch.setattr(service, "FORK_SECONDS", 0.05)
        yield server


def cases(server, caplog, first: int, count: int) -> None:
    """Some at a time, each time beside a talk. No error of the server's own may be logged."""
    url, together, talked = server.start(), ROWS - 2, 0

    async def beside(start: int) -> int:
        end = min(start + 10, first + count)
        limit = asyncio.Semaphore(together)

        async def one(seed: int) -> bool:
            async with limit:
                return await hostile(url, seed)

        _, *there = await asyncio.gather(good(url, start), *(one(seed) for seed in range(start, end)))
        return sum(there)

    for start in range(first, first + count, 10):
        talked += asyncio.run(beside(start))
        assert server.empty()
    assert [record for record in caplog.records if record.levelno >= logging.ERROR] == []
    assert talked > count / 2


def test_thirty_cases(server, caplog):
    cases(server, caplog, 0, 30)


@pytest.mark.slow
def test_a_thousand_cases(server, caplog):
    cases(server, caplog, 1000, 1000)
