"""Figures: they show the numbers of the results, are drawn from the result folder alone, and are whole files."""

import dataclasses

import numpy as np
import pytest

from eval.results.schema import FileInfo
from eval.streaming import draw, plots
from eval.streaming import results as stream_results
from eval.streaming.summary import summarise
from tests.helpers.made_scores import ARMS, CHECKPOINT, FILES, LAYERS, SETTING, write, write_results
from ttt_jax.errors import InputError


@pytest.fixture
def figures(monkeypatch):
    """The figures of `draw_all` by name, kept instead of saved."""
    kept = {}

    def keep(figure, folder, name):
        kept[name] = figure
        return [folder / f"{name}.png"]

    monkeypatch.setattr(plots, "save", keep)
    yield kept
    from matplotlib import pyplot as plt

    plt.close("all")


@pytest.fixture(scope="module")
def drawn(summarised):
    """The figures of `summarised`."""
    folder, _, results = summarised
    (own,) = results.checkpoints
    yield {
        "memory": plots._losses(results, own),
        "figure5": plots._figure5(results, own, folder),
        "state": plots._state(results, own),
    }
    from matplotlib import pyplot as plt

    plt.close("all")


def curve(axis, label):
    """The line that is called `label`, [2, points]."""
    (line,) = [line for line in axis.get_lines() if line.get_label() == label]
    return np.array(line.get_data())


def bands(axis):
    """Highest and lowest value of every band."""
    return [
        (path.vertices[:, 1].min(), path.vertices[:, 1].max())
        for collection in axis.collections
        for path in collection.get_paths()
    ]


def test_a_figure_is_the_same_files_again(summarised, tmp_path):
    folder, _, results = summarised
    first, second = (
        [path.read_bytes() for path in plots.save(plots._state(results, results.checkpoints[0]), tmp_path, "state")]
        for _ in range(2)
    )
    assert first == second  # no date, nothing random
    assert first[0].startswith(b"\x89PNG")
    assert first[1].startswith(b"%PDF")


def test_losses_are_those_of_the_results_by_position(summarised, drawn):
    folder, *_ = summarised
    found = stream_results.read(folder).checkpoints[0].by_position
    losses, differences, kl = drawn["memory"].axes
    for axis, name in ((losses, "losses"), (differences, "against_persist"), (kl, "kl")):
        assert [line.get_label() for line in axis.get_lines() if line.get_label() in ARMS] == list(found[name])
        for arm, values in found[name].items():
            x, y = curve(axis, arm)
            np.testing.assert_allclose(x, [12.5, 37.5, 62.5, 87.5])  # more than half of four files reach four windows
            np.testing.assert_allclose(y, [value.mean for value in values[:4]])
    for axis, values in ((differences, found["against_persist"]), (kl, found["kl"])):
        limits = [(min(v.low for v in own[:4]), max(v.high for v in own[:4])) for own in values.values()]
        np.testing.assert_allclose(bands(axis), limits)
    persist = found["losses"]["persist"][:4]
    np.testing.assert_allclose(bands(losses), [(min(v.low for v in persist), max(v.high for v in persist))])
    assert all(60 in line.get_xdata() for axis in (losses, kl) for line in axis.get_lines() if line.get_ls() == ":")
    assert "60 frames" in losses.get_title(loc="right")


def test_an_attention_window_beyond_the_figure_is_told_not_drawn(tmp_path, figures):
    info = dataclasses.replace(CHECKPOINT, contexts=(3000,))
    write(tmp_path, info, arms=("persist",))
    write_results(tmp_path, [info], FILES)
    plots.draw_all(tmp_path)
    (axis,) = figures["memory"].axes
    assert axis.get_title(loc="right").endswith("3,000 frames (not reached)")
    assert axis.get_xlim()[1] == 100
    assert not [line for line in axis.get_lines() if line.get_ls() == ":"]


def moving(values, size=10):
    """Moving average, frame by frame."""
    return np.array([values[max(0, t - 4) : t - 4 + size].mean() for t in range(len(values))])


