"""Sections on what TTT layers do (`python -m eval diagnose`) and on training (metrics.jsonl)."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from eval.diagnose.records import FIGURES, Record
from eval.report.collect import DIAGNOSE, METRICS, LeftOut, Source
from eval.report.parts import Figure, Section, Series, shades
from eval.report.runs import Runs
from eval.results.figures import CHECKPOINTS
from ttt_jax.errors import InputError
from ttt_jax.utils.jsonl import read_lines

PANELS = {
    "gate_mean_abs": ("Gate", "How far the gates are open"),
    "gated_to_stream": ("Size of what TTT adds", "Gated TTT output beside the stream after attention"),
    "displacement_to_base": ("Drift of the fast weights", "How far the fast weights have moved from their start"),
    "memory": ("Gain from memory", "Inner loss at the start minus that before the frame's step"),
}
"""Figures of the records: title, and the beginning of the caption."""
TITLES = FIGURES | {"memory": "inner loss: base minus before"}
POINTS = 400
"""Points of a training curve; each is the mean of the steps that it stands for."""


def sections(runs: Runs, sources: Sequence[Source], left_out: list[LeftOut]) -> list[Section]:
    """Returns the sections; metrics that cannot be read are added to `left_out`."""
    measured = [figure for source in sources if source.command == DIAGNOSE for figure in _records(runs, source)]
    found = []
    if measured:
        lead = (
            "Records of what the TTT layers do beside attention, over one recording. Colours go from blue, the lowest"
        )
        found.append(Section("diagnostics", "Diagnostics", f"{lead} layer, to red, the highest.", measured))
    trained = _training(runs, left_out)
    if trained:
        lead = f"Losses while training, from {METRICS}: the number that is minimised."
        found.append(Section("training", "Training", lead, trained))
    return found


def _records(runs: Runs, source: Source) -> list[Figure]:
    results, figures = source.results, []
    layers = sorted({record["layer"] for record in results.records})
    colours = dict(zip(layers, shades(len(layers)), strict=True))
    for info in results.checkpoints:
        run = runs.of(source, info.name)
        records = [record for record in results.records if record["checkpoint"] == info.name]
        for name, (title, caption) in PANELS.items():
            series = []
            for layer in layers:
                points = [(r["seconds"], value) for r in records if r["layer"] == layer and _is(value := _of(r, name))]
                if points:
                    series.append(
                        Series(f"layer {layer}", *map(list, zip(*points, strict=True)), colour=colours[layer])
                    )
            if series:
                figures.append(
                    Figure(
                        f"{title}: {run.name}",
                        f"{caption}, by layer, every {results.every} frames of {results.file.name}.",
                        "seconds of speech",
                        TITLES[name],
                        series,
                        frozenset({run.key}),
                        zero=name == "memory",
                        from_zero=name != "memory",
                    )
                )
    return figures


def _of(record: Record, name: str) -> float | None:
    if name != "memory":
        return record.get(name)
    base, before = record.get("loss_base"), record.get("loss_before")
    return base - before if _is(base) and _is(before) else None


def _is(value: Any) -> bool:
    return isinstance(value, int | float)


def _training(runs: Runs, left_out: list[LeftOut]) -> list[Figure]:
    """Returns the training losses and the validation losses of all runs whose folders were found."""
    curves: dict[str, list[Series]] = {"Training loss": [], "Validation loss": []}
    drawn = set[Path]()
    for run in runs.all:
        if run.folder is None or run.folder in drawn:
            continue
        drawn.add(run.folder)  # checkpoints of one run share its curve
        try:
            lines = _lines(run.folder / METRICS)
        except (InputError, OSError, UnicodeDecodeError) as error:
            left_out.append(LeftOut(str(run.folder / METRICS), f"it cannot be read ({error})."))
            continue
        colour = CHECKPOINTS[(len(drawn) - 1) % len(CHECKPOINTS)]
        for title, of in {"Training loss": _loss, "Validation loss": _validation}.items():
            steps, values = _thinned([(line["step"], of(line)) for line in lines if _is(of(line))])
            if steps:
                curves[title].append(Series(run.folder.name, steps, values, colour=colour, run=run.key))
    captions = {
        "Training loss": f"Loss of training steps; where there are more than {POINTS}, means over neighbours",
        "Validation loss": "Loss on the validation files while training",
    }
    return [
        Figure(title, f"{captions[title]}.", "step", "nats", series, frozenset(one.run for one in series))
        for title, series in curves.items()
        if series
    ]


def _lines(path: Path) -> list[dict[str, Any]]:
    """Returns the lines of a metrics file that are whole; a line that is being written is cut off."""
    lines = []
    for text in read_lines(path):
        try:
            line = json.loads(text)
        except (ValueError, RecursionError):
            continue
        if isinstance(line, dict) and _is(line.get("step")):
            lines.append(line)
    return lines


def _loss(line: dict[str, Any]) -> Any:
    return None if "validation" in line else line.get("loss")


def _validation(line: dict[str, Any]) -> Any:
    validation = line.get("validation")
    return validation.get("loss") if isinstance(validation, dict) else None


def _thinned(points: list[tuple[float, float]]) -> tuple[list[float], list[float]]:
    """Returns steps and values of at most `POINTS` means over neighbours."""
    size = -(-len(points) // POINTS) or 1
    groups = [points[start : start + size] for start in range(0, len(points), size)]
    means = [[sum(values) / len(group) for values in zip(*group, strict=True)] for group in groups]
    return [step for step, _ in means], [value for _, value in means]
