"""`python -m experiments.memory`, shrunk: runs, results and best losses from end to end, and what the report
compares."""

import dataclasses
import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest

from eval.compare import plots as compare_plots
from eval.compare import results
from eval.compare.conditions import parse
from eval.compare.experiment import BEYOND
from eval.streaming import runner
from experiments import memory
from tests.helpers.quick import quickly, scan_calls
from tests.helpers.small_tasks import CONFIG, LONG, SHORT
from train import loop, plots
from ttt_jax.checkpoints.parameter_counts import TTT, parameter_counts
from ttt_jax.checkpoints.run_weights import load_run
from ttt_jax.data import corpus as corpora
from ttt_jax.errors import InputError
from ttt_jax.utils.command import parse as parse_options

KINDS = ("persist", "none")
"""Ways to train that are done: one with TTT layers, one without."""
WAYS = tuple(memory.WAYS.values())


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """The part `tasks` on a small model, one task and two ways to train: its folder, the runs that were drawn, and its
    files before and after it was done again."""
    folder = tmp_path_factory.mktemp("memory")
    whole, drawn = memory.Experiment._conditions, []

    def conditions(experiment, name):
        texts = whole(experiment, name)
        return [text for text in texts if all(Path(path).is_dir() for path in parse(text).paths)]

    small = {
        "TASK": CONFIG,
        "SHORT": SHORT,
        "LONG": dataclasses.replace(LONG, frames=288),
        "HELDOUT": dataclasses.replace(memory.HELDOUT, files=3, frames=192, every=7),
        "NAMES": ("recall",),
        "WAYS": {name: memory.WAYS[name] for name in KINDS},
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, value in small.items():
            patch.setattr(memory, name, value)
        patch.setattr(memory.Experiment, "_conditions", conditions)
        patch.setattr(loop, "make_steps_together", quickly(loop.make_steps_together))
        patch.setattr(runner, "scan_calls", scan_calls)
        patch.setattr(compare_plots, "draw_all", lambda *_: [])
        patch.setattr(plots, "draw_run", lambda lines, unigram, folder: drawn.append((len(lines), folder.name)))
        # As many runs and steps as in tests/train/test_together.py: the program may be there already.
        options = memory.Options("tasks", str(folder), seeds="3,4", steps=6)
        assert memory.main(options) == 0
        before = stamps(folder)
        assert memory.main(options) == 0
        return folder, drawn, before, stamps(folder)


def stamps(folder):
    """When each file was written, by its name."""
    return {str(path.relative_to(folder)): path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


@pytest.mark.integration
def test_every_way_to_train_leaves_a_run_that_is_whole_and_is_not_trained_again(done):
    folder, drawn, before, after = done
    names = [f"{way}-recall-{seed}" for way in KINDS for seed in (3, 4)]
    assert {path.name for path in (folder / "runs").iterdir()} == set(names)
    assert drawn == [(6, name) for name in names]
    for name in names:
        run = load_run(folder / "runs" / name)
        config = run.meta["config"]
        assert (run.meta["step"], config["name"], config["seed"]) == (6, name, int(name[-1]))
        assert bool(run.config.ttt_layers) == name.startswith("persist")
    assert before.keys() == after.keys()
    runs = [name for name in before if not name.startswith("results/")]
    assert [before[name] for name in runs] == [after[name] for name in runs]
    # They learn from short and long files, half of the frames each.
    train = load_run(folder / "runs" / "persist-recall-3").meta["config"]["data"]["train"]
    cfg = dataclasses.replace(CONFIG.data, train=train)
    short, long = corpora.load(cfg, *corpora.load_coders(cfg)).train
    assert (Path(short.name).name, Path(long.name).name) == ("recall-short", "recall-long")
    # As in the report, where a long file has as many frames as four short ones.
    assert memory.LONG.frames == 4 * memory.SHORT.frames
    assert short.weight * memory.SHORT.frames == long.weight * memory.LONG.frames


@pytest.mark.integration
def test_the_comparison_shows_how_near_the_best_losses_it_comes(done):
    out = done[0] / "results" / "tasks-recall-seeds-3-4"
    experiment, _ = results.read(out)
    assert [file.frames for file in experiment.files] == [192] * 3
    assert experiment.setting.chunk == CONFIG.data.chunk
    for bound, loss in ((experiment.bounds.ideal, 0), (experiment.bounds.memoryless, math.log(16))):
        assert np.isfinite(bound).any()
        np.testing.assert_allclose(bound[np.isfinite(bound)], loss)
    assert {name: len(losses) for name, losses in experiment.losses.items()} == {"persist": 2, "reset": 2, "none": 2}
    assert json.loads((out / "results.json").read_text())["analysis"]["losses"]["persist"]["closed"]
    assert len(list((out / "frames").rglob("*.npz"))) == 4 * 3


def test_a_run_that_is_not_whole_is_begun_anew_and_those_beside_it_are_left(tmp_path, monkeypatch):
    started = []
    monkeypatch.setattr(loop, "start", lambda cfgs, load, evaluate: started.append([cfg.name for cfg in cfgs]) or 0)
    monkeypatch.setattr(memory.Experiment, "_trained_on", lambda _, name: name)
    experiment, runs = memory.Experiment(tmp_path, [1, 2], 4), tmp_path / "runs"
    names = [f"way-recall-{seed}" for seed in (1, 2)]
    for name in names:
        (runs / name / "checkpoints" / "4").mkdir(parents=True)
    experiment._train("way", memory.TASK, ("recall",))
    assert started == []
    (runs / names[1] / "checkpoints" / "4").rename(runs / names[1] / "checkpoints" / "3")
    experiment._train("way", memory.TASK, ("recall",))
    assert started == [names[1:]]
    # A folder that is taken would be refused.
    assert [path.name for path in runs.iterdir()] == names[:1]
    # A run of another length is never removed.
    (runs / "way-speech-1").mkdir()
    (runs / "way-speech-1" / "config.json").write_text('{"steps": 9}')
    with pytest.raises(InputError, match="holds a run of 9 steps, not 4"):
        experiment._train("way", memory.TINY, ("speech",))
    assert (runs / "way-speech-1" / "config.json").is_file()
    monkeypatch.setattr(loop, "start", lambda *_, **__: 130)
    with pytest.raises(KeyboardInterrupt):  # an interrupt in training ends the whole
        experiment._train("way", memory.TASK, ("recall",))
    assert len(started) == 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["tasks", "FOLDER", "--seeds", "a"], "--seeds 'a'"),
        (["tasks", "FOLDER", "--seeds", ""], "--seeds ''"),
        (["tasks", "FOLDER", "--steps", "0"], "--steps 0"),
        (["tasks"], "part and folder are missing"),
        (["tasks", "FOLDER", "--again"], "part and folder are missing, or given together with --again"),
        ([], "part and folder are missing"),
    ],
)
def test_a_mistake_is_one_sentence(tmp_path, words, message):
    with pytest.raises(InputError, match=message):
        parse_options(memory.Options, "memory", words)
    assert not list(tmp_path.iterdir())


