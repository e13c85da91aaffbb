"""`python -m eval recall` on a model with random weights: arms, items, what is stored, drawn, replaced and refused."""

import csv
import dataclasses
import json
import shutil

import numpy as np
import pytest

from eval.__main__ import main
from eval.recall import figure, play, results
from eval.recall.command import Options
from eval.recall.results import BEYOND, HEARD, WHO
from eval.report import command as report
from eval.streaming import runner
from tests.helpers import micro, quick
from tests.helpers.eval_models import DIGEST, write_codes, write_run
from ttt_jax.checkpoints import loading
from ttt_jax.config import TTTConfig
from ttt_jax.errors import InputError
from ttt_jax.utils.command import PARTIAL

WORDS = ("--excerpt", "2", "--gaps", "2,4", "--items", "2", "--batch", "2")


@pytest.fixture(scope="module", autouse=True)
def compiled_quickly():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runner, "scan_calls", quick.scan_calls)
        yield


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return write_run(tmp_path_factory.mktemp("checkpoints") / "memory")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Three speakers; nothing is known of the last one's text."""
    folder, lines = tmp_path_factory.mktemp("speech"), []
    for i, codes in enumerate(micro.files((260, 300, 280))):
        path = write_codes(folder / f"{i}.safetensors", codes[1:] if i == 2 else codes, DIGEST)
        lines.append(json.dumps({"path": path.name, "duration": codes.shape[1] / 12.5, "speaker": f"s{i}"}))
    (folder / "manifest.jsonl").write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture(scope="module")
def out(run, data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("out") / "recall"
    assert main(["recall", str(run), "--data", str(data), "--out", str(folder), *WORDS]) == 0
    return folder


def rows(folder):
    return list(csv.DictReader((folder / "items.csv").read_text().splitlines()))


def test_arms_without_memory_recall_nothing_beyond_attention(out):
    (checkpoint,) = results.read(out).checkpoints
    assert checkpoint.info.reach < 25
    assert list(checkpoint.curves) == [HEARD, WHO]
    for curve in checkpoint.curves.values():
        assert [(point.gap, point.where, point.failed) for point in curve.gaps] == [(25, BEYOND, 0), (50, BEYOND, 0)]
        for point in curve.gaps:
            for arm in ("frozen", "off"):
                benefits = [point.arms[arm].benefit, *point.arms[arm].by_row.values()]
                assert all(abs(benefit.mean) < 1e-5 for benefit in benefits if benefit.n)
            assert abs(point.arms["persist"].benefit.mean) > 1e-3  # these weights do something, though it is no recall
            assert abs(point.arms["reset"].benefit.mean) < 0.05 * abs(point.arms["persist"].benefit.mean)
            assert point.arms["persist"].heard.mean > 1


def test_items_are_stored_by_arm(out):
    stored = rows(out)
    assert len(stored) == 2 * 2 * 2 * 4  # kinds, gaps, items, arms
    assert {row["arm"] for row in stored} == {"persist", "reset", "frozen", "off"}
    curve = results.read(out).checkpoints[0].curves[HEARD]
    of_first = [row for row in stored if (row["kind"], row["gap_seconds"]) == (HEARD, "2.0")]
    for arm, values in curve.gaps[0].arms.items():
        mine = [float(row["benefit_equal"]) for row in of_first if row["arm"] == arm]
        assert np.mean(mine) == pytest.approx(values.benefit.mean, abs=1e-6)
    for row in stored:
        assert (row["benefit_text"] == "") == (row["unit"] == "s2" and row["kind"] == HEARD)
        assert row["same"].split("@")[0] == row["unit"].removeprefix("s")


def test_results_can_be_drawn_again_and_read(out, tmp_path):
    stored = results.read(out)
    assert sorted(path.name for path in out.iterdir()) == ["items.csv", "recall.pdf", "recall.png", "results.json"]
    assert stored.setting.arms["reset"] == "memory cleared every 10 s and where the second playing begins"
    again = figure.write_figures(stored, tmp_path)
    assert [path.read_bytes() for path in again] == [(out / path.name).read_bytes() for path in again]


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    """A checkpoint without TTT layers, and with other weights."""
    model = dataclasses.replace(micro.MODEL, ttt=TTTConfig(layers="none"))
    return write_run(tmp_path_factory.mktemp("checkpoints") / "plain", micro.config(model=model), seed=1)


def test_checkpoints_are_asked_about_the_same_items(run, other, data, out, tmp_path, capsys):
    folder = tmp_path / "both"
    assert main(["recall", str(run), str(other), "--data", str(data), "--out", str(folder), *WORDS]) == 0
    names = ("kind", "gap_seconds", "item", "unit", "same", "control")
    by_checkpoint = {
        name: {tuple(row[key] for key in names) for row in rows(folder) if row["checkpoint"] == name}
        for name in ("memory", "plain")
    }
    assert by_checkpoint["memory"] == by_checkpoint["plain"]
    assert [row for row in rows(folder) if row["checkpoint"] == "memory"] == rows(
        out
    )  # the same seed, the same numbers
    plain = results.read(folder).checkpoints[1]
    assert (plain.arms, plain.main) == (["off"], "off")
    printed = capsys.readouterr().out
    assert "plain has no TTT layers" in printed
    assert "plain minus memory, heard-before, on the same items" in printed
    memory = results.read(folder).checkpoints[0]
    for kind, gaps in results.read(folder).between["plain"].items():
        # What has no memory recalls nothing, so that all of the difference is what the other recalls.
        expected = [-point.arms["persist"].benefit.mean for point in memory.curves[kind].gaps]
        assert [one.test.mean for one in gaps] == pytest.approx(expected, abs=1e-5)
    assert str(folder / "items.csv") in printed


def test_the_same_question_is_answered_again_and_another_is_refused(run, data, out, tmp_path):
    folder = shutil.copytree(out, tmp_path / "recall")
    (folder / "recall.png").unlink()
    assert main(["recall", str(run), "--data", str(data), "--out", str(folder), *WORDS]) == 0
    assert rows(folder) == rows(out)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    for more, words in (
        (["--seed", "1"], "with --seed 0, not 1"),
        (["--kind", HEARD], f"of {WHO} at 2 s, which would not be measured again"),
        (["--gaps", "2"], "at 4 s, which would not be measured again"),
    ):
        with pytest.raises(InputError, match=words):
            main(["recall", str(run), "--data", str(data), "--out", str(folder), *WORDS, *more])
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_files_that_cannot_be_used_are_named(run, data, tmp_path, capsys):
    folder = shutil.copytree(data, tmp_path / "speech")
    (folder / "1.safetensors").write_bytes(b"no codes")
    words = ["recall", str(run), "--data", str(folder), "--out", str(tmp_path / "out"), *WORDS]
    assert main([*words, "--kind", HEARD, "--gaps", "2,600"]) == PARTIAL
    printed = capsys.readouterr()
    assert "1.safetensors" in printed.err
    assert "dropped: heard-before at 600 s: 612 s of one speaker are needed, but the most is 22 s (s2)" in printed.out


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--excerpt", "9"], "--excerpt 9 is out of range: give 2 to 8 seconds."),
        (["--gaps", "10,x"], "--gaps 10,x has 'x'"),
        (["--gaps", "0"], "--gaps 0 has '0'"),
        (["--items", "0"], "--items 0 is out of range"),
        (["--seed", "-1"], "--seed -1 is negative"),
    ],
)
def test_wrong_options_end_in_a_sentence(words, sentence):
    with pytest.raises(InputError) as error:
        main(["recall", "nowhere", *words])
    assert sentence in str(error.value)


