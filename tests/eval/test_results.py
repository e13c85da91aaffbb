"""Results of streamed files: every estimate against a computation of its own, units, results.json, the table."""

import dataclasses
import json
import subprocess
import sys
import typing

import numpy as np
import pytest
from scipy import stats

from eval.results.schema import CheckpointInfo, FileInfo, Skipped, as_json, plain, scores_path
from eval.stats import estimates, paired
from eval.stats.verdict import MARGIN, THRESHOLD, WORSE, Rule, advise, verdict
from eval.streaming import measure, scores, table, weighting
from eval.streaming import results as stream_results
from eval.streaming.results import Setting
from eval.streaming.summary import summarise
from tests.helpers import made_scores
from tests.helpers.made_scores import ARMS, CHECKPOINT, FILES, LAYERS, SETTING, STREAMS, write
from ttt_jax.errors import InputError

WEIGHTS = {"equal": [1, 1, 1], "kyutai": [100, 1, 1], "semantic": [1, 0, 0], "acoustic": [0, 1, 1]}
SHORT = 1e-6


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    files = write(folder)
    return folder, files, summarise(SETTING, [CHECKPOINT], FILES, [], folder)


def expected(values):
    """Mean, interval and n of one value per unit, by scipy."""
    values = np.array([value for value in values if np.isfinite(value)])
    n, mean = len(values), np.mean(values)
    if n < 2:
        return mean, np.nan, np.nan, n
    half = stats.t.interval(0.95, n - 1)[1] * stats.sem(values)
    return mean, mean - half, mean + half, n


def agree(estimate, values):
    np.testing.assert_allclose(estimate, expected(values), rtol=1e-5, atol=1e-6)


def by_hand(values, row):
    """Frames of a row, one at a time: a stream, or the weighted codebooks of each frame where all that count are
    scored."""
    if row in STREAMS:
        return values[STREAMS.index(row)].astype(float)
    frames = []
    for column in values[1:].astype(float).T:
        pairs = [(weight, value) for weight, value in zip(WEIGHTS[row], column, strict=True) if weight]
        total = sum(weight for weight, _ in pairs)
        frames.append(sum(weight * value for weight, value in pairs) / total)
    return np.array(frames)


def mean(values):
    values = values[np.isfinite(values)]
    return values.mean() if len(values) else np.nan


ROWS = [*STREAMS, *WEIGHTS]


def test_weights_are_those_that_are_named():
    for name, weight in WEIGHTS.items():
        np.testing.assert_array_equal(weighting.weights(name, 3), weight)
    assert list(weighting.WEIGHTINGS) == list(WEIGHTS)


def test_a_frame_counts_where_all_weighted_codebooks_are_scored():
    nan = np.nan
    values = np.array([[9, 9, 9, 9], [1, 1, nan, 1], [nan, 2, 2, 2], [nan, 6, 6, nan]], np.float32)
    np.testing.assert_allclose(weighting.aggregate(values, "equal"), [nan, 3, nan, nan])
    np.testing.assert_allclose(weighting.aggregate(values, "kyutai"), [nan, 108 / 102, nan, nan])
    np.testing.assert_allclose(weighting.aggregate(values, "semantic"), [1, 1, nan, 1])
    np.testing.assert_allclose(weighting.aggregate(values, "acoustic"), [nan, 4, 4, nan])
    assert np.isnan(weighting.aggregate(values[:2], "acoustic")).all()  # a single codebook has no acoustic ones


@pytest.mark.parametrize("row", ROWS)
def test_means_by_arm_and_row(run, row):
    _, files, results = run
    found = results.checkpoints[0]
    assert list(found.losses) == [*ARMS, "unigram"]
    for arm in ARMS:
        own = [file.arms[arm] for file in files]
        agree(found.losses[arm][row], [mean(by_hand(score.nats, row)) for score in own])
        agree(found.entropy[arm][row], [mean(by_hand(score.entropy, row)) for score in own])
        right = [np.where(np.isnan(score.rank), np.nan, score.rank == 0) for score in own]
        agree(found.accuracy[arm][row], [mean(by_hand(values, row)) for values in right])
    agree(found.losses["unigram"][row], [mean(by_hand(file.unigram, row)) for file in files])
    agree(
        found.against_unigram[row],
        [mean(by_hand(file.unigram, row) - by_hand(file.arms["persist"].nats, row)) for file in files],
    )
    assert found.by_file["b"]["off"][row] == pytest.approx(mean(by_hand(files[1].arms["off"].nats, row)))


