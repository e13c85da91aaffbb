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
INNER = {"loss_base": 9.0, "loss_before": 5.0, "loss_after": 4.0}


def training(step, layers=(), text=3.0, **changes):
    line = {
        "step": step,
        "loss": 4.0 - step / 100,
        "streams": dict.fromkeys(STREAMS, 3.0) | {"text": text},
        "half_variance": dict.fromkeys(STREAMS, 0.1),
        "grad_norm": 1.0,
        "grad_norms": {"base": 0.5, "gate": 0.2, "ttt": 0.1},
        "lr": {"base": 1e-3, "ttt": 1e-3},
        "skipped": 0,
        "ttt": {str(layer): {"gate_abs": 0.1, "displacement_ratio": 0.5} for layer in layers},
        "seconds": 2.0 * step,
        "frames_per_second": 1000.0,
    }
    return line | changes


def lines_of(count, layers=(), every=0, **changes):
    """Lines of `count` steps with a validation every `every` of them."""
    lines = []
    for step in range(1, count + 1):
        lines.append(training(step, layers, **changes))
        if every and step % every == 0:
            ttt = {str(layer): INNER for layer in layers}
            values = {"loss": 4.1 - step / 100, "streams": dict.fromkeys(STREAMS, 3.1), "frames": 100, "ttt": ttt}
            lines.append({"step": step, "validation": values, "seconds": 2.0 * step})
    return lines


def write_run(folder, lines, cut="", **files):
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + cut)
    for name, value in files.items():
        (folder / f"{name}.json").write_text(json.dumps(value))
    return folder


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


def dashed(axis):
    return [line.get_ydata()[0] for line in axis.get_lines() if line.get_ls() == "--"]


def last(axis):
    """The last value of each curve by its name."""
    return {line.get_label(): line.get_ydata()[-1] for line in axis.get_lines()}


def slow(*values, id):
    return pytest.param(*values, marks=pytest.mark.slow, id=id)


LAST = training(3, loss=None, grad_norm=None, skipped=2, skipped_for="step 3: loss is nan")


