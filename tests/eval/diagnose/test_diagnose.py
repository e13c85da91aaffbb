"""Diagnosis: every figure against NumPy over one forward, records in any split, what is printed, stored and drawn."""

import dataclasses

import jax
import numpy as np
import pytest

from eval import __main__ as command
from eval.diagnose import measure
from eval.diagnose import records as report
from eval.diagnose.figure import PANELS, draw
from eval.inputs import dataset
from eval.results import schema
from eval.results.schema import CheckpointInfo, FileInfo
from tests.helpers import eval_models, micro
from tests.helpers.drawing import quick_jit
from tests.helpers.micro import MODEL
from ttt_jax.checkpoints import loading
from ttt_jax.config import TTTConfig
from ttt_jax.errors import InputError
from ttt_jax.moshi import model

CFG = dataclasses.replace(MODEL, num_layers=4, ttt=TTTConfig(layers="0,2,3", mini_batch=4))
PLACES = {0: ("layers_00_00", 0), 2: ("layers_02_03", 0), 3: ("layers_02_03", 1)}
FRAMES, EVERY = 23, 5
quick_forward = quick_jit(model.forward.__wrapped__, static_argnames=("cfg", "measured"))


@pytest.fixture(autouse=True, scope="module")
def quick_programs():
    """Programs that compile quickly."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("advance", "measure"):
            patch.setattr(measure, name, quick_jit(getattr(measure, name).__wrapped__, static_argnames="cfg"))
        yield


def walk(params=None, cfg=CFG, frames=FRAMES, every=EVERY, chunk=128):
    return list(measure.walk(params or eval_models.params(cfg), eval_models.tokens(frames), cfg, every, chunk))


@pytest.fixture(scope="module")
def records():
    return walk()


def size(v):
    return np.sqrt((v * v).sum())


def cosine(a, b):
    return (a * b).sum() / size(a) / size(b)


def near(v):
    return 100 * sum(abs(c) < 0.01 for c in v) / len(v)


def by_hand():
    """The figures of every record from one measured forward over all frames, in float64: {(frame, layer): {name:
    value}}."""
    params, mask = eval_models.params(CFG), np.ones((1, FRAMES), bool)
    outputs, _ = quick_forward(
        params, eval_models.tokens(FRAMES)[None], mask, model.init_state(CFG, 1), cfg=CFG, measured=True
    )
    ttt = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64)[:, 0], outputs.ttt)
    expected_records = {}
    for i, (layer, (run, place)) in enumerate(PLACES.items()):
        of_layer = params["layers"][run]["ttt"]
        gate = np.tanh(np.asarray(of_layer["gate"][place], np.float64))
        inner = [np.asarray(leaf[place], np.float64) for name, leaf in of_layer.items() if name.startswith("inner_")]
        base = np.array([np.sqrt(sum((leaf[h] ** 2).sum() for leaf in inner)) for h in range(CFG.num_heads)])
        for t in range(EVERY - 1, FRAMES, EVERY):
            x, y = ttt.read[i, t], ttt.output[i, t]
            together = x + gate * y
            figures = {
                "stream_norm": size(x),
                "ttt_norm": size(y),
                "combined_norm": size(together),
                "ttt_to_stream": size(y) / size(x),
                "gated_to_stream": size(gate * y) / size(x),
                "gate_mean_abs": abs(gate).sum() / CFG.dim,
                "cosine_stream_ttt": cosine(x, y),
                "cosine_stream_combined": cosine(x, together),
                "cosine_ttt_combined": cosine(y, together),
                "stream_change_relative": size(x - ttt.read[i, t - EVERY]) / size(x),
                "ttt_change_relative": size(y - ttt.output[i, t - EVERY]) / size(y),
                "displacement": (ttt.inner.displacement[i, t] * base).mean(),
                "base": base.mean(),
                "displacement_to_base": ttt.inner.displacement[i, t].mean(),
                "loss_base": ttt.inner.loss_base[i, t].mean(),
                "loss_before": ttt.inner.loss_before[i, t].mean(),
                "loss_after": ttt.inner.loss_after[i, t].mean(),
            }
            mean = y.sum() / len(y)
            spread = np.sqrt(((y - mean) ** 2).sum() / len(y))
            figures |= {"ttt_mean": mean, "ttt_std": spread, "ttt_near_zero_percent": near(y)}
            if t < EVERY:
                figures |= {name: None for name in figures if "change" in name}
            expected_records[t + 1, layer] = figures
    return expected_records


def close(got, expected, tolerance=2e-3):
    """Figures that agree; nothing where nothing is expected."""
    if expected is None or got is None:
        return got is expected
    return got == pytest.approx(expected, rel=tolerance, abs=tolerance)


@pytest.mark.slow
def test_every_figure_is_that_of_one_forward(records):
    expected = by_hand()
    assert [(r["frame"], r["layer"]) for r in records] == [(t, layer) for t in (5, 10, 15, 20) for layer in PLACES]
    assert len(expected) == len(records)
    assert all(set(figures) == set(report.FIGURES) for figures in expected.values())
    for record in records:
        assert record["seconds"] == pytest.approx(record["frame"] * 0.08)
        figures = expected[record["frame"], record["layer"]]
        wrong = {name: (record[name], value) for name, value in figures.items() if not close(record[name], value)}
        assert not wrong


def test_layers_and_frames_differ(records):
    """What is compared above would also agree if all records were one."""
    for name in ("stream_norm", "ttt_norm", "cosine_stream_ttt", "loss_before", "displacement"):
        assert len({round(record[name], 5) for record in records}) == len(records)


@pytest.mark.slow
@pytest.mark.parametrize("chunk", [1, 3])
def test_records_do_not_depend_on_the_calls_between(records, chunk):
    for record, other in zip(records, walk(chunk=chunk), strict=True):
        assert not [name for name in record if not close(other[name], record[name])]


def test_a_record_of_every_frame():
    expected_records = walk(frames=4, every=1)
    assert [record["frame"] for record in expected_records] == [1, 1, 1, 2, 2, 2, 3, 3, 3, 4, 4, 4]
    knows = [record["loss_before"] != pytest.approx(record["loss_base"], rel=1e-4) for record in expected_records]
    assert knows == 3 * [False] + 9 * [True]  # there is no memory before the first frame


def edited(**values):
    """Random weights with leaves of the TTT layers replaced by one number."""
    params = eval_models.params(CFG)
    layers = dict(params["layers"])
    for run in {run for run, _ in PLACES.values()}:
        ttt = layers[run]["ttt"]
        layers[run] = {**layers[run], "ttt": {**ttt, **{n: np.full_like(ttt[n], v) for n, v in values.items()}}}
    return {**params, "layers": layers}


def test_a_layer_that_says_nothing_yet_has_no_direction():
    for record in walk(edited(out_kernel=0, out_bias=0), frames=10):
        assert record["ttt_norm"] == record["ttt_to_stream"] == record["gated_to_stream"] == 0
        assert record["cosine_stream_ttt"] is record["cosine_ttt_combined"] is record["ttt_change_relative"] is None
        assert record["cosine_stream_combined"] == pytest.approx(1)
        assert record["ttt_near_zero_percent"] == 100
        assert "stream-TTT -, stream-combined +1.0000, TTT-combined -" in report.block(record)


def test_a_closed_gate_shows():
    for record in walk(edited(gate=0.005), frames=5):
        assert record["gate_mean_abs"] == pytest.approx(np.tanh(0.005))
        assert record["gated_to_stream"] == pytest.approx(record["ttt_to_stream"] * np.tanh(0.005), rel=1e-4)
        assert record["ttt_norm"] > 0


def test_without_an_inner_rate_the_fast_weights_stay():
    for record in walk(edited(rate_bias=-np.inf), frames=10):
        assert record["displacement"] == record["displacement_to_base"] == 0
        assert record["loss_base"] == pytest.approx(record["loss_before"], rel=1e-5)


def test_between_records_nothing_is_measured(monkeypatch):
    calls = []
    for name in ("advance", "measure"):
        step = getattr(measure, name)
        monkeypatch.setattr(
            measure, name, lambda *a, step=step, name=name: calls.append((name, a[1].shape[2])) or step(*a)
        )
    walk()
    assert calls == 4 * [("advance", 4), ("measure", 1)]


# What is printed, stored and drawn


def made(checkpoints=("a", "b"), layers=((0, 2), (0, 2))):
    """Results of numbers that tell where they stand."""
    records = [
        {"checkpoint": name, "frame": t + 1, "seconds": float(t), "layer": layer}
        | {figure: 1000.0 * c + 100 * layer + 10 * t + k / 100 for k, figure in enumerate(report.FIGURES)}
        for c, name in enumerate(checkpoints)
        for t in range(3)
        for layer in layers[c]
    ]
    infos = [CheckpointInfo(name, (8,), (0, 2), about={"weights": name, "step": 3}) for name in checkpoints]
    return report.Results("x", 1, FileInfo("f", "f", 3, "", digest="d"), infos, records)


def test_a_block_holds_every_headline_figure(records):
    text = report.block(records[3])
    assert text.startswith("layer 0, frame 10 (0.8 s)")
    assert text.isascii()
    for name in ("ttt_norm", "gated_to_stream", "displacement", "loss_before"):
        assert format(records[3][name], ".4g") in text


def test_what_attention_leaves_is_called_the_stream(records):
    """The layer reads x + attention's update: it is not attention's output."""
    texts = [report.block(records[3]), report.comparison(made()), *report.FIGURES.values(), *PANELS.values()]
    assert "attention" not in " ".join(texts).replace("stream after attention", "")
    assert "stream: the residual stream after attention (x + attention's update" in report.EXPLANATION


def row(text, name):
    return next(line for line in text.splitlines() if line.startswith(f"{name} ")).split()[1:]


def test_the_comparison_is_of_means_and_their_difference():
    results = made(layers=((0,), (0,)))
    results.records[0]["ttt_norm"] = None  # undefined in one record: the mean is over the others
    text = report.comparison(results)
    assert text.startswith("means over records: A is a, B is b\n")
    assert row(text, "stream_norm") == ["10", "1010", "+1000"]
    assert row(text, "ttt_norm") == ["15.01", "1010", "+995"]
    text = report.comparison(made(layers=((0,), ())))
    assert "(a TTT layer in A only)" in text
    assert row(text, "stream_norm") == ["10", "-", "-"]


def test_records_come_back_from_their_file(tmp_path):
    results = made()
    results.records[0]["ttt_norm"] = None
    schema.write(tmp_path, results, {})
    assert schema.read(tmp_path, report.Results) == results


def test_figures_show_every_layer_and_checkpoint():
    results = made()
    results.records[0]["loss_base"] = None
    figure = draw(results)
    axes = [axis for axis in figure.axes if axis.lines]
    assert len(axes) == len(PANELS)
    assert all(len(axis.lines) == 4 for axis in axes)
    np.testing.assert_allclose(
        axes[0].lines[3].get_ydata(),
        [r["stream_norm"] for r in results.records if (r["checkpoint"], r["layer"]) == ("b", 2)],
    )
    memory = [axis for axis in axes if axis.get_title() == PANELS["memory"]][0]
    assert np.isnan(memory.lines[0].get_ydata()[0])
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["a, layer 0", "b, layer 0", "a, layer 2", "b, layer 2"]


def test_lines_keep_off_the_frame():
    for axis in draw(made(("a",), ((2,),))).axes[: len(PANELS)]:
        low, high = axis.get_ylim()
        drawn = axis.lines[0].get_ydata()
        assert min(drawn) - low > 0.03 * (high - low)
        assert high - max(drawn) > 0.03 * (high - low)


# The command

integration = pytest.mark.integration


SHORTEST = 45
"""Frames of the first held-out file of the run."""


def main(*args):
    return command.main(["diagnose", *map(str, args)])


@integration
def test_the_command_prints_stores_and_draws(tiny_run, tmp_path, capsys):
    run, earlier, data = tiny_run.run, tiny_run.run / "checkpoints" / "2", tiny_run.heldout
    assert main(run, "--data", data, "--every", EVERY, "--out", tmp_path / "out") == 0
    printed = capsys.readouterr().out
    assert "run: TTT layers 1; 45 frames (3.6 s) of " in printed
    checkpoint = loading.load(run)
    tokens = dataset.first(data, [checkpoint], SHORTEST).frames
    records = list(measure.walk(checkpoint.params, tokens, checkpoint.cfg, EVERY))
    assert [record["frame"] for record in records] == list(range(EVERY, SHORTEST + 1, EVERY))
    assert printed.count("  cosine  ") == len(records)
    assert report.block(records[-1]) in printed
    stored = schema.read(tmp_path / "out", report.Results)
    assert len(stored.checkpoints[0].about["weights"]) == 64
    assert (stored.data, stored.file.name, stored.file.frames) == (str(data), "heldout0", SHORTEST)
    assert stored.records == [{"checkpoint": "run"} | record for record in records]
    assert main(run, "--data", data, "--every", EVERY, "--out", tmp_path / "out") == 0
    before = (tmp_path / "out" / "results.json").read_bytes()
    for more in (("--compare", earlier), ("--every", EVERY + 1), ("--frames", EVERY)):
        with pytest.raises(InputError, match="out holds results .*: give another folder by --out"):
            main(run, "--data", data, "--every", EVERY, "--out", tmp_path / "out", *more)
    with pytest.raises(InputError, match=r"out holds results of run \(step 4, .*, not of run-2 \(step 2, "):
        main(earlier, "--data", data, "--every", EVERY, "--out", tmp_path / "out")
    assert (tmp_path / "out" / "results.json").read_bytes() == before
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"results.json", "diagnose.png", "diagnose.pdf"}
    assert (tmp_path / "out" / "diagnose.png").read_bytes()[:4] == b"\x89PNG"


@integration
def test_figures_are_drawn_again_without_a_model(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(loading, "load", lambda path: pytest.fail("a model was loaded"))
    schema.write(tmp_path, made(), {})
    assert main("--draw", tmp_path) == 0
    assert capsys.readouterr().out.split() == [str(tmp_path / f"diagnose.{kind}") for kind in ("png", "pdf")]
    first = (tmp_path / "diagnose.png").read_bytes()
    main("--draw", tmp_path)
    assert (tmp_path / "diagnose.png").read_bytes() == first


@integration
def test_two_checkpoints_stand_side_by_side(tiny_run, tmp_path, capsys):
    earlier = tiny_run.run / "checkpoints" / "2"
    main(tiny_run.run, "--compare", earlier, "--data", tiny_run.heldout, "--every", EVERY, "--out", tmp_path)
    printed = capsys.readouterr().out
    stored = schema.read(tmp_path, report.Results).records
    assert [r["checkpoint"] for r in stored] == ["run"] * (SHORTEST // EVERY) + ["run-2"] * (SHORTEST // EVERY)
    assert "means over records: A is run, B is run-2" in printed
    means = [
        np.mean([r["ttt_norm"] for r in stored if (r["checkpoint"], r["layer"]) == (c, 1)]) for c in ("run", "run-2")
    ]
    *shown, difference = row(printed, "ttt_norm")
    assert shown == [f"{value:.4g}" for value in means]
    assert float(difference) == pytest.approx(means[1] - means[0], rel=1e-3)
    assert "  cosine  " not in printed


@integration
def test_mistakes_are_reported(tiny_run, tmp_path):
    plain = dataclasses.replace(MODEL, ttt=TTTConfig(layers="none"))
    run, data = tiny_run.run, tiny_run.heldout
    eval_models.write_run(tmp_path / "plain", micro.config(model=plain))
    eval_models.write_codes(tmp_path / "foreign.safetensors", eval_models.tokens(FRAMES), "another")
    (tmp_path / "file").touch()
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "results.json").write_text('{"frame": 1}')
    out = ("--out", tmp_path / "out")
    for args, message in (
        ((), "there is no CHECKPOINT"),
        ((tmp_path / "nowhere",), "is no checkpoint"),
        ((tmp_path / "plain",), "plain has no TTT layers"),
        ((run, "--compare", tmp_path / "plain"), "plain has no TTT layers"),
        ((run, "--compare", tiny_run.root / "." / "run"), "is the checkpoint itself"),
        ((run, "--every", 0), "--every 0 is out of range"),
        ((run, "--frames", 50), "--frames 50 end before the first record"),
        ((run, "--data", data, *out), "lasts 45 frames .3.6 s., 100 are needed"),
        ((run, "--data", data, "--frames", 50, "--every", 5, *out), "lasts 45 frames .3.6 s., 50 are needed"),
        ((run, "--data", tmp_path / "foreign.safetensors", *out), "does not fit run: run was trained with"),
        ((run, "--data", tmp_path / "no.wav", *out), "no.wav does not exist"),
        ((run, "--data", tmp_path / "file", *out), "file is an empty file"),
        ((run, "--data", data, "--out", tmp_path / "file"), "--out .*file cannot be made"),
        (("--draw", tmp_path), "results.json is not a file"),
        (("--draw", tmp_path / "damaged"), "results.json does not name its command"),
    ):
        with pytest.raises(InputError, match=message):
            main(*args)
