"""`python -m train.plot`: the figure of a run and of several, whatever lines the metrics hold."""

import json
import subprocess
import sys

import numpy as np
import pytest
from matplotlib import pyplot

from train import plot, plots
from ttt_jax.errors import InputError

STREAMS = ["text", *(f"codebook {i}" for i in range(1, 9))]


def training(step, layers=(), text=3.0, **changes):
    line = {
        "step": step,
        "loss": 4.0 - step / 100,
        "streams": {name: text if name == "text" else 3.0 for name in STREAMS},
        "half_variance": dict.fromkeys(STREAMS, 0.1),
        "grad_norm": 1.0,
        "grad_norms": {"base": 0.5, "gate": 0.2, "ttt": 0.1},
        "lr": {"base": 1e-3, "ttt": 1e-3},
        "skipped": 0,
        "ttt": {
            str(layer): {
                "gate": 0.1,
                "gate_abs": 0.1,
                "base_norm": 2.0,
                "displacement_norm": 1.0,
                "displacement_ratio": 0.5,
            }
            for layer in layers
        },
        "seconds": 2.0 * step,
        "frames_per_second": 1000.0,
    }
    return line | changes


def validation(step, layers=(), text=3.0):
    inner = {"loss_base": 9.0, "loss_before": 5.0, "loss_after": 4.0, "displacement_ratio": 0.5}
    streams = {name: text if name == "text" else 3.1 for name in STREAMS}
    values = {
        "loss": 4.1 - step / 100,
        "streams": streams,
        "frames": 100,
        "ttt": {str(layer): inner for layer in layers},
    }
    return {"step": step, "validation": values, "seconds": 2.0 * step}


def write_run(folder, lines, cut="", **files):
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + cut)
    for name, value in files.items():
        (folder / f"{name}.json").write_text(json.dumps(value))
    return folder


def lines_of(count, layers=(), every=0, **changes):
    found = []
    for step in range(1, count + 1):
        found.append(training(step, layers, **changes))
        if every and step % every == 0:
            found.append(validation(step, layers))
    return found


@pytest.fixture
def figures(monkeypatch):
    """The figures that would be saved."""
    kept = []
    monkeypatch.setattr(plots, "_save", lambda figure, path: (kept.append(figure), [path])[1])
    yield kept
    for figure in kept:
        pyplot.close(figure)


def panels(figure):
    """By the first words of its title."""
    return {axis.get_title(loc="left").split(" (")[0]: axis for axis in figure.axes}


