"""The table of an evaluation and its verdict."""

import dataclasses

import numpy as np
import pytest

from eval.results.schema import FileInfo, Skipped, scores_path
from eval.stats import estimates, paired
from eval.stats.verdict import MARGIN, THRESHOLD, WORSE, Rule, advise, verdict
from eval.streaming import scores, table
from eval.streaming.results import LAST, TREND
from eval.streaming.summary import summarise
from tests.eval.streaming.test_summary import agree, by_hand, mean
from tests.helpers import made_scores
from tests.helpers.made_scores import ARMS, CHECKPOINT, FILES, LAYERS, SETTING, write


def gains(folder, gain, files=6, noise=1e-3):
    """Results where reset is worse than persist by `gain` in every file, but for noise between files; losses are large
    at first."""
    infos = [FileInfo(str(i), str(i), 80, f"{i}.npz") for i in range(files)]
    rng = np.random.default_rng(0)
    for i, file in enumerate(infos):
        own = made_scores.make(80, i)
        persist = own.arms["persist"]
        persist = persist._replace(nats=persist.nats + np.where(np.arange(80) < 40, np.float32(2), np.float32(0)))
        reset = persist._replace(nats=persist.nats + np.float32(gain + rng.normal(0, noise)))
        path = scores_path(folder, CHECKPOINT.name, file)
        path.parent.mkdir(parents=True, exist_ok=True)
        scores.save(path, own._replace(arms={"persist": persist, "reset": reset}))
    return summarise(SETTING, [CHECKPOINT], infos, [], folder)


@pytest.mark.parametrize(
    ("gain", "kind"),
    [(0.01, "clearly better than reset"), (-0.01, "clearly worse than reset"), (0.0, "are equivalent")],
)
def test_the_verdict_follows_the_difference(tmp_path, gain, kind):
    found = gains(tmp_path, gain)
    assert kind in found.checkpoints[0].verdict
    assert found.checkpoints[0].verdict in table.table(found)


def test_the_verdict_is_that_of_compare_on_the_frames_after_the_first_reset(tmp_path):
    found = gains(tmp_path, -0.2).checkpoints[0]
    # All files have 80 frames, memory is cleared at 40.
    folder = tmp_path / "frames" / "tiny"
    arms = [scores.load(folder / f"{i}.npz").arms for i in range(6)]
    reset, persist = (
        np.array([mean(by_hand(one[arm].nats, "equal")[40:]) for one in arms]) for arm in ("reset", "persist")
    )
    agree(found.losses_later["reset"]["equal"], reset)
    value = paired.compare(reset - persist, reset.mean(), MARGIN)
    rule = Rule(MARGIN, THRESHOLD, "files")
    expected = verdict(value, value.p, value.equivalence.p, rule, ("persist", "reset"))
    assert expected.kind == WORSE
    assert found.verdict == advise(expected, "files").text


def test_the_verdict_says_what_it_cannot_tell(tmp_path):
    assert "one file cannot be tested" in gains(tmp_path / "one", 0.1, files=1).checkpoints[0].verdict
    write(tmp_path, arms=("persist", "off"))
    assert "not both run" in summarise(SETTING, [CHECKPOINT], FILES, [], tmp_path).checkpoints[0].verdict
    write(tmp_path)
    rare = dataclasses.replace(SETTING, reset_every=1000)
    assert "no file is so long" in summarise(rare, [CHECKPOINT], FILES, [], tmp_path).checkpoints[0].verdict


