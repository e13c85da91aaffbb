"""A thousand damaged inputs: each ends in one sentence for the user, or the damage did no harm. No traceback, no hang, no damaged
value taken for a sound one, nothing left behind.

Each kind of input makes a sound one, damages it by a generator and a seed, and says what a reader may make of it at most.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import math
import shutil
import signal
from functools import cache
from pathlib import Path
from unittest import mock

import jax
import numpy as np
import pytest
import safetensors.numpy
import soundfile
from matplotlib import pyplot

from eval.__main__ import main as eval_main
from eval.compare import analysis, losses, report
from eval.compare import results as compare_results
from eval.diagnose import records
from eval.inputs import checkpoints
from eval.streaming import results as stream_results
from eval.streaming import summary, table
from tests.eval.test_diagnose import made as diagnosed
from tests.helpers import damage, eval_models, made_scores, micro
from tests.helpers import kyutai_files as kyutai_made
from tests.helpers.made_experiment import made as made_experiment
from tests.train.test_plot import STREAMS, lines_of
from train import metrics, plot
from train.config import TrainConfig
from ttt_jax.checkpoints import stream_state, weights
from ttt_jax.convert import kyutai
from ttt_jax.data.alignments import read_alignments
from ttt_jax.data.audio.reader import read_audio
from ttt_jax.data.codes import Codes, Source, read_codes, write_codes
from ttt_jax.data.manifest import TOLERANCE, read_manifest
from ttt_jax.data.text import load_tokenizer
from ttt_jax.errors import InputError
from ttt_jax.moshi import model
from ttt_jax.utils import config_json
from ttt_jax.utils.files import file_digest

SECONDS = 20
"""A case that takes longer hangs."""
RATE = 24000
TALK = 2.5
"""Seconds of made-up speech."""


def attempt(call, *given):
    """What a call returns; None if it ended in one sentence for the user."""
    try:
        return call(*given)
    except InputError as error:
        message = str(error)
        assert message.endswith("."), message
        assert "\n" not in message
        return None


@contextlib.contextmanager
def warnings():
    """What the library says meanwhile."""
    said = []
    handler = logging.Handler()
    handler.emit = said.append
    logging.getLogger("ttt_jax").addHandler(handler)
    try:
        yield said
    finally:
        logging.getLogger("ttt_jax").removeHandler(handler)


def tree(folder: Path) -> dict[str, int]:
    """What lies in a folder: sizes by relative path."""
    return {str(path.relative_to(folder)): path.lstat().st_size for path in sorted(folder.rglob("*"))}


def place(made: Path, folder: Path) -> Path:
    """A copy of the sound input to be damaged."""
    return Path(shutil.copytree(made, folder / made.name, symlinks=True))


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
    if attempt(kyutai, source, out) is None:
        assert tree(source.parent) == before
        return None
    shutil.move(out, source.parent.parent / "moved")
    assert tree(source.parent) == before
    return weights.load(source.parent.parent / "moved")


def _spoilt_tensors(data: bytes, rng) -> bytes:
    """A safetensors file with damage in its header, in its numbers, or with a number that is none."""
    header = 8 + int.from_bytes(data[:8], "little")
    kind = rng.random()
    if kind < 0.15:
        at = header + 4 * int(rng.integers((len(data) - header) // 4))
        return data[:at] + np.float32(rng.choice([np.nan, np.inf, -np.inf])).tobytes() + data[at + 4 :]
    return damage.of_bytes(data, rng, *((0, header) if kind < 0.7 else (header, None)))


def a_weights_file(rng, root, folder):
    """Weights that convert have the names, types and shapes that the config.json tells, and the bits of the file."""
    sound, cfg, _ = _checkpoint(root)
    (folder / "at").mkdir()
    source = place(sound, folder / "at")
    path = source / "model.safetensors"
    data = path.read_bytes()
    path.write_bytes(_spoilt_tensors(data, rng))
    with warnings() as said:
        found = _converted(source)
    if found is not None:
        there = safetensors.numpy.load_file(path)
        assert found.info["model"] == cfg
        assert np.array_equal(there["text_emb.weight"], found.params["text_emb"])
        finite = all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(found.params))
        assert finite or any("NaN" in one.getMessage() for one in said)


def a_config(rng, root, folder):
    """A configuration that converts is the one that the weights have."""
    sound, cfg, params = _checkpoint(root)
    (folder / "at").mkdir()
    source = place(sound, folder / "at")
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
    source = place(sound, folder / "at")
    path = source / "model.safetensors.index.json"
    if rng.random() < 0.2:
        path = source / "model-00001-of-00002.safetensors"
    spoil(path, rng)
    found = _converted(source)
    if found is not None:
        assert found.info["model"] == cfg
        if path.suffix == ".json":
            jax.tree.map(np.testing.assert_array_equal, found.params, params)


def a_lora_file(rng, root, folder):
    """Adapters that convert have the rank, the names and the shapes that belong to the weights."""
    sound, _, _ = _checkpoint(root)
    (folder / "at").mkdir()
    source = place(sound, folder / "at")
    c = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(c | {"lora": True, "lora_rank": 2, "lora_scaling": 2.0}))
    path = source / "lora.safetensors"
    path.write_bytes(_spoilt_tensors(safetensors.numpy.save(kyutai_made.lora(c, 2)), rng))
    with warnings() as said:
        found = _converted(source)
    if found is not None:
        assert found.cfg.lora.rank == 2
        finite = all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(found.params))
        assert finite or any("NaN" in one.getMessage() for one in said)


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
    found = attempt(read_manifest, folder / "train.jsonl")
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
    found = attempt(read_alignments, path, TALK)
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
    found = attempt(read_codes, path)
    if found is not None:
        assert np.array_equal(found.codes, read_codes(sound).codes)


def a_tokenizer(rng, root, folder):
    """A damaged SentencePiece model is refused or can be used."""
    sound = Path("corpus/tokenizer/spm512.model")
    path = folder / sound.name
    path.write_bytes(damage.of_bytes(sound.read_bytes(), rng))
    found = attempt(load_tokenizer, path)
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
def _sound(name: str) -> bytes:
    time = np.arange(int(TALK * RATE)) / RATE
    noise = np.random.default_rng(1).normal(0, 0.02, time.shape)
    samples = 0.3 * np.sin(2 * np.pi * 220 * time) * np.sin(2 * np.pi * 3 * time) ** 2 + noise
    file = io.BytesIO()
    soundfile.write(file, samples, RATE, **CONTAINERS[name])
    return file.getvalue()


def an_audio_file(rng, root, folder):
    """Sound that is read without a word is as long as it was, to within a packet of its codec."""
    name = list(CONTAINERS)[int(rng.integers(len(CONTAINERS)))]
    sound = _sound(name)
    path = folder / name
    path.write_bytes(damage.of_bytes(sound, rng, 0, 128 if rng.random() < 0.4 else None))
    with warnings() as said:
        found = attempt(read_audio, path, RATE)
    if found is not None:
        assert np.isfinite(found).all()
        levels = ("peak", "silent", "clipped")
        of_length = [one for one in said if not any(word in one.getMessage() for word in levels)]
        assert of_length or abs(found.shape[1] / RATE - TALK) < 0.15, found.shape[1] / RATE


# What commands leave


@cache
def _run(root: Path) -> tuple[Path, dict]:
    made = eval_models.write_run(root / "run")
    (made / "config.json").write_text(json.dumps(config_json.to_dict(micro.CONFIG)))
    (made / "meta.json").write_text(json.dumps({"unigram": dict.fromkeys(STREAMS, 3.5)}))
    lines = lines_of(3, (1,), every=2)
    (made / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return made, jax.tree.map(np.asarray, checkpoints.load(made).params)


def a_run(rng, root, folder):
    """Parameters that are read from a run have the bits that were saved."""
    sound, params = _run(root)
    copied = place(sound, folder)
    path = one_file(copied / "checkpoints", rng)
    if rng.random() < 0.2:
        path.unlink()
    else:
        spoil(path, rng)
    found = attempt(checkpoints.load, copied)
    if found is not None:
        jax.tree.map(np.testing.assert_array_equal, found.params, params)


def what_a_run_says_of_itself(rng, root, folder):
    """Metrics, configuration and meta data are read whole, but for a line of metrics that may have been cut off."""
    sound, _ = _run(root)
    for name in ("metrics.jsonl", "config.json", "meta.json"):
        shutil.copy(sound / name, folder)
    path = folder / ("metrics.jsonl", "config.json", "meta.json")[int(rng.integers(3))]
    a_value = path.suffix == ".jsonl" and rng.random() < 0.7
    if a_value:
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        at = int(rng.integers(len(lines)))
        lines[at], _ = damage.of_json(lines[at], rng)
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    else:
        spoil(path, rng)
    found = attempt(metrics.read, folder / "metrics.jsonl")
    if found is not None and a_value:
        assert len(found) == len(lines)
    with mock.patch("train.plots._save", lambda figure, path: (pyplot.close(figure), [path])[1]):
        attempt(plot.main, [str(folder)])
        attempt(plot.main, [str(folder), str(sound)])
    pyplot.close("all")
    attempt(
        config_json.from_dict,
        TrainConfig,
        attempt(config_json.read_json, folder / "config.json", "a configuration"),
        "it",
    )


@cache
def _results(root: Path) -> tuple[Path, str]:
    made = root / "results"
    made_scores.write(made)
    made_scores.write_results(made, [made_scores.CHECKPOINT])
    return made, table.table(stream_results.read(made))


def a_results_folder(rng, root, folder):
    """A table that is shown, from the summary or again from the frames, is that of the evaluation."""
    sound, table = _results(root)
    copied = place(sound, folder)
    spoil(copied / "results.json" if rng.random() < 0.6 else one_file(copied / "frames", rng), rng)

    def shown():
        found = stream_results.read(copied)
        infos = [one.info for one in found.checkpoints]
        again = summary.summarise(found.setting, infos, found.files, found.skipped, copied)
        return table.table(found), table.table(again)

    assert attempt(shown) in (None, (table, table))


@cache
def _comparison(root: Path) -> tuple[Path, str]:
    made = root / "comparison"
    made.mkdir()
    experiment = made_experiment({"reset": 0.05})
    losses.write(made, experiment)
    compare_results.write(made, experiment, analysis.analyse(experiment), {})
    return made, report.table(*_analysed(made))


def _analysed(folder: Path):
    experiment, _ = compare_results.read(folder)
    return experiment, analysis.analyse(experiment)


def a_comparison(rng, root, folder):
    """Statistics are done again on what was measured, or not at all."""
    sound, table = _comparison(root)
    copied = place(sound, folder)
    spoil(copied / ("results.json" if rng.random() < 0.6 else "losses.npz"), rng)
    found = attempt(_analysed, copied)
    assert found is None or report.table(*found) == table


@cache
def _records(root: Path) -> Path:
    made = root / "records"
    made.mkdir()
    records.write_records(diagnosed(), made)
    return made


def records_of_a_diagnosis(rng, root, folder):
    """Records that are read are those that were written."""
    copied = place(_records(root), folder)
    spoil(copied / records.RECORDS, rng)
    found = attempt(records.read, copied)
    assert found is None or found == diagnosed()


@cache
def _prepared(root: Path) -> Path:
    made = root / "prepared"
    talks = root / "talks"
    talks.mkdir()
    (talks / "talk.wav").write_bytes(_sound("pcm16.wav"))
    words = [[f"word{i}", [0.2 * i, 0.2 * i + 0.1], "SPEAKER_MAIN"] for i in range(12)]
    (talks / "talk.json").write_text(json.dumps({"alignments": words}))
    assert eval_main(["prepare", str(talks), "--out", str(made)]) == 0
    return made


def content_of(folder: Path) -> dict[str, bytes]:
    """All files of a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def made_of(folder: Path) -> list:
    """What a prepared folder says and holds; the bytes of code files differ, as safetensors orders metadata at random."""
    entries = [json.loads(line) for line in (folder / "manifest.jsonl").read_text().splitlines()]
    assert all(entry.pop("sha256") == file_digest(folder / entry["path"]) for entry in entries)
    codes = [read_codes(folder / entry["path"]) for entry in entries]
    return [(folder / "prepare.json").read_text(), entries, [one.codes.tolist() for one in codes]]


