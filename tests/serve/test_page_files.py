"""The files of the page without a browser: no other server, contrast, and the parts that compute, in Node."""

from __future__ import annotations

import json
import re
import shutil
import subprocess

import numpy as np
import pytest

from tests.helpers.places import ROOT

PAGE = ROOT / "ttt_jax" / "serve" / "page"
FILES = sorted(file for file in PAGE.iterdir() if file.is_file())
SCRIPTS = [file for file in FILES if file.suffix == ".js"]


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_nothing_comes_from_another_server(file):
    text = file.read_text(encoding="utf-8").replace('xmlns="http://www.w3.org/2000/svg"', "")
    assert not re.search(r"(https?|wss?):?//|(src|href)=.?//|@import|url\(", text)
    assert not re.search(r"<script(?![^>]*src=)|<style|style=|\bon\w+=\"|innerHTML|eval\(", text)  # its own policy


def test_the_page_names_files_that_are_there():
    names = re.findall(r'"static/([^"]+)"', (PAGE / "index.html").read_text(encoding="utf-8"))
    imports = [name for file in SCRIPTS for name in re.findall(r'from "\./([^"]+)"', file.read_text(encoding="utf-8"))]
    assert {"main.js", "style.css", "icon.svg", "connection.js", "audio.js"} <= {*names, *imports}
    assert {*names, *imports, "worklet.js", "index.html"} == {file.name for file in FILES}


def colours(text: str) -> dict[str, str]:
    return dict(re.findall(r"--([\w-]+): (#\w{6});", text))


def contrast(one: str, other: str) -> float:
    """WCAG 2's contrast ratio."""

    def luminance(colour: str) -> float:
        parts = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)]) / 255
        linear = np.where(parts <= 0.04045, parts / 12.92, ((parts + 0.055) / 1.055) ** 2.4)
        return float(linear @ [0.2126, 0.7152, 0.0722])

    dark, light = sorted((luminance(one), luminance(other)))
    return (light + 0.05) / (dark + 0.05)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_contrast(scheme):
    light, dark = (PAGE / "style.css").read_text(encoding="utf-8").split("prefers-color-scheme: dark")
    found = colours(light) if scheme == "light" else {**colours(light), **colours(dark)}
    for ink, ground in (
        ("text", "card"),
        ("text", "page"),
        ("quiet", "card"),
        ("quiet", "page"),
        ("on-accent", "accent"),
        ("stop", "card"),
        ("alert-text", "alert"),
    ):
        assert contrast(found[ink], found[ground]) >= 4.5, (ink, ground)
    for name, colour in found.items():
        if name.startswith("layer-") or name in ("edge", "accent"):
            assert contrast(colour, found["card"]) >= 3, name


# In Node


