"""Damaged weights, manifests, words, codes and sound: each ends in one sentence for the user, or does no harm.

No traceback, no hang, no damaged value taken for a sound one, nothing left behind. Each kind of input makes a sound
one, damages it by a generator and a seed, and states what a reader may make of it at most.
"""

from __future__ import annotations

import io
import json
import math
import shutil
from functools import cache
from pathlib import Path

import jax
import numpy as np
import pytest
import safetensors.numpy
import soundfile

from tests.helpers import damage
from tests.helpers import kyutai_files as kyutai_made
from ttt_jax.checkpoints import weights
from ttt_jax.convert import kyutai
from ttt_jax.data.alignments import read_alignments
from ttt_jax.data.audio.reader import read_audio
from ttt_jax.data.codes import Codes, Source, read_codes, write_codes
from ttt_jax.data.manifest import TOLERANCE, read_manifest
from ttt_jax.data.text import load_tokenizer

RATE = 24000
TALK = 2.5
"""Seconds of made-up speech."""


def tree(folder: Path) -> dict[str, int]:
    """Returns what lies in a folder: sizes by relative path."""
    return {str(path.relative_to(folder)): path.lstat().st_size for path in sorted(folder.rglob("*"))}


# Weights and their configuration


@cache
def _checkpoint(root: Path) -> tuple[Path, dict, dict]:
    made = root / "kyutai"
    made.mkdir()
    c = kyutai_made.config(num_layers=1, depformer_num_layers=1)
    sound = kyutai_made.write(made / "source", c, kyutai_made.fuse(kyutai_made.weights(c)))
    kyutai(sound, made / "ours")
    found = weights.load(made / "ours")
    return sound, found.info["model"], jax.tree.map(np.asarray, found.params)


def _converted(source: Path):
    out = source.parent / "ours"
    before = tree(source.parent)
    if damage.attempt(kyutai, source, out) is None:
        assert tree(source.parent) == before
        return None
    shutil.move(out, source.parent.parent / "moved")
    assert tree(source.parent) == before
    return weights.load(source.parent.parent / "moved")


