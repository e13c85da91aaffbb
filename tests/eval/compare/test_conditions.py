"""Conditions of `python -m eval compare` name paths that exist, whatever they are called, seeds, arms."""

import pytest

from eval.compare import conditions
from eval.compare.experiment import plan
from eval.results.schema import CheckpointInfo, FileInfo
from ttt_jax.errors import InputError
from ttt_jax.utils import paths

HERE = ["runs/lr=0.1,seed@2:a", "runs/x", "runs/x@reset", "runs/y", "a=b", "a=b@off", "one,two", "one,two,three", "one"]
HERE += ["kept", "~odd", "with blank ", "b", "-dash"]


@pytest.fixture
def here(tmp_path, monkeypatch):
    for name in HERE:
        (tmp_path / name).mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "runs"))
    return tmp_path


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("runs/lr=0.1,seed@2:a", (None, ["runs/lr=0.1,seed@2:a"], None)),
        ("runs/lr=0.1,seed@2:a@frozen", (None, ["runs/lr=0.1,seed@2:a"], "frozen")),
        ("kept=runs/lr=0.1,seed@2:a,runs/y@off", ("kept", ["runs/lr=0.1,seed@2:a", "runs/y"], "off")),
        ("lr=0.1=runs/y,runs/lr=0.1,seed@2:a", ("lr=0.1", ["runs/y", "runs/lr=0.1,seed@2:a"], None)),
        # A folder that ends like an arm is a folder; a slash makes the arm one.
        ("runs/x@reset", (None, ["runs/x@reset"], None)),
        ("runs/x/@reset", (None, ["runs/x"], "reset")),
        ("runs/x@reset@reset", (None, ["runs/x@reset"], "reset")),
        ("runs/y,runs/x@reset", (None, ["runs/y", "runs/x@reset"], None)),
        # So is one that begins like a name.
        ("a=b", (None, ["a=b"], None)),
        ("a=b@off", (None, ["a=b@off"], None)),
        ("a=b@persist", (None, ["a=b"], "persist")),
        ("kept = one", ("kept", ["one"], None)),
        (" kept = one, b@off", ("kept", ["one", "b"], "off")),
        (" = one", (None, ["one"], None)),
        ("new = gone", ("new", ["gone"], None)),
        ("a=./b", ("a", ["b"], None)),
        # And one that is like a list; the longest comes first.
        ("one,two", (None, ["one,two"], None)),
        ("one,two,three", (None, ["one,two,three"], None)),
        ("one,two,one", (None, ["one,two", "one"], None)),
        ("n=b, one,two ,kept@off", ("n", ["b", "one,two", "kept"], "off")),
        ("with blank ,b", (None, ["with blank ", "b"], None)),
        ("~odd", (None, ["~odd"], None)),
        ("n=~/x", ("n", ["HOME/x"], None)),
        ("runs/../kept", (None, ["runs/../kept"], None)),
        ("-dash@off", (None, ["-dash"], "off")),
        ("a\nb=b", ("a\\nb", ["b"], None)),
        # Where nothing exists, as it is written: whoever opens a path reports what is missing.
        ("gone=gone,b@off", ("gone", ["gone", "b"], "off")),
        ("new/lr=3/x@2/y@off", (None, ["new/lr=3/x@2/y"], "off")),
        ("~nobody-here/x", (None, ["~nobody-here/x"], None)),
    ],
)
def test_what_exists_is_a_path(here, text, expected):
    name, named, arm = expected
    assert conditions.parse(text) == (name, tuple(path.replace("HOME", str(here / "runs")) for path in named), arm)


CHECKPOINTS = {name: CheckpointInfo(name, (8, 8), () if name == "plain" else (1,)) for name in ("a", "b", "c", "plain")}


def chosen(*texts):
    compared = conditions.conditions(list(map(conditions.parse, texts)), CHECKPOINTS)
    return [(condition.name, condition.arm, condition.checkpoints) for condition in compared]


def test_attention_with_a_sink_reaches_all_of_the_longest_file():
    files = [FileInfo(name, name, frames, f"{name}.npz") for name, frames in (("x", 900), ("y", 40))]
    setting = {"chunk": 20, "weighting": "equal"}
    infos = [CheckpointInfo("a", (8, 8), (1,), max_delay=1), CheckpointInfo("b", (8, 8), (1,), attention_sink=2)]
    assert plan([], infos[:1], files, [], **setting).setting.reach == infos[0].reach == 16
    assert plan([], infos, files, [], **setting).setting.reach == 900 + 1


def test_conditions():
    arms = ("persist", "reset", "frozen", "off")
    assert chosen("a") == [(arm, arm, ("a",)) for arm in arms]
    assert chosen("a,b") == [(arm, arm, ("a", "b")) for arm in arms]
    assert chosen("x=a")[1] == ("x reset", "reset", ("a",))
    assert chosen("a@reset", "a@off") == [("reset", "reset", ("a",)), ("off", "off", ("a",))]
    assert chosen("a", "plain") == [("a@persist", "persist", ("a",)), ("plain@off", "off", ("plain",))]
    seeds = [("kept", "persist", ("a", "b")), ("b+1@frozen", "frozen", ("b", "c"))]
    assert chosen("kept=a,b@persist", "b,c@frozen") == seeds


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (["runs/y@sideways"], "runs/y@sideways is no path, and its arm 'sideways' cannot be compared"),
        (["runs/lr=0.1,seed@2:b"], "its arm '2:b' cannot be compared"),
        (["a@permuted", "a"], "'permuted' cannot be compared"),
        (["runs/y,,b"], "names no checkpoint where one is expected"),
        (["x="], "names no checkpoint where one is expected"),
        (["@off"], "names no checkpoint where one is expected"),
        ([""], "names no checkpoint where one is expected"),
        (["a@reset"], "single condition"),
        (["plain"], "plain has no TTT layers, so there is nothing to compare"),
        (["a", "plain@reset"], "plain has no TTT layers, so there is no arm reset"),
        (["a,b", "c"], "2 and 1 checkpoints"),
        (["a", "a"], "two conditions are called persist"),
        (["a,a", "b,c"], "names one checkpoint twice"),
    ],
)
def test_conditions_that_cannot_be(here, texts, message):
    with pytest.raises(InputError, match=message) as refused:
        chosen(*texts)
    assert "\n" not in str(refused.value)


def test_names_of_stored_checkpoints_may_be_like_paths_arms_and_lists():
    names = ("a=b", "x@off", "one,two", "one", "plain")
    for text, expected in {
        "a=b": (None, ("a=b",), None),
        "x@off": (None, ("x@off",), None),
        "x@off@reset": (None, ("x@off",), "reset"),
        "k=one,two,one@off": ("k", ("one,two", "one"), "off"),
    }.items():
        assert conditions.parse(text, names) == expected
    with pytest.raises(InputError, match="no scores of the checkpoint gone: give some of a=b, "):
        conditions.parse("gone@off", names)


def test_names_become_names_of_files_that_differ():
    names = ["a.1", "a.2", "A/x", "B/x", "A%2Fx", "A_x", "é" * 200, "é" * 200 + "x", "x" * 400, "..x"]
    made = [paths.file_name(name) for name in names]
    assert len(set(made)) == len(names)
    assert made[:3] == ["a.1", "a.2", "A%2Fx"]
    assert all("/" not in name and len(name.encode()) <= 150 for name in made)
