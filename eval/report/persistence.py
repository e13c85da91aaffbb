"""Section on persistence: verdicts of `python -m eval compare`, and checks of `python -m eval check-state`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from eval.compare.experiment import REGIONS
from eval.report.collect import CHECK_STATE, COMPARE, Source
from eval.report.parts import (
    NOTHING,
    Cell,
    Figure,
    Note,
    Row,
    Section,
    Series,
    Table,
    estimate,
    listed,
    number,
    p_value,
    words,
)
from eval.report.runs import Runs
from eval.results.figures import CHECKPOINTS
from eval.stats.estimates import Estimate
from eval.stats.verdict import BELOW, BETTER, WORSE

GOOD, BAD = (BETTER, BELOW), (WORSE,)


def sections(runs: Runs, sources: Sequence[Source]) -> list[Section]:
    """Returns the section, if any results belong to it."""
    blocks = list[Figure | Table | Note]()
    for source in sources:
        if source.command == COMPARE:
            blocks += _compared(runs, source)
        elif source.command == CHECK_STATE:
            blocks.append(_checked(runs, source))
    lead = (
        "Does kept memory help? A difference is the loss of another condition minus that of the first, on the same"
        " file: above 0 the first is better. The part after the first chunk decides, the others describe. Does the"
        " state persist at all? That is what the checks of the state say."
    )
    return [Section("persistence", "Persistence", lead, blocks)] if blocks else []


def _compared(runs: Runs, source: Source) -> list[Figure | Table | Note]:
    """Returns a figure of the differences and a table with the verdicts."""
    results = source.results
    first, setting = results.conditions[0].name, results.setting
    keys = frozenset(runs.of(source, info.name).key for info in results.checkpoints)
    data = setting.about.get("data") or "the held-out files of its run"
    name = f"{first} against {listed(condition.name for condition in results.conditions[1:])}"
    names = listed(runs.of(source, info.name).name for info in results.checkpoints)
    comparisons = results.analysis["comparisons"]
    about = (
        f"{names} on {data}, {results.counts['units']} {results.counts['unit']}, chunks of {setting.chunk} frames,"
        f" codebooks weighted {setting.weighting}"
    )
    blocks = list[Figure | Table | Note]()
    if results.broken:
        blocks.append(Note(f"{names}: {results.broken}", warning=True, runs=keys))
    series = [_region(comparisons, region, CHECKPOINTS[i]) for i, region in enumerate(REGIONS)]
    series = [one for one in series if one.x]
    if series:
        caption = f"Mean difference to {first} with its 95 % interval, above 0 {first} is better; {about}."
        blocks.append(Figure(f"Differences: {name}", caption, "nats per token", "", series, keys, "points", zero=True))
    rows = [_row(comparison, region) for comparison in comparisons for region in REGIONS]
    heads = ("Other condition", "Part of the file", "Verdict", "Difference, nats", "p (Holm)", "d_z", "n", "In words")
    caption = f"Paired t tests and equivalence within {setting.margin:g} nats: {about}."
    return [*blocks, Table(f"Verdicts: {name}", caption, heads, rows, keys)]


def _region(comparisons: Sequence[dict[str, Any]], region: str, colour: str) -> Series:
    """Returns the differences in one region as points; the categories are the other conditions."""
    known = [(entry["name"], entry["regions"][region]["paired"]) for entry in comparisons]
    known = [(name, paired) for name, paired in known if paired["n"]]
    x, low, high = ([paired[name] for _, paired in known] for name in ("mean", "low", "high"))
    return Series(region, x, [name for name, _ in known], low, high, [paired["n"] for _, paired in known], colour)


def _row(comparison: dict[str, Any], region: str) -> Row:
    compared = comparison["regions"][region]
    paired, verdict = compared["paired"], compared["verdict"]
    kind = verdict and ("good" if verdict["kind"] in GOOD else "bad" if verdict["kind"] in BAD else "")
    difference = Estimate(paired["mean"], paired["low"], paired["high"], int(paired["n"]))
    return (
        Cell(comparison["name"]),
        Cell(region),
        Cell(verdict["kind"], kind=kind) if verdict else NOTHING,
        estimate(difference, 4, signed=True),
        p_value(compared["holm"]),
        number(paired["dz"], ".2f"),
        number(paired["n"], ".0f"),
        words(verdict and verdict["text"]),
    )


def _checked(runs: Runs, source: Source) -> Table:
    results = source.results
    run = runs.of(source, results.checkpoint.name)
    rows = [
        (Cell(check.what), Cell("PASS", kind="good") if check.passed else Cell("FAIL", kind="bad"), Cell(check.figure))
        for check in results.checks
    ]
    caption = f"{results.meaning} {results.file.frames} frames of {results.file.name}, one at a time."
    return Table(f"State: {run.name}", caption, ("Property", "Result", "Seen"), rows, frozenset({run.key}))
