"""The results of `eval.streaming.summary` as a table for a terminal."""

from __future__ import annotations

from typing import Any

import numpy as np

from eval.stats.estimates import Estimate, interval
from eval.streaming.results import ALL, BEYOND, LAST, LATER, RESETTING, TREND, CheckpointResults, Results
from eval.streaming.weighting import WEIGHTINGS

POSITIONS, THINNED = 10, 8
"""Rows of the table by position: all windows up to the first number; of more the second, evenly spaced."""

LABEL, WIDE = 18, 28
"""Columns of a row's label, and of a difference with its interval."""


def table(results: Results) -> str:
    """The results for a terminal: what was run, a block for each checkpoint, and how checkpoints compare."""
    blocks = [_head(results), *(_checkpoint(results, own) for own in results.checkpoints)]
    if len(results.checkpoints) > 1:
        blocks.append(_between(results))
    return "\n\n".join("\n".join(line.rstrip() for line in block) for block in blocks)


def shown(values: list[Estimate], units: int) -> int:
    """Leading windows that more than half of the units reach; an interval over the few left says nothing."""
    return sum(value.n > units / 2 for value in values)


def span(start: float, end: float) -> str:
    """A stretch of a stream, in seconds; in minutes and seconds beyond the tenth minute."""
    if end <= 600:
        digits = 0 if start == int(start) and end == int(end) else 1
        return f"{start:.{digits}f} to {end:.{digits}f} s"
    return " to ".join(f"{int(at // 60)}:{int(at % 60):02d}" for at in (start, end))


def _head(results: Results) -> list[str]:
    setting = results.setting
    frames = [file.frames for file in results.files]
    minutes = sum(frames) / setting.frame_rate / 60
    parts = [
        ("1 file" if len(frames) == 1 else f"{len(frames)} files")
        + (
            ""
            if results.unit == "files"
            else f" of {results.units} {results.unit if results.units > 1 else results.unit.removesuffix('s')}"
        ),
        (f"{frames[0]} frames" if len(frames) == 1 else f"{min(frames)} to {max(frames)} frames")
        + f" ({minutes:.1f} minutes in all)",
        *([f"{len(results.skipped)} skipped"] if results.skipped else []),
        *(f"{what} {name}" for what, value in setting.about.items() if isinstance(name := _name(value), str)),
    ]
    lines = [
        ", ".join(parts) + ("," if setting.text else ""),
        *([setting.text] if setting.text else []),
        f"[95 % interval over {results.unit}]; where codebooks are one number they are weighted {setting.weighting}:"
        f" {WEIGHTINGS[setting.weighting]}",
    ]
    wide = max(map(len, setting.arms))
    return lines + [f"  {arm:<{wide}}  {meaning}" for arm, meaning in setting.arms.items()]


def _checkpoint(results: Results, own: CheckpointResults) -> list[str]:
    info, setting = own.info, results.setting
    layers = f"TTT layers {', '.join(map(str, info.ttt_layers))}" if info.ttt_layers else "no TTT layers"
    resets = f", periods of {setting.reset_every} frames" if set(RESETTING) & set(own.arms) else ""
    parts = [
        _streams(results, own),
        _positions(results, own),
        _differences(results, own),
        _inner(results, own),
        [own.verdict],
    ]
    lines = [f"{info.name}: {layers}, attention window {info.context} frames{resets}"]
    for part in parts:
        lines += ["", *part] if part else []
    return lines


def _streams(results: Results, own: CheckpointResults) -> list[str]:
    """By stream and weighting, arms side by side; then entropy, accuracy and the distance to off."""
    head = results.setting.weighting
    columns = [arm for arm in own.losses if arm in (*own.arms, "unigram")]
    compared = f"   unigram minus {own.main}" if own.against_unigram else ""
    lines = [f"{'nats per token':<{LABEL}}" + "".join(f"{arm:>10}" for arm in columns) + compared]

    def row(name: str, cells: list[str], end: str = "") -> None:
        lines.append(f"{name:<{LABEL}}" + "".join(f"{cell:>10}" for cell in cells) + end)

    # "semantic" would repeat the first codebook.
    for name in [*results.setting.streams, *(name for name in WEIGHTINGS if name != "semantic")]:
        if not own.losses[own.main][name].n:
            continue
        better = f"   {interval(own.against_unigram[name], 3)}" if compared else ""
        row(name, [_number(own.losses[arm][name]) for arm in columns], better)
    row("entropy", [_number(own.entropy[arm][head]) for arm in own.arms])
    row("top-1 accuracy %", [_number(own.accuracy[arm][head], 1, 100) for arm in own.arms])
    if own.against_off:
        off = {arm: own.against_off.get(arm) for arm in own.arms}
        row("KL to off", [_number(there["kl"], 4) if there else "-" for there in off.values()])
        row("top-1 changed %", [_number(there["changed"], 1, 100) if there else "-" for there in off.values()])
    return lines