# What the report compares


@pytest.mark.parametrize("base", [memory.TASK, memory.TINY])
def test_ways_to_train_have_as_many_parameters_frames_and_steps(base):
    cfg = memory.none(base)
    counts = parameter_counts(base.model), parameter_counts(cfg.model)
    assert counts[0][TTT] > 0 == counts[1][TTT]
    sizes = [sum(count.values()) for count in counts]
    assert abs(sizes[1] / sizes[0] - 1) < 0.01
    assert dataclasses.replace(cfg, model=base.model) == memory.persist(base) == base
    assert (
        len({way.data.batch * way.data.chunk * way.bptt * way.steps for way in (change(base) for change in WAYS)}) == 1
    )
    assert (memory.bptt(base).bptt, memory.reset(base).state) == (4, "reset")


def test_tasks_are_trained_on_from_the_first_frame_of_code_files_and_without_their_text():
    for change in [*WAYS, *memory.INNER.values(), *memory.PLACES.values()]:
        cfg = change(memory.TASK)
        assert (cfg.data.from_start, cfg.data.codec, cfg.loss.text) == (True, corpora.FILES, 0)
    assert len({data.seed for data in (memory.HELDOUT, memory.SHORT, memory.LONG)}) == 3


def test_each_variant_differs_from_the_first_in_its_name():
    inner = {name: change(memory.TASK).model for name, change in memory.INNER.items()}
    assert {name: (model.ttt.hidden, model.ttt.mini_batch) for name, model in inner.items()} == {
        "persist": ((4,), 16),
        "linear-16": ((), 16),
        "linear-1": ((), 1),
        "mlp-1": ((4,), 1),
    }
    assert inner["mlp-1"].inner_lr >= inner["persist"].inner_lr  # which follows from the rest
    places = {name: list(change(memory.TASK).model.ttt_layers) for name, change in memory.PLACES.items()}
    assert places == {"persist": [0], "middle": [1], "last": [2]}
    assert memory.TASK.model.num_layers == 3


