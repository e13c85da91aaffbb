"""Results of streamed files: every estimate against a computation of its own, units, results.json, the table."""

import dataclasses
import json
import subprocess
import sys
import typing

import numpy as np
import pytest
from scipy import stats

from eval.results.schema import FileInfo, Skipped, as_json, plain
from eval.stats import estimates
from eval.streaming import measure, weighting
from eval.streaming import results as stream_results
from eval.streaming.results import LAST, TREND, Setting
from eval.streaming.summary import summarise
from tests.helpers.made_scores import ARMS, CHECKPOINT, FILES, LAYERS, SETTING, STREAMS, write
from ttt_jax.errors import InputError

WEIGHTS = {"equal": [1, 1, 1], "kyutai": [100, 1, 1], "semantic": [1, 0, 0], "acoustic": [0, 1, 1]}


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
def test_means_by_arm_and_row(summarised, row):
    _, files, results = summarised
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


@pytest.mark.parametrize("row", ROWS)
def test_paired_differences_by_part_of_the_file(summarised, row):
    _, files, results = summarised
    found = results.checkpoints[0].against_persist
    assert list(found) == [arm for arm in ARMS if arm != "persist"]
    for arm in found:
        pairs = [by_hand(file.arms[arm].nats, row) - by_hand(file.arms["persist"].nats, row) for file in files]
        agree(found[arm]["all frames"][row], [mean(pair) for pair in pairs])
        agree(found[arm]["after the first reset"][row], [mean(pair[40:]) for pair in pairs])
        agree(found[arm]["beyond the attention window"][row], [mean(pair[60:]) for pair in pairs])
        assert found[arm]["beyond the attention window"][row].n == 3  # file d ends before


def test_the_headline_weighting_decides_mean_positions_and_slopes(summarised):
    folder, files, results = summarised
    other = summarise(dataclasses.replace(SETTING, weighting="kyutai"), [CHECKPOINT], FILES, [], folder)
    first, second = results.checkpoints[0], other.checkpoints[0]
    assert first.losses == second.losses
    agree_by_position(
        second.by_position["losses"]["off"], [chunks(by_hand(f.arms["off"].nats, "kyutai")) for f in files]
    )
    assert first.slopes != second.slopes
    for name in ("kl", "changed"):
        values = [by_hand(getattr(file.arms["reset"].against_off, name), "kyutai") for file in files]
        agree(second.against_off["reset"][name], [mean(frames) for frames in values])


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
def test_windows_by_position(summarised, arm):
    _, files, results = summarised
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
            agree(results.checkpoints[0].against_off[arm][name], [mean(frames) for frames in values])
            if name == "kl":
                agree_by_position(found[name][arm], [chunks(frames) for frames in values])
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
def test_slopes_by_file(summarised, arm):
    _, files, results = summarised
    found = results.checkpoints[0].slopes
    nats = [by_hand(file.arms[arm].nats, "equal") for file in files]
    agree(found["losses"][arm], [line(values) for values in nats])
    assert found["losses"][arm].n == 3  # file d has 30 frames, less than two windows
    if arm != "persist":
        pairs = zip(nats, [by_hand(file.arms["persist"].nats, "equal") for file in files], strict=True)
        agree(found["against_persist"][arm], [line(own - base) for own, base in pairs])


@pytest.mark.parametrize("arm", ["persist", "reset", "frozen"])
@pytest.mark.parametrize("i", range(len(LAYERS)))
def test_inner_losses_by_layer(summarised, arm, i):
    _, files, results = summarised
    found = results.checkpoints[0].inner[arm][str(LAYERS[i])]
    losses = {
        name: [getattr(file.arms[arm].inner, name)[i].astype(float) for file in files]
        for name in ("loss_base", "loss_before", "loss_after")
    }
    gains = [base - before for base, before in zip(losses["loss_base"], losses["loss_before"], strict=True)]
    for name, values in (losses | {"gain": gains}).items():
        agree(found[name], [mean(frames) for frames in values])
    agree(found[LAST], [mean(frames[-25:]) for frames in gains])
    np.testing.assert_allclose(found[TREND], expected([line(frames) for frames in gains]), rtol=1e-4, atol=1e-5)
    assert gains[0][0] == pytest.approx(0, abs=1e-6)  # memory begins at W0