def _spoilt_tensors(data: bytes, rng) -> bytes:
    """Returns a safetensors file with damage in its header or its numbers, or with NaN or infinity in it."""
    header = 8 + int.from_bytes(data[:8], "little")
    kind = rng.random()
    if kind < 0.15:
        at = header + 4 * int(rng.integers((len(data) - header) // 4))
        return data[:at] + np.float32(rng.choice([np.nan, np.inf, -np.inf])).tobytes() + data[at + 4 :]
    return damage.of_bytes(data, rng, *((0, header) if kind < 0.7 else (header, None)))


def a_weights_file(rng, root, folder):
    """Weights that convert have the names, types and shapes of the config.json, and the bits of the file."""
    sound, cfg, _ = _checkpoint(root)
    (folder / "at").mkdir()
    source = damage.copied(sound, folder / "at")
    path = source / "model.safetensors"
    data = path.read_bytes()
    path.write_bytes(_spoilt_tensors(data, rng))
    with damage.warnings() as messages:
        found = _converted(source)
    if found is not None:
        there = safetensors.numpy.load_file(path)
        assert found.info["model"] == cfg
        assert np.array_equal(there["text_emb.weight"], found.params["text_emb"])
        finite = all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(found.params))
        assert finite or any("NaN" in record.getMessage() for record in messages)


def a_config(rng, root, folder):
    """A configuration that converts is the one that the weights have."""
    sound, cfg, params = _checkpoint(root)
    (folder / "at").mkdir()
    source = damage.copied(sound, folder / "at")
    path = source / "config.json"
    if rng.random() < 0.7:
        content, key = damage.of_json(json.loads(path.read_text()), rng)
        path.write_text(json.dumps(content))
    else:
        path.write_bytes(damage.of_bytes(path.read_bytes(), rng))
        key = None
    found = _converted(source)
    if found is not None and key is not None:  # a flipped digit can make another number that is as good
        assert found.info["model"] == cfg, key
        jax.tree.map(np.testing.assert_array_equal, found.params, params)


@cache
def _shards(root: Path) -> tuple[Path, dict, dict]:
    sound, cfg, params = _checkpoint(root)
    made = root / "shards" / "source"
    made.mkdir(parents=True)
    shutil.copy(sound / "config.json", made)
    tensors = safetensors.numpy.load_file(sound / "model.safetensors")
    parts = {f"model-0000{i + 1}-of-00002.safetensors": dict(list(tensors.items())[i::2]) for i in range(2)}
    for name, part in parts.items():
        safetensors.numpy.save_file(part, made / name)
    index = {"metadata": {}, "weight_map": {key: name for name, part in parts.items() for key in part}}
    (made / "model.safetensors.index.json").write_text(json.dumps(index))
    return made, cfg, params


def an_index_of_shards(rng, root, folder):
    """Shards that convert are all of the weights."""
    sound, cfg, params = _shards(root)
    (folder / "at").mkdir()
    source = damage.copied(sound, folder / "at")
    path = source / "model.safetensors.index.json"
    if rng.random() < 0.2:
        path = source / "model-00001-of-00002.safetensors"
    damage.spoil(path, rng)
    found = _converted(source)
    if found is not None:
        assert found.info["model"] == cfg
        if path.suffix == ".json":
            jax.tree.map(np.testing.assert_array_equal, found.params, params)


def a_lora_file(rng, root, folder):
    """Adapters that convert have the rank, the names and the shapes that belong to the weights."""
    sound, _, _ = _checkpoint(root)
    (folder / "at").mkdir()
    source = damage.copied(sound, folder / "at")
    c = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(c | {"lora": True, "lora_rank": 2, "lora_scaling": 2.0}))
    path = source / "lora.safetensors"
    path.write_bytes(_spoilt_tensors(safetensors.numpy.save(kyutai_made.lora(c, 2)), rng))
    with damage.warnings() as messages:
        found = _converted(source)
    if found is not None:
        assert found.cfg.lora.rank == 2
        finite = all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(found.params))
        assert finite or any("NaN" in record.getMessage() for record in messages)


# Manifests, words, codes


def a_manifest(rng, root, folder):
    """Every recording that is read is there, with a length and at most a name for its speaker."""
    lines = []
    for index in range(3):
        (folder / f"talk {index}.wav").write_bytes(b"RIFF")
        lines.append({"path": f"talk {index}.wav", "duration": 1.5 + index, "speaker": f"s{index}"})
    if rng.random() < 0.6:
        lines[1], _ = damage.of_json(lines[1], rng)
        data = "".join(json.dumps(line) + "\n" for line in lines).encode()
    else:
        data = damage.of_bytes("".join(json.dumps(line) + "\n" for line in lines).encode(), rng)
    (folder / "train.jsonl").write_bytes(data)
    found = damage.attempt(read_manifest, folder / "train.jsonl")
    for entry in found.entries if found is not None else []:
        assert entry.path.is_file()
        assert 0 < entry.duration < math.inf
        assert entry.speaker is None or (isinstance(entry.speaker, str) and entry.speaker)


def an_alignment(rng, root, folder):
    """Every word that is read has text and lies in the recording; damage to one word costs no other."""
    words = [[f"word{i}", [0.2 * i, 0.2 * i + 0.1], "SPEAKER_MAIN"] for i in range(12)]
    content, where = {"alignments": words}, ()
    path = folder / "talk.json"
    if rng.random() < 0.7:
        content, where = damage.of_json(content, rng)
        path.write_text(json.dumps(content))
    else:
        path.write_bytes(damage.of_bytes(json.dumps(content).encode(), rng))
    found = damage.attempt(read_alignments, path, TALK)
    if found is None:
        return
    for word in found.words or ():
        assert word.text
        assert 0 <= word.start < word.end <= TALK + TOLERANCE
    if len(where) > 1:  # of one word
        assert found.notice if found.words is None else len(found.words) >= len(words) - 1


