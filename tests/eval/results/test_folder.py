"""Folders of results: names, what may be replaced in them, and what is there when it goes wrong. No model is run."""

import dataclasses
import json

import pytest

from eval.compare import command as compare_command
from eval.compare import losses
from eval.compare import results as compare_results
from eval.compare.analysis import analyse
from eval.results import folder as folders
from eval.results import schema
from eval.results.schema import CheckpointInfo, scores_path
from eval.streaming import command as streaming_command
from eval.streaming import plots as streaming_plots
from eval.streaming import results as stream_results
from eval.streaming.results import Results, Setting
from tests.eval.diagnose.test_diagnose import made as made_records
from tests.helpers import made_scores, micro
from tests.helpers.made_experiment import made
from tests.helpers.made_scores import FILES
from ttt_jax.checkpoints import loading
from ttt_jax.errors import InputError
from ttt_jax.utils import config_json

CFG = micro.CONFIG


def touched(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
    return path


# Names


@pytest.mark.parametrize(
    ("data", "name"),
    [
        ("talks-1.1", "eval-talks-1.1"),
        ("talks-1.2", "eval-talks-1.2"),
        ("talks-1.1/manifest.jsonl", "eval-talks-1.1"),
        ("talks-1.1/manifest.jsonl.gz", "eval-talks-1.1"),
        ("talks-1.1/other.jsonl", "eval-other.jsonl"),
        ("talks-1.1/a.wav", "eval-a.wav"),
        ("talks-1.1/a.flac", "eval-a.flac"),
        ("talks-1.1/", "eval-talks-1.1"),
        ("talks-1.1/../talks-1.2/.", "eval-talks-1.2"),
        ("talks-1.1/..", "eval-HERE"),
        (".", "eval-HERE"),
        ("manifest.jsonl", "eval-HERE"),
        ("link", "eval-link"),  # the name that was given: what a link leads to may be called by a digest
        ("a=b,c@d:e", "eval-a=b,c@d:e"),
        (None, "eval"),
    ],
)
def test_results_are_called_by_the_whole_name_of_the_data(tmp_path, monkeypatch, data, name):
    for part in ("talks-1.1", "talks-1.2", "a=b,c@d:e", "run"):
        (tmp_path / part).mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "talks-1.1")
    monkeypatch.chdir(tmp_path)
    folder = folders.find(None, "eval", "run", data)
    assert (str(folder.parent), folder.name) == ("run", name.replace("HERE", tmp_path.name))
    assert str(folders.find("x/y.1", "eval", "run", data)) == "x/y.1"


@pytest.mark.parametrize("given", ["run/checkpoints/5", "run/checkpoints/5/", "~/run/checkpoints/5", "link", "."])
def test_a_checkpoint_of_several_has_its_step_in_the_runs_folder(tmp_path, monkeypatch, given):
    (tmp_path / "run" / "checkpoints" / "5").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "run" / "checkpoints" / "5")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path / "run" / "checkpoints" / "5" if given == "." else tmp_path)
    assert folders.find(None, "eval", given, "x/talks").resolve() == tmp_path / "run" / "eval-talks-5"


def test_checkpoints_of_one_name_are_told_apart(tmp_path, monkeypatch):
    monkeypatch.setattr(loading, "load", lambda path: loading.Checkpoint(loading._name(path, 1), None, {}, {}))
    for name in ("A/x", "B/x", "B/C/x", "a.1", "a.2", "x-5", "x/checkpoints/5", "new\nline", "new\\nline"):
        (tmp_path / name).mkdir(parents=True)

    def names(*paths):
        return [entry.name for entry in loading.load_all([tmp_path / path for path in paths])]

    assert names("a.1", "a.2") == ["a.1", "a.2"]
    assert names("A/x", "B/x", "a.1") == ["A/x", "B/x", "a.1"]
    assert names("B/x", "A/../B/C/x") == ["B/x", "C/x"]
    assert names("x-5", "x/checkpoints/5") == [f"{tmp_path.name}/x-5", "x/checkpoints/5"]
    assert names("new\nline", "new\\nline") == ["new\\nline", "new\\\\nline"]
    (tmp_path / "link").symlink_to(tmp_path / "a.1")
    for same in ("a.1", "a.1/", "A/../a.1", "link"):
        with pytest.raises(InputError, match="is given twice: leave it out once"):
            names("a.1", same)
    infos = [CheckpointInfo(name, (9,), ()) for name in names("A/x", "B/x")]
    assert streaming_plots.figures([info.name for info in infos])[:2] == ["memory-A%2Fx.png", "memory-A%2Fx.pdf"]
    file = FILES[0]
    assert len({scores_path(tmp_path, info.name, file) for info in infos}) == 2


