"""Codecs by name and by path: the embedded one, a Mimi's file, the Mimi of converted weights; what is no codec."""

import dataclasses
import json
import shutil
import subprocess
import sys

import pytest
import safetensors.numpy

from tests.helpers import mimi_files
from tests.helpers.places import ROOT
from ttt_jax.codec import DEFAULT_FILE, load_codec
from ttt_jax.codec.kmeans import KMeansCodec
from ttt_jax.codec.mimi import file
from ttt_jax.codec.mimi.codec import MimiCodec
from ttt_jax.data.corpus import EMBEDDED, CorpusConfig, load_coders
from ttt_jax.errors import InputError


def test_a_mimi_is_found_by_its_file_and_in_converted_weights(small_mimi):
    digest = file.read(small_mimi).digest
    for place in (small_mimi, f"mimi:{small_mimi}", small_mimi.parent / "weights", f"mimi:{small_mimi.parent}/weights"):
        codec = load_codec(place)
        assert isinstance(codec, MimiCodec)
        assert (codec.name, codec.digest) == ("mimi-8x64", digest)
        assert (codec.num_codebooks, codec.cardinality, codec.sample_rate, codec.frame_size) == (8, 64, 24000, 1920)


def test_the_embedded_codec_is_found_by_its_name_and_its_path():
    assert isinstance(load_codec(), KMeansCodec)
    assert load_codec(DEFAULT_FILE).digest == load_codec("kmeans").digest


def test_the_embedded_codec_loads_no_jax():
    code = "import sys; from ttt_jax.data.corpus import load_coders, CorpusConfig; load_coders(CorpusConfig())"
    subprocess.run([sys.executable, "-c", f"{code}; assert 'jax' not in sys.modules"], cwd=ROOT, check=True)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("mimi", "codec 'mimi' does not come with the project: give mimi:PATH or PATH, a file that `python -m ttt_jax"),
        ("no/such", "codec 'no/such' is neither a codec nor a file: use 'kmeans'"),
        ("mimi:no/such", "codec 'mimi:no/such' is neither a codec nor a file"),
        ("mimi:", "an empty name was given"),
        (f"mimi:{DEFAULT_FILE}", "is no Mimi (its metadata state the format 'ttt_jax.kmeans/1'): give one"),
        ("corpus/codec", "corpus/codec is a folder without a codec in its config.json"),
        ("{mimi}/kyutai", "kyutai is a folder without a codec in its config.json"),
        (f"{{mimi}}/kyutai/{mimi_files.NAME}", "convert it by `python -m ttt_jax.convert mimi "),
        ("{mimi}/huggingface/model.safetensors", "convert it by `python -m ttt_jax.convert mimi "),
        ("{mimi}/weights/head.safetensors", "head.safetensors is no codec file (its metadata state the format None"),
        ("corpus/codec/NOTICE", "the codec file corpus/codec/NOTICE cannot be read"),
    ],
)
def test_what_is_no_codec_is_refused_with_what_is_one(small_mimi, tmp_path, monkeypatch, name, message):
    monkeypatch.chdir(ROOT)
    if "huggingface" in name:
        name = str(mimi_files.write_huggingface(tmp_path / "huggingface") / "model.safetensors")
    with pytest.raises(InputError) as error:
        load_codec(name.format(mimi=small_mimi.parent))
    assert message in str(error.value)


def test_a_mimi_of_another_frame_rate_is_refused(small_mimi, tmp_path):
    mimi = file.read(small_mimi)
    twice = dataclasses.replace(mimi.cfg, sample_rate=2 * mimi.cfg.sample_rate)
    file.write(tmp_path / "m.safetensors", file.make(mimi.params, twice, mimi.use, licence="none", source="test"))
    with pytest.raises(InputError, match=r"gives 25 frames a second \(48000 Hz, 1920 .*but models read 12\.5"):
        load_codec(tmp_path / "m.safetensors")


def test_a_damaged_mimi_and_another_than_the_weights_state_are_refused(small_mimi, tmp_path):
    weights = shutil.copytree(small_mimi.parent / "weights", tmp_path / "weights")
    content = safetensors.numpy.load_file(small_mimi)
    content["encoder/first/b"][0] += 1
    with safetensors.safe_open(small_mimi, "numpy") as opened:
        metadata = opened.metadata()
    safetensors.numpy.save_file(content, weights / "mimi.safetensors", metadata)
    with pytest.raises(InputError, match=r"mimi\.safetensors is damaged"):
        load_codec(weights)
    mimi = file.read(small_mimi)
    sound = file.make(content, mimi.cfg, mimi.use, licence="none", source="test")
    file.write(weights / "mimi.safetensors", sound)
    with pytest.raises(InputError, match=f"has the digest {sound.digest}, but .*config.json states {mimi.digest}"):
        load_codec(weights)
    assert load_codec(weights / "mimi.safetensors").digest == sound.digest


def test_the_tokenizer_of_converted_weights_comes_with_their_mimi(small_mimi, tmp_path):
    weights = shutil.copytree(small_mimi.parent / "weights", tmp_path / "weights")
    embedded = load_coders(CorpusConfig())[1].digest
    assert load_coders(CorpusConfig(codec=f"mimi:{weights}"))[1].digest == embedded  # as they have none
    info = json.loads((weights / "config.json").read_text())
    info["source"]["tokenizer"] = "pieces.model"
    (weights / "config.json").write_text(json.dumps(info))
    (weights / "pieces.model").write_bytes(b"pieces")
    for codec in (f"mimi:{weights}", str(weights)):
        with pytest.raises(InputError, match=r"weights/pieces\.model is not a usable SentencePiece model"):
            load_coders(CorpusConfig(codec=codec))
    given = CorpusConfig(codec=str(weights), tokenizer=str(EMBEDDED / "tokenizer" / "spm512.model"))
    assert load_coders(given)[1].digest == embedded


def test_a_stored_codec_is_an_absolute_path(small_mimi, monkeypatch):
    monkeypatch.chdir(small_mimi.parent)
    for given, place in {
        "mimi.safetensors": small_mimi,
        "mimi:mimi.safetensors": f"mimi:{small_mimi}",
        "mimi:weights": f"mimi:{small_mimi.parent}/weights",
    }.items():
        assert CorpusConfig(codec=given).resolved().codec == str(place)
    for name in ("kmeans", "files", "mimi", "mimi:nowhere"):
        assert CorpusConfig(codec=name).resolved().codec == name
