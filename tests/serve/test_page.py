"""The page of a live talk, in headless Chromium with a microphone that plays a recording, on the real server.

Run with -m integration; needs the package `playwright` and a Chromium or Chrome that is installed already.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from tests.helpers.live_server import ROWS, Live, live
from ttt_jax.serve.access import access
from ttt_jax.serve.app import PAGE, make_app

pytestmark = pytest.mark.integration

RECORDING = Path("corpus/voices/en_us_f_allison/heldout-1.ogg")
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
PHONE, DESK = {"width": 360, "height": 740}, {"width": 1280, "height": 900}
SILENT = 1e-3
"""RMS, full scale 1."""


def until(true: Callable[[], object], seconds: float = 15.0) -> None:
    """Waits until `true()`."""
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, f"not within {seconds} s"
        time.sleep(0.05)


@pytest.fixture(scope="module")
def heard() -> list[float]:
    """RMS of each frame that the server heard."""
    return []


@pytest.fixture(scope="module")
def server(tmp_path_factory, heard) -> Iterator[Live]:
    pytest.importorskip("playwright", reason="the package playwright is not installed")
    with live(tmp_path_factory.mktemp("server")) as server:
        talks = server.service.ticks._talks
        step = talks.step

        def listening(frames):
            heard.extend(float(np.sqrt(np.mean(frame**2))) for frame in frames.values())
            return step(frames)

        talks.step = listening
        yield server


class Address:
    """The page on a port of the server."""

    def __init__(self, server: Live, token: str | None = None) -> None:
        from aiohttp import web

        async def begin() -> str:
            service = dataclasses.replace(server.service)  # stops alone
            self._runner = web.AppRunner(make_app(service, access("127.0.0.1", token, ()), PAGE))
            await self._runner.setup()
            site = web.TCPSite(self._runner, "127.0.0.1", 0)
            await site.start()
            return f"http://127.0.0.1:{self._runner.addresses[0][1]}/"

        self._server = server
        self.url = server.run(begin())

    def cut(self) -> None:
        """Drops all connections, as a network does."""

        async def abort() -> None:
            for connection in self._runner.server.connections:
                connection.transport.abort()

        self._server.run(abort())

    def close(self) -> None:
        self._server.run(self._runner.cleanup())


@pytest.fixture(scope="module")
def address(server) -> Iterator[Address]:
    address = Address(server)
    yield address
    address.close()


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    api = pytest.importorskip("playwright.sync_api", reason="the package playwright is not installed")
    soundfile = pytest.importorskip("soundfile", reason="the package soundfile is not installed")
    found = next(filter(None, map(shutil.which, BROWSERS)), None)
    if found is None:
        pytest.skip(f"none of {', '.join(BROWSERS)} is installed")
    samples, rate = soundfile.read(RECORDING, dtype="float32")
    microphone = tmp_path_factory.mktemp("microphone") / "microphone.wav"
    soundfile.write(microphone, samples[: 30 * rate], rate)
    flags = [
        "--use-fake-device-for-media-stream",
        "--use-fake-ui-for-media-stream",
        f"--use-file-for-fake-audio-capture={microphone}",
    ]
    if os.geteuid() == 0:
        flags.append("--no-sandbox")
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=found, args=flags)
        yield browser
        browser.close()


class Tab:
    """A tab with the page, and what the page would complain of."""

    def __init__(self, page, url: str) -> None:
        self.page, self.complaints, self.requests = page, [], []
        page.on("console", lambda message: self.complaints.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: self.complaints.append(str(error)))
        page.on("request", lambda request: self.requests.append(request.url))
        page.goto(url)

    @property
    def talk(self) -> dict:
        """What the page has counted."""
        return self.page.evaluate("() => globalThis.talk")

    def begin(self) -> None:
        self.page.click("#start")
        self.measured()

    def measured(self) -> None:
        """Waits for the next measurement but one: what was pressed before is in it."""
        frame = self.talk["frame"]
        until(lambda: self.talk["frame"] >= frame + 10)

    @property
    def displacement(self) -> float:
        return self.talk["measured"][0]["displacement"]

    def text(self, selector: str) -> str:
        return self.page.inner_text(selector)

    def answered(self, words: str) -> None:
        until(lambda: words in self.text("#answer"))


@pytest.fixture
def opened(browser, address, server) -> Iterator[Callable[..., Tab]]:
    """Opens the page in a context of its own."""
    contexts = []

    def open_tab(path: str = "", script: str = "", url: str = "", **options) -> Tab:
        context = browser.new_context(**{"viewport": DESK, **options})
        contexts.append(context)
        if script:
            context.add_init_script(script)
        return Tab(context.new_page(), (url or address.url) + path)

    yield open_tab
    for context in contexts:
        context.close()
    assert server.empty()


@pytest.fixture
def tab(opened) -> Iterator[Tab]:
    """A talk that has begun; it must have ended without a complaint."""
    tab = opened("?")
    tab.begin()
    yield tab
    assert tab.complaints == []


def test_voice_goes_both_ways_and_text_comes(tab, heard, address):
    before = len(heard)
    until(lambda: tab.talk["loudest"] > SILENT and tab.text("#text p"))
    counts = tab.talk
    assert counts["played"] > 0
    assert counts["received"] % 1280 == 0
    until(lambda: len(heard) > before + 12)
    assert max(heard[before:]) > 10 * SILENT
    assert counts["dropped"] == 0
    delay = re.search(r"delay (\d+) ms", tab.text("#status"))
    assert 80 < int(delay[1]) < 1000
    until(lambda: tab.page.text_content("#spoken"))  # what a screen reader is told
    assert {request.split("?")[0].rsplit("/", 1)[0] + "/" for request in tab.requests} <= {
        address.url,
        f"{address.url}static/",
    }
    tab.page.click("#mute")
    time.sleep(1)
    muted = len(heard)
    until(lambda: len(heard) > muted + 5)
    assert max(heard[muted:]) == 0
    tab.page.click("#mute")
    until(lambda: heard[-1] > SILENT)


def settings(server: Live):
    """Of the only talk."""
    talks = server.service.ticks._talks
    return talks.settings(next(row for row in range(ROWS) if row not in talks._free))


def test_memory_buttons_do_what_they_say(tab, server):
    page = tab.page
    tab.measured()
    page.check("[value=frozen]")
    tab.measured()
    frozen = tab.displacement
    tab.measured()
    assert tab.displacement == frozen > 0
    assert settings(server).memory == "frozen"
    assert "learn nothing" in tab.text("#memory-note")

    page.fill("#save-name", "monday")
    page.press("#save-name", "Enter")
    tab.answered("Saved as monday.")
    assert [file.name for file in server.folder.iterdir()] == ["monday.safetensors"]
    assert page.input_value("#load-name") == "monday"

    page.click("#forget")
    tab.answered("W₀ again")
    tab.measured()
    assert tab.displacement == 0

    page.click("text=Take up >> visible=true >> nth=-1")
    tab.answered("Took up monday.")
    tab.measured()
    assert tab.displacement == pytest.approx(frozen, rel=1e-6)

    page.check("[value=on]")
    tab.measured()
    assert tab.displacement != pytest.approx(frozen, rel=1e-6)

    page.check("[value=off]")
    until(lambda: settings(server).memory == "off")
    page.uncheck("#gate-trained")
    page.locator("#gate").fill("-0.3")
    until(lambda: settings(server).gate == -0.3)
    assert tab.text("#gate-value") == "−0.30"
    page.check("#gate-trained")
    until(lambda: settings(server).gate is None)


def test_what_the_server_refuses_is_said_and_undone(tab, server):
    server.run(refuse_to_save(server, True))
    try:
        tab.page.fill("#save-name", "tuesday")
        tab.page.click("#save button")
        tab.answered("memories are saved, as many as may be")
    finally:
        server.run(refuse_to_save(server, False))
    tab.page.fill("#save-name", "no/name")
    tab.page.click("#save button")  # the browser says which letters may be
    assert not tab.page.evaluate("() => document.getElementById('save').checkValidity()")


async def refuse_to_save(server: Live, refuse: bool) -> None:
    server.service.memories._most = -1 if refuse else 3


def test_a_fork_goes_on_in_a_new_tab(tab, server):
    tab.page.check("[value=frozen]")
    tab.measured()
    with tab.page.context.expect_page() as popup:
        tab.page.click("#fork")
    tab.answered("new tab")
    other = Tab(popup.value, popup.value.url)
    assert "fork of a talk" in other.text("#hint")
    other.begin()
    assert server.service.ticks.taken == 2
    assert other.page.is_checked("[value=frozen]")
    assert other.displacement == pytest.approx(tab.displacement, rel=1e-6)
    assert "fork" not in other.page.url
    other.page.click("#start")
    tab.measured()  # goes on alone
    assert other.complaints == []


def test_pause_restart_and_stop(tab, server, heard):
    page = tab.page
    tab.measured()
    page.click("#pause")
    time.sleep(0.5)
    paused = len(heard)
    time.sleep(0.5)
    assert len(heard) == paused
    assert "Paused" in tab.text("#status")
    page.click("#pause")
    until(lambda: len(heard) > paused)

    tab.measured()
    frame = tab.talk["frame"]
    page.click("#restart")
    until(lambda: 0 < tab.talk["frame"] < frame)

    page.click("#start")
    assert server.empty()
    assert tab.text("#start") == "Start talking"
    assert tab.page.is_disabled("#pause")
    assert tab.page.is_visible("#loss-plot")  # the talk can still be looked at


def test_settings_and_memory_are_those_of_the_next_start(opened, server):
    tab = opened()
    tab.page.click("summary")
    for name, value in {"audio_temperature": "0.5", "audio_topk": "7", "text_temperature": "0.25"}.items():
        tab.page.fill(f"[name={name}]", value)
    tab.page.check("[value=frozen]")
    tab.page.focus("#start")
    tab.page.keyboard.press("Enter")
    until(lambda: tab.talk["state"] == "talking")
    found = settings(server)
    assert (found.sampling.temperature, found.sampling.top_k, found.sampling.text_temperature) == (0.5, 7, 0.25)
    assert found.memory == "frozen"


def test_the_plot_has_lines_of_the_layer_and_marks(tab):
    tab.measured()
    plain = tab.page.locator("#loss-plot").screenshot()
    tab.page.check("[value=whole]")
    tab.page.click("#forget")
    tab.measured()
    assert tab.page.locator("#loss-plot").screenshot() != plain
    cells = tab.page.locator("#layers tbody td").all_inner_texts()
    base, before, gap = (float(cell.replace("−", "-")) for cell in cells[:3])
    assert gap == pytest.approx(base - before, abs=0.02 * abs(base))
    tab.page.uncheck("#layers input")
    colours = """() => {
        const plot = document.getElementById("loss-plot");
        const { data } = plot.getContext("2d").getImageData(0, 0, plot.width, plot.height);
        let coloured = 0;
        for (let i = 0; i < data.length; i += 4) coloured += data[i + 3] > 128 && data[i + 2] - data[i] > 60;
        return coloured;
    }"""
    until(lambda: tab.page.evaluate(colours) == 0)
    tab.page.check("#layers input")
    until(lambda: tab.page.evaluate(colours) > 50)


def said(tab: Tab) -> str:
    """The page's alert."""
    until(lambda: tab.page.is_visible("#alert"))
    return tab.text("#alert")