# What may be replaced

OLD = folders.Subject(
    "talks",
    {"a": "d1", "b": "d2"},
    frozenset("c"),
    (("x (step 1)", "w1"),),
    {"--every": 3},
    frozenset({"the arm off"}),
)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"data": "elsewhere/talks"},
        {"checkpoints": (("y (step 1)", "w1"),)},
        {"files": {"a": "d1"}, "skipped": frozenset("bc")},
        {"files": {"a": "d1", "b": "d2", "c": "d3"}, "skipped": frozenset()},
        {"measured": frozenset({"the arm off", "inner losses"})},
    ],
)
def test_the_same_again_replaces_results(tmp_path, changes):
    folders.check(tmp_path, OLD, OLD._replace(**changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": "other", "files": {"a": "d1"}}, "on talks with b, but other, as asked for, does not have that file"),
        ({"files": {**OLD.files, "new": "d3"}}, "on talks without new, but talks, as asked for, has that file"),
        ({"files": {"a": "d1", "b": "d9"}}, "on talks, but b has other content or another length in talks"),
        ({"checkpoints": (("x (step 2)", "w2"),)}, r"of x \(step 1\), not of x \(step 2\)"),
        ({"checkpoints": (*OLD.checkpoints, ("y", "w2"))}, r"of x \(step 1\), not of x \(step 1\), y"),
        ({"setting": {"--every": 4}}, "with --every 3, not 4"),
        ({"measured": frozenset({"inner losses"})}, "of the arm off, which would not be measured again"),
    ],
)
def test_results_of_something_else_are_refused(tmp_path, changes, message):
    with pytest.raises(
        InputError, match=f"holds results {message}.*: give another folder by --out, or remove this one"
    ):
        folders.check(tmp_path, OLD, OLD._replace(**changes))


def info(weights="w1", name="tiny", run=CFG, **about):
    about = {"step": 7, "weights": weights, "config": config_json.to_dict(run), "train": {"digest": "t"}, **about}
    return CheckpointInfo(name, (60,), micro.MODEL.ttt_layers, about=about)


@pytest.fixture
def stored(tmp_path):
    """A folder of results of the arms persist and reset; beside them a file of the user's."""
    arms = {name: made_scores.ARMS[name] for name in ("persist", "reset")}
    made_scores.write(tmp_path, info(), FILES[:2], arms=("persist", "reset"))
    setting = Setting(made_scores.STREAMS, arms, reset_every=CFG.data.chunk, window=25)
    made_scores.write_results(tmp_path, [info()], FILES[:2], setting=setting)
    (tmp_path / "memory.png").write_bytes(b"old")
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "memory-of-a-day.png").write_text("mine")
    return tmp_path


def replaced(
    folder,
    infos=None,
    files=FILES[:2],
    arms=("persist", "reset"),
    reset_every=CFG.data.chunk,
    inner=True,
    own_run=False,
):
    infos = infos or [info()]
    names = [entry.name for entry in infos]
    subject = streaming_command._subject(
        None, files, [], infos, reset_every, dict.fromkeys(names, arms), names if inner else []
    )
    return streaming_command.replaced(folder, subject, infos[0] if own_run else None)