@pytest.mark.parametrize("i", range(len(LAYERS)))
def test_figure_5_shows_smoothed_means_over_files(summarised, drawn, i):
    _, files, _ = summarised
    axes = np.array(drawn["figure5"].axes).reshape(2, 2)
    names = {"l(W0)": "loss_base", "l(W before)": "loss_before", "l(W after)": "loss_after"}
    reach = 110  # three of four files
    for label, name in names.items():
        smoothed = [moving(getattr(file.arms["persist"].inner, name)[i].astype(float)) for file in files]
        at_100 = np.mean([own[100] for own in smoothed if len(own) > 100])
        at_10 = np.mean([own[10] for own in smoothed])
        x, y = curve(axes[0, i], label)
        np.testing.assert_array_equal(x, np.arange(reach))
        np.testing.assert_allclose([y[100], y[10]], [at_100, at_10], rtol=1e-6)
    for arm in ("persist", "reset", "permuted"):
        own = [file.arms[arm].inner for file in files]
        gains = [inner.loss_base[i].astype(float) - inner.loss_before[i] for inner in own]
        x, y = curve(axes[1, i], f"gain under {arm}")
        if arm == "persist":
            gains = [moving(values) for values in gains]
        else:  # resets at 40 and 80: no average goes over them
            gains = [
                np.concatenate([moving(values[at : at + 40]) for at in range(0, len(values), 40)]) for values in gains
            ]
        for t in (20, 38, 39, 40, 41, 82):
            assert y[t] == pytest.approx(
                np.mean([values[t] for values in gains if len(values) > t]), rel=1e-6, abs=1e-9
            )
    assert "not across resets" in drawn["figure5"].get_suptitle()
    assert axes[0, i].get_title(loc="left") == f"TTT layer {LAYERS[i]}"


def test_figure_5_tells_its_curves_apart(drawn):
    losses, gains = np.array(drawn["figure5"].axes).reshape(2, 2)[:, 0]
    named = {line.get_label(): line for axis in (losses, gains) for line in axis.get_lines()}
    curves = [line for label, line in named.items() if label.startswith(("l(", "gain"))]
    assert len({line.get_color() for line in curves}) == len(curves) == 6


@pytest.mark.parametrize("count", [1, 2])
def test_figure_5_marks_the_boundaries_of_a_single_file(summarised, figures, count):
    folder, *_ = summarised
    files = [dataclasses.replace(file, boundaries=(50, 70)) for file in FILES[:count]]
    plots.draw_all(folder, summarise(SETTING, [CHECKPOINT], files, [], folder))
    for axis in figures["figure5"].axes:
        marks = [line.get_xdata()[0] for line in axis.get_lines() if "recording" in line.get_label()]
        assert marks == ([50, 70] if count == 1 else [])


def test_names_are_not_read_as_mathematics(tmp_path, monkeypatch):
    from matplotlib import pyplot as plt
    from matplotlib.text import Text

    kept = []
    monkeypatch.setattr(plt, "close", kept.append)
    for name in ("savefig", "draw_without_rendering"):
        monkeypatch.setattr(f"matplotlib.figure.Figure.{name}", lambda *_, **__: None)
    infos = [dataclasses.replace(CHECKPOINT, name=name) for name in ("lr $1e-4$ x_", "$\\broken$")]
    for info in infos:
        write(tmp_path, info, FILES[:2], arms=("persist",))
    paths = plots.draw_all(tmp_path, summarise(SETTING, infos, FILES[:2], [], tmp_path))
    assert tmp_path / "memory-lr $1e-4$ x_.png" in paths
    monkeypatch.undo()
    texts = [text for figure in kept for text in figure.findobj(Text) if "$" in text.get_text()]
    assert len(texts) == 9  # titles of six figures and one panel, two labels
    assert not any(text.get_parse_math() for text in texts)
    plt.close("all")


def test_names_of_figures_are_those_of_their_checkpoints():
    one = [f"{name}.{kind}" for name in ("memory", "figure5", "state") for kind in plots.KINDS]
    assert plots.figures(["any"]) == one
    several = plots.figures(["a.1", "a.2", "A/x"])
    assert {"memory-a.1.png", "memory-a.2.png", "state-A%2Fx.pdf", "checkpoints.png"} <= set(several)
    assert len(set(several)) == len(several) == 3 * len(one) + 2


def test_figure_5_averages_files_of_a_group_first(summarised, figures):
    folder, files, _ = summarised
    shared = [dataclasses.replace(file, group="abc" if file.name in "abc" else file.name) for file in FILES]
    plots.draw_all(folder, summarise(SETTING, [CHECKPOINT], shared, [], folder))
    a, b, c, d = (moving(file.arms["persist"].inner.loss_before[0].astype(float))[10] for file in files)
    assert curve(figures["figure5"].axes[0], "l(W before)")[1][10] == pytest.approx(((a + b + c) / 3 + d) / 2)