def a_prepared_folder(rng, root, folder):
    """`prepare` that runs again mends what is damaged, or refuses the folder as it is."""
    sound = _prepared(root)
    copied = place(sound, folder)
    spoil(one_file(copied, rng), rng)
    before = content_of(copied)
    if attempt(eval_main, ["prepare", str(root / "talks"), "--out", str(copied)]) is None:
        assert content_of(copied) == before
    else:
        assert made_of(copied) == made_of(sound)


@cache
def _conversation(root: Path) -> tuple[Path, bytes]:
    made = root / "conversation.safetensors"
    state = model.init_state(micro.MODEL, 1)
    rng = np.random.default_rng(0)
    state = jax.tree.map(lambda x: x if x.dtype != np.float32 else rng.normal(size=x.shape).astype(x.dtype), state)
    stream_state.save_state(made, state, micro.MODEL)
    return made, _bits(stream_state.load_state(made, micro.MODEL))


def _bits(state) -> bytes:
    return b"".join(np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(state))


def a_conversation(rng, root, folder):
    """A stream goes on from the state that was saved, or not at all."""
    sound, bits = _conversation(root)
    path = folder / sound.name
    path.write_bytes(damage.of_bytes(sound.read_bytes(), rng))
    found = attempt(stream_state.load_state, path, micro.MODEL)
    assert found is None or _bits(found) == bits