@pytest.mark.parametrize("row", ROWS)
def test_paired_differences_by_part_of_the_file(run, row):
    _, files, results = run
    found = results.checkpoints[0].against_persist
    assert list(found) == [arm for arm in ARMS if arm != "persist"]
    for arm in found:
        pairs = [by_hand(file.arms[arm].nats, row) - by_hand(file.arms["persist"].nats, row) for file in files]
        agree(found[arm]["all frames"][row], [mean(pair) for pair in pairs])
        agree(found[arm]["after the first reset"][row], [mean(pair[40:]) for pair in pairs])
        agree(found[arm]["beyond the attention window"][row], [mean(pair[60:]) for pair in pairs])
        assert found[arm]["beyond the attention window"][row].n == 3  # file d ends before


def test_the_headline_weighting_decides_mean_positions_and_slopes(run):
    folder, files, results = run
    other = summarise(dataclasses.replace(SETTING, weighting="kyutai"), [CHECKPOINT], FILES, [], folder)
    first, second = results.checkpoints[0], other.checkpoints[0]
    assert first.against_unigram["mean"] == first.against_unigram["equal"]
    assert second.against_unigram["mean"] == second.against_unigram["kyutai"]
    assert first.losses == second.losses
    agree_by_position(
        second.by_position["losses"]["off"], [chunks(by_hand(f.arms["off"].nats, "kyutai")) for f in files]
    )
    assert first.slopes != second.slopes
    for name in ("kl", "changed"):
        values = [by_hand(getattr(file.arms["reset"].against_off, name), "kyutai") for file in files]
        agree(second.against_off["reset"][name], [mean(own) for own in values])
        agree_by_position(second.by_position[name]["reset"], [chunks(own) for own in values])


def chunks(values, size=25):
    """Means of the windows that are at least half full."""
    parts = [values[..., at : at + size] for at in range(0, values.shape[-1], size)]
    return [mean(part) for part in parts if part.shape[-1] >= size / 2]


def agree_by_position(estimates, files):
    """`files`: by file, values in windows."""
    longest = max(map(len, files))
    assert len(estimates) == longest == 8
    for i, estimate in enumerate(estimates):
        agree(estimate, [file[i] for file in files if len(file) > i])


@pytest.mark.parametrize("arm", ARMS)
def test_windows_by_position(run, arm):
    _, files, results = run
    found = results.checkpoints[0].by_position
    nats = [by_hand(file.arms[arm].nats, "equal") for file in files]
    persist = [by_hand(file.arms["persist"].nats, "equal") for file in files]
    agree_by_position(found["losses"][arm], [chunks(values) for values in nats])
    if arm != "persist":
        differences = [chunks(own - base) for own, base in zip(nats, persist, strict=True)]
        agree_by_position(found["against_persist"][arm], differences)
    assert ("off" in found["kl"], "persist" in found["against_persist"]) == (False, False)
    if arm != "off":
        for name in ("kl", "changed"):
            values = [by_hand(getattr(file.arms[arm].against_off, name), "equal") for file in files]
            agree_by_position(found[name][arm], [chunks(own) for own in values])
            agree(results.checkpoints[0].against_off[arm][name], [mean(own) for own in values])
    for name in ("displacement", "rate"):
        for i, layer in enumerate(LAYERS):
            values = [getattr(file.arms[arm].inner, name)[i] for file in files]
            agree_by_position(found[name][arm][str(layer)], [chunks(own) for own in values])


def line(values):
    """Slope per 1,000 frames by numpy's own fit; files shorter than two windows have none."""
    there = np.isfinite(values)
    position = np.arange(len(values))[there] / 1000
    return np.polyfit(position, values[there], 1)[0] if len(values) >= 50 else np.nan


