"""Manifests of one recording, with a codec that counts and a tokenizer of letters."""

import json
import types

import safetensors.numpy
import soundfile

from tests.helpers.recordings import RATE
from ttt_jax.data.frames import FrameReader
from ttt_jax.data.manifest import read_manifest

TOKENIZER = types.SimpleNamespace(
    cardinality=300, digest="t" * 64, encode=lambda word: [4 + ord(c) % 200 for c in word]
)


class CountingCodec:
    """The codec, counting how often it encodes."""

    def __init__(self, codec):
        self._codec, self.calls = codec, 0

    def __getattr__(self, name):
        return getattr(self._codec, name)

    def encode_step(self, audio, state, mask=None):
        self.calls += 1
        return self._codec.encode_step(audio, state, mask)


def write_entry(folder, audio, name="a.wav", words=None, duration=None):
    """Writes audio [samples] or [samples, 2] with its manifest, and returns the manifest's path."""
    soundfile.write(folder / name, audio, RATE, subtype="FLOAT")
    if words is not None:
        (folder / name).with_suffix(".json").write_text(json.dumps({"alignments": words}))
    return write_manifest(folder, name, len(audio) / RATE if duration is None else duration)


def write_manifest(folder, name, duration):
    (folder / "m.jsonl").write_text(json.dumps({"path": name, "duration": duration}) + "\n")
    return folder / "m.jsonl"


def opened(manifest, codec, cache, tokenizer=TOKENIZER):
    """The only recording of a manifest."""
    (entry,) = read_manifest(manifest).entries
    return FrameReader(codec, tokenizer, cache).open(entry)


def frames_of(manifest, codec, cache):
    return opened(manifest, codec, cache).read()


def write_codes(folder, codes, made_by, duration=None, **changes):
    metadata = {"frame_rate": "12.5", "codec": made_by.digest} | changes
    metadata = {key: value for key, value in metadata.items() if value is not None}
    safetensors.numpy.save_file({"codes": codes}, folder / "a.safetensors", metadata=metadata)
    return write_manifest(folder, "a.safetensors", codes.shape[-1] / 12.5 if duration is None else duration)