def test_long_files_are_thinned_after_smoothing(tmp_path, figures):
    files = [FileInfo(name, name, 4000, f"{name}.npz") for name in "ab"]
    made = write(tmp_path, files=files, arms=("persist", "reset"))
    write_results(tmp_path, [CHECKPOINT], files)
    plots.draw_all(tmp_path)
    x, y = curve(figures["figure5"].axes[0], "l(W0)")
    assert len(x) == 1500
    assert (x[0], x[-1]) == (0, 3999)
    smoothed = [moving(file.arms["persist"].inner.loss_base[0].astype(float)) for file in made]
    np.testing.assert_allclose(y, np.mean(smoothed, 0)[x.astype(int)], rtol=1e-6)
    # A hundred resets of 40 frames would be a block of colour: their mean is drawn.
    _, y = curve(figures["figure5"].axes[2], "gain under reset (average over 40)")
    assert np.ptp(y[100:-100]) < 0.01


def test_state_shows_every_layer(summarised, drawn):
    folder, *_ = summarised
    found = stream_results.read(folder).checkpoints[0].by_position
    for axis, name in zip(drawn["state"].axes, ("displacement", "rate"), strict=True):
        for layer in map(str, LAYERS):
            means = [value.mean for value in found[name]["persist"][layer][:4]]
            np.testing.assert_allclose(curve(axis, f"layer {layer}")[1], means)


def test_several_checkpoints_have_figures_of_their_own_and_one_together(several, figures):
    folder, _, results = several
    plots.draw_all(folder, dataclasses.replace(results, checkpoints=results.checkpoints[:2]))
    assert set(figures) == {"memory-tiny", "figure5-tiny", "state-tiny", "memory-base", "checkpoints"}
    losses, differences = figures["checkpoints"].axes
    for checkpoint in results.checkpoints[:2]:
        means = [value.mean for value in checkpoint.by_position["losses"][checkpoint.main][:4]]
        np.testing.assert_allclose(curve(losses, f"{checkpoint.info.name} ({checkpoint.main})")[1], means)
    means = [value.mean for value in results.between["base"]["by_position"][:4]]
    np.testing.assert_allclose(curve(differences, "base (off)")[1], means)
    assert "30 frames and 60 frames" in losses.get_title(loc="right")


@pytest.mark.parametrize("count", [1, 2])
def test_few_files_can_be_drawn(tmp_path, figures, count):
    write(tmp_path, files=FILES[:count], arms=("persist", "off"), text=False, unigram=False)
    write_results(tmp_path, [CHECKPOINT], FILES[:count])
    plots.draw_all(tmp_path)
    axis = figures["memory"].axes[0]
    drawn = np.concatenate([curve(axis, arm)[1] for arm in ("persist", "off")])
    assert np.ptp(axis.get_ylim()) == pytest.approx(
        1.1 * np.ptp(drawn), rel=0.01
    )  # intervals over two files set no scale
    assert ("no band" in figures["memory"].get_suptitle()) == (count == 1)


def test_a_file_shorter_than_the_delays_can_be_drawn(tmp_path, figures):
    files = [FileInfo("a", "a", 1, "a.npz")]
    write(tmp_path, files=files)
    write_results(tmp_path, [CHECKPOINT], files)
    plots.draw_all(tmp_path)
    figures["memory"].canvas.draw()
    figures["figure5"].canvas.draw()


def command(folder, weighting=None, window=None):
    return draw.main(draw.Options(str(folder), weighting, window))


def test_the_command_draws_with_other_options_and_leaves_the_results(summarised, figures, capsys):
    folder, *_ = summarised
    stored = (folder / "results.json").read_text()
    assert command(folder, "semantic", 50) == 0
    out = capsys.readouterr().out
    assert "weighted semantic" in out
    assert "0 to 4 s" in out
    assert str(folder / "memory.png") in out
    x, y = curve(figures["memory"].axes[0], "persist")
    np.testing.assert_allclose(x, [25, 75])
    setting = dataclasses.replace(SETTING, weighting="semantic", window=50)
    expected = summarise(setting, [CHECKPOINT], FILES, [], folder).checkpoints[0].by_position["losses"]["persist"]
    np.testing.assert_allclose(y, [value.mean for value in expected[:2]])
    assert (folder / "results.json").read_text() == stored
    assert command(folder) == 0
    assert "weighted equal" in capsys.readouterr().out


def test_the_command_names_what_is_wrong(summarised, tmp_path, figures):
    with pytest.raises(InputError, match="results.json is not a file"):
        command(tmp_path)
    folder, *_ = summarised
    (tmp_path / "results.json").write_bytes((folder / "results.json").read_bytes())
    with pytest.raises(InputError, match=r"frames/tiny/a\.npz"):
        command(tmp_path)
    with pytest.raises(InputError, match="window of 0"):
        command(folder, window=0)