@pytest.mark.parametrize("arm", ARMS)
def test_slopes_by_file(run, arm):
    _, files, results = run
    found = results.checkpoints[0].slopes
    nats = [by_hand(file.arms[arm].nats, "equal") for file in files]
    agree(found["losses"][arm], [line(values) for values in nats])
    assert found["losses"][arm].n == 3  # file d has 30 frames, less than two windows
    if arm != "persist":
        pairs = zip(nats, [by_hand(file.arms["persist"].nats, "equal") for file in files], strict=True)
        agree(found["against_persist"][arm], [line(own - base) for own, base in pairs])


def test_a_known_slope_is_found(tmp_path):
    """Losses fall by 2 nats in 1,000 frames under persist and by 1 under reset; noise hides little of it in long
    files."""
    files = [FileInfo(name, name, 3000, f"{name}.npz") for name in "abc"]
    write(tmp_path, files=files, arms=("persist", "reset"))
    found = summarise(SETTING, [CHECKPOINT], files, [], tmp_path).checkpoints[0]
    assert found.slopes["losses"]["persist"].mean == pytest.approx(-2, abs=0.03)
    assert found.slopes["against_persist"]["reset"].mean == pytest.approx(1, abs=0.03)


@pytest.mark.parametrize("arm", ["persist", "reset", "frozen"])
@pytest.mark.parametrize("i", range(len(LAYERS)))
def test_inner_losses_by_layer(run, arm, i):
    _, files, results = run
    found = results.checkpoints[0].inner[arm][str(LAYERS[i])]
    quantities = {
        "loss_base": lambda own: own.loss_base,
        "loss_before": lambda own: own.loss_before,
        "loss_after": lambda own: own.loss_after,
        "gain": lambda own: own.loss_base.astype(float) - own.loss_before,
        "immediate": lambda own: own.loss_before.astype(float) - own.loss_after,
    }
    assert list(found) == list(quantities)
    for name, compute in quantities.items():
        values = [compute(file.arms[arm].inner)[i].astype(float) for file in files]
        agree(found[name]["all frames"], [mean(own) for own in values])
        agree(found[name]["first frame"], [own[0] for own in values])
        agree(found[name]["last window"], [mean(own[-25:]) for own in values])
        np.testing.assert_allclose(found[name]["slope"], expected([line(own) for own in values]), rtol=1e-4, atol=1e-5)
    assert found["gain"]["first frame"].mean == pytest.approx(0, abs=SHORT)  # memory begins at W0


def test_files_of_one_speaker_are_one_unit(run):
    folder, files, results = run
    shared = [dataclasses.replace(file, group="bc" if file.name in "bc" else file.name) for file in FILES]
    grouped = summarise(SETTING, [CHECKPOINT], shared, [], folder)
    assert (grouped.units, grouped.unit) == (3, "speakers")
    assert (results.units, results.unit) == (4, "files")
    a, b, c, d = (mean(by_hand(file.arms["off"].nats, "equal")) for file in files)
    agree(grouped.checkpoints[0].losses["off"]["equal"], [a, (b + c) / 2, d])
    # Windows 5 and 6 of c have no counterpart in b, which is shorter (it fills 10 frames of window 5): its group has
    # the value of c
    # there.
    b5, c5 = (chunks(by_hand(file.arms["off"].nats, "equal")) for file in files[1:3])
    assert len(b5) == 4
    assert grouped.checkpoints[0].by_position["losses"]["off"][5].n == 2
    agree(
        grouped.checkpoints[0].by_position["losses"]["off"][5],
        [chunks(by_hand(files[0].arms["off"].nats, "equal"))[5], c5[5]],
    )


@pytest.fixture(scope="module")
def several(tmp_path_factory):
    """A model with memory, one without TTT layers, one that is 0.03 nats better."""
    folder = tmp_path_factory.mktemp("several")
    base = CheckpointInfo("base", contexts=(60,), ttt_layers=())
    better = dataclasses.replace(CHECKPOINT, name="better")
    files = write(folder), write(folder, base, arms=("off",), unigram=False), write(folder, better, shift=-0.03)
    return folder, files, summarise(SETTING, [CHECKPOINT, base, better], FILES, [], folder)


