"""Sections of `python -m eval stream`: losses by position, and inner losses by frame (Figure 5)."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import numpy as np

from eval.report.collect import STREAM, LeftOut, Source
from eval.report.parts import Figure, Note, Section, Series, curve, of, seconds
from eval.report.runs import Run, Runs
from eval.results.figures import CHECKPOINTS, COLOURS
from eval.stats.estimates import Band, Estimate
from eval.streaming import plots, table
from eval.streaming.results import CheckpointResults, Results
from ttt_jax.errors import InputError

POINTS = 2400
"""Points of all layers' curves of one quantity together: a page with many layers stays small."""
SHORT = {"reset": "dash", "permuted": "dot"}


def sections(runs: Runs, sources: Sequence[Source], left_out: list[LeftOut]) -> list[Section]:
    """Returns the sections on streamed speech; scores that cannot be read are added to `left_out`."""
    streams = [source for source in sources if source.command == STREAM]
    by_position, by_frame = [*_together(runs, streams)], list[Figure]()
    for source in streams:
        by_position += _between(runs, source)
        for checkpoint in source.results.checkpoints:
            run = runs.of(source, checkpoint.info.name)
            by_position += _losses(run, source.results, checkpoint)
            by_position.append(Note(of(run.name, checkpoint.verdict), runs=frozenset({run.key})))
            if checkpoint.inner:
                try:
                    by_frame += _figure5(run, source, checkpoint)
                except InputError as error:
                    left_out.append(LeftOut(str(source.folder), f"its inner losses by frame are left out: {error}"))
    found = []
    if by_position:
        lead = (
            "Loss of the codebooks in nats per token, in consecutive windows of the stream, from a fresh state. Arms"
            " share weights, files and tokens; only the fast weights differ. Bands are 95 % intervals over files or"
            " speakers, drawn over three or more."
        )
        found.append(Section("position", "Loss by position", lead, by_position))
    if by_frame:
        lead = (
            "The inner loss of a TTT layer at its learned start, l(W0), before the step of the frame and after it."
            " Where the loss before the step falls below that at W0, memory has learned something of what came before."
        )
        found.append(Section("inner", "Inner losses (Figure 5)", lead, by_frame))
    return found


def _together(runs: Runs, streams: Sequence[Source]) -> list[Figure]:
    """Returns a figure of the main arm of all checkpoints that were streamed through the same files."""
    groups = defaultdict(list)
    for source in streams:
        results = source.results
        files = tuple(file.digest or file.name for file in results.files)
        groups[files, results.setting.weighting, results.setting.window].append(source)
    figures = []
    for (_, weighting, window), members in groups.items():
        series, keys = [], set[str]()
        for source in members:
            for checkpoint in source.results.checkpoints:
                run = runs.of(source, checkpoint.info.name)
                if run.key not in keys:  # the same checkpoint in two results
                    values, colour = checkpoint.by_position["losses"][checkpoint.main], CHECKPOINTS[len(keys) % 7]
                    name = f"{run.name} ({checkpoint.main})"
                    series.append(_by_window(source.results, values, name, colour, run=run.key))
                    keys.add(run.key)
        if len(series) > 1:
            caption = f"{len(series)} checkpoints on the same {_files(members[0].results)}, {_how(weighting, window)}."
            axes = ("seconds of speech", "nats per token")
            figures.append(Figure("Loss by position, all runs", caption, *axes, series, frozenset(keys)))
    return figures


def _between(runs: Runs, source: Source) -> list[Figure]:
    """Returns the paired differences of the checkpoints of one evaluation to the first of them."""
    results, series = source.results, []
    first, *others = (runs.of(source, info.name) for info in source.checkpoints)
    for i, (run, info) in enumerate(zip(others, source.checkpoints[1:], strict=True), 1):
        values, colour = results.between[info.name]["by_position"], CHECKPOINTS[i % len(CHECKPOINTS)]
        series.append(_by_window(results, values, run.name, colour, run=run.key))
    if not series:
        return []
    setting, keys = results.setting, frozenset(run.key for run in others)
    title, how = f"Loss minus that of {first.name}, by position", _how(setting.weighting, setting.window)
    caption = f"Paired by file, over {_files(results)}, {how}: below 0 a checkpoint is better than {first.name}."
    return [Figure(title, caption, "seconds of speech", "nats per token", series, keys, zero=True)]


