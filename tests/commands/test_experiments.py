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
from train import plots, together
from ttt_jax.checkpoints.parameter_counts import TTT, parameter_counts
from ttt_jax.checkpoints.run_weights import load_run
from ttt_jax.data import corpus as corpora
from ttt_jax.errors import InputError
from ttt_jax.utils.command import parse as parse_options

KINDS = ("persist", "none")
"""Ways to train that are done: one with TTT layers, one without."""


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """The part `tasks` on a small model, one task and two ways to train: its folder, and what changed when it was done
    again."""
    folder = tmp_path_factory.mktemp("memory")
    whole, drawn = memory.Experiment._conditions, []

    def conditions(experiment, name):
        found = [(text, parse(text)) for text in whole(experiment, name)]
        return [text for text, one in found if all(Path(path).is_dir() for path in one.paths)]

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
        patch.setattr(together, "make_steps_together", quickly(together.make_steps_together))
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
def test_every_way_to_train_leaves_a_run_that_is_whole(done):
    folder, drawn, *_ = done
    names = [f"{way}-recall-{seed}" for way in KINDS for seed in (3, 4)]
    assert {path.name for path in (folder / "runs").iterdir()} == set(names)
    assert drawn == [(6, name) for name in names]
    for name in names:
        run = load_run(folder / "runs" / name)
        assert run.meta["step"] == 6
        assert (run.meta["config"]["name"], f"recall-{run.meta['config']['seed']}") == (name, name.partition("-")[2])
        assert bool(run.config.ttt_layers) == name.startswith("persist")


@pytest.mark.integration
def test_runs_learn_from_short_and_long_files_half_of_the_frames_each(done):
    folder, *_ = done
    cfg = dataclasses.replace(
        CONFIG.data, train=load_run(folder / "runs" / "persist-recall-3").meta["config"]["data"]["train"]
    )
    short, long = corpora.load(cfg, *corpora.load_coders(cfg)).train
    assert (Path(short.name).name, Path(long.name).name) == ("recall-short", "recall-long")
    # As in the report, where a long file has as many frames as four short ones.
    assert memory.LONG.frames == 4 * memory.SHORT.frames
    assert short.weight * memory.SHORT.frames == long.weight * memory.LONG.frames


@pytest.mark.integration
def test_the_comparison_tells_how_near_the_best_losses_it_comes(done):
    folder, *_ = done
    out = folder / "results" / "tasks-recall-seeds-3-4"
    experiment, _ = results.read(out)
    assert [file.frames for file in experiment.files] == [192] * 3
    assert experiment.setting.chunk == CONFIG.data.chunk
    ideal, memoryless = (
        values[np.isfinite(values)] for values in (experiment.bounds.ideal, experiment.bounds.memoryless)
    )
    assert len(ideal)
    np.testing.assert_array_equal(ideal, 0)
    np.testing.assert_allclose(memoryless, math.log(16))
    assert {name: len(losses) for name, losses in experiment.losses.items()} == {"persist": 2, "reset": 2, "none": 2}
    assert json.loads((out / "results.json").read_text())["analysis"]["losses"]["persist"]["closed"]
    assert len(list((out / "frames").rglob("*.npz"))) == 4 * 3


@pytest.mark.integration
def test_runs_that_have_ended_are_not_trained_again(done):
    _, _, before, after = done
    runs = [name for name in before if not name.startswith("results/")]
    assert any(name.startswith("runs/") for name in runs)
    assert [before[name] for name in runs] == [after[name] for name in runs]
    assert before.keys() == after.keys()


def test_a_run_that_is_not_whole_is_begun_anew_and_those_beside_it_are_left(tmp_path, monkeypatch):
    started = []
    monkeypatch.setattr(together, "start", lambda cfgs, load: started.append([cfg.name for cfg in cfgs]) or 0)
    monkeypatch.setattr(memory.Experiment, "_trained_on", lambda _, name: name)
    experiment = memory.Experiment(tmp_path, [1, 2], 4)
    names = [f"way-recall-{seed}" for seed in (1, 2)]
    for name in names:
        (tmp_path / "runs" / name / "checkpoints" / "4").mkdir(parents=True)
    experiment._train("way", memory.TASK, ("recall",))
    assert started == []
    (tmp_path / "runs" / names[1] / "checkpoints" / "4").rename(tmp_path / "runs" / names[1] / "checkpoints" / "3")
    experiment._train("way", memory.TASK, ("recall",))
    assert started == [names[1:]]
    # A folder that is taken would be refused.
    assert [path.name for path in (tmp_path / "runs").iterdir()] == names[:1]