def test_checkpoints_are_compared_by_the_same_files(several):
    _, (first, base, better), results = several
    assert [own.main for own in results.checkpoints] == ["persist", "off", "persist"]
    assert list(results.between) == ["base", "better"]
    for row in ROWS:
        own = [by_hand(file.arms["persist"].nats, row) for file in first]
        agree(
            results.between["base"][row],
            [mean(by_hand(file.arms["off"].nats, row)) - mean(o) for file, o in zip(base, own, strict=True)],
        )
        assert results.between["better"][row].mean == pytest.approx(-0.03, abs=1e-5)
    own = [chunks(by_hand(file.arms["persist"].nats, "equal")) for file in first]
    other = [chunks(by_hand(file.arms["off"].nats, "equal")) for file in base]
    differences = [list(np.subtract(one, two)) for one, two in zip(other, own, strict=True)]
    agree_by_position(results.between["base"]["by_position"], differences)


def test_speakers_are_units_between_checkpoints_too(several):
    folder, (first, base, _), results = several
    shared = [dataclasses.replace(file, group="bc" if file.name in "bc" else file.name) for file in FILES]
    found = summarise(SETTING, [own.info for own in results.checkpoints[:2]], shared, [], folder).between["base"]
    a, b, c, d = (
        mean(by_hand(two.arms["off"].nats, "equal")) - mean(by_hand(one.arms["persist"].nats, "equal"))
        for one, two in zip(first, base, strict=True)
    )
    agree(found["equal"], [a, (b + c) / 2, d])


def test_a_model_without_ttt_layers_has_one_arm_and_no_memory(several):
    _, _, results = several
    base = results.checkpoints[1]
    assert base.arms == ["off"]
    assert (base.against_persist, base.against_off, base.against_unigram, base.inner) == ({}, {}, {}, {})
    assert "no TTT layers" in base.verdict


