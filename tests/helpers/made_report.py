"""Made-up results of every kind that `python -m eval report` shows, with known numbers and awkward names."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

from eval.benchmarks.results import BenchmarkResults, Comparison, Mean, TaskResults, ViewResults
from eval.benchmarks.results import Setting as PairSetting
from eval.benchmarks.scored import View
from eval.check_state.results import Check
from eval.check_state.results import Results as StateResults
from eval.compare import losses
from eval.compare import results as compared
from eval.compare.analysis import analyse
from eval.diagnose.records import FIGURES
from eval.diagnose.records import Results as Records
from eval.recall import results as recall
from eval.recall.analysis import half_words
from eval.results import schema
from eval.results.schema import CheckpointInfo, FileInfo, Skipped
from eval.stats.estimates import Estimate
from eval.stats.paired import MeanTest
from tests.helpers import made_scores
from tests.helpers.made_experiment import made

SCRIPT = "<script>document.title='broken'</script>"
"""A name that must stay a name."""
FORMULA = "=1+<b>2</b>"
ABOUT = {"evaluated_with": {"versions": {"ttt_jax": "0.1.0", "jax": "0.10.2"}, "device": "cpu"}, "cost": {"seconds": 2}}
FILE = FileInfo("speech", "speech", 500, "speech.npz", digest="f0")


def checkpoint(name: str, digit: str, layers=made_scores.LAYERS, seed=0, **config) -> CheckpointInfo:
    """A checkpoint whose weights have a digest of this digit."""
    ttt = {"layers": "1,4" if layers else "none", "hidden": [4], "mini_batch": 16, **config}
    about = {
        "path": f"/runs/{name}",
        "step": 100,
        "weights": digit * 64,
        "config": {"name": "tiny", "run_dir": name, "model": {"dim": 128, "num_layers": 6, "ttt": ttt}},
        "codec": {"name": "made", "digest": "c0"},
    }
    return CheckpointInfo(name, (60,) * 6, layers, 1, seed=seed, about=about)


ONE, TWO = checkpoint("one", "a"), checkpoint(SCRIPT, "b", seed=1, base_lr=0.25)
PLAIN = checkpoint(FORMULA, "c", layers=())


def stream(folder: Path, infos=(ONE, TWO, PLAIN)) -> Path:
    """Results of `stream` with scores by frame."""
    for i, info in enumerate(infos):
        options = {} if info.ttt_layers else {"arms": ("off",), "unigram": False}
        made_scores.write(folder, info, shift=-0.05 * i, **options)
    made_scores.write_results(folder, list(infos))
    return folder


def compare(folder: Path, broken: bool = False) -> Path:
    """Results of `compare`."""
    experiment = made({"reset": 0.05, "frozen": 0.2})
    folder.mkdir(parents=True)
    losses.write(folder, experiment)
    analysis = analyse(experiment)
    if broken:
        analysis = analysis._replace(first_chunk=analysis.first_chunk._replace(largest=1.0))
    compared.write(folder, experiment, analysis, ABOUT)
    return folder


def state(folder: Path, passed: bool = True) -> Path:
    """Results of `check-state`."""
    checks = [
        Check("the fast weights change at every frame", True, "50 of 50 frames"),
        Check("rows", passed, "0 differ"),
    ]
    folder.mkdir(parents=True)
    results = StateResults(None, FILE, ONE, checks, "The fast weights persist: every frame changes them.", passed)
    schema.write(folder, results, ABOUT)
    return folder


def diagnose(folder: Path, info: CheckpointInfo = ONE) -> Path:
    """Results of `diagnose`: brief about the checkpoint, as the command stores it."""
    brief = {name: info.about[name] for name in ("path", "step", "weights")}
    info = dataclasses.replace(info, about=brief)
    records = [
        {"checkpoint": info.name, "frame": frame, "seconds": frame / 12.5, "layer": layer}
        | {name: layer + math.sin(frame) / 9 for name in FIGURES}
        | {"ttt_change_relative": None}
        for frame in range(50, 501, 50)
        for layer in info.ttt_layers
    ]
    folder.mkdir(parents=True)
    schema.write(folder, Records(None, 50, FILE, [info], records), ABOUT)
    return folder


def _accuracy(mean: float, n: int = 200) -> Estimate:
    half = 1.96 * math.sqrt(mean * (1 - mean) / n)
    return Estimate(mean, mean - half, mean + half, n)


MINI_AND_OFFICIAL = ("mini-swuggy", "mini-sblimp", "mini-salmon/gender", "swuggy")


def suite(
    folder: Path,
    infos=(ONE, TWO),
    tasks=MINI_AND_OFFICIAL,
    limit: int | None = None,
    data: str = "data/mini",
    items: int = 200,
) -> Path:
    """Results of `suite`: mini tasks, and an official one; of a part of the items they are 10 points lower."""
    rule = "kyutai mean"
    views = [View(info.name, arm, "padding", "moshi") for info in infos for arm in ("persist", "off")]
    made_tasks, comparisons = [], []
    for i, name in enumerate(tasks):
        split = "dev" if name.endswith(("swuggy", "sblimp")) else ""
        first = 0.5 if limit is None else 0.4
        accuracies = [_accuracy(first + 0.04 * i + 0.02 * j, items) for j in range(len(views))]
        own = [
            ViewResults(*view, {rule: accuracy}, {rule: accuracy} if "swuggy" in name else {}, {}, {}, 200, 3, 1)
            for view, accuracy in zip(views, accuracies, strict=True)
        ]
        failed = [Skipped("x", "no pair"), Skipped("y", "its right side"), Skipped("y", "its wrong side")]
        made_tasks.append(TaskResults(name, split, {"problems": 1}, 201, 200, failed, own))
        for view in views[1:]:
            difference = Estimate(0.02, -0.01, 0.05, 200)
            comparisons.append(Comparison(name, split, views[0], view, 200, 1, 0.5, 0.52, difference, 30, 26, 0.6, 1.0))
    setting = PairSetting(rule, data, "dev", limit, 0, ("padding",), ("moshi",), made_scores.ARMS, {"name": "made"}, 2)
    means = [Mean("mini-salmon", "", ["mini-salmon/gender"], views[0], {rule: _accuracy(0.58)})]
    folder.mkdir(parents=True)
    schema.write(folder, BenchmarkResults(setting, list(infos), made_tasks, comparisons, means), ABOUT)
    return folder


def _at_gap(gap: int, level: float) -> recall.AtGap:
    def arm(benefit: float) -> recall.ArmAtGap:
        estimate = Estimate(benefit, benefit - 0.01, benefit + 0.01, 12)
        return recall.ArmAtGap(estimate, Estimate(3 - benefit, 2.9, 3.1, 12), Estimate(3.0, 2.9, 3.1, 12), {})

    arms = {"persist": arm(level), "reset": arm(0.001), "frozen": arm(0.0), "off": arm(-0.001)}
    against = {name: recall.Against(MeanTest(level, level - 0.01, level + 0.01, 12, 1e-5), 1e-4) for name in ("reset",)}
    where = recall.WINDOW if gap < 60 else recall.REACH if gap < 350 else recall.BEYOND
    return recall.AtGap(gap, where, 24, 0, 12, "speakers", arms, against)


def recalled(folder: Path, infos=(ONE, TWO), excerpt: int = 50, file=FILE) -> Path:
    """Results of `recall`."""
    setting = recall.Setting(
        [recall.HEARD], excerpt, 24, [50, 125, 750, 3750], 5, 0, "equal", made_scores.ARMS, {"data": None}
    )
    checkpoints = []
    for i, info in enumerate(infos):
        gaps = [_at_gap(gap, 0.2 * (1 - 0.3 * i) / (1 + gap / 500)) for gap in setting.gaps]
        half = recall.Half(750, 91.5, 70.0, None)
        curve = recall.Curve(gaps, half, f"The memory recalls beyond attention's reach; {half_words(half)}.")
        checkpoints.append(
            recall.CheckpointRecall(info, ["persist", "reset", "frozen", "off"], "persist", {recall.HEARD: curve})
        )
    dropped = [recall.Dropped(recall.HEARD, 45000, "no speaker has an hour of speech.")]
    folder.mkdir(parents=True)
    between = {
        info.name: {recall.HEARD: [recall.Between(750, MeanTest(-0.02, -0.03, -0.01, 12, 1e-4), 2e-4)]}
        for info in infos[1:]
    }
    schema.write(folder, recall.RecallResults(setting, checkpoints, dropped, [file], [], between), ABOUT)
    return folder


def run(folder: Path, steps: int = 900) -> Path:
    """A run's folder: its configuration and metrics, without checkpoints."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(ONE.about["config"] | {"name": "smoke", "seed": 3}))
    lines = [{"step": step, "loss": 3 + 1 / step} for step in range(1, steps + 1)]
    lines.insert(500, {"step": 500, "validation": {"loss": 3.25}, "seconds": 1.0})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 901, "lo')
    return folder


def everything(folder: Path) -> Path:
    """One folder with results of every kind."""
    for make in (stream, compare, state, diagnose, suite, recalled, run):
        make(folder / make.__name__)
    return folder