def test_stored_results_are_replaced_by_the_same_again_alone(stored):
    assert isinstance(stream_results.read(stored), Results)
    assert {"frames", "memory.png", "state.pdf"} <= set(replaced(stored))
    assert "memory-of-a-day.png" not in replaced(stored)
    replaced(stored, arms=("persist", "reset", "off"))  # there are more
    for text, changes in {
        "without c, but .* has that file": {"files": FILES[:3]},
        "with b, but .* does not have that file": {"files": FILES[:1]},
        "of tiny .*weights w1.*not of tiny .*weights w2": {"infos": [info("w2")]},
        "not of tiny .*, other ": {"infos": [info(), info("w2", "other")]},
        f"with --reset-every {CFG.data.chunk}, not 5": {"reset_every": 5},
        "of the arm reset, which would not": {"arms": ("persist",)},
        "of inner losses, which would not": {"inner": False},
    }.items():
        with pytest.raises(InputError, match=text):
            replaced(stored, **changes)


def test_a_run_replaces_its_own_evaluation_of_another_step(stored):
    later = info("w2", step=9)
    elsewhere = info("w2", run=micro.config(run_dir="moved"))
    for own in (later, elsewhere):
        assert replaced(stored, [own], FILES, ("persist",), own_run=True)
    for other in (
        info("w2", run=micro.config(seed=99)),
        info("w2", train={"digest": "other"}),
        info("w2", config=None),
        info(),  # the same step: there it is less
    ):
        with pytest.raises(InputError, match="without c, but .* has that file"):
            replaced(stored, [other], FILES, own_run=True)
    with pytest.raises(InputError, match="without c, but .* has that file"):
        replaced(stored, [later], FILES)
    content = json.loads((stored / "results.json").read_text())
    data = dataclasses.replace(stream_results.read(stored).setting, about={"data": "talks"})
    assert content["setting"]["about"] == {}
    made_scores.write_results(stored, [info()], FILES[:2], setting=data)
    with pytest.raises(InputError, match="without c, but .* has that file"):
        replaced(stored, [later], FILES, own_run=True)


@pytest.mark.parametrize("name", ["frames", "memory.png", "figure5.pdf"])
def test_what_lies_there_and_is_no_result_is_not_replaced(tmp_path, name):
    (tmp_path / name).write_bytes(b"mine")
    with pytest.raises(InputError, match=f"holds {name}, but no results.json that says what it is of"):
        replaced(tmp_path)
    assert (tmp_path / name).read_bytes() == b"mine"


@pytest.mark.parametrize("content", ["", '{"command": "python -m eval compare", "format": 4}'])
def test_results_of_another_command_are_refused(tmp_path, content):
    (tmp_path / "results.json").write_text(content)
    with pytest.raises(InputError, match="results.json that is not this command's, or damaged .*: give another"):
        replaced(tmp_path)


def test_files_among_the_scores_are_not_replaced(stored):
    for name in ("frames/holiday.jpg", "frames/tiny/mine.npz", "frames/other/a.npz"):
        touched(stored / name)
        with pytest.raises(InputError, match=f"holds {name}, which is no result"):
            replaced(stored)
        (stored / name).unlink()
    replaced(stored)


def test_replacing_leaves_other_files_alone_and_nothing_between(stored, tmp_path_factory):
    new = stored / ".new"
    touched(new / "frames" / "tiny" / "new.npz")
    (new / "results.json").write_text("new")
    folders.replace(stored, new, replaced(stored))
    names_found = {str(path.relative_to(stored)) for path in stored.rglob("*") if path.is_file()}
    assert names_found == {"results.json", "frames/tiny/new.npz", "notes.txt", "memory-of-a-day.png"}
    assert (stored / "results.json").read_text() == "new"


def test_a_crash_between_old_and_new_leaves_no_mixture(stored, monkeypatch):
    before = (stored / "results.json").read_bytes()
    scores = sorted(path.name for path in (stored / "frames" / "tiny").iterdir())
    touched(stored / ".new" / "frames" / "tiny" / "new.npz")
    (stored / ".new" / "results.json").write_text("new")
    old, whole = replaced(stored), folders.Path.rename

    def rename(path, target):
        if path.parent.name == ".new":
            raise OSError(28, "No space left on device")
        return whole(path, target)

    monkeypatch.setattr(folders.Path, "rename", rename)
    with pytest.raises(OSError, match="No space"):
        folders.replace(stored, stored / ".new", old)
    assert not (stored / "results.json").exists()
    (aside,) = stored.glob(".old.*")
    assert (aside / "results.json").read_bytes() == before
    assert sorted(path.name for path in (aside / "frames" / "tiny").iterdir()) == scores