def test_all_talks_taken(opened, server):
    async def seats():
        return [server.service.ticks.seat() for _ in range(ROWS)]

    async def back(taken):
        for seat in taken:
            server.service.ticks.give_back(seat)

    taken = server.run(seats())
    try:
        tab = opened()
        tab.page.click("#start")
        assert said(tab) == f"All {ROWS} talks are taken. Wait until one ends, then press Start."
    finally:
        server.run(back(taken))
    tab.begin()
    assert tab.page.is_hidden("#alert")


def test_a_token_is_asked_for_and_taken(opened, server):
    address = Address(server, token="secret words")
    tab = opened(url=address.url)
    tab.page.click("#start")
    assert "asks for a token" in said(tab)
    tab.page.click("summary")
    tab.page.fill("[name=token]", "secret words")
    tab.begin()
    opened("?token=secret%20words", url=address.url).begin()
    address.close()


def test_a_lost_connection_and_a_stopping_server_are_said(opened, server):
    address = Address(server)
    tab = opened(url=address.url)
    tab.begin()
    address.cut()
    assert re.fullmatch(r"The connection was lost after 0:0\d. Press Start for a new talk.", said(tab))
    tab.begin()
    address.close()
    assert said(tab) == "The server says: the server stops."
    tab.page.click("#start")
    until(lambda: tab.talk["state"] == "idle" and tab.text("#alert").startswith("The server does not answer."))
    tab.page.route("**/worklet.js", lambda route: route.abort())  # where the browser keeps no copy
    tab.page.click("#start")
    until(lambda: tab.talk["state"] == "idle" and tab.text("#alert").startswith("The server does not answer."))