def test_results_are_read_as_they_were_written(several, run, tmp_path):
    for results in (several[2], run[2]):
        results = dataclasses.replace(results, skipped=[Skipped("x", "too short")])
        about = {"cost": {"seconds": 1.5}, "versions": {"numpy": "2"}, "not measured": float("nan")}
        path = stream_results.write(tmp_path, results, about)
        back = stream_results.read(tmp_path)
        assert plain(back) == plain(results)
        assert isinstance(back.checkpoints[0].losses["off"]["text"], estimates.Estimate)
        assert (type(back.setting), type(back.files[0]), back.files[0].boundaries) == (Setting, FileInfo, (50,))
        assert (back.checkpoints[0].info, back.setting) == (CHECKPOINT, SETTING)
        stored = json.loads(path.read_text(), parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
        assert stored["cost"] == {"seconds": 1.5}
        assert stored["not measured"] is None
        assert stored["counts"] == {"files": 4, "skipped": 1, "units": 4, "unit": "files"}
        assert stored["files"][0]["digest"] == "d1"
        assert stored["checkpoints"][0]["info"]["about"] == {"step": 7}
        assert stored["checkpoints"][0]["verdict"] == results.checkpoints[0].verdict
        fields = {field.name for field in dataclasses.fields(stream_results.CheckpointResults)} - {
            "info",
            "arms",
            "main",
        }
        assert fields - {"by_file", "verdict"} <= set(stored["notes"])


def test_what_was_not_measured_is_null_and_read_as_nan(tmp_path):
    write(tmp_path, files=FILES[:1], arms=("persist",), text=False, unigram=False)
    results = summarise(SETTING, [CHECKPOINT], FILES[:1], [], tmp_path)
    stored = json.loads(stream_results.write(tmp_path, results, {}).read_text())["checkpoints"][0]
    assert stored["losses"]["persist"]["text"] == {"mean": None, "low": None, "high": None, "n": 0}
    assert stored["losses"]["persist"]["equal"]["low"] is None
    assert stored["by_file"]["a"]["persist"]["text"] is None
    back = stream_results.read(tmp_path).checkpoints[0]
    assert np.isnan(back.losses["persist"]["text"].mean)
    assert np.isnan(back.by_file["a"]["persist"]["text"])


def test_of_a_file_only_means_stay(run):
    _, files, _ = run

    def leaves(tree):
        for value in tree.values():
            yield from leaves(value) if isinstance(value, dict) else [value]

    for value in leaves(measure.measure(files[0], SETTING, CHECKPOINT)):
        assert np.size(value) in (1, 8)
        assert getattr(value, "base", None) is None  # a view would keep the frames


def damage(path, how):
    content = path.read_bytes()
    if how == "cut":
        path.write_bytes(content[: len(content) // 2])
    elif how == "flipped":
        at = content.index(b"persist/nats") + 200
        path.write_bytes(content[:at] + bytes(255 - byte for byte in content[at : at + 50]) + content[at + 50 :])
    elif how == "empty":
        path.write_bytes(b"")
    else:
        path.unlink()


@pytest.mark.parametrize("how", ["cut", "flipped", "empty", "gone"])
def test_missing_and_damaged_scores_are_named(tmp_path, how):
    write(tmp_path)
    damage(tmp_path / "frames" / "tiny" / "b.npz", how)
    with pytest.raises(InputError, match=r"tiny/b\.npz .* again"):
        summarise(SETTING, [CHECKPOINT], FILES, [], tmp_path)


def test_scores_of_another_file_are_refused(tmp_path):
    write(tmp_path)
    (tmp_path / "frames/tiny/a.npz").rename(tmp_path / "frames/tiny/b.npz")
    with pytest.raises(InputError, match="b.npz holds .* 200.* but b has .* 110"):
        summarise(SETTING, [CHECKPOINT], FILES[1:], [], tmp_path)


def test_other_results_are_refused(run, tmp_path):
    with pytest.raises(InputError, match="results.json is not a file"):
        stream_results.read(tmp_path)
    path = stream_results.write(tmp_path, run[2], {})
    stored = json.loads(path.read_text())
    for change, problem in [
        ({"format": 99}, "is of format 99 of python -m eval stream, but format 3 of python -m eval stream is read"),
        ({"format": None}, "does not say of which command and format it is"),
        ({"command": ["x"]}, "does not say of which command and format it is"),
        ({"checkpoints": [{}]}, "not as it was written"),
        ({"setting": None}, "not as it was written"),
    ]:
        path.write_text(json.dumps(stored | change))
        with pytest.raises(InputError, match=problem):
            stream_results.read(tmp_path)
    path.write_text("[]")
    with pytest.raises(InputError, match="format"):
        stream_results.read(tmp_path)


def test_a_setting_is_checked():
    with pytest.raises(InputError, match="weighting 'loud'"):
        dataclasses.replace(SETTING, weighting="loud")
    with pytest.raises(InputError, match="window of 0"):
        dataclasses.replace(SETTING, window=0)


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
    value = paired.compare(reset - persist, reset.mean(), MARGIN, THRESHOLD / 100)
    rule = Rule(MARGIN, THRESHOLD, "files")
    expected = verdict(value, value.p.t, value.equivalence.p, rule, ("persist", "reset"))
    assert expected.kind == WORSE
    assert found.verdict == advise(expected, "files").text


def test_the_verdict_says_what_it_cannot_tell(tmp_path):
    assert "one file cannot be tested" in gains(tmp_path / "one", 0.1, files=1).checkpoints[0].verdict
    write(tmp_path, arms=("persist", "off"))
    assert "not both run" in summarise(SETTING, [CHECKPOINT], FILES, [], tmp_path).checkpoints[0].verdict
    write(tmp_path)
    rare = dataclasses.replace(SETTING, reset_every=1000)
    assert "no file is so long" in summarise(rare, [CHECKPOINT], FILES, [], tmp_path).checkpoints[0].verdict


def test_the_table_shows_what_was_found(run):
    _, _, results = run
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
        for part in ("all frames", "last window", "slope"):
            gain = found.inner["persist"][name]["gain"][part]
            assert f"{estimates.interval(gain, digits, signed=True)}" in line(f"TTT layer {name}")
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


def test_only_a_finite_rank_of_zero_is_right():
    got = measure._first(np.array([0, 1, np.nan, np.inf], np.float32))
    np.testing.assert_array_equal(got, [1, 0, np.nan, np.nan])


def test_notes_say_what_could_mislead():
    assert "ties count as right" in stream_results.NOTES["accuracy"]
    assert "L layers" in stream_results.NOTES[stream_results.BEYOND]
    assert "mean" not in stream_results.NOTES["against_off"]


def test_an_estimate_is_students_interval_over_units():
    value = estimates.band(np.array([1.0, 2.0, 3.0, np.nan]))
    assert value.n == 3
    assert value.mean == pytest.approx(2.0)
    assert value.high - value.mean == pytest.approx(4.302653 / np.sqrt(3), rel=1e-6)  # t(0.975, 2) * 1 / sqrt(3)
    assert value.mean - value.low == pytest.approx(value.high - value.mean)


def test_one_file_has_no_interval_and_none_no_mean():
    value = estimates.band(np.array([1.0]))
    assert (int(value.n), float(value.mean)) == (1, 1.0)
    assert np.isnan(value.low)
    none = estimates.band(np.array([np.nan]))
    assert none.n == 0
    assert np.isnan(none.mean)


def test_windows_average_what_is_there():
    got = estimates.windows(np.array([1.0, 3.0, np.nan, 5.0, np.nan]), 2)
    np.testing.assert_array_equal(got, [2.0, 5.0, np.nan])


@pytest.mark.parametrize(("frames", "count"), [(1, 0), (4, 0), (5, 1), (10, 1), (13, 1), (14, 1), (15, 2), (20, 2)])
def test_a_window_that_is_less_than_half_full_is_left_out(frames, count):
    got = estimates.windows(np.arange(2.0 * frames).reshape(2, frames), 10)
    assert got.shape == (2, count)
    np.testing.assert_array_equal(
        got[0], [np.arange(at, min(at + 10, frames)).mean() for at in range(0, 10 * count, 10)]
    )


def test_a_slope_is_per_thousand_frames_and_leaves_nan_out():
    values = 5 + 0.003 * np.arange(40.0)
    values[[0, 7, 39]] = np.nan
    assert estimates.slope(values) == pytest.approx(3)
    assert np.isnan(estimates.slope(np.array([np.nan, 1.0])))


def test_a_moving_average_is_centred():
    values = np.array([0.0, 0, 0, 4, 0, 0, np.nan, 2])
    np.testing.assert_allclose(estimates.smooth(values, 3), [0, 0, 4 / 3, 4 / 3, 4 / 3, 0, 1, 2])
    np.testing.assert_allclose(estimates.smooth(values, 1), values)


@pytest.mark.parametrize("frames", [1, 7, 8, 9, 40])
def test_a_moving_average_can_stay_within_periods(frames):
    values = np.random.default_rng(0).normal(size=(2, frames))
    parts = [estimates.smooth(values[:, at : at + 8], 5) for at in range(0, frames, 8)]
    np.testing.assert_allclose(estimates.smooth(values, 5, 8), np.concatenate(parts, 1), atol=1e-12)


def test_group_means_keep_the_order_of_groups():
    got = estimates.group_means(np.array([[1.0, np.nan], [5, 2], [3, 4]]), ["x", "y", "x"])
    np.testing.assert_array_equal(got, [[2, 4], [5, 2]])


@pytest.mark.integration
def test_no_jax_is_needed():
    code = (
        "import sys, eval.streaming.summary, eval.streaming.table, eval.streaming.plots; sys.exit('jax' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_the_command_line_knows_the_weightings():
    assert typing.get_args(weighting.Weighting) == tuple(weighting.WEIGHTINGS)


def test_json_has_a_line_for_each_entry_of_some_levels_and_is_what_it_was():
    content = {
        "numbers": [[1, -2.5e-07, None, float("nan")], [1e16], []],
        "names": ["a", "[\n 1\n]", "1"],
        "rows": [{"name": "x" * 300, "of": [0.1, True]}, {"name": "y" * 200, "of": {}}],
        "deep": {"a": {"b": [{"c": "z" * 500, "d": {"e": 1}}]}},
        "empty": [{}, []],
    }
    text = as_json(content).decode()
    assert json.loads(text) == content | {"numbers": [[1, -2.5e-07, None, None], [1e16], []]}
    lines = text.splitlines()
    assert ' "numbers": [[1, -2.5e-07, null, null], [1e+16], []],' in lines
    assert sum(line.startswith("  {") for line in lines) == 2  # rows
    assert sum("zzz" in line and '"e": 1' in line for line in lines) == 1