def one_file(folder: Path, rng) -> Path:
    """One of the files below a folder that hold anything."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.stat().st_size]
    return files[int(rng.integers(len(files)))]


def spoil(path: Path, rng) -> None:
    """Damages a file: a value of its JSON, or its bytes."""
    if path.suffix == ".json" and rng.random() < 0.6:
        path.write_text(json.dumps(damage.of_json(json.loads(path.read_text()), rng)[0]))
    else:
        path.write_bytes(damage.of_bytes(path.read_bytes(), rng))


KINDS = (
    a_weights_file,
    an_index_of_shards,
    a_lora_file,
    a_config,
    a_manifest,
    an_alignment,
    a_code_file,
    a_tokenizer,
    an_audio_file,
    a_run,
    what_a_run_says_of_itself,
    a_results_folder,
    a_comparison,
    records_of_a_diagnosis,
    a_prepared_folder,
    a_conversation,
)
FEW, MANY = 7, 63
"""Cases of each kind: a hundred in all by default, a thousand more with -m slow."""


@contextlib.contextmanager
def time_limit(seconds: int):
    """Raises `TimeoutError` in what takes longer."""

    def stop(*_):
        raise TimeoutError(f"more than {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Sound inputs, made once."""
    return tmp_path_factory.mktemp("sound")


def tried(kind, seeds, root, folder):
    """Runs the cases of some seeds, in a folder of their own each."""
    number = KINDS.index(kind)
    for seed in seeds:
        own = folder / str(seed)
        own.mkdir()
        with time_limit(SECONDS):
            try:
                kind(np.random.default_rng([number, seed]), root, own)
            except BaseException as error:
                error.add_note(f"{kind.__name__}, seed {seed}")
                raise
        shutil.rmtree(own)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_damage_is_told_or_does_no_harm(kind, root, tmp_path):
    tried(kind, range(FEW), root, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("part", range(4))
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_more_damage_is_told_or_does_no_harm(kind, part, root, tmp_path):
    tried(kind, range(FEW + part * MANY // 4, FEW + (part + 1) * MANY // 4), root, tmp_path)