def test_files_of_one_speaker_are_one_unit(summarised):
    folder, files, results = summarised
    shared = [dataclasses.replace(file, group="bc" if file.name in "bc" else file.name) for file in FILES]
    grouped = summarise(SETTING, [CHECKPOINT], shared, [], folder)
    assert (grouped.units, grouped.unit) == (3, "speakers")
    assert (results.units, results.unit) == (4, "files")
    a, b, c, d = (mean(by_hand(file.arms["off"].nats, "equal")) for file in files)
    agree(grouped.checkpoints[0].losses["off"]["equal"], [a, (b + c) / 2, d])
    # Windows 5 and 6 of c have no counterpart in b, which is shorter: its group has the value of c there.
    a5, c5 = (chunks(by_hand(files[i].arms["off"].nats, "equal"))[5] for i in (0, 2))
    agree(grouped.checkpoints[0].by_position["losses"]["off"][5], [a5, c5])


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


def test_results_are_read_as_they_were_written(several, summarised, tmp_path):
    for results in (several[2], summarised[2]):
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
        fields = {field.name for field in dataclasses.fields(stream_results.CheckpointResults)}
        assert fields - {"info", "arms", "main", "verdict"} <= set(stored["notes"])


def test_what_was_not_measured_is_null_and_read_as_nan(tmp_path):
    write(tmp_path, files=FILES[:1], arms=("persist",), text=False, unigram=False)
    results = summarise(SETTING, [CHECKPOINT], FILES[:1], [], tmp_path)
    stored = json.loads(stream_results.write(tmp_path, results, {}).read_text())["checkpoints"][0]
    assert stored["losses"]["persist"]["text"] == {"mean": None, "low": None, "high": None, "n": 0}
    assert stored["losses"]["persist"]["equal"]["low"] is None
    back = stream_results.read(tmp_path).checkpoints[0]
    assert np.isnan(back.losses["persist"]["text"].mean)


def test_of_a_file_only_means_stay(summarised):
    _, files, _ = summarised

    def leaves(tree):
        for value in tree.values():
            yield from leaves(value) if isinstance(value, dict) else [value]

    for value in leaves(measure.measure(files[0], SETTING, CHECKPOINT)):
        assert np.size(value) in (1, 8)
        assert getattr(value, "base", None) is None  # a view would keep the frames


def test_other_results_are_refused(summarised, tmp_path):
    with pytest.raises(InputError, match="results.json is not a file"):
        stream_results.read(tmp_path)
    path = stream_results.write(tmp_path, summarised[2], {})
    stored = json.loads(path.read_text())
    for change, problem in [
        ({"format": 99}, "is of format 99 of python -m eval stream, but format 4 of python -m eval stream is read"),
        ({"format": None}, "does not name its command and format"),
        ({"command": ["x"]}, "does not name its command and format"),
        ({"command": "python -m eval compare"}, "is of format 4 of python -m eval compare, but format 4"),
        ({"checkpoints": [{}]}, "not as it was written"),
        ({"setting": None}, "not as it was written"),
    ]:
        path.write_text(json.dumps(stored | change))
        with pytest.raises(InputError, match=problem):
            stream_results.read(tmp_path)
    path.write_text("[]")
    with pytest.raises(InputError, match="format"):
        stream_results.read(tmp_path)


def test_only_a_finite_rank_of_zero_is_right():
    got = measure._is_top(np.array([0, 1, np.nan, np.inf], np.float32))
    np.testing.assert_array_equal(got, [1, 0, np.nan, np.nan])


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