def test_the_table_shows_what_was_found(summarised):
    _, _, results = summarised
    found, lines = results.checkpoints[0], table.table(results).splitlines()

    def line(start):
        (own,) = [line for line in lines if line.startswith(start)]
        return own

    assert lines[0].endswith("30 to 200 frames (0.7 minutes in all), codec made, voice left,")
    assert lines[1] == "own transcripts"
    header = line("nats per token")
    assert header.split()[3:9] == [*ARMS, "unigram"]
    for row in ("text", "codebook 3", "equal", "kyutai", "acoustic"):
        means = [f"{found.losses[arm][row].mean:.3f}" for arm in (*ARMS, "unigram")]
        assert line(row).removeprefix(row).split()[:6] == means
        assert estimates.interval(found.against_unigram[row], 3) in line(row)
    assert line("KL to off").split()[3:] == [
        f"{found.against_off[arm]['kl'].mean:.4f}" if arm != "off" else "-" for arm in ARMS
    ]
    assert line("top-1 changed %").split()[3] == f"{100 * found.against_off['persist']['changed'].mean:.1f}"
    assert line("top-1 accuracy %").split()[3] == f"{100 * found.accuracy['persist']['equal'].mean:.1f}"
    third = line("4 to 6 s")
    assert third.split()[4] == "3"
    assert estimates.interval(found.by_position["against_persist"]["off"][2], 4, signed=True) in third
    assert estimates.interval(found.slopes["against_persist"]["reset"], 4, signed=True) in line("per 1,000 frames")
    beyond = found.against_persist["permuted"]["beyond the attention window"]["equal"]
    assert any(row.startswith("permuted ") and estimates.interval(beyond, 4, signed=True) in row for row in lines)
    for name, digits in (("1", 4), ("4", 2)):  # the second layer's losses are above 1
        for part in ("gain", LAST, TREND):
            gain = estimates.interval(found.inner["persist"][name][part], digits, signed=True)
            assert gain in line(f"TTT layer {name}")
    assert lines[-1] == found.verdict
    assert len(lines) < 45
    assert "nan" not in "\n".join(lines)


def test_the_table_of_several_checkpoints(several):
    _, _, results = several
    text = table.table(results)
    assert "nan" not in text
    assert text.count("by position") == 3
    last = text.splitlines()[-1]
    assert last.startswith("better ")
    assert estimates.interval(results.between["better"]["text"], 4, signed=True) in last


@pytest.mark.parametrize("arms", [("persist",), ("off",), ("persist", "frozen"), ("reset", "off")])
def test_the_table_of_little(tmp_path, arms):
    info = dataclasses.replace(CHECKPOINT, ttt_layers=() if arms == ("off",) else LAYERS)
    write(tmp_path, info, FILES[:1], arms=arms, text=False, unigram=False)
    text = table.table(summarise(SETTING, [info], FILES[:1], [Skipped("y", "gone")], tmp_path))
    assert "nan" not in text
    assert "None" not in text
    assert "1 skipped" in text
    assert not any(line.startswith("text ") for line in text.splitlines())


def test_the_table_of_an_hour_is_short(tmp_path):
    files = [FileInfo("a", "a", 45000, "a.npz")]
    write(tmp_path, files=files, arms=("persist", "off"))
    text = table.table(summarise(dataclasses.replace(SETTING, window=250), [CHECKPOINT], files, [], tmp_path))
    assert "by position, 8/180" in text
    assert "59:40 to 60:00" in text
    assert len(text.splitlines()) < 45


def test_the_table_ends_where_the_longest_file_ends(tmp_path):
    files = [FileInfo("a", "a", 170, "a.npz"), FileInfo("b", "b", 160, "b.npz")]
    write(tmp_path, files=files)
    setting = dataclasses.replace(SETTING, window=50)
    text = table.table(summarise(setting, [CHECKPOINT], files, [], tmp_path))
    assert "8 to 12 s" in text
    assert "12 to" not in text  # 20 of 50 frames
    text = table.table(summarise(dataclasses.replace(setting, window=60), [CHECKPOINT], files, [], tmp_path))
    assert "\n9.6 to 13.6 s  " in text


def test_files_shorter_than_half_a_window_have_no_positions(tmp_path):
    write(tmp_path)
    setting = dataclasses.replace(SETTING, window=1000)
    results = summarise(setting, [CHECKPOINT], FILES, [], tmp_path)
    assert results.checkpoints[0].by_position["losses"]["persist"] == []
    assert "by position" not in table.table(results)


@pytest.mark.parametrize(
    ("arms", "there"), [(("persist", "reset"), True), (("persist", "permuted"), True), (("persist", "off"), False)]
)
def test_the_first_reset_is_of_interest_where_an_arm_resets(tmp_path, arms, there):
    write(tmp_path, arms=arms)
    results = summarise(SETTING, [CHECKPOINT], FILES, [], tmp_path)
    (head,) = [line for line in table.table(results).splitlines() if line.startswith("minus persist")]
    assert ("after the first reset" in head) == there
    assert "beyond the attention window" in head


def test_one_speaker_is_singular(tmp_path):
    files = [dataclasses.replace(file, group="x") for file in FILES[:2]]
    write(tmp_path, files=files)
    text = table.table(summarise(SETTING, [CHECKPOINT], files, [], tmp_path))
    assert text.startswith("2 files of 1 speaker, ")
