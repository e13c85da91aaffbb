"""The command as a whole: what it writes, replaces and refuses, bad input, Full-Duplex-Bench, states, and --score."""

from __future__ import annotations

import json

import numpy as np
import pytest
import soundfile
from safetensors.numpy import load_file

from eval.generating import results
from eval.generating.command import Options
from eval.generating.inputs import find
from eval.generating.outputs import ENDINGS, SOFTWARE, check_answer
from eval.results import schema
from eval.results.schema import scores_path
from eval.streaming.results import read as read_stream
from tests.helpers import eval_models, in_process
from ttt_jax.data.codes import read_codes
from ttt_jax.errors import InputError
from ttt_jax.utils.command import PARTIAL

RATE = 24000


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"files": ()}, "give the folder of a checkpoint and one or more recordings"),
        ({"silence": -1.0}, "--silence -1.0 is out of range: give 0 or more"),
        ({"top_k": -1}, "--top-k -1 is out of range"),
        ({"batch": 0}, "--batch 0 is out of range: give 1 or more"),
        ({"score": True, "seed": 3}, "--seed has no effect with --score"),
        ({"reset_every": 5}, "--reset-every 5 has no effect without --arm reset"),
        ({"gate": 3.0}, "--gate 3.0 is out of range: give -1 to 1"),
        ({"arm": "off", "gate": 0.5}, "--gate 0.5 has no effect with --arm off"),
    ],
)
def test_options_that_cannot_be(changes, message):
    with pytest.raises(InputError, match=message):
        Options(**{"checkpoint": "run", "files": ("a.wav",)} | changes)


def test_figures_of_a_talk():
    assert results.quantiles(np.arange(101) / 1000) == pytest.approx((50, 90, 99))
    log_probs = np.log(np.array([[0.5, np.nan, 0.125], [0.1, 0.1, np.nan]]))
    assert results.perplexity(log_probs) == pytest.approx((4, 10))
    assert np.isnan(results.perplexity(None)).all()
    assert np.isnan(results.perplexity(np.full((2, 3), np.nan))).all()


def test_an_answer_of_another_origin_is_not_overwritten(tmp_path):
    soundfile.write(tmp_path / "input.wav", np.zeros(100), RATE)
    (source,), _ = find([str(tmp_path)])
    check_answer(source)
    with soundfile.SoundFile(tmp_path / "output.wav", "w", RATE, 1) as sound:
        sound.software = SOFTWARE
        sound.write(np.zeros(100))
    check_answer(source)
    for content in (lambda path: soundfile.write(path, np.zeros(9), RATE), lambda path: path.write_text("notes")):
        content(tmp_path / "output.wav")
        with pytest.raises(InputError, match=r"output\.wav exists and was not written by this command"):
            check_answer(source)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return eval_models.write_run(tmp_path_factory.mktemp("runs") / "run")