# The other commands


def test_an_experiment_is_replaced_by_the_same_again_alone(tmp_path):
    replace = dataclasses.replace
    experiment = made({"reset": 0.05, "off": 0.1}, files=3)
    infos = [replace(entry, about={"weights": f"w{i}", "step": 1}) for i, entry in enumerate(experiment.checkpoints)]
    experiment = replace(experiment, checkpoints=infos)
    losses.write(tmp_path, experiment)
    compare_results.write(tmp_path, experiment, analyse(experiment), {})

    def other(setting=None, **fields):
        return replace(experiment, setting=replace(experiment.setting, **setting or {}), **fields)

    assert {"frames", "losses.npz", "report.md"} <= set(compare_command.replaced(tmp_path, experiment))
    compare_command.replaced(tmp_path, other({"margin": 0.5, "threshold": 1.0}))
    persist, reset, off = experiment.conditions
    compare_command.replaced(tmp_path, other(conditions=[replace(persist, name="new"), reset, off]))
    for text, changed in {
        "with file2, but .* does not have that file": other(files=experiment.files[:2]),
        "not of .* under persist, .* under off:": other(conditions=[persist, off]),
        "under reset, .* under persist, ": other(conditions=[reset, persist, off]),
        "weights v": other(checkpoints=[replace(one, about={"weights": "v", "step": 1}) for one in infos]),
        "with --weighting equal, not kyutai": other({"weighting": "kyutai"}),
        "with --reset-every .*, not 7": other({"chunk": 7}),
    }.items():
        with pytest.raises(InputError, match=text):
            compare_command.replaced(tmp_path, changed)
    touched(tmp_path / "frames" / "run0" / "mine.npz")
    with pytest.raises(InputError, match="holds frames/run0/mine.npz, which is no result"):
        compare_command.replaced(tmp_path, experiment)


@pytest.mark.parametrize("name", ["report.md", "losses.npz"])
def test_reports_of_somebody_else_are_not_replaced(tmp_path, name):
    (tmp_path / name).write_text("mine")
    with pytest.raises(InputError, match=f"holds {name}, but no results.json"):
        compare_command.replaced(tmp_path, made({"reset": 0.05}, files=3))


def test_a_diagnosis_is_replaced_by_the_same_again_alone(tmp_path):
    from eval.diagnose.command import check_replaced

    results = made_records()
    schema.write(tmp_path, results, {})
    check_replaced(tmp_path, dataclasses.replace(results, records=[]))
    for text, changes in {
        "on x, but f has other content or another length in y": {
            "data": "y",
            "file": dataclasses.replace(results.file, digest="e"),
        },
        r"of a \(step 3.*, b \(step 3.*\), not of a \(step 3, weights a\):": {"checkpoints": results.checkpoints[:1]},
        "with --every 1, not 5": {"every": 5},
    }.items():
        with pytest.raises(InputError, match=text):
            check_replaced(tmp_path, dataclasses.replace(results, **changes))


@pytest.mark.parametrize("earlier", [True, False])
def test_results_that_fail_leave_the_folder_as_it_was(tmp_path, earlier):
    folder = tmp_path / "out"
    folders.make(folder)
    if earlier:
        (folder / "results.json").write_text("earlier")
    staged = folders.staged(folder)
    (staged.__enter__() / "results.json").write_text("half")
    assert not staged.__exit__(KeyboardInterrupt, KeyboardInterrupt(), None)
    left = {path.name: path.read_text() for path in tmp_path.rglob("*") if path.is_file()}
    assert left == ({"results.json": "earlier"} if earlier else {})
    assert folder.exists() == earlier
