"""Training on audio with a Mimi: the base's by its name, samples, evaluation, and what is refused."""

import dataclasses
import json
import wave
from unittest import mock

import numpy as np
import pytest
import soundfile
from matplotlib.figure import Figure

from eval.inputs import dataset
from eval.streaming import runner
from tests.helpers import micro, quick
from tests.helpers.converting import assert_one_sentence
from tests.helpers.in_process import command
from tests.helpers.places import ROOT
from tests.helpers.small_mimi import write_model
from train.config import TrainableConfig
from train.setup import prepare, with_codec_of_base
from ttt_jax.checkpoints import loading, weights
from ttt_jax.codec import load_codec
from ttt_jax.codec.mimi.codec import MimiCodec
from ttt_jax.data.codes import read_codes
from ttt_jax.errors import InputError
from ttt_jax.utils import config_json


def config(base, **changes):
    """The micro run from converted weights, on audio that the base's Mimi encodes."""
    data = dataclasses.replace(micro.CONFIG.data, codec="mimi", **changes)
    return micro.config(data=data, base=base and str(base))


def test_the_codec_mimi_is_that_of_the_base(small_mimi):
    base = small_mimi.parent / "weights"
    assert with_codec_of_base(config(base)).data.codec == f"mimi:{base}"
    assert load_codec(f"mimi:{base}").digest == load_codec(small_mimi).digest
    assert with_codec_of_base(config(None)) == config(None)
    files = dataclasses.replace(config(base), data=dataclasses.replace(micro.CONFIG.data, codec="files"))
    assert with_codec_of_base(files) == files


def test_a_base_without_mimi_is_refused(tmp_path):
    base = write_model(tmp_path, with_mimi=False)
    with pytest.raises(InputError, match=r"weights has no Mimi, which data\.codec='mimi' asks for: convert it again"):
        with_codec_of_base(config(base))


def test_a_base_of_another_architecture_is_refused_before_audio_is_encoded(small_mimi, tmp_path):
    with mock.patch.object(MimiCodec, "encode_step", side_effect=AssertionError("encoded")):
        for field, value in (("dim", 32), ("text_card", 600)):
            cfg = config(small_mimi.parent / "weights", train=str(tmp_path / cut(tmp_path, "train", (0,))))
            cfg = dataclasses.replace(cfg, model=dataclasses.replace(cfg.model, **{field: value}))
            with pytest.raises(InputError, match=rf"are of another architecture \(.*model\.{field} is {value}, there"):
                prepare(cfg, tmp_path / "run")


def cut(folder, part, starts, seconds=6.0):
    """A manifest of pieces of an embedded recording, as wav."""
    path = ROOT / "corpus" / "voices" / "en_us_f_allison" / f"{part}-1.ogg"
    rate, lines = soundfile.info(path).samplerate, []
    for start in starts:
        sound, _ = soundfile.read(path, frames=round(seconds * rate), start=round(start * rate))
        soundfile.write(folder / f"{part}{start}.wav", sound, rate)
        lines.append(json.dumps({"path": f"{part}{start}.wav", "duration": seconds}))
    (folder / f"{part}.jsonl").write_text("\n".join(lines))
    return f"{part}.jsonl"


@pytest.mark.integration
def test_a_run_on_audio_trains_speaks_and_is_evaluated(small_mimi, tmp_path, monkeypatch):
    quick.quicken(monkeypatch)
    monkeypatch.setattr(runner, "scan_calls", quick.scan_calls)
    monkeypatch.chdir(small_mimi.parent)  # the base is given by a relative path
    (tmp_path / "elsewhere").mkdir()
    data = {
        name: str(tmp_path / cut(tmp_path, name, starts))
        for name, starts in {"train": (0, 8, 16, 24), "heldout": (5, 20)}.items()
    }
    cfg = config("weights", cache=str(tmp_path / "cache"), **data)
    trainable = TrainableConfig(base=False, lora=False)
    cfg = dataclasses.replace(cfg, model=weights.Folder("weights").cfg, trainable=trainable, steps=2, sample_every=2)
    config_json.write_json(tmp_path / "asked.json", config_json.to_dict(cfg))
    run, codec = tmp_path / "run", load_codec(small_mimi)
    nothing = lambda *args, **options: None  # noqa: E731  draws no figure
    with mock.patch.multiple(Figure, savefig=nothing, draw_without_rendering=nothing):
        done = command("train", "--from", tmp_path / "asked.json", "--run-dir", run)
        assert done.returncode == 0, done.stderr
        assert "codec     mimi-8x64, 8 x 64 codes" in done.stdout
        assert (run / "eval" / "results.json").is_file()
        stored, meta = (json.loads((run / name).read_text()) for name in ("config.json", "meta.json"))
        assert stored["data"]["codec"] == f"mimi:{small_mimi.parent / 'weights'}"
        assert meta["codec"] == {"name": "mimi-8x64", "digest": codec.digest}

        (sample, _) = sorted((run / "samples" / "step-000002").glob("*.safetensors"))
        codes = read_codes(sample)
        assert codes.codec == codec.digest
        with wave.open(str(sample.with_suffix(".wav"))) as sound:
            assert (sound.getframerate(), sound.getnchannels()) == (24000, 2)
            heard = np.frombuffer(sound.readframes(sound.getnframes()), "<i2").reshape(-1, 2)[:, 1] / 32767
        np.testing.assert_allclose(heard, codec.decode(codes.codes[9:]).clip(-1, 1), atol=1e-4)

        monkeypatch.chdir(tmp_path / "elsewhere")
        done = command("eval", "stream", run, "--data", data["heldout"], "--out", "s")
        assert done.returncode == 0, done.stderr
        assert "codec mimi-8x64" in done.stdout
        done = command("eval", "check-state", run, "--audio", tmp_path / "heldout5.wav", "--frames", 4)
        assert done.stdout.endswith("PASS\n"), done.stderr
        # Code files: those of this Mimi are the audio, those of another codec are refused.
        for name in (f"mimi:{small_mimi}", "kmeans"):
            out = name.partition(":")[0]
            assert command("eval", "prepare", data["heldout"], "--codec", name, "--out", out).returncode == 0
        (model,) = loading.load_all([run])
        audio, prepared = (dataset.read(place, [model])[0] for place in (data["heldout"], "mimi"))
        for heard, read in zip(audio, prepared, strict=True):
            np.testing.assert_array_equal(heard.frames[1:], read.frames[1:])
        assert_one_sentence(command("eval", "stream", run, "--data", "kmeans"), "was trained with the codec mimi-8x64")
        assert command("train", "--resume", run).returncode == 0