def test_runs_of_another_length_are_never_removed(tmp_path, monkeypatch):
    monkeypatch.setattr(together, "start", lambda *_: pytest.fail("nothing may start"))
    place = tmp_path / "runs" / "way-speech-1"
    (place / "checkpoints" / "9").mkdir(parents=True)
    (place / "config.json").write_text('{"steps": 9}')
    with pytest.raises(InputError, match="holds a run of 9 steps, not 4"):
        memory.Experiment(tmp_path, [1], 4)._train("way", memory.TINY, ("speech",))
    assert (place / "checkpoints" / "9").is_dir()


def test_an_interrupt_in_training_ends_the_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(together, "start", lambda *_: 130)
    with pytest.raises(KeyboardInterrupt):
        memory.Experiment(tmp_path, [1], 4)._train("way", memory.TINY, ("speech",))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["tasks", "FOLDER", "--seeds", "a"], "--seeds 'a'"),
        (["tasks", "FOLDER", "--seeds", ""], "--seeds ''"),
        (["tasks", "FOLDER", "--steps", "0"], "--steps 0"),
        (["tasks"], "part and folder are missing"),
        (["tasks", "FOLDER", "--again"], "part and folder are missing, or given together with --again"),
        ([], "part and folder are missing"),
    ],
)
def test_a_mistake_is_one_sentence(tmp_path, words, said):
    with pytest.raises(InputError, match=said):
        parse_options(memory.Options, "memory", words)
    assert not list(tmp_path.iterdir())


# What the report compares


@pytest.mark.parametrize("base", [memory.TASK, memory.TINY])
def test_without_ttt_layers_a_model_has_as_many_parameters(base):
    cfg = memory.none(base)
    counts = parameter_counts(base.model), parameter_counts(cfg.model)
    assert counts[0][TTT] > 0 == counts[1][TTT]
    sizes = [sum(one.values()) for one in counts]
    assert abs(sizes[1] / sizes[0] - 1) < 0.01
    assert dataclasses.replace(cfg, model=base.model) == base


@pytest.mark.parametrize("base", [memory.TASK, memory.TINY])
def test_every_way_to_train_sees_as_many_frames_and_steps(base):
    def frames(cfg):
        return cfg.data.batch * cfg.data.chunk * cfg.bptt * cfg.steps

    assert {frames(way(base)) for way in memory.WAYS.values()} == {frames(base)}
    assert memory.bptt(base).bptt == 4
    assert memory.reset(base).state == "reset"
    assert memory.persist(base) == base


def test_tasks_are_trained_on_from_the_first_frame_of_code_files_and_without_their_text():
    for change in [*memory.WAYS.values(), *memory.INNER.values(), *memory.PLACES.values()]:
        cfg = change(memory.TASK)
        assert cfg.data.from_start
        assert (cfg.data.codec, cfg.loss.text) == (corpora.FILES, 0)
    assert memory.HELDOUT.seed not in (memory.SHORT.seed, memory.LONG.seed)
    assert memory.SHORT.seed != memory.LONG.seed