@pytest.fixture(scope="module")
def node():
    """Runs a module of JavaScript; returns what it prints, as JSON."""
    found = shutil.which("node")
    if found is None:
        pytest.skip("node is not installed")

    def run(script: str):
        command = [found, "--input-type=module", "-"]
        done = subprocess.run(command, input=script, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    return run


@pytest.mark.parametrize("file", SCRIPTS, ids=lambda file: file.name)
def test_scripts_parse(node, file):
    command = [shutil.which("node"), "--check", "--input-type=module", "-"]
    done = subprocess.run(command, input=file.read_text(encoding="utf-8"), capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


PROCESSORS = f"""
import fs from "node:fs";
import vm from "node:vm";
function worklet(sampleRate) {{
  const port = () => ({{ posted: [], postMessage(it) {{ this.posted.push(it); }} }});
  class AudioWorkletProcessor {{ constructor() {{ this.port = port(); }} }}
  const found = {{}};
  const world = {{ AudioWorkletProcessor, sampleRate, registerProcessor: (name, one) => (found[name] = one) }};
  vm.runInNewContext(fs.readFileSync({json.dumps(str(PAGE / "worklet.js"))}, "utf8"), world);
  return found;
}}
const sine = (rate, hertz, seconds) =>
  Float32Array.from({{ length: rate * seconds }}, (_, i) => 0.5 * Math.sin((2 * Math.PI * hertz * i) / rate));
function captured(from, to, hertz, step = 128) {{
  const capture = new (worklet(from).capture)({{ processorOptions: {{ rate: to }} }});
  const input = sine(from, hertz, 1);
  for (let i = 0; i < input.length; i += step) capture.process([[input.slice(i, i + step)]]);
  return capture.port.posted.flatMap(({{ samples }}) => [...samples]);
}}
"""


@pytest.mark.parametrize(("source", "target"), [(48000, 16000), (48000, 24000), (44100, 16000), (44100, 24000)])
def test_the_microphone_keeps_speech_and_loses_what_would_alias(node, source, target):
    """A sine in the band keeps frequency and level to 1 %; one above half the rate is below -60 dB."""
    low, high = 0.3 * target, 0.56 * target
    script = f"console.log(JSON.stringify([{low}, {high}].map((hertz) => captured({source}, {target}, hertz))))"
    kept, lost = (np.array(samples) / 32767 for samples in node(PROCESSORS + script))
    assert target * 0.96 <= len(kept) <= target
    middle = kept[target // 4 : target * 3 // 4]
    spectrum = np.abs(np.fft.rfft(middle * np.hanning(len(middle)))) * 4 / len(middle)
    assert np.argmax(spectrum) * target / len(middle) == pytest.approx(low, abs=3)
    assert np.sqrt(2 * np.mean(middle**2)) == pytest.approx(0.5, rel=0.01)
    assert np.sqrt(2 * np.mean(lost[target // 4 : target * 3 // 4] ** 2)) < 0.5e-3


def test_the_split_of_the_microphone_changes_no_sample(node):
    script = "console.log(JSON.stringify([128, 37].map((step) => captured(44100, 16000, 440, step))))"
    one, other = node(PROCESSORS + script)
    assert one[: len(other)] == other[: len(one)]


PLAYER = (
    PROCESSORS
    + """
const player = new (worklet(48000).playback)({ processorOptions: { rate: 16000, wait: 0.16, most: 0.64 } });
const frame = (level = 8000) => player.port.onmessage({ data: new Int16Array(1280).fill(level) });
function play(blocks) {
  const out = [];
  for (let i = 0; i < blocks; i++) {
    const block = new Float32Array(128);
    player.process([], [[block]]);
    out.push(...block);
  }
  return out.filter((sample) => Math.abs(sample) > 0.2).length;
}
const last = () => player.port.posted.at(-1);
"""
)


def test_the_player_waits_for_two_frames_and_counts_gaps(node):
    script = "frame(); const alone = play(40); frame(); frame(); const all = play(120); play(40);"
    alone, played, report = node(PLAYER + script + "console.log(JSON.stringify([alone, all, last()]))")
    assert alone == 0
    assert played == pytest.approx(3 * 1280 * 3, abs=200)  # less the resampler's delay
    assert (report["gaps"], report["skipped"]) == (1, 0)


def test_the_player_cuts_a_queue_that_is_too_long(node):
    script = "for (let i = 0; i < 9; i++) frame(); play(40); console.log(JSON.stringify(last()))"
    report = node(PLAYER + script)
    assert report["skipped"] > 0
    assert report["buffered"] < 0.2


@pytest.mark.parametrize("level", [0, 8000])
def test_what_a_burst_has_left_goes_in_a_silence(node, level):
    """Six frames at once, then one each 80 ms (30 blocks): only in a silence the queue gets shorter."""
    script = f"for (let i = 0; i < 5; i++) frame(); for (let i = 0; i < 90; i++) {{ frame({level}); play(30); }}"
    report = node(PLAYER + script + "console.log(JSON.stringify(last()))")
    assert (report["gaps"], report["skipped"]) == (0, 0)
    assert report["buffered"] == pytest.approx(0.08 if level == 0 else 0.4, abs=0.03)


def test_the_history_of_a_long_talk_is_bounded_and_keeps_the_mean(node):
    script = (PAGE / "history.js").read_text(encoding="utf-8").replace("export ", "")
    script += """
    const history = new History();
    const n = 45000;
    for (let i = 0; i < n; i++) history.add(i / 12.5, [i, 1]);
    const points = thinned(history.whole, 0, n / 12.5, 100);
    const total = history.whole.reduce((sum, { row, count }) => sum + row[0] * count, 0);
    const counts = [history.recent.length, history.whole.length, total / n, points.length];
    console.log(JSON.stringify([...counts, points[50].row, history.mean(2)]));
    """
    recent, whole, mean, count, middle, newest = node(script)
    assert (recent, newest) == (751, [44987, 1])
    assert whole <= 2400
    assert mean == pytest.approx(44999 / 2)
    assert count in (100, 101)
    assert middle == [pytest.approx(45000 * 0.505, rel=0.01), 1]