@pytest.fixture(scope="module")
def recordings(tmp_path_factory):
    """Four that can be used, of 8, 16 and 24 kHz, mono and stereo, and five that cannot."""
    folder = tmp_path_factory.mktemp("recordings")
    rng = np.random.default_rng(0)
    for name, rate, shape in (("a", 8000, 9000), ("b", 16000, (12000, 2)), ("c", 24000, 1)):
        soundfile.write(folder / f"{name}.wav", rng.uniform(-0.3, 0.3, shape), rate)
    soundfile.write(folder / "d.wav", np.zeros(5000), 16000)
    soundfile.write(folder / "nan.wav", np.array([0.1, np.nan]), 16000, "FLOAT")
    soundfile.write(folder / "six.wav", rng.uniform(-0.3, 0.3, (900, 6)), 16000)
    soundfile.write(folder / "long.flac", rng.uniform(-0.3, 0.3, 30000), 16000)
    cut = (folder / "long.flac").read_bytes()
    (folder / "cut.flac").write_bytes(cut[: len(cut) // 2])
    (folder / "long.flac").unlink()
    (folder / "empty.wav").touch()
    (folder / "notes.wav").write_text("not a sound")
    return folder


def content(path):
    """The content of a file; safetensors puts its metadata in any order."""
    if path.suffix != ".safetensors":
        return path.read_bytes()
    return {name: (tensor.shape, tensor.tobytes()) for name, tensor in load_file(path).items()}


def generate(*words):
    return in_process.command("eval", "generate", *words)


@pytest.mark.integration
def test_files_folder_and_results(run, recordings, tmp_path):
    out = tmp_path / "out"
    words = run, recordings, "--out", out, "--batch", 2, "--silence", 0.1, "--save-state"
    done = generate(*words)
    assert done.returncode == PARTIAL, done.stderr
    skipped = [line for line in done.stderr.splitlines() if "skipped: " in line]
    assert len(skipped) == 5
    for name in ("nan.wav", "six.wav", "cut.flac", "empty.wav", "notes.wav"):
        assert sum(f"/{name} " in line for line in skipped) == 1

    made = schema.read(out, results.Results)
    assert [file.name for file in made.files] == ["a", "b", "c", "d"]
    assert len(made.skipped) == 5
    assert {path.name for path in out.iterdir()} == {"results.json"} | {
        f"{name}{ending}" for name in "abcd" for ending in ENDINGS
    }
    rate = 16000  # of the embedded codec
    for file, seconds in zip(made.files, (9000 / 8000, 12000 / 16000, 1 / 24000, 5000 / 16000), strict=True):
        samples = round(seconds * rate) + round(0.1 * rate)
        voice, conversation = (soundfile.read(out / f"{file.name}{end}")[0] for end in (".wav", ".conversation.wav"))
        assert voice.shape == (samples,)
        np.testing.assert_array_equal(conversation[:, 0], voice)
        assert (conversation[-round(0.1 * rate) :, 1] == 0).all()
        assert file.seconds == samples / rate
        codes = read_codes(out / f"{file.name}.codes.safetensors")
        assert codes.codes.shape == (17, file.frames)
        assert (codes.codes >= 0).all()
        said = json.loads((out / f"{file.name}.text.json").read_text())
        assert said["tokens"] == codes.codes[0].tolist()
        assert (out / f"{file.name}.vtt").read_text().startswith("WEBVTT\n")
        assert sum(file.tokens) == file.frames
        assert file.latency_ms.p50 <= file.latency_ms.p99
        assert file.perplexity.codebooks > 1
        diagnostics = np.load(out / f"{file.name}.diagnostics.npz")
        assert diagnostics["loss_base"].shape == (file.frames, 1)
        assert file.text[:20] in done.stdout

    before = {path.name: content(path) for path in out.iterdir()}
    assert generate(*words).returncode == PARTIAL
    after = {path.name: content(path) for path in out.iterdir()}
    assert {name for name in before if before[name] != after[name]} == {"results.json"}  # it has times
    refused = generate(*words, "--seed", 1)
    assert refused.returncode == 2
    assert "holds results with --seed 0, not 1" in refused.stderr
    assert {path.name for path in out.iterdir()} == set(before)
    refused = generate(run, recordings / "a.wav", "--out", recordings)
    assert refused.returncode == 2
    assert "holds a.wav, but no results.json" in refused.stderr


@pytest.mark.slow
@pytest.mark.integration
def test_flags(run, recordings, tmp_path):
    def tokens(name, *flags, files="a"):
        out = tmp_path / name
        done = generate(run, *(recordings / f"{file}.wav" for file in files), "--out", out, *flags)
        assert done.returncode == 0, done.stderr
        return [read_codes(out / f"{file}.codes.safetensors").codes for file in files]

    (plain,) = tokens("plain")
    different = {
        "seed": ("--seed", 5),
        "greedy": ("--temperature", 0, "--text-temperature", 0),
        "top": ("--top-k", 2, "--text-top-k", 2),
        "off": ("--arm", "off"),
        "gate": ("--gate", -1),
        "once": ("--first-frame", "once"),
        "context": ("--context", 2),
        "reset": ("--arm", "reset", "--reset-every", 3),
    }
    said = {name: tokens(name, *flags)[0] for name, flags in different.items()}
    for name, codes in said.items():
        assert not np.array_equal(codes, plain), name
    assert schema.read(tmp_path / "context", results.Results).checkpoint.contexts == (2, 2)
    unmeasured = schema.read(tmp_path / "context", results.Results)
    tokens("unmeasured", "--diagnostics-every", 0)
    unmeasured = schema.read(tmp_path / "unmeasured", results.Results).files[0]
    assert np.isnan(unmeasured.perplexity).all()
    assert not (tmp_path / "unmeasured/a.diagnostics.npz").exists()
    tokens("thinned", "--diagnostics-every", 4)
    assert list(np.load(tmp_path / "thinned/a.diagnostics.npz")["frames"]) == [0, 4, 8, 12]

    kept = tokens("kept", "--keep-state", "--save-state", files="ad")
    np.testing.assert_array_equal(kept[0], plain)
    (loaded,) = tokens("loaded", "--load-state", tmp_path / "kept/a.state.safetensors", files="d")
    np.testing.assert_array_equal(loaded, kept[1])
    assert not np.array_equal(tokens("fresh", files="d")[0], loaded)


@pytest.mark.integration
def test_full_duplex_bench(run, recordings, tmp_path):
    for name, place in (("a", "t/1"), ("b", "t/2"), ("d", "t/10")):
        (tmp_path / place).mkdir(parents=True)
        (tmp_path / place / "input.wav").write_bytes((recordings / f"{name}.wav").read_bytes())
    (tmp_path / "t/10/output.wav").write_text("somebody's")
    words = run, tmp_path / "t", "--out", tmp_path / "out", "--silence", 1
    for _ in range(2):  # its own answers are replaced
        done = generate(*words)
        assert done.returncode == PARTIAL, done.stderr
        assert "t/10/output.wav exists and was not written by this command" in done.stderr
        assert (tmp_path / "t/10/output.wav").read_text() == "somebody's"
        for place in ("t/1", "t/2"):
            asked, answer = (soundfile.info(tmp_path / place / f"{name}.wav") for name in ("input", "output"))
            assert (answer.frames, answer.samplerate, answer.channels) == (asked.frames, asked.samplerate, 1)
        assert {path.name for path in (tmp_path / "t/1").iterdir()} == {"input.wav", "output.wav"}
    voice, answer = soundfile.read(tmp_path / "out/2.wav")[0], soundfile.read(tmp_path / "t/2/output.wav")[0]
    np.testing.assert_array_equal(answer, voice[: len(answer)])


@pytest.mark.integration
def test_score_is_eval_stream(run, recordings, tmp_path):
    path = recordings / "b.wav"
    done = generate(run, path, recordings / "nan.wav", "--score", "--out", tmp_path / "score")
    assert done.returncode == PARTIAL, done.stderr
    streamed = in_process.command("eval", "stream", run, "--data", path, "--out", tmp_path / "stream")
    assert streamed.returncode == 0, streamed.stderr
    ours, theirs = read_stream(tmp_path / "score"), read_stream(tmp_path / "stream")
    assert ours.files == theirs.files
    assert schema.plain(ours.checkpoints) == schema.plain(theirs.checkpoints)
    (file,), info = ours.files, ours.checkpoints[0].info
    a, b = (np.load(scores_path(tmp_path / name, info.name, file)) for name in ("score", "stream"))
    assert set(a) == set(b)
    for name in a:
        np.testing.assert_array_equal(a[name], b[name])