def test_each_variant_differs_from_the_first_in_what_it_is_called_by():
    model = memory.TASK.model
    inner = {name: change(memory.TASK).model for name, change in memory.INNER.items()}
    assert {name: (one.ttt.hidden, one.ttt.mini_batch) for name, one in inner.items()} == {
        "persist": ((4,), 16),
        "linear-16": ((), 16),
        "linear-1": ((), 1),
        "mlp-1": ((4,), 1),
    }
    assert inner["mlp-1"].inner_lr >= inner["persist"].inner_lr  # which follows from the rest
    places = {name: change(memory.TASK).model.ttt_layers for name, change in memory.PLACES.items()}
    assert {name: list(layers) for name, layers in places.items()} == {
        "persist": [0],
        "middle": [model.num_layers // 2],
        "last": [model.num_layers - 1],
    }


def test_variants_are_compared_with_the_runs_of_the_report(tmp_path, monkeypatch):
    trainable, compared = [], []
    monkeypatch.setattr(memory.Experiment, "_train", lambda _, way, cfg, names: trainable.append((way, cfg, names)))
    monkeypatch.setattr(memory.Experiment, "_heldout", lambda _, name: name)
    monkeypatch.setattr(memory.Experiment, "_compare", lambda _, *found: compared.append(found))
    experiment = memory.Experiment(tmp_path, [1, 2], None)
    experiment.inner()
    assert trainable == [(name, change(memory.TASK), ("recall",)) for name, change in memory.INNER.items()]
    (name, conditions, data) = compared[0]
    assert (name, data) == ("inner", "recall")
    found = [parse(text) for text in conditions]
    assert [(one.name, one.arm, Path(one.paths[1]).name) for one in found] == [
        (name, "persist", f"{name}-recall-2") for name in ("persist", "linear-16", "linear-1", "mlp-1")
    ]
    assert memory.INNER["persist"](memory.TASK) == memory.PLACES["persist"](memory.TASK) == memory.persist(memory.TASK)


def test_conditions_are_those_that_compare_understands_with_all_seeds_each(tmp_path):
    found = [parse(text) for text in memory.Experiment(tmp_path, [1, 2], None)._conditions("recall")]
    assert [(one.name, one.arm, Path(one.paths[0]).name) for one in found] == [
        ("persist", "persist", "persist-recall-1"),
        ("reset", "reset", "persist-recall-1"),
        ("none", "off", "none-recall-1"),
        ("trained-reset", "reset", "reset-recall-1"),
        ("trained-reset-kept", "persist", "reset-recall-1"),
        ("bptt", "persist", "bptt-recall-1"),
    ]
    assert all(len(one.paths) == 2 for one in found)
    assert {Path(path).parent for one in found for path in one.paths} == {tmp_path / "runs"}


@pytest.mark.parametrize(
    ("part", "given", "seeds"),
    [
        ("tasks", None, [20, 21, 22]),
        ("place", None, [20, 21, 22]),
        ("speech", None, list(range(20, 29))),
        ("speech", "7,8", [7, 8]),
    ],
)
def test_a_part_has_the_seeds_of_the_report_unless_others_are_asked_for(tmp_path, monkeypatch, part, given, seeds):
    had = []
    monkeypatch.setattr(memory.Experiment, part, lambda experiment: had.extend(experiment._seeds))
    assert memory.main(memory.Options(part, str(tmp_path), seeds=given)) == 0
    assert had == seeds


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
    """What the stored results of a part say: units, losses, and the comparisons with what cannot remember."""
    stored = json.loads((memory.REPORTED / part / "results.json").read_text())
    analysis = stored["analysis"]
    rivals = [one for one in analysis["comparisons"] if one["name"] in ("reset", "none")]
    assert len(rivals) == 2
    return analysis["units"], analysis["losses"]["persist"], [one["regions"][BEYOND] for one in rivals], stored


@pytest.mark.parametrize(("part", "share"), [("recall", 0.8), ("speaker", 0.5)])
def test_the_reported_memory_closes_the_gap_in_every_seed(part, share):
    files, losses, rivals, _ = reported(part)
    assert files >= 50
    assert len(losses["closed_by_seed"]) >= 3
    assert all(one["mean"] > share for one in losses["closed_by_seed"])
    assert len(losses["closed_by_chunk"]) >= 17  # 16 after the one in which the facts were given
    assert all(one["mean"] > share for one in losses["closed_by_chunk"][1:])
    for rival in rivals:
        assert len(rival["seeds"]) >= 3
        assert all(one["paired"]["mean"] > 0 and one["holm"] < 0.01 for one in rival["seeds"])


def test_the_reported_memory_is_equivalent_where_there_is_nothing_to_remember():
    _, _, rivals, stored = reported("control")
    assert stored["setting"]["margin"] == 0.02
    for rival in rivals:
        assert rival["paired"]["equivalence"]["p"] < 0.01