def test_stop_while_the_browser_asks(opened, server):
    """Two starts of which the first was stopped are one talk, and the first gives its microphone back."""
    script = """
        const open = navigator.mediaDevices.getUserMedia.bind(navigator.mediaDevices);
        globalThis.streams = [];
        navigator.mediaDevices.getUserMedia = async (wanted) => {
            await new Promise((done) => setTimeout(done, 500));
            streams.push(await open(wanted));
            return streams.at(-1);
        };"""
    tab = opened(script=script)
    for _ in range(3):
        tab.page.click("#start")
    tab.measured()
    assert server.service.ticks.taken == 1
    live = "() => streams.map((stream) => stream.getTracks()[0].readyState)"
    assert tab.page.evaluate(live) == ["ended", "live"]


def test_settings_that_cannot_be(opened):
    tab = opened()
    tab.page.evaluate("() => (document.querySelector('details').open = true)")
    tab.page.fill("[name=audio_topk]", "-1")
    tab.page.evaluate("() => (document.querySelector('details').open = false)")
    tab.page.click("#start")
    assert tab.talk["state"] == "idle"
    assert tab.page.is_visible("[name=audio_topk]:focus")
    # What only the server knows to be wrong is said in its words.
    tab.page.evaluate("() => Object.assign(document.querySelector('[name=audio_topk]'), { step: 'any', value: 1.5 })")
    tab.page.click("#start")
    assert said(tab).startswith("The server says: audio_topk='1.5' in the URL is no whole number")