def slow(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


LAST = training(3, loss=None, grad_norm=None, skipped=2, skipped_for="step 3: loss is nan")


@pytest.mark.parametrize(
    ("lines", "baseline"),
    [
        slow(lines_of(1), None),
        (lines_of(1, (1,), every=1), {"text": 4.0}),
        slow(lines_of(30, (1, 2, 3), every=10), dict.fromkeys(STREAMS, 3.5)),
        (lines_of(30, range(32), every=10), {}),
        slow(lines_of(30, (1,), text=None), {"text": None, "codebook 1": 3.0}),
        slow([*lines_of(2), LAST], None),
    ],
    ids=["one line", "one of each", "three layers", "32 layers", "no text", "skipped at the end"],
)
def test_every_kind_of_run_is_drawn(tmp_path, lines, baseline, recwarn):
    paths = plots.draw_run(lines, baseline, tmp_path)
    assert paths == [tmp_path / "loss.png", tmp_path / "loss.pdf"]
    assert [path.read_bytes()[:4] for path in paths] == [b"\x89PNG", b"%PDF"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["loss.pdf", "loss.png"]
    assert not [
        str(warning.message) for warning in recwarn if issubclass(warning.category, UserWarning | RuntimeWarning)
    ]


def test_nothing_is_drawn_before_the_first_step(tmp_path):
    assert plots.draw_run([], None, tmp_path) == []
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_the_same_metrics_give_the_same_files(tmp_path):
    first = [path.read_bytes() for path in plots.draw_run(lines_of(5, (1,)), None, tmp_path)]
    assert first == [path.read_bytes() for path in plots.draw_run(lines_of(5, (1,)), None, tmp_path)]


def test_panels_show_what_the_lines_hold(tmp_path, figures):
    (tmp_path / "a $x$ b").mkdir()
    plots.draw_run(lines_of(30, (1, 5), every=10), {"text": 3.75}, tmp_path / "a $x$ b")
    found = panels(figures[0])
    assert figures[0].get_suptitle().startswith("a $x$ b: step 30, 1.0 minutes, loss 3.7")
    assert "validation 3.800 (best 3.800 at step 30)" in figures[0].get_suptitle()
    curves = {line.get_label(): line for line in found["Loss by stream"].get_lines()}
    assert set(STREAMS) <= set(curves)
    assert [list(line.get_ydata()) for line in found["Loss by stream"].get_lines() if line.get_ls() == "--"] == [
        [3.75, 3.75]
    ]
    raw, smooth, validated = found["Minimised loss"].get_lines()
    np.testing.assert_allclose(raw.get_ydata(), [4 - step / 100 for step in range(1, 31)])
    np.testing.assert_allclose(smooth.get_ydata()[10], raw.get_ydata()[5:16].mean())
    np.testing.assert_allclose(validated.get_xydata(), [[10, 4.0], [20, 3.9], [30, 3.8]])
    for title, value in (("Gates: mean |tanh alpha|", 0.1), ("Norm of displacement / norm of W0", 0.5)):
        assert [line.get_label() for line in found[title].get_lines()] == ["layer 1", "layer 5"]
        np.testing.assert_allclose(found[title].get_lines()[0].get_ydata(), value)
    for title in ("Inner losses in validation", "Inner losses by layer at step 30"):
        values = {line.get_label(): line.get_ydata()[-1] for line in found[title].get_lines()}
        assert values == {"l(W0)": 9.0, "l(W before)": 5.0, "l(W after)": 4.0}
    norms = {
        line.get_label(): line.get_ydata()[-1]
        for line in found["Norm of the gradient before clipping, by group"].get_lines()
    }
    assert norms["all"] == pytest.approx(1.0)
    assert norms["ttt"] == pytest.approx(0.1)
    assert [line.get_label() for line in found["Learning rate by group"].get_lines()] == ["base", "ttt"]


@pytest.mark.slow
def test_no_legend_covers_a_curve(tmp_path, figures):
    for layers in ((1, 2, 3), range(32), ()):
        plots.draw_run(lines_of(30, layers, every=10), dict.fromkeys(STREAMS, 3.5), tmp_path)
    for figure in figures:
        figure.draw_without_rendering()
        for axis in figure.axes:
            if axis.get_legend() is not None:
                assert axis.get_legend().get_window_extent().x0 >= axis.get_window_extent().x1


def test_smoothing_leaves_out_what_is_missing():
    values = np.array([np.nan, 1.0, 3.0, np.nan, 5.0])
    np.testing.assert_allclose(plots._smooth(values, 2), [np.nan, 2.0, 2.0, 4.0, 5.0])
    assert np.isnan(plots._smooth(np.full(3, np.nan), 10)).all()


def test_the_command_draws_a_run_beside_its_metrics(tmp_path, capsys, figures):
    cut = json.dumps(training(4))[:40]
    run = write_run(tmp_path / "run", lines_of(3), cut, meta={"unigram": {"text": 3.75}})
    assert plot.main([str(run)]) == 0
    assert capsys.readouterr().out.split() == [str(run / "loss.png")]
    assert "step 3" in figures[0].get_suptitle()
    dashed = [line for line in panels(figures[0])["Loss by stream"].get_lines() if line.get_ls() == "--"]
    assert [line.get_ydata()[0] for line in dashed] == [3.75]


def test_the_command_draws_several_runs_over_steps_and_hours(tmp_path, capsys, figures, monkeypatch):
    config = {"data": {"batch": 10, "chunk": 450}, "bptt": 2}  # 0.2 hours a step
    runs = [
        write_run(tmp_path / "a", lines_of(5, every=5), config=config),
        write_run(tmp_path / "b", lines_of(20)),  # metrics that came alone
    ]
    monkeypatch.chdir(tmp_path)
    assert plot.main([str(run) for run in runs]) == 0
    assert capsys.readouterr().out.split() == ["runs.png"]
    steps, hours, validated, _ = figures[0].axes
    assert {line.get_label(): line.get_xdata()[-1] for line in steps.get_lines()} == {"a": 5, "b": 20}
    assert {line.get_label(): line.get_xdata()[-1] for line in hours.get_lines()} == {"a": pytest.approx(1.0)}
    assert [line.get_ydata().tolist() for line in validated.get_lines()] == [[pytest.approx(4.05)]]
    (legend,) = figures[0].legends
    assert [text.get_text() for text in legend.get_texts()] == ["a", "b"]


def test_runs_of_one_name_are_told_apart_by_their_paths(tmp_path, figures):
    runs = [str(write_run(tmp_path / name / "tiny", lines_of(2))) for name in "ab"]
    plot.main([*runs, "--out", str(tmp_path / "both.png")])
    assert [line.get_label() for line in figures[0].axes[0].get_lines()] == runs


def test_pictures_are_written_where_they_are_asked_for(tmp_path, capsys):
    # The name would be no formula that could be set.
    run, name = str(write_run(tmp_path / r"run $\frac$", lines_of(2))), str(tmp_path / "other.")
    for runs in ([run], [run, run]):
        assert plot.main([*runs, "--out", f"{name}png"]) == 0
        assert capsys.readouterr().out.split() == [f"{name}png", f"{name}pdf"]
        for kind, begin in (("png", b"\x89PNG"), ("pdf", b"%PDF")):
            path = tmp_path / f"other.{kind}"
            assert path.read_bytes().startswith(begin)
            path.unlink()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["missing"], "missing is not the folder of a run"),
        (["empty"], "holds no step of training yet"),
        (["good", "--out", "picture.jpg"], "picture.jpg does not end in .png"),
        (["good", "--out", "nowhere/x.png"], "make nowhere first"),
    ],
)
def test_mistakes_end_in_one_sentence(tmp_path, monkeypatch, words, message):
    monkeypatch.chdir(tmp_path)
    write_run(tmp_path / "good", lines_of(2))
    write_run(tmp_path / "empty", [], '{"step": 1, "lo')
    with pytest.raises(InputError, match=message):
        plot.main(words)


@pytest.mark.integration
def test_the_command_loads_no_jax_and_says_mistakes_by_its_exit_code(tmp_path):
    write_run(tmp_path / "run", lines_of(3, (1,)))
    code = (
        f"import sys; from train import plot; plot.main([{str(tmp_path / 'run')!r}]); assert 'jax' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    done = subprocess.run([sys.executable, "-m", "train.plot", "nothing"], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("error: nothing is not the folder of a run")
    assert done.stderr.count("\n") == 1
