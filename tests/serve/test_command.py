"""`python -m ttt_jax.serve` as a process: its end by a signal, its mistakes; Kyutai's own client."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from tests.helpers import in_process
from tests.helpers.converting import assert_one_sentence
from tests.helpers.live_server import connected, live, voice
from tests.helpers.places import ROOT


@pytest.fixture
def page(tmp_path) -> Path:
    (tmp_path / "index.html").write_text("a page")
    return tmp_path


def start(tiny_run, page: Path, *words: object) -> tuple[subprocess.Popen, str]:
    """The server, and the URL that it prints when it listens."""
    command = [sys.executable, "-m", "ttt_jax.serve", tiny_run.run, "--port", 0, "--static", page, *words]
    env = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT), "XDG_CACHE_HOME": str(page / "cache")}
    process = subprocess.Popen(
        list(map(str, command)), cwd=page, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    line = next((line for line in process.stdout if " talks at " in line), None)
    if line is None:
        raise RuntimeError(process.communicate()[1])
    return process, line.split()[-1].split("?")[0].rstrip("/")


@pytest.mark.integration
@pytest.mark.parametrize(("sent", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 0)])
def test_a_signal_ends_the_talks_and_the_server(tiny_run, page, sent, code):
    process, url = start(tiny_run, page, "--rows", 2, "--memories", page / "memories")

    async def talk():
        async with connected(url, metadata="1") as client:
            await client.send(*voice(10))
            await client.until(lambda: len(client.audio) > 5 * 2560)
            saved = await client.order("save", name="a")
            before = time.monotonic()
            process.send_signal(sent)
            return saved, await client.end(), client.errors, time.monotonic() - before

    try:
        saved, closed, errors, seconds = asyncio.run(talk())
        out, err = process.communicate(timeout=20)
    finally:
        process.kill()
    assert saved["memories"] == ["a"]
    assert (page / "memories" / "a.safetensors").stat().st_size > 1000
    assert (closed, errors) == (1001, ["the server stops."])
    assert seconds < 5
    assert process.returncode == code
    assert (out, err) == ("", "")


@pytest.mark.integration
def test_help_loads_no_jax(page):
    code = (
        "import sys; from ttt_jax.serve.__main__ import main\n"
        "try: main(['--help'])\nexcept SystemExit: pass\nassert not {'jax', 'aiohttp'} & set(sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True
    )
    assert done.returncode == 0, done.stderr
    assert b"--max-memories" in done.stdout


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nowhere"], "nowhere is no checkpoint"),
        (["nowhere", "--rows", "0"], "--rows 0 cannot be"),
        (["nowhere", "--idle", "nan"], "--idle nan cannot be"),
        (["nowhere", "--port", "65536"], "--port 65536 cannot be"),
        (["nowhere", "--host", "198.51.100.7"], "198.51.100.7 cannot be had"),
        (["nowhere", "--host", "no such host"], "is no address of this machine"),
        (["nowhere", "--tls-cert", "a.pem"], "belong together"),
        (["nowhere", "--tls-cert", "index.html", "--tls-key", "index.html"], "are no certificate and key"),
        (["nowhere", "--static", "/"], "has no index.html"),
        (["nowhere", "--token", ""], "--token is empty"),
        (["nowhere", "--origin", "https://example.org/"], "--origin https://example.org/ is no origin"),
        (["nowhere", "--origin", "example.org"], "--origin example.org is no origin"),
        (["nowhere", "--memories", "index.html"], "--memories index.html is no folder"),
    ],
)
def test_a_mistake_is_one_sentence(page, monkeypatch, words, message):
    monkeypatch.chdir(page)
    words = words if "--static" in words else [*words, "--static", "."]
    words = words if "--port" in words else [*words, "--port", "0"]
    assert_one_sentence(in_process.command("ttt_jax.serve", *words), message)


def test_a_port_that_is_taken_is_named_before_anything_is_loaded(page):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        done = in_process.command("ttt_jax.serve", "nowhere", "--static", page, "--port", port)
    assert_one_sentence(done, f"port {port} of 127.0.0.1 is taken")


class Sound:
    """The module `sounddevice` without a sound card: a microphone with a voice, and what the loudspeaker plays."""

    def __init__(self, microphone: np.ndarray) -> None:
        self.microphone, self.played = microphone, []

    def InputStream(self, **options):  # noqa: N802
        blocks = iter(self.microphone.reshape(-1, options["blocksize"], 1))
        return Device(lambda: options["callback"](next(blocks), options["blocksize"], None, None))

    def OutputStream(self, **options):  # noqa: N802
        def play():
            block = np.zeros((options["blocksize"], 1), np.float32)
            options["callback"](block, options["blocksize"], None, None)
            self.played.append(block[:, 0])

        return Device(play)


class Device:
    """Calls `beat` every 20 ms, four times as fast as in real time, until it stops or has no more."""

    def __init__(self, beat) -> None:
        self._beat, self._stops = beat, threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def _run(self) -> None:
        while not self._stops.wait(0.02):
            try:
                self._beat()
            except StopIteration:
                return

    def __enter__(self):
        self._thread.start()

    def __exit__(self, *_):
        self._stops.set()
        self._thread.join()


@pytest.mark.parity
def test_kyutais_client_talks(tmp_path, monkeypatch):
    """`moshi.client` as it is, with a recording for a microphone, against a server in this process."""
    soundfile, soxr = pytest.importorskip("soundfile"), pytest.importorskip("soxr")
    pytest.importorskip("moshi", reason="Kyutai's client is in the PyPI package moshi", exc_type=ImportError)
    import aiohttp

    audio, rate = soundfile.read(ROOT / "corpus/voices/en_us_f_allison/heldout-1.ogg", dtype="float32")
    audio = soxr.resample(audio, rate, 24000)[: 50 * 1920].astype(np.float32)
    sound = Sound(audio)
    monkeypatch.setitem(sys.modules, "sounddevice", sound)
    from moshi import client, client_utils

    said: list[str] = []

    class Printer(client_utils.RawPrinter):
        def print_token(self, token):
            said.append(token)

        def log(self, level, text):
            said.append(f"{level}: {text}")

    async def talk(url):
        async with aiohttp.ClientSession() as http, http.ws_connect(f"{url}/api/chat") as ws:
            connection = client.Connection(Printer(), ws, event_loop=asyncio.get_running_loop())
            running = asyncio.create_task(connection.run())
            await asyncio.sleep(50 * 0.02 + 1.5)
            await ws.close()
            await running

    with live(tmp_path) as server:
        asyncio.run(talk(server.start()))
        assert server.empty()
        heard = server.service.metrics.frames
    played = np.concatenate(sound.played)
    assert heard >= 45
    assert np.abs(played).max() > 0.01
    assert (np.abs(played.reshape(-1, 1920)).max(1) > 1e-3).sum() >= 30
    assert "".join(said).strip()
    assert not [line for line in said if line.startswith("error")], said
    assert [line for line in said if "unknown message kind" in line] in ([], ["warning: unknown message kind 0"])