HELLO = {
    "type": "hello",
    "sample_rate": 24000,
    "frame_size": 1920,
    "frame_rate": 12.5,
    "checkpoint": "another",
    "codec": "mimi",
    "every": 1,
    "memories": [],
    "memory": "on",
    "gate": None,
}


@pytest.mark.parametrize("layers", [[], list(range(25, 32))], ids=["none", "many"])
def test_models_without_and_with_many_ttt_layers(opened, layers):
    """A made server, with a number that is not finite and Mimi's rate."""
    losses = {"loss_base": 2.0, "loss_before": 1.0, "loss_after": 0.5, "displacement": None}
    measured = [{"layer": layer, **losses} for layer in layers]
    heard = []

    def answer(ws):
        def say(content: dict) -> None:
            ws.send(b"\x04" + json.dumps(content).encode())

        ws.on_message(lambda message: heard.append(message))
        ws.send(b"\x00")
        say({**HELLO, "ttt_layers": layers})
        for frame in range(1, 30):
            say({"type": "frame", "frame": frame, "layers": measured, "queue": 0, "dropped": 0})

    tab = opened()
    tab.page.route_web_socket("**/api/chat*", answer)
    tab.page.reload()
    tab.page.click("#start")
    until(lambda: tab.talk["frame"] == 29)
    until(lambda: tab.talk["sent"] > 0 and len(heard) > 10)
    assert {len(message) for message in heard} == {1 + 2 * 480}  # 20 ms at the server's rate
    assert tab.page.is_visible("#without") == (not layers)
    assert tab.page.is_visible("#plots") == tab.page.is_visible("#forget") == bool(layers)
    assert tab.page.locator("#layers tbody tr").count() == len(layers)
    if layers:
        until(lambda: tab.text("#layers tbody tr").split() == ["25", "2.00", "1.00", "1.00", "–", "%"])
    assert tab.complaints == []