def test_what_the_data_cannot_give_ends_in_a_sentence(run, data, tmp_path):
    words = ["recall", str(run), "--out", str(tmp_path / "out")]
    with pytest.raises(InputError, match="no gap can be filled: heard-before at 3600 s: 3.* give more or longer"):
        main([*words, "--data", str(data), "--kind", HEARD, "--gaps", "3600"])
    one = write_codes(tmp_path / "one.safetensors", micro.files((300,))[0])
    with pytest.raises(InputError, match="two speakers or better three are needed, none is named"):
        main([*words, "--data", str(one), "--kind", WHO])
    with pytest.raises(InputError, match="there is no checkpoint"):
        main(["recall"])
    assert not (tmp_path / "out").exists()


def test_predictions_that_are_not_finite_are_no_recall(run, data, tmp_path, monkeypatch):
    load = loading.load

    def broken(path):
        checkpoint = load(path)
        checkpoint.params["text_head"] = checkpoint.params["text_head"] * np.nan
        return checkpoint

    monkeypatch.setattr(loading, "load", broken)
    with pytest.raises(InputError, match="memory gives no finite predictions"):
        main(["recall", str(run), "--data", str(data), "--out", str(tmp_path / "out"), *WORDS])
    assert not (tmp_path / "out").exists()


def test_a_checkpoint_that_diverged_costs_the_others_nothing(run, other, data, tmp_path, monkeypatch, capsys):
    params_of = loading.params_of

    def broken(checkpoint):
        params = params_of(checkpoint)
        return params | {"text_head": params["text_head"] * np.nan} if checkpoint.name == run.name else params

    monkeypatch.setattr(loading, "params_of", broken)
    words = ["recall", str(run), str(other), "--data", str(data), *WORDS]
    assert main([*words, "--out", str(tmp_path / "out")]) == PARTIAL
    first, second = results.read(tmp_path / "out").checkpoints
    assert (first.curves, first.failed, second.failed) == ({}, 8, 0)
    assert list(second.curves) == list(results.KINDS)
    assert "left out: 8 items of which memory gives no finite predictions" in capsys.readouterr().out
    assert report.main(report.Options((str(tmp_path / "out"),), str(tmp_path / "page.html"))) == 0


def test_items_that_are_not_finite_are_counted(run, data, tmp_path, monkeypatch, capsys):
    """All of a gap: it has no point, and the exit code says that something is missing."""
    of_model = play.of_model

    def broken(*given):
        player = of_model(*given)
        return lambda streams: [None] * len(streams) if streams[0].shape[1] > 150 else player(streams)

    monkeypatch.setattr(play, "of_model", broken)
    words = ["recall", str(run), "--data", str(data), "--out", str(tmp_path), *WORDS, "--kind", HEARD]
    assert main([*words, "--gaps", "2,10"]) == PARTIAL
    (checkpoint,) = results.read(tmp_path).checkpoints
    assert checkpoint.failed == 2
    assert [point.gap for point in checkpoint.curves[HEARD].gaps] == [25]
    assert "left out: 2 items of which memory gives no finite predictions" in capsys.readouterr().out
    assert {row["arm"] for row in rows(tmp_path) if row["gap_seconds"] == "10.0"} == {"not finite"}


def test_a_run_recalls_its_own_held_out_files_if_no_data_is_given(tiny_run, tmp_path):
    with pytest.raises(
        InputError, match=r"no gap can be filled: heard-before at 4 s: 12 s .* most is 5 s \(tiny_run/heldout1\)"
    ):
        main(["recall", str(tiny_run.run), "--out", str(tmp_path / "out"), "--gaps", "4", "--excerpt", "2"])


def test_gaps_are_whole_frames_in_order():
    assert Options(gaps="60, 10,10.01").gap_frames == [125, 750]
    assert Options(excerpt=2).excerpt_frames == 25
