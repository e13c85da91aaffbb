"""Damaged output of the commands: each ends in one sentence for the user, or does no harm.

No traceback, no hang, no damaged value taken for a sound one, nothing left behind. Each kind of input makes a sound
one, damages it by a generator and a seed, and states what a reader may make of it at most.
"""

from __future__ import annotations

import json
import shutil
from functools import cache
from pathlib import Path
from unittest import mock

import jax
import numpy as np
import pytest
from matplotlib import pyplot

from eval.__main__ import main as eval_main
from eval.compare import analysis, losses, report
from eval.compare import results as compare_results
from eval.diagnose.records import Results
from eval.results import schema
from eval.streaming import results as stream_results
from eval.streaming import summary, table
from tests.commands.test_damaged_inputs import sound_file
from tests.eval.diagnose.test_diagnose import made as diagnosed
from tests.helpers import damage, micro
from tests.helpers.made_experiment import made as made_experiment
from tests.train.test_plot import lines_of
from train import metrics, plot
from train.config import TrainConfig
from ttt_jax.checkpoints import loading, stream_state
from ttt_jax.data.codes import read_codes
from ttt_jax.moshi import model
from ttt_jax.utils import config_json
from ttt_jax.utils.files import file_digest

pytestmark = pytest.mark.integration


@cache
def _params(run: Path) -> dict:
    return jax.tree.map(np.asarray, loading.load(run).params)


def a_run(rng, root, folder):
    """Parameters that are read from a run have the bits that were saved."""
    sound = root / "run"
    copied = damage.copied(sound, folder)
    path = damage.one_file(copied / "checkpoints", rng)
    if rng.random() < 0.2:
        path.unlink()
    else:
        damage.spoil(path, rng)
    found = damage.attempt(loading.load, copied)
    if found is not None:
        jax.tree.map(np.testing.assert_array_equal, found.params, _params(sound))


def metrics_and_configuration_of_a_run(rng, root, folder):
    """Metrics, configuration and meta data are read whole, but for a line of metrics that may have been cut off."""
    sound = root / "run"
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
        damage.spoil(path, rng)
    found = damage.attempt(metrics.read, folder / "metrics.jsonl")
    if found is not None and a_value:
        assert len(found) == len(lines)
    with mock.patch("train.plots._save", lambda figure, path: (pyplot.close(figure), [path])[1]):
        damage.attempt(plot.main, [str(folder)])
        damage.attempt(plot.main, [str(folder), str(sound)])
    pyplot.close("all")
    damage.attempt(
        config_json.from_dict,
        TrainConfig,
        damage.attempt(config_json.read_json, folder / "config.json", "a configuration"),
        "it",
    )


@cache
def _table(folder: Path) -> str:
    return table.table(stream_results.read(folder))


def a_results_folder(rng, root, folder):
    """A table that is shown, from the summary or again from the frames, is that of the evaluation."""
    sound = root / "eval"
    copied = damage.copied(sound, folder)
    damage.spoil(copied / "results.json" if rng.random() < 0.6 else damage.one_file(copied / "frames", rng), rng)

    def shown():
        found = stream_results.read(copied)
        infos = [stored.info for stored in found.checkpoints]
        again = summary.summarise(found.setting, infos, found.files, found.skipped, copied)
        return table.table(found), table.table(again)

    assert damage.attempt(shown) in (None, (_table(sound), _table(sound)))


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
    copied = damage.copied(sound, folder)
    damage.spoil(copied / ("results.json" if rng.random() < 0.6 else "losses.npz"), rng)
    found = damage.attempt(_analysed, copied)
    assert found is None or report.table(*found) == table


@cache
def _records(root: Path) -> Path:
    made = root / "records"
    made.mkdir()
    schema.write(made, diagnosed(), {})
    return made


def records_of_a_diagnosis(rng, root, folder):
    """Records that are read are those that were written."""
    copied = damage.copied(_records(root), folder)
    damage.spoil(copied / schema.RESULTS, rng)
    found = damage.attempt(schema.read, copied, Results)
    assert found is None or found == diagnosed()


@cache
def _prepared(root: Path) -> Path:
    made = root / "prepared"
    talks = root / "talks"
    talks.mkdir()
    (talks / "talk.wav").write_bytes(sound_file("pcm16.wav"))
    words = [[f"word{i}", [0.2 * i, 0.2 * i + 0.1], "SPEAKER_MAIN"] for i in range(12)]
    (talks / "talk.json").write_text(json.dumps({"alignments": words}))
    assert eval_main(["prepare", str(talks), "--out", str(made)]) == 0
    return made


def content_of(folder: Path) -> dict[str, bytes]:
    """Returns all files of a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def made_of(folder: Path) -> list:
    """Returns what a prepared folder holds; bytes of code files differ, as safetensors orders metadata at random."""
    entries = [json.loads(line) for line in (folder / "manifest.jsonl").read_text().splitlines()]
    assert all(entry.pop("sha256") == file_digest(folder / entry["path"]) for entry in entries)
    codes = [read_codes(folder / entry["path"]) for entry in entries]
    return [(folder / "prepare.json").read_text(), entries, [file.codes.tolist() for file in codes]]


def a_prepared_folder(rng, root, folder):
    """`prepare` that runs again mends what is damaged, or refuses the folder as it is."""
    sound = _prepared(root)
    copied = damage.copied(sound, folder)
    damage.spoil(damage.one_file(copied, rng), rng)
    before = content_of(copied)
    if damage.attempt(eval_main, ["prepare", str(root / "talks"), "--out", str(copied)]) is None:
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
    found = damage.attempt(stream_state.load_state, path, micro.MODEL)
    assert found is None or _bits(found) == bits


@pytest.fixture(scope="module")
def root(tiny_run, tmp_path_factory):
    """Folder of the sound inputs, which are made once: a run with one checkpoint, its evaluation, and others."""
    folder = tmp_path_factory.mktemp("sound")
    run = tiny_run.copy(folder)
    (run / "eval").rename(folder / "eval")
    shutil.rmtree(run / "checkpoints" / "2")
    with (run / "metrics.jsonl").open("a") as metrics_file:  # the run has no validation
        metrics_file.write(json.dumps(lines_of(4, (1,), every=4)[-1]) + "\n")
    return folder


@damage.cases(
    a_run,
    metrics_and_configuration_of_a_run,
    a_results_folder,
    a_comparison,
    records_of_a_diagnosis,
    a_prepared_folder,
    a_conversation,
    first=9,
)
def test_damage_gives_one_sentence_or_does_no_harm(number, kind, seeds, root, tmp_path):
    damage.try_cases(number, kind, seeds, root, tmp_path)