@pytest.mark.parametrize(
    ("lines", "baseline"),
    [
        slow(lines_of(1), None, id="one line"),
        pytest.param(lines_of(1, (1,), every=1), {"text": 4.0}, id="one of each"),
        slow(lines_of(30, (1, 2, 3), every=10), dict.fromkeys(STREAMS, 3.5), id="three layers"),
        slow(lines_of(30, range(32), every=10), {}, id="32 layers"),
        slow(lines_of(30, (1,), text=None), {"text": None, "codebook 1": 3.0}, id="no text"),
        slow([*lines_of(2), LAST], None, id="skipped at the end"),
    ],
)
def test_every_kind_of_run_is_drawn(tmp_path, lines, baseline, recwarn):
    paths = plots.draw_run(lines, baseline, tmp_path)
    assert paths == [tmp_path / "loss.png", tmp_path / "loss.pdf"]
    first = [path.read_bytes() for path in paths]
    assert [content[:4] for content in first] == [b"\x89PNG", b"%PDF"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["loss.pdf", "loss.png"]
    assert not [one for one in recwarn if issubclass(one.category, UserWarning | RuntimeWarning)]
    if len(lines) == 1:
        assert [path.read_bytes() for path in plots.draw_run(lines, baseline, tmp_path)] == first


def test_nothing_is_drawn_before_the_first_step(tmp_path):
    assert plots.draw_run([], None, tmp_path) == []
    assert not list(tmp_path.iterdir())


def test_panels_show_what_the_lines_hold(tmp_path, figures):
    (tmp_path / "a $x$ b").mkdir()
    plots.draw_run(lines_of(30, (1, 5), every=10), {"text": 3.75}, tmp_path / "a $x$ b")
    found = panels(figures[0])
    assert figures[0].get_suptitle().startswith("a $x$ b: step 30, 1.0 minutes, loss 3.7")
    assert "validation 3.800 (best 3.800 at step 30)" in figures[0].get_suptitle()
    assert set(STREAMS) <= set(last(found["Loss by stream"]))
    assert dashed(found["Loss by stream"]) == [3.75]
    raw, smooth, validated = found["Minimised loss"].get_lines()
    np.testing.assert_allclose(raw.get_ydata(), [4 - step / 100 for step in range(1, 31)])
    np.testing.assert_allclose(smooth.get_ydata()[10], raw.get_ydata()[5:16].mean())
    np.testing.assert_allclose(validated.get_xydata(), [[10, 4.0], [20, 3.9], [30, 3.8]])
    for title, value in (("Gates: mean |tanh alpha|", 0.1), ("Norm of displacement / norm of W0", 0.5)):
        assert last(found[title]) == pytest.approx({"layer 1": value, "layer 5": value})
    assert last(found["Inner losses in validation"]) == {"l(W0)": 9.0, "l(W before)": 5.0, "l(W after)": 4.0}
    norms = last(found["Norm of the gradient before clipping, by group"])
    assert (norms["all"], norms["ttt"]) == (pytest.approx(1.0), pytest.approx(0.1))
    assert list(last(found["Learning rate by group"])) == ["base", "ttt"]


@pytest.mark.slow
def test_no_legend_covers_a_curve(tmp_path, figures):
    for layers in ((1, 2, 3), range(32), ()):
        plots.draw_run(lines_of(30, layers, every=10), dict.fromkeys(STREAMS, 3.5), tmp_path)
    for figure in figures:
        figure.draw_without_rendering()
        for axis in figure.axes:
            if axis.get_legend() is not None:
                assert axis.get_legend().get_window_extent().x0 >= axis.get_window_extent().x1
                assert len(axis.get_legend().get_texts()) <= len(STREAMS)


def test_smoothing_leaves_out_what_is_missing():
    values = np.array([np.nan, 1.0, 3.0, np.nan, 5.0])
    np.testing.assert_allclose(plots._smooth(values, 2), [np.nan, 2.0, 2.0, 4.0, 5.0])
    assert np.isnan(plots._smooth(np.full(3, np.nan), 10)).all()


def test_the_command_draws_a_run_beside_its_metrics(tmp_path, capsys, figures):
    run = write_run(tmp_path / "run", lines_of(3), json.dumps(training(4))[:40], meta={"unigram": {"text": 3.75}})
    assert plot.main([str(run)]) == 0
    assert capsys.readouterr().out.split() == [str(run / "loss.png")]
    assert "step 3" in figures[0].get_suptitle()
    assert dashed(panels(figures[0])["Loss by stream"]) == [3.75]


def test_the_command_draws_several_runs_over_steps_and_hours(tmp_path, capsys, figures, monkeypatch):
    config = {"data": {"batch": 10, "chunk": 450}, "bptt": 2}  # 0.2 hours a step
    alone = write_run(tmp_path / "b", lines_of(20))  # metrics without a configuration
    runs = [write_run(tmp_path / "a", lines_of(5, every=5), config=config), alone]
    monkeypatch.chdir(tmp_path)
    assert plot.main([str(run) for run in runs]) == 0
    assert capsys.readouterr().out.split() == ["runs.png"]
    steps, hours, validated, _ = figures[0].axes
    assert {line.get_label(): line.get_xdata()[-1] for line in steps.get_lines()} == {"a": 5, "b": 20}
    assert {line.get_label(): line.get_xdata()[-1] for line in hours.get_lines()} == {"a": pytest.approx(1.0)}
    assert [line.get_ydata().tolist() for line in validated.get_lines()] == [[pytest.approx(4.05)]]
    (legend,) = figures[0].legends
    assert [text.get_text() for text in legend.get_texts()] == ["a", "b"]
    # Two of one name have their paths as names.
    other = write_run(tmp_path / "c" / "a", lines_of(2))
    plot.main([str(runs[0]), str(other), "--out", str(tmp_path / "both.png")])
    assert [line.get_label() for line in figures[1].axes[0].get_lines()] == [str(runs[0]), str(other)]


def test_pictures_are_written_to_the_given_path(tmp_path, capsys):
    # The name of the run would be no formula that could be set.
    run, name = str(write_run(tmp_path / r"run $\frac$", lines_of(2))), str(tmp_path / "other.")
    assert plot.main([run, run, "--out", f"{name}png"]) == 0
    assert capsys.readouterr().out.split() == [f"{name}png", f"{name}pdf"]
    assert (tmp_path / "other.pdf").read_bytes().startswith(b"%PDF")


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
def test_the_command_loads_no_jax_and_ends_mistakes_with_exit_code_2(tiny_run, tmp_path):
    words = [str(tiny_run.run), "--out", str(tmp_path / "loss.png")]
    code = f"import sys; from train import plot; plot.main({words!r}); assert 'jax' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
    done = subprocess.run([sys.executable, "-m", "train.plot", "nothing"], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("error: nothing is not the folder of a run")
    assert done.stderr.count("\n") == 1