@pytest.mark.parametrize(
    ("name", "words"),
    [("NotFoundError", "No microphone was found"), ("NotAllowedError", "may not use"), ("NotReadableError", "another")],
)
def test_a_missing_microphone(opened, name, words):
    script = f"navigator.mediaDevices.getUserMedia = async () => {{ throw new DOMException('', '{name}'); }};"
    tab = opened(script=script)
    tab.page.click("#start")
    assert words in said(tab)
    assert tab.text("#start") == "Start talking"
    assert tab.text("#status") == "Not connected"


def test_a_page_that_is_not_secure_says_so(opened):
    tab = opened(script="Object.defineProperty(window, 'isSecureContext', { value: false });")
    assert "https" in said(tab)
    assert tab.page.is_disabled("#start")


def test_a_fork_that_is_gone(opened):
    tab = opened("?fork=nothing")
    tab.page.click("#start")
    assert "The fork is gone" in said(tab)
    tab.begin()
    assert "fork" not in tab.page.url


@pytest.mark.parametrize("end", [True, False])
def test_the_last_words_stay_in_view_when_a_phone_is_turned(opened, end):
    tab = opened(viewport={"width": PHONE["height"], "height": PHONE["width"]})
    tab.page.evaluate("""async (end) => {
        const { Transcript } = await import("/static/text.js");
        const text = document.getElementById("text");
        const transcript = new Transcript(text, document.getElementById("spoken"));
        for (let i = 0; i < 500; i++) transcript.add(" word", i);
        if (!end) text.scrollTop -= 50;
    }""", end)  # fmt: skip
    tab.page.wait_for_timeout(200)  # a page learns of scrolling in the next frame
    tab.page.set_viewport_size(PHONE)
    tab.page.wait_for_timeout(500)
    height, below = tab.page.locator("#text").evaluate(
        "(text) => [text.clientHeight, text.scrollHeight - text.scrollTop - text.clientHeight]"
    )
    assert height > 100
    assert (below < 8) == end


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_nothing_overflows_on_a_phone(opened, scheme):
    tab = opened(viewport=PHONE, color_scheme=scheme)
    width = "() => document.documentElement.scrollWidth"
    assert tab.page.evaluate(width) <= PHONE["width"]
    tab.page.click("summary")
    tab.begin()
    tab.page.evaluate("""() => {
        for (const id of ["model", "alert", "answer", "text"]) {
            const place = document.getElementById(id);
            place.hidden = false;
            place.textContent = "W".repeat(120);
        }
    }""")
    tab.page.uncheck("#gate-trained")
    assert tab.page.evaluate(width) <= PHONE["width"]
    assert tab.page.evaluate("() => document.getElementById('loss-plot').clientWidth") > 250
    nameless = """() => [...document.querySelectorAll("button, input, select, canvas")].filter(
        (one) => !one.labels?.length && !one.textContent.trim() && !one.ariaLabel && !one.title).map((one) => one.id)"""
    assert tab.page.evaluate(nameless) == []