def _positions(results: Results, own: CheckpointResults) -> list[str]:
    """Losses of the main arm and two differences in windows that more than half of the units reach (of many windows
    some, evenly spaced), and their slopes."""
    losses, differences = own.by_position["losses"][own.main], own.by_position["against_persist"]
    count = shown(losses, results.units)
    if not count:
        return []
    rows = np.arange(count) if count <= POSITIONS else np.linspace(0, count - 1, THINNED).round().astype(int)
    preferred = [arm for arm in ("reset", "off", *own.arms) if arm in differences]
    arms = list(dict.fromkeys(preferred))[:2]
    seconds = results.setting.window / results.setting.frame_rate
    longest = max(file.frames for file in results.files) / results.setting.frame_rate
    title = "by position" + (f", {len(rows)}/{count}" if len(rows) < count else "")
    heads = "".join(f"{f'{arm} minus persist':<{WIDE}}" for arm in arms)
    lines = [f"{title:<21}{results.unit:>8}   {own.main:<24}{heads}"]
    for i in rows:
        cells = "".join(f"{interval(differences[arm][i], 4, signed=True):<{WIDE}}" for arm in arms)
        where = span(i * seconds, min((i + 1) * seconds, longest))
        lines.append(f"{where:<21}{losses[i].n:>8}   {interval(losses[i], 3):<24}{cells}")
    slope = own.slopes["losses"][own.main]
    if slope.n:
        cells = "".join(f"{interval(own.slopes['against_persist'][arm], 4, signed=True):<{WIDE}}" for arm in arms)
        lines.append(f"{'per 1,000 frames':<21}{slope.n:>8}   {interval(slope, 3, signed=True):<24}{cells}")
    return lines


def _differences(results: Results, own: CheckpointResults) -> list[str]:
    """What memory brings, by arm and part of the files."""
    if not own.against_persist:
        return []
    later = [LATER] if set(RESETTING) & set(own.arms) else []
    parts, head = (ALL, *later, BEYOND), results.setting.weighting
    lines = [f"{'minus persist':<15}" + "".join(f"{part:<{WIDE}}" for part in parts) + "(above 0: memory helps)"]
    for arm, found in own.against_persist.items():
        lines.append(f"{arm:<15}" + "".join(f"{interval(found[part][head], 4, signed=True):<{WIDE}}" for part in parts))
    return lines


def _inner(results: Results, own: CheckpointResults) -> list[str]:
    """Inner losses by TTT layer: means over frames; the gain over all frames and in the last window; its trend."""
    layers = own.inner.get(own.main, {})
    if not layers:
        return []
    lines = [
        f"{'inner losses':<15}{'l(W0)':>8}{'before':>8}{'after':>8}  "
        f" {'gain: l(W0) - before':<{WIDE}}{'gain in the last window':<{WIDE}}per 1,000 frames"
    ]
    for layer, found in layers.items():
        means = "".join(f"{_number(found[f'loss_{name}'][ALL]):>8}" for name in ("base", "before", "after"))
        digits = 4 if found["loss_base"][ALL].mean < 1 else 2  # inner losses grow with the heads' width
        gains = "".join(f"{interval(found['gain'][part], digits, signed=True):<{WIDE}}" for part in (ALL, LAST, TREND))
        lines.append(f"{f'TTT layer {layer}':<15}{means}   {gains}")
    return lines


def _between(results: Results) -> list[str]:
    first, head = results.checkpoints[0], results.setting.weighting
    rows = list(dict.fromkeys([head, "semantic", "acoustic", "text"]))[:4]
    rows = [row for row in rows if first.losses[first.main][row].n]
    wide = max(len(own.info.name) for own in results.checkpoints) + 2
    lines = [
        f"checkpoints: loss minus that of {first.info.name}, by the same {results.unit} (below 0: better)",
        f"{'':<{wide}}{'arm':<9}{head:>8}   " + "".join(f"{row:<{WIDE}}" for row in rows),
    ]
    for own in results.checkpoints:
        found = results.between.get(own.info.name)
        cells = "".join(f"{interval(found[row], 4, signed=True):<{WIDE}}" for row in rows) if found else ""
        lines.append(f"{own.info.name:<{wide}}{own.main:<9}{_number(own.losses[own.main][head]):>8}   {cells}")
    return lines


def _name(value: Any) -> Any:
    """What a thing is called: a name stands for itself, or beside a digest."""
    return value.get("name") if isinstance(value, dict) else value


def _number(value: Estimate, digits: int = 3, times: float = 1) -> str:
    return f"{times * value.mean:.{digits}f}" if value.n else "-"
