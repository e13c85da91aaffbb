"""Runs that train side by side learn what each would alone, and can be resumed alone."""

import dataclasses
import signal
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from eval.tasks.dataset import CODEC
from tests.helpers.commands import lines
from tests.helpers.quick import interrupted, quicken, quickly
from tests.helpers.small_tasks import CONFIG, write_data
from train import loop, plots
from train.config import load
from ttt_jax.checkpoints import loading
from ttt_jax.checkpoints.run_weights import load_run
from ttt_jax.errors import InputError
from ttt_jax.utils import config_json

MEMBERS = {"first": ("recall", 3), "second": ("speaker", 4)}
STOPPED = 5
"""The step in which the runs that train together are interrupted."""


def one(folder, name, task="recall", seed=3, **changes):
    """The configuration of a run in `folder`."""
    train = changes.pop("train", None) or ",".join(
        f"{folder / task / part}:{weight}" for part, weight in (("short", 2), ("long", 1))
    )
    data = dataclasses.replace(CONFIG.data, train=train)
    return dataclasses.replace(
        CONFIG, **{"name": name, "run_dir": str(folder / name), "seed": seed, "data": data} | changes
    )


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The runs `first` and `second`, interrupted in step 5; `second` resumed by itself, and trained as `alone`."""
    folder = tmp_path_factory.mktemp("together")
    for task, _ in MEMBERS.values():
        write_data(folder / task, task)

    codes = {}
    with pytest.MonkeyPatch.context() as patch:
        quicken(patch)
        with interrupted(STOPPED):
            codes["together"] = loop.start([one(folder, name, *of) for name, of in MEMBERS.items()])
        left = {name: sorted(path.name for path in (folder / name / "checkpoints").iterdir()) for name in MEMBERS}
        kept = {name: (lines(folder / name), load_run(folder / name / "checkpoints" / "4")) for name in MEMBERS}
        codes["alone"] = loop.start([one(folder, "alone", *MEMBERS["second"], keep=9)])
        codes["second"] = loop.resume(folder / "second")
    return folder, codes, left, kept


def numbers(line):
    """All numbers of a line, by their names; None where there is none."""
    if isinstance(line, dict):
        return {f"{key}/{rest}": value for key, inner in line.items() for rest, value in numbers(inner).items()}
    return {"": np.nan if line is None else line}


def assert_alike(found, expected):
    """Lines of metrics that are the same to rounding."""
    assert len(found) == len(expected)
    for a, b in zip(map(numbers, found), map(numbers, expected), strict=True):
        assert a.keys() == b.keys()
        np.testing.assert_allclose(list(a.values()), list(b.values()), rtol=1e-5, atol=1e-6)


def assert_near(found, expected):
    """Parameters that differ by no more than 1e-5 of their size."""
    apart = jax.tree.map(lambda a, b: float(np.linalg.norm(a - b) / (np.linalg.norm(b) + 1e-3)), found, expected)
    assert max(jax.tree.leaves(apart)) < 1e-5, apart


@pytest.mark.integration
def test_a_run_has_the_losses_that_it_would_have_alone_and_its_neighbour_others(runs):
    folder, _, _, kept = runs
    expected = lines(folder / "alone")
    assert_alike(kept["second"][0], expected[:STOPPED])
    assert len({line["loss"] for line in expected}) == CONFIG.steps
    other = kept["first"][0]
    assert all(abs(a["loss"] - b["loss"]) > 1e-3 for a, b in zip(other, expected[:STOPPED], strict=True))


@pytest.mark.integration
def test_a_run_has_the_weights_that_it_would_have_alone_and_its_neighbour_others(runs):
    folder, _, _, kept = runs
    early, later = (load_run(folder / "alone" / "checkpoints" / step).params for step in "46")
    assert_near(kept["second"][1].params, early)
    (layer,) = early["layers"].values()
    assert (
        np.abs(layer["ttt"]["q_kernel"] - layer["ttt"]["k_kernel"]).max() > 1e-3
    )  # alike at the start, but two parameters
    for other in (later, kept["first"][1].params):  # beside which the rounding is little
        apart = jax.tree.map(lambda a, b: float(np.linalg.norm(a - b)), early, other)
        assert max(jax.tree.leaves(apart)) > 1e-2


@pytest.mark.integration
def test_an_interrupt_ends_all_runs_after_the_same_step_with_a_checkpoint(runs):
    _, codes, left, kept = runs
    assert codes["together"] == 128 + signal.SIGINT
    for name in MEMBERS:
        assert left[name] == ["4", "5"]  # every second step, and the one that was interrupted; the two latest are kept
        assert [line["step"] for line in kept[name][0]] == list(range(1, STOPPED + 1))


@pytest.mark.integration
def test_a_run_goes_on_alone_to_where_it_would_have_come_alone(runs):
    folder, codes, *_ = runs
    assert codes["second"] == codes["alone"] == 0
    assert_alike(lines(folder / "second"), lines(folder / "alone"))
    assert_near(load_run(folder / "second").params, load_run(folder / "alone").params)


@pytest.mark.integration
@pytest.mark.parametrize("name", MEMBERS)
def test_the_folder_of_each_run_is_that_of_a_run_by_itself(runs, name):
    folder, _, _, kept = runs
    mine, alone = folder / name, folder / "alone"
    own, other = (dataclasses.replace(load(path / "config.json"), run_dir=str(mine)) for path in (mine, alone))
    task, seed = MEMBERS[name]
    assert (own.name, own.seed) == (name, seed)
    assert f"/{task}/" in own.data.train
    assert own == dataclasses.replace(other, name=name, seed=seed, data=own.data, keep=CONFIG.keep)
    assert own.data == dataclasses.replace(other.data, train=own.data.train)
    assert own.model.ttt.base_lr == CONFIG.model.inner_lr  # as it was used
    metas = [config_json.read_json(one / "meta.json", "it") for one in (mine, alone)]
    assert metas[0].keys() == metas[1].keys()
    data = [{key: value for key, value in meta.items() if key != "versions"} for meta in metas]
    assert (data[0] == data[1]) == (name == "second")  # meta.json describes the data
    assert metas[0]["codec"]["digest"] == CODEC
    assert kept[name][1].meta["config"] == config_json.to_dict(own)
    loaded = loading.load(mine)
    assert (loaded.name, loaded.cfg, loaded.chunk, loaded.seed) == (name, own.model, own.data.chunk, own.seed)
    assert vars(loaded.corpus).items() <= vars(own.data).items()


# What cannot train together


def refused(message, *cfgs):
    with pytest.raises(InputError, match=message) as error:
        loop.start(cfgs)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("steps", 7),
        ("state", "reset"),
        ("loss", dataclasses.replace(CONFIG.loss, text=0.2)),
        ("model", dataclasses.replace(CONFIG.model, context=7)),
        ("data", dataclasses.replace(CONFIG.data, chunk=32)),
        ("keep", 3),
    ],
)
def test_runs_that_differ_in_something_else_are_refused(field, value, tmp_path):
    a, b, c = one(tmp_path, "a"), one(tmp_path, "b", seed=4), one(tmp_path, "c", **{field: value})
    refused(f"c and .*a differ in {field}: .* the same but for seed and files", a, b, c)
    assert not list(tmp_path.iterdir())


def test_runs_without_folders_of_their_own_are_refused(tmp_path):
    a = one(tmp_path, "a")
    refused(r"run_dirs \['.*a', '.*a'\] .* not all given and different", a, dataclasses.replace(a, seed=4))
    # One folder by two names, too: the second run would write over the first.
    write_data(tmp_path / "recall", "recall")
    refused("not all given and different", a, one(tmp_path, "b", run_dir=str(tmp_path / "." / "a") + "/"))
    refused(r"run_dirs \['.*a', None\]", a, one(tmp_path, "b", run_dir=None))
    assert [path.name for path in tmp_path.iterdir()] == ["recall"]


@pytest.mark.parametrize(
    ("name", "value"),
    [("base", "weights"), ("eval_every", 2), ("sample_every", 3), ("tensorboard", True), ("wandb", "project")],
)
def test_what_one_program_cannot_do_for_many_is_refused(name, value, tmp_path):
    cfgs = [one(tmp_path, run, **{name: value}) for run in "ab"]
    refused(f"{name}={value} is for a run by itself: .*leave it out", *cfgs)
    assert not list(tmp_path.iterdir())


def test_a_run_that_cannot_start_keeps_all_from_being_made(tmp_path, monkeypatch):
    write_data(tmp_path / "recall", "recall")
    a, b = one(tmp_path, "a"), one(tmp_path, "b", seed=4)
    refused("nowhere", a, one(tmp_path, "c", train=str(tmp_path / "nowhere")))
    (tmp_path / "b" / "checkpoints" / "1").mkdir(parents=True)
    refused("run_dir .*b is taken", a, b)
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    refused("one process, but there are 2: start it without --launch", a, one(tmp_path, "c"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["b", "recall"]


@pytest.mark.integration
@pytest.mark.parametrize("broken", [{1: 3}, pytest.param({0: 2, 1: 4}, marks=pytest.mark.slow)])
def test_a_run_whose_loss_is_not_finite_is_named_and_the_others_come_to_their_end(broken, runs, tmp_path, monkeypatch):
    folder, *_ = runs
    whole = quickly(loop.make_steps_together)

    def breaking(cfg, count):
        """The step, after which runs have had losses that are no numbers, from a step on."""

        def compiled(*given):
            taken, step = [], whole(cfg, count).lower(*given).compile()

            def run(*arrays):
                taken.append(1)
                states, metrics = step(*arrays)
                loss, finite = np.array(metrics.loss), np.array(metrics.finite)
                for i, first in broken.items():
                    if len(taken) >= first:
                        loss[i], finite[i] = np.nan, False
                return states, metrics._replace(loss=loss, finite=finite)

            return run

        return SimpleNamespace(lower=lambda *given: SimpleNamespace(compile=lambda: compiled(*given)))

    monkeypatch.setattr(loop, "make_steps_together", breaking)
    monkeypatch.setattr(plots, "draw_run", lambda lines, unigram, folder: drawn.append(folder.name))
    drawn = []
    train = {name: one(folder, name, *of).data.train for name, of in MEMBERS.items()}
    cfgs = [one(tmp_path, name, seed=seed, train=train[name]) for name, (_, seed) in MEMBERS.items()]
    with pytest.raises(InputError) as raised:
        loop.start(cfgs)
    for i, cfg in enumerate(cfgs):
        kept = sorted(int(path.name) for path in (tmp_path / cfg.name / "checkpoints").iterdir())
        if i in broken:
            assert f"{cfg.run_dir}: step {broken[i]}: loss is nan" in str(raised.value)
            assert kept == [step for step in (2, 4, 6) if step < broken[i]]
        else:
            assert cfg.run_dir not in str(raised.value)
            assert kept[-1] == 6
            assert lines(tmp_path / cfg.name)[-1]["step"] == 6
    assert drawn == [cfg.name for i, cfg in enumerate(cfgs) if i not in broken]
    assert ("of 2 runs 1 stopped, the others are whole" in str(raised.value)) == (len(broken) == 1)
