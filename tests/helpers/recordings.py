"""Small recordings, and `python -m eval prepare` on them."""

import json
from pathlib import Path

import numpy as np
import soundfile

from eval.__main__ import main
from ttt_jax.data.audio.reader import read_audio
from ttt_jax.data.codes import read_codes
from ttt_jax.data.corpus import CorpusConfig, load_coders
from ttt_jax.utils import command

RATE = 16000
CODEC, TOKENIZER = load_coders(CorpusConfig())


def babble(seconds, seed=0, channels=1, rate=RATE):
    """Noise whose level changes every tenth of a second: float32 [samples, channels]."""
    rng = np.random.default_rng(seed)
    level = np.repeat(10 ** rng.uniform(-3, -0.5, (round(seconds * 10), channels)), rate // 10, axis=0)
    return (level * rng.normal(size=level.shape)).clip(-1, 1).astype(np.float32)


def record(path, seconds=1.0, seed=None, channels=1, rate=RATE, words=None, **format_):
    """Writes a recording, all different, and its alignments if there are `words`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    seed = sum(str(path.name).encode()) if seed is None else seed
    soundfile.write(path, babble(seconds, seed, channels, rate), rate, **format_)
    if words is not None:
        path.with_suffix(".json").write_text(json.dumps({"alignments": words}))
    return path


def librilight(root, *chapters):
    """LibriLight's tree with speaker/book/chapter.flac and their JSON."""
    for chapter in chapters:
        path = record(root / f"{chapter}.flac")
        about = {"speaker": chapter.split("/")[0], "book_meta": {"id": "7", "title": "T"}, "snr": 1.0}
        path.with_suffix(".json").write_text(json.dumps({**about, "voice_activity": [[0.1, 0.9]]}))
    return root


def run(*args):
    """The exit code of `python -m eval prepare`, as the shell sees it."""
    return command.run(lambda: main(["prepare", *map(str, args)]))


def lines_of(folder):
    """The manifest of a prepared folder."""
    return [json.loads(line) for line in (folder / "manifest.jsonl").read_text(encoding="utf-8").split("\n") if line]


def codes_of(folder):
    """The code files of a prepared folder."""
    return [read_codes(folder / entry["path"]) for entry in lines_of(folder)]


def offline(path):
    """The codes of each channel in one piece, and silence for as long."""
    channels = [CODEC.encode(channel) for channel in read_audio(path, RATE)]
    silence = CODEC.encode(np.zeros(channels[0].shape[1] * CODEC.frame_size, np.float32))
    return channels, silence


def stems(folder):
    """The recordings of each stream of a prepared folder, by name."""
    return [[Path(source["path"]).stem for source in entry["sources"]] for entry in lines_of(folder)]