def _losses(run: Run, results: Results, checkpoint: CheckpointResults) -> list[Figure]:
    """Returns the loss of each arm by position, and what each has more than persist."""
    figures, how = [], _how(results.setting.weighting, results.setting.window)
    data = results.setting.about.get("data")
    context = seconds(checkpoint.info.context)
    words = f"over {_files(results)}{f' of {data}' if data else ''}, {how}; {_window(results, checkpoint)}"
    titles = {
        "losses": ("Loss by position", f"Loss of each arm {words}."),
        "against_persist": (
            "Arm minus persist, by position",
            f"Paired by file: above 0 memory helps; {words}.",
        ),
    }
    for name, (title, caption) in titles.items():
        by_arm = checkpoint.by_position[name]
        series = [
            _by_window(results, values, arm, COLOURS[arm], dash=SHORT.get(arm, ""))
            for arm, values in by_arm.items()
            if arm in COLOURS
        ]
        if name == "losses":  # files differ more than arms do, and one band shows that
            series = [one if one.name == checkpoint.main else one._replace(low=(), high=()) for one in series]
        if any(one.x for one in series):
            figures.append(
                Figure(
                    f"{title}: {run.name}",
                    caption,
                    "seconds of speech",
                    "nats per token",
                    series,
                    frozenset({run.key}),
                    marks=[(context, "attention window")],
                    zero=name != "losses",
                )
            )
    return figures


def _by_window(results: Results, values: Sequence[Estimate], name: str, colour: str, **style: str) -> Series:
    """Returns windows that more than half of the units reach, at their middles in seconds."""
    window, longest = results.setting.window, max(file.frames for file in results.files)
    starts = np.arange(table.shown(list(values), results.units)) * window
    middles = (starts + np.minimum(starts + window, longest)) / 2
    return curve(name, list(map(seconds, middles.tolist())), values, colour=colour, **style)


def _figure5(run: Run, source: Source, checkpoint: CheckpointResults) -> list[Figure]:
    """Returns inner losses of the main arm, and the gain of each arm that learns, with a choice of the layer."""
    results, layers = source.results, checkpoint.info.ttt_layers
    points = max(100, min(300, POINTS // len(layers)))
    frames, curves = plots.by_frame(results, checkpoint, source.folder, points)
    x = [round(seconds(frame), 2) for frame in frames.tolist()]
    losses, gains = list[Series](), list[Series]()
    for i, layer in enumerate(layers):
        of_layer = {key: Band(*(field[i] for field in band)) for key, band in curves.items()}
        choice = f"layer {layer}"
        for name, (colour, label) in plots.INNER.items():
            losses.append(_band(label, x, of_layer[checkpoint.main, name], colour=colour, choice=choice))
        for arm in plots.WITH_MEMORY:
            if (arm, "gain") in of_layer:
                average = plots.smoothing(results, arm, frames)[0]
                note = f" (average over {average})" if average != plots.SMOOTHED else ""
                style = {"colour": COLOURS[arm], "dash": SHORT.get(arm, ""), "choice": choice}
                gains.append(_band(f"gain under {arm}{note}", x, of_layer[arm, "gain"], **style))
    average = f"over {_files(results)}, a moving average over {plots.SMOOTHED} frames"
    keys = frozenset({run.key})
    figures = [
        Figure(
            f"Inner losses: {run.name}",
            f"Inner losses of a TTT layer under {checkpoint.main}, mean over heads, {average}.",
            "seconds of speech",
            "inner loss",
            losses,
            keys,
            marks=[(seconds(checkpoint.info.context), "attention window")],
            choice="TTT layer",
        ),
        Figure(
            f"What memory brought: {run.name}",
            f"l(W0) minus l(W before the frame), {average}: above 0 memory predicted the frame better than the start.",
            "seconds of speech",
            "gain",
            gains,
            keys,
            marks=[(seconds(checkpoint.info.context), "attention window")],
            zero=True,
            choice="TTT layer",
        ),
    ]
    return [figure for figure in figures if figure.series]


def _band(name: str, x: Sequence[float], band: Band, **style: str) -> Series:
    values = [Estimate(*numbers) for numbers in zip(*(field.tolist() for field in band), strict=True)]
    return curve(name, x, values, **style)


def _files(results: Results) -> str:
    count = len(results.files)
    files = "1 file" if count == 1 else f"{count} files"
    return files if results.unit == "files" else f"{files} of {results.units} {results.unit}"


def _how(weighting: str, window: int) -> str:
    return f"codebooks weighted {weighting}, windows of {window} frames"


def _window(results: Results, checkpoint: CheckpointResults) -> str:
    context = checkpoint.info.context
    longest = max(file.frames for file in results.files)
    return f"attention window {context:,} frames ({seconds(context):g} s)" + (
        "" if context < longest else ", not reached"
    )
