"""The page over made-up results of every kind: what it shows, what it leaves out, and what it refuses."""

import dataclasses
import importlib
import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest

from eval.report import collect as collecting
from eval.report import page, parts, published
from eval.report.collect import collect
from eval.report.command import Options, main
from eval.report.runs import Runs, _ranges
from eval.results.schema import RESULTS
from eval.stats.estimates import Estimate
from tests.helpers import damage, made_report
from tests.helpers.in_process import command
from tests.helpers.made_report import FORMULA, SCRIPT
from ttt_jax.errors import InputError

LIBRARY = "/* plotly.js in its place */", "0"


@pytest.fixture(autouse=True)
def small_library(monkeypatch):
    """A page without the 4.8 MB of plotly.js, and without the import of plotly."""
    monkeypatch.setattr(page, "_library", lambda: LIBRARY)


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """Results of every kind."""
    return made_report.everything(tmp_path_factory.mktemp("results"))


class Page(HTMLParser):
    """The elements of a page, and the texts of its tables and headings."""

    def __init__(self, text: str):
        super().__init__()
        self.text, self.tags, self.headings, self.sections, self.tables = text, [], [], [], {}
        self._into, self._row, self._title = None, None, ""
        self.feed(text)
        self.data = json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', text)[1])

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        if tag == "section":
            self.sections.append(dict(attrs)["id"])
        if re.fullmatch("h[1-6]", tag):
            self.headings.append((int(tag[1]), ""))
            self._into = "heading"
        elif tag == "tr":
            self.tables.setdefault(self.headings[-1][1], []).append([])
        elif tag in ("td", "th"):
            self.tables[self.headings[-1][1]][-1].append("")
            self._into = "cell"

    def handle_endtag(self, tag):
        if tag in ("td", "th") or re.fullmatch("h[1-6]", tag):
            self._into = None

    def handle_data(self, data):
        if self._into == "heading":
            level, text = self.headings[-1]
            self.headings[-1] = (level, text + data)
        elif self._into == "cell":
            self.tables[self.headings[-1][1]][-1][-1] += data

    def figure(self, start):
        """The figure whose title starts so."""
        return next(figure for figure in self.data["figures"] if figure["title"].startswith(start))


def made_page(tmp_path, *paths, code=0, **options) -> Page:
    out = tmp_path / "report.html"
    assert main(Options(tuple(map(str, paths)), str(out), **options)) == code
    return Page(out.read_text("utf-8"))


