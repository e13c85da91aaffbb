"""The commands of benchmarks of pairs on a model with random weights: what is printed, stored, resumed and refused."""

import csv
import json
import shutil
from dataclasses import replace

import numpy as np
import pytest

from eval.__main__ import main
from eval.benchmarks import results
from eval.benchmarks.commands.run import _codec
from eval.benchmarks.rules import RULES
from eval.benchmarks.scoring import measure
from eval.streaming import runner
from tests.helpers import benchmark_files, eval_models, micro, quick
from tests.helpers.eval_models import write_run
from ttt_jax.errors import InputError
from ttt_jax.utils.command import PARTIAL

SAMPLES = 16000  # a second, 13 frames
ARMS = ("persist", "frozen", "off")


@pytest.fixture(scope="module", autouse=True)
def compiled_quickly():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runner, "scan_calls", quick.scan_calls)
        yield


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoints")
    data = {"cache": str(folder / "cache")}
    return write_run(folder / "memory", micro.config(data=micro.dataclasses.replace(micro.CONFIG.data, **data)))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A mini set of all benchmarks; a recording of sWUGGY is there twice, so that a pair is a tie."""
    root = benchmark_files.mark_mini(tmp_path_factory.mktemp("data") / "set")
    lexical = benchmark_files.lexical(root, samples=SAMPLES)
    shutil.copy(lexical / "w0A.wav", lexical / "nw0A.wav")
    benchmark_files.syntactic(root, samples=SAMPLES)
    benchmark_files.storycloze(root, samples=SAMPLES)
    benchmark_files.salmon(root, samples=SAMPLES)
    return root


@pytest.fixture(scope="module")
def out(run, data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("out") / "suite"
    assert main(["suite", str(run), "--data", str(data), "--out", str(folder), "--submission"]) == 0
    return folder


def rows(folder):
    return list(csv.DictReader((folder / "pairs.csv").read_text().splitlines()))


def test_the_suite_scores_every_pair_of_every_task_in_every_arm(out):
    stored = results.read(out)
    names = [task.name for task in stored.tasks]
    assert names == ["mini-swuggy", "mini-sblimp", "mini-sstorycloze", "mini-tstorycloze", *names[4:]]
    assert all(name.startswith("mini-salmon/") for name in names[4:])
    counts = {"mini-swuggy": 6, "mini-sblimp": 12}
    for task in stored.tasks:
        assert task.pairs == counts.get(task.name, 3)
        assert [view.arm for view in task.views] == list(ARMS)
        for view in task.views:
            assert (view.scored, view.failed) == (task.pairs, 0)
            assert set(view.accuracies) == set(RULES)
    assert [view.ties for view in stored.tasks[0].views] == [1, 1, 1]  # the same recording twice, to the bit
    assert stored.setting.codec["name"] == "melkmeans-8x64"
    assert stored.setting.flush_frames == 1
    assert len(rows(out)) == 3 * sum(task.pairs for task in stored.tasks)
    assert "swuggy_accuracy" not in json.loads((out / "results.json").read_text())  # mini


def test_rows_hold_the_scores_that_the_accuracies_come_from(out):
    stored = results.read(out)
    for task in stored.tasks:
        for view in task.views:
            own = [row for row in rows(out) if (row["task"], row["arm"]) == (task.name, view.arm)]
            assert sum(float(row["outcome"]) == 0.5 for row in own) == view.ties
            for row in own:
                right, wrong = float(row["right"]), float(row["wrong"])
                assert float(row["outcome"]) == (0.5 if right == wrong else float(right > wrong))
                assert right < 0  # minus nats
    lines = {}
    for arm in ARMS:
        (folder,) = (out / "submission").glob(f"* {arm} *")
        lines[arm] = dict(line.split(" ") for line in (folder / "lexical" / "dev.txt").read_text().splitlines())
        assert len(lines[arm]) == 12
    own = {(row["arm"], row["key"]): row for row in rows(out) if row["task"] == "mini-swuggy"}
    assert float(lines["off"]["w1A"]) == float(own["off", "A/1"]["right"])
    assert float(lines["off"]["nw1A"]) == float(own["off", "A/1"]["wrong"])


def test_one_benchmark_alone_has_the_same_scores(run, data, out, tmp_path, capsys):
    assert main(["swuggy", str(run), "--data", str(data / "lexical"), "--out", str(tmp_path / "out")]) == 0
    assert "11 recordings under memory, 11 of them scored before" in capsys.readouterr().out
    assert rows(tmp_path / "out")[0]["right"] == rows(out)[0]["right"]
    assert [task.name for task in results.read(tmp_path / "out").tasks] == ["mini-swuggy"]


def test_a_run_that_was_killed_goes_on_and_ends_with_the_same_bits(run, data, out, tmp_path, monkeypatch):
    shutil.rmtree(run.parent / "cache" / "scores")
    arguments = ["sblimp", str(run), "--data", str(data), "--out", str(tmp_path / "out"), "--batch", "3"]
    assert main([*arguments[:-4], "--out", str(tmp_path / "whole"), "--batch", "3"]) == 0
    shutil.rmtree(run.parent / "cache" / "scores")
    whole, calls = measure.score, []

    def killed(*args):
        for call in whole(*args):
            calls.append(call)
            yield call
            if len(calls) == 3:
                raise KeyboardInterrupt

    monkeypatch.setattr(measure, "score", killed)
    with pytest.raises(KeyboardInterrupt):
        main(arguments)
    assert not (tmp_path / "out" / "results.json").exists()
    monkeypatch.setattr(measure, "score", lambda *args: (calls.append(call) or call for call in whole(*args)))
    assert main(arguments) == 0
    assert len(calls) == 8  # 24 recordings, three a call, none scored twice
    assert (tmp_path / "out" / "pairs.csv").read_bytes() == (tmp_path / "whole" / "pairs.csv").read_bytes()


def test_bad_recordings_are_named_and_counted_and_never_scored(run, data, tmp_path, capsys):
    root = shutil.copytree(data, tmp_path / "set")
    for name in ("w1A.wav", "nw1A.wav"):
        (root / "lexical" / "dev" / name).write_text("no sound")
    (root / "lexical" / "dev" / "nw2B.wav").unlink()
    code = main(["swuggy", str(run), "--data", str(root), "--out", str(tmp_path / "out"), "--arms", "off"])
    assert code == PARTIAL
    (task,) = results.read(tmp_path / "out").tasks
    assert (task.pairs, task.views[0].scored, task.views[0].failed) == (5, 4, 1)
    assert {problem.name for problem in task.problems} == {"A/1", "B/2"}
    (row,) = [row for row in rows(tmp_path / "out") if row["outcome"] == ""]
    assert (row["key"], row["right"]) == ("A/1", "")
    assert "2 not used (results.json names all), such as" in capsys.readouterr().out


def test_recordings_of_which_none_can_be_used_leave_nothing(run, data, tmp_path):
    root = shutil.copytree(data / "sSC", tmp_path / "sSC")
    for path in root.iterdir():
        path.write_text("no sound")
    with pytest.raises(InputError, match=r"no pair could be scored; the first: .*_correct\.wav is .*[^.]\.$"):
        main(["storycloze", str(run), "--data", str(root), "--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


def test_verify_needs_no_model(data, tmp_path, capsys):
    assert main(["suite", "--data", str(data), "--verify"]) == 0
    shown = capsys.readouterr().out
    assert "mini-swuggy (dev): 6 pairs of 3 items, 0 problems" in shown
    assert "salmon/rir_consistency is not there" in shown
    root = shutil.copytree(data, tmp_path / "set")
    (root / "lexical" / "dev" / "w1A.wav").write_text("no sound")
    assert main(["suite", "--data", str(root), "--verify"]) == PARTIAL
    assert "w1A.wav is unreadable" in capsys.readouterr().out


def test_verify_names_a_table_without_a_column(data, tmp_path, capsys):
    root = shutil.copytree(data / "lexical", tmp_path / "lexical")
    gold = (root / "dev" / "gold.csv").read_text()
    (root / "dev" / "gold.csv").write_text(gold.replace("voice", "speaker", 1))
    assert main(["swuggy", "--data", str(root), "--verify"]) == PARTIAL
    assert "gold.csv has no column voice" in capsys.readouterr().out


def test_incomplete_submission_files_are_said(run, data, tmp_path, capsys):
    flags = ["--limit", "2", "--arms", "off", "--submission", "--out", str(tmp_path / "out")]
    assert main(["swuggy", str(run), "--data", str(data), *flags]) == 0
    shown = capsys.readouterr()
    assert str(tmp_path / "out" / "submission") in shown.out.splitlines()
    assert "submission files lack recordings" in shown.err


def test_a_limit_takes_whole_items(run, data, tmp_path):
    flags = ["--limit", "2", "--arms", "off", "--out", str(tmp_path / "out")]
    assert main(["swuggy", str(run), "--data", str(data), *flags]) == 0
    (task,) = results.read(tmp_path / "out").tasks
    assert (task.items, task.pairs) == (2, 4)
    assert results.read(tmp_path / "out").setting.limit == 2


def test_results_of_another_question_are_not_replaced(run, data, out, tmp_path):
    folder = shutil.copytree(out, tmp_path / "out")
    same = ["suite", str(run), "--data", str(data), "--out", str(folder)]
    assert main(same) == 0
    for flags, message in {
        ("--arms", "off"): "--arms persist,frozen,off, not off",
        ("--text", "padding"): "--text absent, not padding",
        ("--limit", "2"): "--limit None, not 2",
    }.items():
        with pytest.raises(InputError, match=message):
            main([*same, *flags])
    assert results.read(folder)
    stored = results.read(folder)
    setting = replace(stored.setting, codec={"name": "another", "digest": "0" * 64})
    results.write(folder, replace(stored, setting=setting), {})
    with pytest.raises(InputError, match="with codec another .digest 000000000000., not melkmeans-8x64"):
        main(same)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--rule", "moshi"], "--rule 'moshi' is no rule: give one of"),
        (["--arms", "reset"], "--arms 'reset' is unknown"),
        (["--text", "words"], "--text 'words' is unknown"),
        (["--voice", "user"], "predicts 8 of 16 codebooks"),
        (["--voice", "moshi,moshi"], "--voice moshi,moshi names one twice"),
        (["--limit", "0"], "--limit 0 is out of range"),
        (["--split", "test"], "test"),
    ],
)
def test_wrong_options_end_in_one_sentence(flags, message, run, data, tmp_path):
    with pytest.raises(InputError, match=message) as refused:
        main(["swuggy", str(run), "--data", str(data), "--out", str(tmp_path / "out"), *flags])
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "out").exists()


def test_a_codec_that_does_not_fit_the_model_is_refused():
    fits = eval_models.checkpoint()
    assert _codec([fits]).digest == eval_models.DIGEST
    for change in ({"card": 128}, {"n_q": 14, "dep_q": 7, "delays": (0,) * 15}):
        other = fits._replace(name="other", cfg=replace(fits.cfg, **change))
        with pytest.raises(InputError, match=r"other reads 1\d codebooks of \d+ entries, but its codec melkmeans"):
            _codec([fits, other])


def test_no_checkpoint_and_no_benchmark_are_said(run, tmp_path):
    with pytest.raises(InputError, match="there is no checkpoint"):
        main(["swuggy"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="empty holds no benchmark"):
        main(["suite", str(run), "--data", str(tmp_path / "empty")])
    with pytest.raises(InputError, match="no folder"):
        main(["suite", str(run), "--data", str(tmp_path / "absent")])
    with pytest.raises(InputError, match=r"/empty/\.\./empty holds no benchmark .*: there is no folder lexical [^.]*"):
        main(["swuggy", str(run), "--data", f"{tmp_path}/empty/../empty"])


def test_checkpoints_are_compared_on_the_same_pairs(run, data, tmp_path):
    other = write_run(tmp_path / "other", micro.config(), seed=1)
    flags = ["--arms", "off", "--out", str(tmp_path / "out")]
    assert main(["storycloze", str(run), str(other), "--data", str(data), *flags]) == 0
    stored = results.read(tmp_path / "out")
    assert [comparison.view.checkpoint for comparison in stored.comparisons] == ["other", "other"]
    assert all(np.isfinite(comparison.p) for comparison in stored.comparisons)


def test_a_checkpoint_that_changed_meanwhile_is_not_scored_under_the_old_ones_name(run, data, tmp_path, monkeypatch):
    other, whole = shutil.copytree(run, tmp_path / "other"), measure.encode

    def encode(*args):
        shutil.rmtree(other)
        write_run(other, micro.config(), seed=2)
        return whole(*args)

    monkeypatch.setattr(measure, "encode", encode)
    changed = ["storycloze", str(write_run(tmp_path / "one", micro.config(), seed=1)), str(other)]
    with pytest.raises(InputError, match="has another checkpoint than when this command began"):
        main([*changed, "--data", str(data), "--arms", "off", "--out", str(tmp_path / "out")])
