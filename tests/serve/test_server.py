"""The live server over websockets: each talk equals one by hand, whatever other clients do."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import logging
import socket

import aiohttp
import numpy as np
import pytest

from eval.generating import talk as generating
from eval.generating.inputs import Input
from tests.helpers import live_server, micro, tiny_mimi
from tests.helpers.eval_models import params
from tests.helpers.live_server import QUEUE, ROWS, ByHand, connected, live, speech, voice, with_client
from ttt_jax.serve import inbox, receiver, service, session
from ttt_jax.serve.access import access
from ttt_jax.serve.protocol import from_pcm, to_pcm
from ttt_jax.serve.speech import Speech
from ttt_jax.serve.talks import Talks, TalkSettings

FRAMES = 14


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with live(tmp_path_factory.mktemp("server")) as server:
        yield server


@pytest.fixture(scope="module")
def url(server):
    return server.start()


@pytest.fixture(autouse=True)
def rows_are_freed_and_no_error_is_logged(server, caplog):
    yield
    assert server.empty()
    assert [record for record in caplog.get_records("call") if record.levelno >= logging.ERROR] == []


def said(url: str, frames: list[bytes], **query) -> bytes:
    """The PCM that a client hears for its frames."""

    async def talk(client):
        await client.send(*frames)
        return await client.hear(len(ByHand(0, first_frame=query.get("first_frame", "once")).hear(frames)))

    return with_client(url, talk, **query)


@pytest.mark.parametrize("first_frame", ["once", "twice"])
def test_a_talk_equals_one_by_hand(url, first_frame):
    frames, hand = voice(FRAMES), ByHand(7, first_frame=first_frame)
    expected = hand.hear(frames)

    async def talk(client):
        await client.send(*frames)
        audio = await client.hear(len(expected))
        await client.until(lambda: len(client.text) >= len(hand.text))
        return audio, client

    audio, client = with_client(url, talk, audio_seed="7", first_frame=first_frame)
    assert audio == expected
    assert client.text == hand.text != ""
    assert client.kinds[0] == 0
    assert set(client.kinds) == {0, 1, 2}  # neither metadata nor errors unless asked for
    assert len(set(np.frombuffer(audio, "<i2"))) > 100


def test_frames_may_come_in_pieces_of_any_length(url):
    frames = voice(FRAMES)
    whole = b"".join(frames)
    cuts = [0, *sorted(np.random.default_rng(0).integers(0, len(whole) // 2, 50) * 2), len(whole)]
    pieces = [whole[a:b] for a, b in zip(cuts, cuts[1:], strict=False)]
    expected = ByHand(3).hear(frames)

    async def talk(client):
        await client.send(*pieces)
        return await client.hear(len(expected))

    assert with_client(url, talk, text_seed="3") == expected


def test_the_url_says_how_a_talk_samples_and_learns(url):
    frames = voice(FRAMES)
    quiet = {"audio_temperature": "0.3", "audio_topk": "9", "text_temperature": "0", "text_topk": "5"}
    sampling = TalkSettings().sampling._replace(temperature=0.3, top_k=9, text_temperature=0.0, text_top_k=5)
    plain = ByHand(1).hear(frames)
    for query, settings in (
        (quiet, TalkSettings(sampling)),
        ({"memory": "frozen"}, TalkSettings(memory="frozen")),
        ({"memory": "off"}, TalkSettings(memory="off")),
        ({"gate": "-0.9"}, TalkSettings(gate=-0.9)),
    ):
        expected = ByHand(1, settings).hear(frames)
        assert expected != plain
        assert said(url, frames, audio_seed="1", **query) == expected


def test_other_clients_change_no_bit(url):
    others_change_no_bit(url, ROWS)


@pytest.mark.slow
def test_of_32_clients_none_changes_a_bit_of_another(tmp_path):
    with live(tmp_path, 32) as server:
        others_change_no_bit(server.start(), 32)
        assert server.empty()


def others_change_no_bit(url: str, rows: int) -> None:
    """One client goes in the middle, one sends garbage, one pauses and goes on; all others talk."""
    talking = rows - 2
    voices = [voice(FRAMES, seed) for seed in range(talking)]
    expected = [ByHand(seed, rows=rows).hear(frames) for seed, frames in enumerate(voices)]

    async def good(seed):
        async with connected(url, audio_seed=str(seed)) as client:
            heard = b""
            step = len(expected[seed]) // (FRAMES - 1)
            for frame in range(FRAMES):
                await client.send(voices[seed][frame])
                if frame:
                    heard += await client.hear(step)
            return heard

    async def pausing():
        frames = voice(FRAMES, 9)
        async with connected(url, audio_seed="9") as client:
            await client.send(*frames[:5])
            await client.send(b"\x02", kind=3)
            await client.send(*voice(3, 10), frames[0][:600])  # nobody hears these
            await asyncio.sleep(0.05)
            await client.send(b"\x00", kind=3)
            await client.send(*frames[5:])
            return await client.hear(len(ByHand(9, rows=rows).hear(frames)))

    async def hostile():
        for seed in range(4):
            rng = np.random.default_rng(seed)
            with contextlib.suppress(aiohttp.WSServerHandshakeError):
                async with connected(url, audio="opus") as client:
                    await client.send(rng.bytes(5000))
                    await client.end()
            with contextlib.suppress(aiohttp.WSServerHandshakeError):  # the row of the last one is not free yet
                async with connected(url, audio_seed="1") as client:
                    await client.send(*voice(3))
                    client.ws._response.connection.transport.abort()

    async def all_of_them():
        return await asyncio.gather(*(good(seed) for seed in range(talking)), pausing(), hostile())

    *heard, paused, _ = asyncio.run(all_of_them())
    assert heard == expected
    assert paused == ByHand(9, rows=rows).hear(voice(FRAMES, 9))


def test_eval_generate_says_the_same(url, tmp_path):
    frames = voice(FRAMES)
    source = Input(tmp_path / "user.wav", "user", digest="0123456789abcdef")
    talks = Talks(speech(), ROWS, measured=True)
    (made,) = generating.generate(
        talks, [source], lambda _: from_pcm(b"".join(frames)), generating.Plan(first_frame="twice")
    )
    assert said(url, frames, audio_seed=str(source.seed(0)), first_frame="twice") == to_pcm(made.voice)


def test_restart_begins_the_talk_anew(url):
    frames = voice(FRAMES)
    expected = ByHand(5).hear(frames)

    async def talk(client):
        await client.send(*voice(6, 1))
        await client.hear(len(ByHand(5).hear(voice(6, 1))))
        await client.send(frames[3][:1000])  # of a frame that never is whole
        await client.send(b"\x03", kind=3)
        await client.send(*frames)
        return await client.hear(len(expected))

    assert with_client(url, talk, audio_seed="5") == expected


def test_restart_drops_what_waits(url):
    frames = voice(FRAMES)
    expected = ByHand(5).hear(frames)

    async def talk(client):
        await client.send(b"".join(voice(20, 1)))
        await client.send(b"\x03", kind=3)
        await client.send(b"".join(frames))
        await client.until(lambda: client.audio.endswith(expected))
        return len(client.audio) - len(expected)

    step = len(expected) // (FRAMES - 1)
    assert with_client(url, talk, audio_seed="5") < 19 * step


# Metadata


def test_metadata_describes_the_talk_and_changes_no_bit(url):
    frames, hand = voice(FRAMES), ByHand(2)
    expected = hand.hear(frames)

    async def talk(client):
        await client.send(*frames)
        audio = await client.hear(len(expected))
        return audio, client.metadata

    audio, (hello, *measured) = with_client(url, talk, audio_seed="2", metadata="1")
    assert audio == expected
    codec = speech().codec
    assert hello == {
        "type": "hello",
        "sample_rate": codec.sample_rate,
        "frame_size": codec.frame_size,
        "frame_rate": 12.5,
        "checkpoint": "a run",
        "codec": codec.name,
        "ttt_layers": [1],
        "context": 8,
        "every": 5,
        "memories": hello["memories"],
        "memory": "on",
        "gate": None,
    }
    assert [frame["frame"] for frame in measured] == [5, 10]
    hand = ByHand(2)
    replies = [hand.talks.step({hand.row: np.frombuffer(frame, "<i2") / np.float32(32768)})[-1] for frame in frames[:5]]
    (layer,) = measured[0]["layers"]
    inner = replies[-1].inner
    assert layer == {"layer": 1} | {
        name: float(getattr(inner, name)[0]) for name in ("loss_base", "loss_before", "loss_after", "displacement")
    }


def test_commands_do_what_they_say(server, url):
    frames, later = voice(FRAMES), voice(FRAMES, 1)
    one, other = ByHand(4), ByHand(8)

    async def talk(client):
        async def hears(sent, hand):
            await client.send(*sent)
            expected = hand.hear(sent)
            assert await client.hear(len(expected)) == expected

        await hears(frames, one)
        saved = await client.order("save", name="a")
        assert saved == {"type": "done", "command": "save", "name": "a", "memories": ["a"]}
        memory = one.talks.take_memory(one.row)
        await client.order("memory", value="frozen")
        one.talks.change(one.row, TalkSettings(memory="frozen"))
        await hears(later, one)
        assert (await client.order("gate", value=0.9))["value"] == 0.9
        one.talks.change(one.row, TalkSettings(memory="frozen", gate=0.9))
        await hears(later, one)
        await client.order("reset")
        one.talks.put_memory(one.row, None)
        await hears(frames, one)
        return memory

    memory = with_client(url, talk, audio_seed="4", metadata="1")

    async def takes_up(client):
        assert (await client.order("load", name="a"))["type"] == "done"
        other.talks.put_memory(other.row, memory)
        await client.send(*frames)
        expected = other.hear(frames)
        assert expected != ByHand(8).hear(frames)
        assert await client.hear(len(expected)) == expected

    with_client(url, takes_up, audio_seed="8", metadata="1")
    assert [file.name for file in server.folder.iterdir()] == ["a.safetensors"]
    (server.folder / "a.safetensors").unlink()


def test_commands_that_cannot_be_done_are_answered_in_one_sentence(server, url):
    async def talk(client):
        answers = [
            await client.order("load", name="no-such"),
            await client.order("load", name="../a"),
            await client.order("gate", value=2),
            await client.order("dance"),
        ]
        for name in "bcd":
            assert (await client.order("save", name=name))["type"] == "done"
        answers.append(await client.order("save", name="e"))
        assert (await client.order("save", name="b"))["type"] == "done"  # replaced
        (server.folder / "c.safetensors").write_bytes(b"no talk")
        answers.append(await client.order("load", name="c"))
        await client.send(*voice(3))
        await client.hear(len(ByHand(0).hear(voice(3))))  # it goes on
        return answers

    answers = with_client(url, talk, metadata="1")
    for file in server.folder.iterdir():
        file.unlink()
    assert [answer["type"] for answer in answers] == ["error"] * 6
    for answer, part in zip(answers, ["no-such", "../a", "gate=2", "dance", "3 memories", "c "], strict=False):
        assert part in answer["message"].replace("'2'", "2"), answer
        assert str(server.folder) not in answer["message"]


def test_a_memory_that_cannot_be_written_is_named_without_the_servers_folder(server, url):
    place = server.folder / "a.safetensors"
    place.mkdir(parents=True)

    async def talk(client):
        return await client.order("save", name="a")

    answer = with_client(url, talk, metadata="1")
    place.rmdir()
    assert answer["type"] == "error"
    assert answer["message"].startswith("a could not be written")
    assert str(server.folder) not in answer["message"]


def test_a_fork_goes_on_beside_its_talk(url):
    frames, later = voice(FRAMES), voice(FRAMES, 1)
    hand = ByHand(6, TalkSettings(gate=0.7))
    hand.hear(frames)
    expected = hand.hear(later)

    async def job():
        async with connected(url, audio_seed="6", metadata="1", gate="0.7") as client:
            await client.send(*frames)
            await client.hear(len(ByHand(6).hear(frames)))
            key = (await client.order("fork"))["key"]
            with pytest.raises(aiohttp.WSServerHandshakeError) as wrong:
                async with connected(url, fork=key[:-1]):
                    pass
            async with connected(url, fork=key, metadata="1") as fork:
                await fork.send(*later)
                heard = [await fork.hear(len(expected))]
                gate = fork.metadata[0]["gate"]
            with pytest.raises(aiohttp.WSServerHandshakeError) as again:
                async with connected(url, fork=key):
                    pass
            await client.send(*later)
            heard.append(await client.hear(len(expected)))
            return heard, gate, wrong.value.status, again.value.status

    assert asyncio.run(job()) == ([expected, expected], 0.7, 404, 404)


def test_a_fork_that_nobody_takes_up_frees_its_row(server, url, monkeypatch):
    monkeypatch.setattr(service, "FORK_SECONDS", 0.05)

    async def talk(client):
        await client.order("fork")
        assert server.service.ticks.taken == 2
        await asyncio.sleep(0.2)
        assert server.service.ticks.taken == 1

    with_client(url, talk, metadata="1")


# Limits


def test_a_client_too_many_is_refused(server, url):
    before = server.service.metrics.refused

    async def job():
        async with contextlib.AsyncExitStack() as stack:
            clients = [await stack.enter_async_context(connected(url, metadata="1")) for _ in range(ROWS)]
            with pytest.raises(aiohttp.WSServerHandshakeError) as refused:
                await stack.enter_async_context(connected(url))
            async with aiohttp.ClientSession() as http, http.get(f"{url}/metrics") as page:
                return refused.value.status, await clients[0].order("fork"), await page.text()

    status, no_row, text = asyncio.run(job())
    assert status == 503
    assert no_row["type"] == "error"
    assert f"ttt_jax_talks {ROWS}\n" in text
    assert server.service.metrics.refused == before + 1


def test_a_flood_drops_the_oldest_frames_and_counts_them(server, url):
    flood, messages = b"".join(voice(FRAMES)), 40
    before = server.service.metrics.dropped

    def counted(client):
        frames = [message for message in client.metadata if message["type"] == "frame"]
        assert all(frame["queue"] <= QUEUE for frame in frames)
        return bool(frames) and sum(frames[-1][name] for name in ("frame", "dropped", "queue")) == messages * FRAMES

    async def talk(client):
        await client.send(*[flood] * messages)
        await client.until(lambda: counted(client))
        return client.metadata[-1]

    last = with_client(url, talk, metadata="1")
    assert last["dropped"] > 100
    assert server.service.metrics.dropped - before >= last["dropped"]


@pytest.mark.parametrize(
    ("query", "messages", "limits", "code", "says"),
    [
        ({}, [b"\x01" + bytes(1 << 16)], {}, 1009, "65,537 bytes"),
        ({}, [b"\x01" + bytes(3)], {}, 1007, "even number"),
        ({}, [b"\x01"] * 101, {}, 1008, "100 messages have no whole frame"),
        ({}, [b"\x06"] * 101, {}, 1008, "100 messages have no whole frame"),
        ({"audio": "opus"}, [b"\x01garbage"], {}, 1007, "OggS"),
        ({}, [], {"idle": 0.1}, 1008, "no message came for 0.1 s"),
        (
            {"metadata": "1"},
            [b"\x01" + b"".join(voice(20))] + [b'\x04{"command": "reset"}'] * 3,
            {},
            1008,
            "2 commands wait",
        ),
    ],
    ids=["large", "half a sample", "nothing", "pings", "garbage", "idle", "commands"],
)
def test_who_breaks_a_limit_is_told_and_closed(server, monkeypatch, query, messages, limits, code, says):
    monkeypatch.setattr(receiver, "WITHOUT_FRAME", 100)
    monkeypatch.setattr(inbox, "COMMANDS", 2)

    async def talk(client):
        for message in messages:
            await client.ws.send_bytes(message)
        return await client.end(), client.errors

    closed, errors = with_client(server.start(**limits), talk, **query)
    assert closed == code
    assert says in "".join(errors)


def test_pings_of_the_websocket_are_answered_and_counted(server, monkeypatch):
    """aiohttp by itself would answer any number of them at once, while all talks wait."""
    url = server.start(idle=10)
    monkeypatch.setattr(receiver, "WITHOUT_FRAME", 100)

    async def job():
        async with aiohttp.ClientSession() as http, http.ws_connect(f"{url}/api/chat", autoping=False) as ws:
            for i in range(101):
                await ws.ping(str(i).encode())
            return [(message.type, message.data) async for message in ws]

    messages = asyncio.run(job())
    pongs = [data for kind, data in messages if kind == aiohttp.WSMsgType.PONG]
    assert pongs == [str(i).encode() for i in range(101)]
    assert messages[-1][1].endswith(b"100 messages have no whole frame of audio: send larger ones.")


def test_samples_that_are_not_finite_end_their_talk_alone(url, monkeypatch):
    """No coding has them today; in a step they would end all talks."""
    monkeypatch.setattr(receiver, "from_pcm", lambda payload: np.full(len(payload) // 2, np.nan, np.float32))

    async def talk(client):
        await client.send(*voice(1))
        return await client.end(), client.errors

    code, errors = with_client(url, talk)
    assert code == 1007
    assert "not finite" in errors[0]


def test_a_message_that_is_much_too_large_is_cut_off(url):
    async def talk(client):
        with contextlib.suppress(ConnectionError):
            await client.ws.send_bytes(bytes(10_000_000))
        return await client.end()

    assert with_client(url, talk) in (1006, 1009)


def test_a_client_that_does_not_read_is_closed(server, url):
    """It sends frames and never reads; another talk goes on meanwhile."""
    host, port = url.removeprefix("http://").split(":")
    frames = voice(FRAMES)
    message = b"\x01" + b"".join(frames[:10])
    with socket.socket() as deaf:
        deaf.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        deaf.settimeout(30)
        deaf.connect((host, int(port)))
        deaf.sendall(
            b"GET /api/chat?audio=pcm HTTP/1.1\r\nHost: localhost\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
            b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n\r\n"
        )
        frame = b"\x82\xfe" + len(message).to_bytes(2, "big") + bytes(4) + message
        with pytest.raises(OSError, match="reset|Broken pipe"):
            deaf.sendall(frame * 2000)
        assert server.empty()
    assert said(url, frames, audio_seed="2") == ByHand(2).hear(frames)


def test_unknown_kinds_and_parameters_are_passed_over_with_one_line(url, caplog):
    frames = voice(FRAMES)
    expected = ByHand(1).hear(frames)

    async def talk(client):
        for kind in (9, 9, 200):
            await client.send(b"what", kind=kind)
        await client.ws.send_str("text")
        await client.ws.send_bytes(b"")
        for kind in (0, 2, 4, 5, 6):
            await client.send(b"\x00", kind=kind)
        await client.send(b"\x01", kind=3)  # end of turn
        await client.send(*frames)
        return await client.hear(len(expected))

    query = {"pad_mult": "1.5", "email": "", "repetition_penalty": "1.0", "new_one": "x", "text_prompt": "Be kind."}
    for _ in range(2):
        assert with_client(url, talk, audio_seed="1", **query) == expected
    lines = [record.getMessage() for record in caplog.records if record.name == "ttt_jax"]
    assert sum("unknown kind" in line for line in lines) == 2  # one for each talk
    assert sum("pad_mult" in line for line in lines) <= 1
    assert sum("text_prompt" in line for line in lines) <= 1
    assert not any("email" in line or "new_one" in line for line in lines)


def test_a_silent_server_sends_pings(url, monkeypatch):
    monkeypatch.setattr(session, "KEEP_ALIVE", 0.05)

    async def talk(client):
        await client.until(lambda: client.kinds.count(6) == 2)

    with_client(url, talk)


# Who may talk


def status(url: str, headers: dict | None = None, **query) -> int:
    """101 for a websocket that opens, else the HTTP status."""

    async def job():
        try:
            async with connected(url, headers, **query):
                return 101
        except aiohttp.WSServerHandshakeError as error:
            return error.status

    return asyncio.run(job())


def get(url: str, path: str, headers: dict | None = None) -> tuple[int, str, str]:
    async def job():
        async with aiohttp.ClientSession() as http, http.get(f"{url}{path}", headers=headers) as answer:
            return answer.status, answer.content_type, await answer.text()

    return asyncio.run(job())


def test_impossible_values_are_refused_before_the_talk(url):
    for query in (
        {"audio_temperature": "-1"},
        {"audio_temperature": "nan"},
        {"text_temperature": "hot"},
        {"audio_topk": "4294967295"},  # an error of the step that reads it would end all talks
        {"audio_seed": "-1"},
        {"audio": "mp3"},
        {"memory": "maybe"},
        {"gate": "3"},
        {"first_frame": "thrice"},
        {"metadata": "2"},
    ):
        assert status(url, **query) == 400, query
    code, _, text = get(url, "/api/chat?gate=3")
    assert code == 400
    assert "gate=3.0 cannot be" in text


def test_origins(url, server):
    assert status(url) == 101
    assert status(url, {"Origin": url}) == 101
    assert status(url, {"Origin": "https://evil.example"}) == 403
    assert status(url, {"Origin": "null"}) == 403
    allowed = server.start(access("127.0.0.1", None, ("https://good.example",)))
    assert status(allowed, {"Origin": "https://good.example"}) == 101


def test_a_foreign_name_for_this_machine_is_refused(url):
    assert status(url, {"Host": "evil.example", "Origin": "http://evil.example"}) == 403
    assert get(url, "/", {"Host": "evil.example:80"})[0] == 403
    host, port = url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), 10) as garbage:
        garbage.sendall(b"GET / HTTP/1.1\r\nHost: \xff\r\n\r\n")
        assert garbage.recv(12) == b"HTTP/1.1 403"
    assert get(url, "/", {"Host": "localhost:1234"})[0] == 200
    assert get(url, "/", {"Host": "[::1]"})[0] == 200


def test_off_loopback_a_token_is_needed(server):
    rules = access("0.0.0.0", None, ())
    assert len(rules.token) >= 32
    far = server.start(rules)
    assert status(far) == 401
    assert status(far, token="x" * 32) == 401
    assert status(far, token="é") == 401
    assert status(far, token=rules.token) == 101
    assert status(far, {"Authorization": f"Bearer {rules.token}"}) == 101
    assert get(far, "/metrics")[0] == 401
    assert get(far, f"/metrics?token={rules.token}")[0] == 200
    assert get(far, "/", {"Host": "example.org"})[0] == 200


def test_the_page_and_nothing_beside_it(url, server):
    (server.folder.parent / "secret.txt").write_text("secret")
    assert get(url, "/") == (200, "text/html", "<p>a page</p>")
    for path in ("/static/main.js", "/main.js"):
        code, kind, text = get(url, path)
        assert (code, text) == (200, "1")
        assert kind in ("text/javascript", "application/javascript")  # by version of Python
    assert get(url, "/healthz")[0] == 200
    for path in ("/static/../secret.txt", "/static/%2e%2e/secret.txt", "/..%2fsecret.txt", "/static/"):
        code, _, text = get(url, path)
        assert code in (403, 404)
        assert text != "secret"


def test_metrics(url):
    said(url, voice(FRAMES))
    code, kind, text = get(url, "/metrics")
    assert (code, kind) == (200, "text/plain")
    lines = [line for line in text.splitlines() if not line.startswith("#")]
    values = {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines)}
    assert values["ttt_jax_rows"] == ROWS
    assert values["ttt_jax_frames_total"] >= FRAMES
    assert values["ttt_jax_tick_seconds_count"] >= FRAMES
    assert 0 < values['ttt_jax_tick_seconds{quantile="0.5"}'] <= values['ttt_jax_tick_seconds{quantile="0.99"}'] < 60
    assert values["ttt_jax_tick_seconds_sum"] > 0
    assert values["ttt_jax_talks_total"] >= 1
    assert values["ttt_jax_resident_memory_bytes"] > 1e8
    assert {"ttt_jax_talks", "ttt_jax_refused_total", "ttt_jax_dropped_frames_total"} <= set(values)


def test_what_is_waiting_is_heard_in_order(url):
    """Commands take effect between the frames that they came between."""
    frames = voice(QUEUE - 5)
    hand = ByHand(3)
    expected = hand.hear(frames[:10])
    hand.talks.put_memory(hand.row, None)
    expected += hand.hear(frames[10:])

    async def talk(client):
        await client.send(*frames[:10])
        await client.send(json.dumps({"command": "reset"}).encode(), kind=4)
        await client.send(*frames[10:])
        return await client.hear(len(expected))

    assert with_client(url, talk, audio_seed="3", metadata="1") == expected != ByHand(3).hear(frames)


def test_a_talk_with_a_mimi(tmp_path, monkeypatch):
    """Codec and model are one program then. Opus lacks the rate of this Mimi."""
    cfg = dataclasses.replace(micro.MODEL, n_q=8, dep_q=4, card=32, delays=(0, 0, 1, 1, 1, 0, 1, 1, 1))
    small = Speech(params(cfg), cfg, tiny_mimi.codec())
    monkeypatch.setattr(live_server, "speech", lambda: small)
    frames, hand = voice(FRAMES), ByHand(7)
    expected = hand.hear(frames)

    async def talk(client):
        await client.send(*frames)
        heard = await client.hear(len(expected))
        return heard, [(await client.order(*order))["type"] for order in (["reset"], ["fork"])]

    with live(tmp_path) as server:
        url = server.start()
        assert status(url, audio="opus") == 400
        assert with_client(url, talk, audio_seed="7", metadata="1") == (expected, ["done", "done"])