@cache
def _codes(root: Path) -> Path:
    made = root / "codes.safetensors"
    codes = np.random.default_rng(0).integers(0, 64, (17, 40)).astype(np.int32)
    source = Source("talk.wav", "0" * 64, 3.2, 40, 0)
    write_codes(made, Codes(codes, 12.5, "d" * 64, "made", 64, "t" * 64, "moshi", (source,)))
    return made


def a_code_file(rng, root, folder):
    """Codes that are read are those that were written: a file states their checksum."""
    sound = _codes(root)
    path = folder / sound.name
    path.write_bytes(damage.of_bytes(sound.read_bytes(), rng))
    found = damage.attempt(read_codes, path)
    if found is not None:
        assert np.array_equal(found.codes, read_codes(sound).codes)


def a_tokenizer(rng, root, folder):
    """A damaged SentencePiece model is refused or can be used."""
    sound = Path("corpus/tokenizer/spm512.model")
    path = folder / sound.name
    path.write_bytes(damage.of_bytes(sound.read_bytes(), rng))
    found = damage.attempt(load_tokenizer, path)
    if found is not None:
        assert all(0 <= token < found.cardinality for token in found.encode("hello"))


# Sound


CONTAINERS = {
    "pcm16.wav": {"format": "WAV", "subtype": "PCM_16"},
    "float.wav": {"format": "WAV", "subtype": "FLOAT"},
    "wide.wav": {"format": "WAVEX", "subtype": "PCM_24"},
    "large.wav": {"format": "RF64", "subtype": "PCM_16"},
    "talk.flac": {"format": "FLAC", "subtype": "PCM_16"},
    "vorbis.ogg": {"format": "OGG", "subtype": "VORBIS"},
    "opus.ogg": {"format": "OGG", "subtype": "OPUS"},
    "talk.mp3": {"format": "MP3", "subtype": "MPEG_LAYER_III"},
}


@cache
def sound_file(name: str) -> bytes:
    """Returns `TALK` seconds of noisy sound in one of `CONTAINERS`."""
    time = np.arange(int(TALK * RATE)) / RATE
    noise = np.random.default_rng(1).normal(0, 0.02, time.shape)
    samples = 0.3 * np.sin(2 * np.pi * 220 * time) * np.sin(2 * np.pi * 3 * time) ** 2 + noise
    file = io.BytesIO()
    soundfile.write(file, samples, RATE, **CONTAINERS[name])
    return file.getvalue()


def an_audio_file(rng, root, folder):
    """Sound that is read without a warning is as long as it was, to within a packet of its codec."""
    name = list(CONTAINERS)[int(rng.integers(len(CONTAINERS)))]
    sound = sound_file(name)
    path = folder / name
    path.write_bytes(damage.of_bytes(sound, rng, 0, 128 if rng.random() < 0.4 else None))
    with damage.warnings() as messages:
        found = damage.attempt(read_audio, path, RATE)
    if found is not None:
        assert np.isfinite(found).all()
        levels = ("peak", "silent", "clipped")
        of_length = [record for record in messages if not any(word in record.getMessage() for word in levels)]
        assert of_length or abs(found.shape[1] / RATE - TALK) < 0.15, found.shape[1] / RATE


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Folder of the sound inputs, which are made once."""
    return tmp_path_factory.mktemp("sound")


@damage.cases(
    a_weights_file,
    an_index_of_shards,
    a_lora_file,
    a_config,
    a_manifest,
    an_alignment,
    a_code_file,
    a_tokenizer,
    an_audio_file,
)
def test_damage_gives_one_sentence_or_does_no_harm(number, kind, seeds, root, tmp_path):
    damage.try_cases(number, kind, seeds, root, tmp_path)