@pytest.fixture(scope="module")
def whole(results, tmp_path_factory):
    """The page over everything."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(page, "_library", lambda: LIBRARY)
        return made_page(tmp_path_factory.mktemp("page"), results, title="A <b> & C", tag=("one=first, long",))


def test_every_kind_of_result_has_its_section(whole):
    sections = ["runs", "benchmarks", "position", "inner", "recall", "persistence", "diagnostics", "training"]
    assert whole.sections == [*sections, "configuration", "origin"]
    levels = [level for level, _ in whole.headings]
    assert levels[0] == 1
    assert all(after <= before + 1 for before, after in zip(levels, levels[1:], strict=False)), "a level is left out"


def test_names_are_texts(whole):
    assert whole.tags.count("script") == 3, "data, library and the page's own"
    assert SCRIPT not in whole.text
    assert (1, "A <b> & C") in whole.headings
    assert SCRIPT in [row[0] for row in whole.tables["Runs"]]
    assert any(SCRIPT in series["name"] for figure in whole.data["figures"] for series in figure["series"])


def test_nothing_is_fetched(whole):
    assert not re.search(r'(?:src|href)="(?!#|data:)', whole.text)
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', whole.text)[1]
    assert policy.startswith("default-src 'none'; script-src 'sha256-")
    assert "unsafe-inline" not in policy.split(";")[1]


def test_a_row_is_a_checkpoint(whole):
    heads, *rows = whole.tables["Runs"]
    assert [row[0] for row in rows] == ["run0", "one", SCRIPT, FORMULA, "run"], "one for all results of a checkpoint"
    one = dict(zip(heads, rows[1], strict=True))
    assert one["Tags"].split() == ["TTT", "first", "long"]
    assert (one["Step"], one["Preset"], one["TTT layers"], one["Weights"]) == ("100", "tiny", "1, 4", "a" * 12)
    assert one["Inner model"] == "MLP 4, mini-batch 16"
    assert one["mini-swuggy (dev) %"].startswith("50.0 [43.1, ")
    assert one["Loss persist"].startswith("2.")
    plain = dict(zip(heads, rows[3], strict=True))
    assert plain["Loss persist"] == plain["mini-swuggy (dev) %"] == "–", "what was not run is absent, not 0"
    assert plain["Loss off"] != "–"


def test_accuracies_have_intervals_and_mini_tasks_stand_apart(whole):
    mini, official = whole.figure("Mini tasks"), whole.figure("Accuracy")
    assert {x for series in mini["series"] for x in series["x"]} == {
        "mini-swuggy (dev)",
        "mini-sblimp (dev)",
        "mini-salmon/gender",
        "mini-salmon, mean of 1",
    }
    assert [series["x"] for series in official["series"]] == [["swuggy (dev)"]] * 4
    first = official["series"][0]
    assert first["y"] == [62.0]
    assert first["low"][0] < 62 < first["high"][0]
    assert "not the official ones" in mini["caption"]


def test_accuracies_on_other_items_do_not_stand_for_each_other(tmp_path):
    made_report.suite(tmp_path / "all")
    made_report.suite(tmp_path / "part", limit=50)
    shown = made_page(tmp_path, tmp_path / "all", tmp_path / "part")
    figures = [figure for figure in shown.data["figures"] if figure["title"].startswith("Accuracy")]
    assert [figure["series"][0]["y"] for figure in figures] == [[62.0], [52.0]]
    assert ["at most 50 items of a task, seed 0" in figure["caption"] for figure in figures] == [False, True]
    heads, one, _ = shown.tables["Runs"]
    cells = {head: cell for head, cell in zip(heads, one, strict=True) if head.startswith("swuggy (dev)")}
    assert [cell[:4] for cell in cells.values()] == ["62.0", "52.0"]
    assert ["at most 50 items" in head for head in cells] == [False, True]


def test_accuracies_on_other_recordings_do_not_stand_side_by_side(tmp_path):
    for i, data in enumerate(("one/set", "another/set")):
        made_report.suite(tmp_path / "results" / str(i), data=data, items=1)
    found = made_page(tmp_path, tmp_path / "results")
    titles = [figure["title"] for figure in found.data["figures"] if figure["title"].startswith("Mini tasks")]
    assert titles == [f"Mini tasks: accuracy, {data}/set, all items" for data in ("one", "another")]
    heads = found.tables["Runs"][0]
    assert [f"mini-swuggy (dev) %, {data}, all items, kyutai mean" in heads for data in ("one/set", "another/set")] == [
        True,
        True,
    ]
    row = found.tables["Accuracies: one/set"][1]
    assert "[" in row[5], "an accuracy of one item has an interval"


def test_recall_on_other_recordings_is_another_figure(tmp_path):
    for i, digest in enumerate(("same", "same", "other")):
        file = dataclasses.replace(made_report.FILE, digest=digest)
        made_report.recalled(tmp_path / str(i), [(made_report.ONE, made_report.TWO, made_report.PLAIN)[i]], file=file)
    alone = made_page(tmp_path, tmp_path / "0", tmp_path / "2")
    assert not any("all runs" in figure["title"] for figure in alone.data["figures"])
    together = made_page(tmp_path, tmp_path / "0", tmp_path / "1", tmp_path / "2").figure("Recall, all runs")
    assert len(together["series"]) == 2


def test_published_rows_are_apart_with_source_and_caveat(whole):
    _, *rows = whole.tables["Published results of other systems"]
    assert len(rows) == len(published.ROWS)
    assert all(row[-1] for row in rows), "a row without a source"
    moshi = next(row for row in rows if row[0].startswith("Moshi, multi-stream, user"))
    assert moshi[1:5] == ["63.0", "55.2", "83.6", "62.7"]
    assert "Released Moshi weights have no heads for that stream" in whole.text
    assert not any("Moshi" in series["name"] for figure in whole.data["figures"] for series in figure["series"])


def test_losses_by_position(whole, results):
    figure = whole.figure("Loss by position: one")
    assert [series["name"] for series in figure["series"]] == ["persist", "reset", "frozen", "off", "permuted"]
    assert [bool(series["low"]) for series in figure["series"]] == [True, *[False] * 4]
    assert figure["series"][0]["x"][0] == 1.0, "the middle of 25 frames, in seconds"
    assert figure["marks"] == [[4.8, "attention window"]]
    together = whole.figure("Loss by position, all runs")
    assert [series["name"] for series in together["series"]] == [
        "one (persist)",
        f"{SCRIPT} (persist)",
        f"{FORMULA} (off)",
    ]
    stored = json.loads((results / "stream" / RESULTS).read_text())["checkpoints"][0]["by_position"]["losses"][
        "persist"
    ]
    assert together["series"][0]["y"] == pytest.approx([entry["mean"] for entry in stored[:4]], rel=1e-5)


def test_recall_of_other_excerpts_is_not_drawn_together(tmp_path):
    made_report.recalled(tmp_path / "one", (made_report.ONE,))
    for excerpt, drawn in ((50, 1), (100, 0)):
        other = made_report.recalled(tmp_path / str(excerpt), (made_report.TWO,), excerpt)
        figures = made_page(tmp_path, tmp_path / "one", other).data["figures"]
        assert sum(figure["title"].startswith("Recall, all runs: heard-before") for figure in figures) == drawn


def test_checkpoints_of_one_evaluation_are_paired(whole):
    figure = whole.figure("Loss minus that of one, by position")
    assert [series["name"] for series in figure["series"]] == [SCRIPT, FORMULA]
    assert figure["series"][0]["y"] == pytest.approx([-0.05] * 4, abs=0.03), "made to be 0.05 nats better"


def test_figure_5_has_a_choice_of_the_layer(whole):
    losses, gains = whole.figure("Inner losses: one"), whole.figure("What memory brought: one")
    assert {series["choice"] for series in losses["series"]} == {"layer 1", "layer 4"}
    assert [series["name"] for series in gains["series"][:3]] == [
        f"gain under {arm}" for arm in ("persist", "reset", "permuted")
    ]
    assert all(len(series["x"]) <= 300 for series in losses["series"])


def test_recall_by_gap(whole):
    figure = whole.figure("Recall, heard-before: one")
    assert figure["log"]
    assert figure["series"][0]["x"] == [4.0, 10.0, 60.0, 300.0]
    assert figure["series"][0]["y"][1] == pytest.approx(0.16)
    assert [words for _, words in figure["marks"]] == ["attention window", "attention's reach"]
    half = "half of the benefit at 60 s is left at 91.5 s [70 s, beyond the longest gap]."
    assert whole.text.count(half) == 2, "once for each run, in its verdict"
    assert whole.text.lower().count("half of the benefit") == 2
    row = ["60", "-0.02000 [-0.03000, -0.01000]", "< 0.001", "12"]
    assert whole.tables["Recall beside one"][1] == [SCRIPT, "persist", "heard-before", *row]
    assert "gap of 3600 s: left out, no speaker has an hour of speech." in whole.text


def test_verdicts_and_checks(whole):
    rows = whole.tables["Verdicts: persist against reset, frozen"]
    assert [row[:3] for row in rows[1:]][0] == ["reset", "after the first chunk", "better, below the threshold"]
    assert len(rows) == 1 + 2 * 3
    assert [row[1] for row in whole.tables["State: one"]] == ["Result", "PASS", "PASS"]
    points = whole.figure("Differences: persist")
    assert points["series"][0]["y"] == ["reset", "frozen"]
    assert points["series"][0]["x"][1] == pytest.approx(0.2, abs=0.02)


def test_diagnostics_and_training(whole):
    gate = whole.figure("Gate: one")
    assert [series["name"] for series in gate["series"]] == ["layer 1", "layer 4"]
    assert gate["series"][0]["x"][:2] == [4.0, 8.0]
    training = whole.figure("Training loss")
    assert len(training["series"][0]["x"]) == 300, "900 steps, three to a point; the cut line at the end is none"
    assert whole.figure("Validation loss")["series"][0]["y"] == [3.25]


def test_only_fields_that_differ(whole):
    heads, *rows = whole.tables["Fields that differ"]
    assert heads == ["Field", "one", SCRIPT, FORMULA, "run"]
    fields = {row[0]: row[1:] for row in rows}
    assert fields["model.ttt.base_lr"] == ["–", "0.25", "–", "–"]
    assert fields["model.ttt.layers"] == ["1,4", "1,4", "none", "1,4"]
    assert not {"model.dim", "run_dir"} & fields.keys()


def test_what_was_not_run_is_absent(tmp_path):
    found = made_page(tmp_path, made_report.state(tmp_path / "state", passed=False))
    assert found.sections == ["runs", "persistence", "origin"]
    assert [row[1] for row in found.tables["State: one"]] == ["Result", "PASS", "FAIL"]
    assert not found.data["figures"]
    assert not [head for head in found.tables["Runs"][0] if head.startswith(("Loss", "Top-1", "mini"))]
    assert published.NOTE not in found.text


def test_a_broken_comparison_is_a_warning(tmp_path):
    found = made_page(tmp_path, made_report.compare(tmp_path / "compare", broken=True))
    assert 'class="card warning"' in found.text
    assert "BROKEN: persist and reset differ" in found.text


def test_damaged_and_foreign_results_are_named(tmp_path, capsys):
    made_report.state(tmp_path / "good")
    damaged = made_report.state(tmp_path / "damaged") / RESULTS
    damaged.write_text(damaged.read_text().replace("50 of 50", "49 of 50"))
    (made_report.state(tmp_path / "cut") / RESULTS).write_text('{"command": ')
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / RESULTS).write_text('{"accuracy": 1}')
    (tmp_path / "empty").mkdir()
    found = made_page(tmp_path, *(tmp_path / name for name in ("good", "damaged", "cut", "foreign", "empty")), code=3)
    reasons = {row[0].removeprefix(f"{tmp_path}/"): row[1] for row in found.tables["Left out"][1:]}
    assert set(reasons) == {f"damaged/{RESULTS}", f"cut/{RESULTS}", f"foreign/{RESULTS}", "empty"}
    assert "checksum does not match" in reasons[f"damaged/{RESULTS}"]
    assert "of no command that the page knows" in reasons[f"foreign/{RESULTS}"]
    errors = capsys.readouterr().err
    assert all(name in errors for name in reasons)
    assert len(found.tables["Result folders"]) == 2


def test_missing_scores_leave_the_rest(tmp_path, capsys):
    folder = made_report.stream(tmp_path / "eval", (made_report.ONE,))
    for path in (folder / "frames").rglob("*.npz"):
        path.unlink()
    found = made_page(tmp_path, folder, code=3)
    assert "position" in found.sections
    assert "inner" not in found.sections
    assert "inner losses by frame are left out" in capsys.readouterr().err


def test_recordings_are_no_error(tmp_path):
    made_report.state(tmp_path / "run" / "state")
    (tmp_path / "run" / "generate").mkdir()
    (tmp_path / "run" / "generate" / RESULTS).write_text('{"command": "python -m eval generate", "format": 1}')
    found = made_page(tmp_path, tmp_path / "run")
    assert "no part for results of python -m eval generate" in found.tables["Left out"][1][1]


def test_results_are_found_once_and_not_among_checkpoints(tmp_path):
    folder = made_report.run(tmp_path / "run")
    made_report.state(folder / "state")
    made_report.state(folder / "checkpoints" / "100" / "state")
    made_report.state(folder / ".old" / "state")
    (tmp_path / "link").symlink_to(folder)
    collected = collect([str(folder), str(folder / "state"), str(tmp_path / "link")])
    assert [source.folder for source in collected.sources] == [folder / "state"]
    assert collected.runs == [folder]
    assert not collected.left_out


def test_names_are_unique(tmp_path):
    for name, digit, step in (("a", "1", 100), ("b", "2", 200), ("c", "3", 200)):
        info = made_report.checkpoint("run", digit)
        info.about["step"] = step
        made_report.diagnose(tmp_path / name, info)
    runs = Runs(collect([str(tmp_path)]))
    assert [run.name for run in runs.all] == [
        "run, step 100",
        "run, step 200, weights 22222222",
        "run, step 200, weights 33333333",
    ]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"paths": ()}, "there is no PATH"),
        ({"paths": ("nowhere",)}, "nowhere is no folder"),
        ({"paths": ("empty",)}, "there are no results to show"),
        ({"tag": ("two=x",)}, "names no run of the page: give one of one"),
        ({"tag": ("one",)}, "write RUN=tag,tag"),
        ({"out": "other.html"}, "did not write"),
        ({"out": "empty"}, "is a folder"),
        ({"out": "no/report.html"}, "is no folder"),
    ],
)
def test_refusals_write_nothing(tmp_path, monkeypatch, options, message):
    monkeypatch.chdir(tmp_path)
    made_report.state(tmp_path / "state")
    (tmp_path / "empty").mkdir()
    (tmp_path / "other.html").write_text("<!doctype html><title>mine</title>")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(InputError, match=message):
        main(Options(**{"paths": ("state",), **options}))
    assert sorted(tmp_path.rglob("*")) == before
    assert "mine" in (tmp_path / "other.html").read_text()


def test_a_page_of_ours_is_replaced(tmp_path):
    folder = made_report.state(tmp_path / "state")
    assert "First" in made_page(tmp_path, folder, title="First").text
    assert "First" not in made_page(tmp_path, folder, title="Second").text


def test_the_command_line_gives_several_tags(tmp_path):
    made_report.state(tmp_path / "state")
    out = tmp_path / "page.html"
    done = command("eval", "report", tmp_path / "state", "--out", out, "--tag", "one=a,b", "--tag", "one=c")
    assert done.returncode == 0, done.stderr
    assert json.loads(re.search(r'id="data">(.*?)</script>', out.read_text())[1])["runs"] == [
        {"key": "r0", "tags": ["TTT", "a", "b", "c"]}
    ]


def test_layers_as_ranges():
    assert _ranges(()) == ""
    assert _ranges((0, 1, 3, 5, 6, 7, 31)) == "0, 1, 3, 5 to 7, 31"


def test_estimates_as_cells():
    nan = float("nan")
    assert parts.estimate(Estimate(nan, nan, nan, 0)) == parts.NOTHING
    assert parts.estimate(Estimate(0.5, nan, nan, 1), 1, scale=100) == parts.Cell("50.0", 50.0)
    assert parts.estimate(Estimate(0.5, 0.4, 0.6, 9), 1, scale=100) == parts.Cell(
        "50.0 [40.0, 60.0]", 50.0, (40.0, 60.0)
    )
    series = parts.curve("x", [1, 2], [Estimate(0.0, nan, nan, 0), Estimate(3.0, 2.0, 4.0, 5)])
    assert (series.x, series.y, series.n) == ([2], [3.0], [5])


def test_every_command_of_the_page_can_be_read():
    for line, (module, kind) in collecting.KINDS.items():
        results = getattr(importlib.import_module(module), kind)
        assert line == results.COMMAND


@pytest.mark.parametrize("seed", range(20))
def test_damage_is_named_or_harmless(results, tmp_path, seed, capsys):
    """One damaged file, whichever it is, costs at most what it holds."""
    rng = np.random.default_rng(seed)
    folder = damage.copied(results, tmp_path / "results")
    path = folder / "run" / "config.json" if seed % 2 else damage.one_file(folder, rng)
    if seed % 2:
        path.write_text(json.dumps(damage.of_json(json.loads(path.read_text()), rng)[0]))
    else:
        path.write_bytes(damage.of_bytes(path.read_bytes(), rng))
    out = tmp_path / "report.html"
    code = main(Options((str(folder),), str(out)))
    found = Page(out.read_text("utf-8"))
    assert len(found.sections) >= 8
    assert code in (0, 3)
    assert (code == 3) == ("Left out" in found.tables)
    if path.name == RESULTS:
        assert str(path) in capsys.readouterr().err