def test_conditions_are_those_that_compare_understands_with_all_seeds_each(tmp_path, monkeypatch):
    trained, compared = [], []
    monkeypatch.setattr(memory.Experiment, "_train", lambda _, way, cfg, names: trained.append((way, cfg, names)))
    monkeypatch.setattr(memory.Experiment, "_heldout", lambda _, name: name)
    monkeypatch.setattr(memory.Experiment, "_compare", lambda _, *words: compared.append(words))
    experiment = memory.Experiment(tmp_path, [1, 2], None)

    def read(conditions):
        given = [parse(text) for text in conditions]
        assert {Path(path).parent for condition in given for path in condition.paths} == {tmp_path / "runs"}
        return [(condition.name, condition.arm, *(Path(path).name for path in condition.paths)) for condition in given]

    assert read(experiment._conditions("recall")) == [
        ("persist", "persist", "persist-recall-1", "persist-recall-2"),
        ("reset", "reset", "persist-recall-1", "persist-recall-2"),
        ("none", "off", "none-recall-1", "none-recall-2"),
        ("trained-reset", "reset", "reset-recall-1", "reset-recall-2"),
        ("trained-reset-kept", "persist", "reset-recall-1", "reset-recall-2"),
        ("bptt", "persist", "bptt-recall-1", "bptt-recall-2"),
    ]
    experiment.inner()
    assert trained == [(name, change(memory.TASK), ("recall",)) for name, change in memory.INNER.items()]
    ((part, conditions, data),) = compared
    assert (part, data) == ("inner", "recall")
    names = ("persist", "linear-16", "linear-1", "mlp-1")
    assert read(conditions) == [(name, "persist", f"{name}-recall-1", f"{name}-recall-2") for name in names]


def test_a_part_has_the_seeds_of_the_report_unless_others_are_given(tmp_path, monkeypatch):
    used = []
    for part in ("tasks", "place", "speech"):
        monkeypatch.setattr(memory.Experiment, part, lambda experiment: used.append(list(experiment._seeds)))
        assert memory.main(memory.Options(part, str(tmp_path))) == 0
    memory.main(memory.Options("speech", str(tmp_path), seeds="7,8"))
    assert used == [[20, 21, 22], [20, 21, 22], list(range(20, 29)), [7, 8]]


PARTS = ("control", "inner", "place", "recall", "speaker", "speech")


def test_the_stored_results_are_whole_and_small():
    folders = sorted(memory.REPORTED.iterdir())
    assert [folder.name for folder in folders] == list(PARTS)
    for folder in folders:
        experiment, about = results.read(folder)
        assert len((folder / "results.json").read_text().splitlines()) <= 300
        assert len(experiment.losses) >= 3
        assert about.keys() == {"evaluated_with", "cost"}
    assert sum((folder / "losses.npz").stat().st_size for folder in folders) < 1e6


@pytest.mark.slow
@pytest.mark.parametrize("part", PARTS)
def test_the_stored_losses_give_the_stored_reports_again(tmp_path, part, monkeypatch):
    monkeypatch.setattr(compare_plots, "draw_all", lambda *_: [])
    folder = Path(shutil.copytree(memory.REPORTED / part, tmp_path / part))
    assert memory.again(tmp_path) == 0
    for name in ("report.md", "results.json"):
        assert (folder / name).read_bytes() == (memory.REPORTED / part / name).read_bytes()


def reported(part):
    """Returns the stored results of a part, and its comparisons with what cannot remember."""
    stored = json.loads((memory.REPORTED / part / "results.json").read_text())
    comparisons = {one["name"]: one["regions"][BEYOND] for one in stored["analysis"]["comparisons"]}
    return stored, [comparisons[name] for name in ("reset", "none")]


@pytest.mark.parametrize(("part", "share"), [("recall", 0.8), ("speaker", 0.5)])
def test_the_reported_memory_closes_the_gap_in_every_seed(part, share):
    stored, rivals = reported(part)
    assert stored["analysis"]["units"] >= 50
    losses = stored["analysis"]["losses"]["persist"]
    chunks = losses["closed_by_chunk"][1:]
    assert len(losses["closed_by_seed"]) >= 3
    assert len(chunks) >= 16
    assert all(value["mean"] > share for value in [*losses["closed_by_seed"], *chunks])
    for rival in rivals:
        assert len(rival["seeds"]) >= 3
        assert all(seed["test"]["mean"] > 0 and seed["holm"] < 0.01 for seed in rival["seeds"])


def test_the_reported_memory_is_equivalent_where_there_is_nothing_to_remember():
    stored, rivals = reported("control")
    assert stored["setting"]["margin"] == 0.02
    assert all(rival["paired"]["equivalence"]["p"] < 0.01 for rival in rivals)
