"""The results of `eval.streaming.summary` as a table for a terminal."""

from __future__ import annotations

import numpy as np

from eval.stats.estimates import Estimate, interval
from eval.streaming.results import ALL, BEYOND, LAST, LATER, RESETTING, TREND, CheckpointResults, Results
from eval.streaming.weighting import WEIGHTINGS
from ttt_jax.config import FRAME_RATE

POSITIONS, THINNED = 10, 8
"""Rows of the table by position: all windows up to the first number; of more the second, evenly spaced."""

LABEL, WIDE = 18, 28
"""Columns of a row's label, and of a difference with its interval."""


def table(results: Results) -> str:
    """Returns the results for a terminal: the setting, a block for each checkpoint, and how checkpoints compare."""
    blocks = [_head(results), *(_checkpoint(results, checkpoint) for checkpoint in results.checkpoints)]
    if len(results.checkpoints) > 1:
        blocks.append(_between(results))
    return "\n\n".join("\n".join(line.rstrip() for line in block) for block in blocks)


def shown(values: list[Estimate], units: int) -> int:
    """Returns how many leading windows more than half of the units reach; an interval over fewer would mislead."""
    return sum(value.n > units / 2 for value in values)


def span(start: float, end: float) -> str:
    """Returns a stretch of a stream in seconds; beyond the tenth minute in minutes and seconds."""
    if end <= 600:
        digits = 0 if start == int(start) and end == int(end) else 1
        return f"{start:.{digits}f} to {end:.{digits}f} s"
    return " to ".join(f"{int(at // 60)}:{int(at % 60):02d}" for at in (start, end))


def _head(results: Results) -> list[str]:
    setting, frames = results.setting, [file.frames for file in results.files]
    parts = [_count(len(frames), "files")]
    if results.unit != "files":
        parts[0] += f" of {_count(results.units, results.unit)}"
    length = f"{min(frames)} to {max(frames)}" if len(frames) > 1 else frames[0]
    parts.append(f"{length} frames ({sum(frames) / FRAME_RATE / 60:.1f} minutes in all)")
    if results.skipped:
        parts.append(f"{len(results.skipped)} skipped")
    for name, value in setting.about.items():
        value = value.get("name") if isinstance(value, dict) else value  # a name stands beside a digest
        parts += [f"{name} {value}"] if isinstance(value, str) else []
    width = max(map(len, setting.arms))
    return [
        ", ".join(parts) + ("," if setting.text else ""),
        *([setting.text] if setting.text else []),
        f"[95 % interval over {results.unit}]; where codebooks are one number they are weighted {setting.weighting}:"
        f" {WEIGHTINGS[setting.weighting]}",
        *(f"  {arm:<{width}}  {meaning}" for arm, meaning in setting.arms.items()),
    ]


def _count(number: int, nouns: str) -> str:
    return f"{number} {nouns.removesuffix('s') if number == 1 else nouns}"


def _checkpoint(results: Results, checkpoint: CheckpointResults) -> list[str]:
    info = checkpoint.info
    layers = f"TTT layers {', '.join(map(str, info.ttt_layers))}" if info.ttt_layers else "no TTT layers"
    resets = f", resets every {results.setting.reset_every} frames" if set(RESETTING) & set(checkpoint.arms) else ""
    sink = f" with a sink of {info.attention_sink}" if info.attention_sink else ""
    lines = [f"{info.name}: {layers}, attention window {info.context} frames{sink}{resets}"]
    parts = [part(results, checkpoint) for part in (_streams, _positions, _differences, _inner)]
    for part in [*parts, [checkpoint.verdict]]:
        lines += ["", *part] if part else []
    return lines


def _streams(results: Results, checkpoint: CheckpointResults) -> list[str]:
    """Returns losses by stream and weighting, arms side by side; then entropy, accuracy and the distance to off."""
    head = results.setting.weighting
    columns = [arm for arm in checkpoint.losses if arm in (*checkpoint.arms, "unigram")]
    compared = f"   unigram minus {checkpoint.main}" if checkpoint.against_unigram else ""
    lines = [f"{'nats per token':<{LABEL}}" + "".join(f"{arm:>10}" for arm in columns) + compared]

    def row(name: str, cells: list[str], end: str = "") -> None:
        lines.append(f"{name:<{LABEL}}" + "".join(f"{cell:>10}" for cell in cells) + end)

    # "semantic" would repeat the first codebook.
    for name in [*results.setting.streams, *(name for name in WEIGHTINGS if name != "semantic")]:
        if not checkpoint.losses[checkpoint.main][name].n:
            continue
        better = f"   {interval(checkpoint.against_unigram[name], 3)}" if compared else ""
        row(name, [_number(checkpoint.losses[arm][name]) for arm in columns], better)
    row("entropy", [_number(checkpoint.entropy[arm][head]) for arm in checkpoint.arms])
    row("top-1 accuracy %", [_number(checkpoint.accuracy[arm][head], 1, 100) for arm in checkpoint.arms])
    if checkpoint.against_off:
        off = {arm: checkpoint.against_off.get(arm) for arm in checkpoint.arms}
        row("KL to off", [_number(there["kl"], 4) if there else "-" for there in off.values()])
        row("top-1 changed %", [_number(there["changed"], 1, 100) if there else "-" for there in off.values()])
    return lines


def _positions(results: Results, checkpoint: CheckpointResults) -> list[str]:
    """Returns losses of the main arm and two differences in windows that more than half of the units reach (of many
    windows some, evenly spaced), and their slopes."""
    losses, differences = checkpoint.by_position["losses"][checkpoint.main], checkpoint.by_position["against_persist"]
    count = shown(losses, results.units)
    if not count:
        return []
    rows = np.arange(count) if count <= POSITIONS else np.linspace(0, count - 1, THINNED).round().astype(int)
    arms = sorted(differences, key=lambda arm: arm not in ("reset", "off"))[:2]
    seconds = results.setting.window / FRAME_RATE
    longest = max(file.frames for file in results.files) / FRAME_RATE
    title = "by position" + (f", {len(rows)}/{count}" if len(rows) < count else "")
    heads = "".join(f"{f'{arm} minus persist':<{WIDE}}" for arm in arms)
    lines = [f"{title:<21}{results.unit:>8}   {checkpoint.main:<24}{heads}"]

    def row(name: str, loss: Estimate, signed: bool, values: list[Estimate]) -> None:
        cells = "".join(f"{interval(value, 4, signed=True):<{WIDE}}" for value in values)
        lines.append(f"{name:<21}{loss.n:>8}   {interval(loss, 3, signed=signed):<24}{cells}")

    for i in rows:
        name = span(i * seconds, min((i + 1) * seconds, longest))
        row(name, losses[i], False, [differences[arm][i] for arm in arms])
    slopes = checkpoint.slopes
    if slopes["losses"][checkpoint.main].n:
        values = [slopes["against_persist"][arm] for arm in arms]
        row("per 1,000 frames", slopes["losses"][checkpoint.main], True, values)
    return lines


def _differences(results: Results, checkpoint: CheckpointResults) -> list[str]:
    """Returns the differences from persist, by arm and part of the files."""
    if not checkpoint.against_persist:
        return []
    parts = [ALL, *([LATER] if set(RESETTING) & set(checkpoint.arms) else []), BEYOND]
    lines = [f"{'minus persist':<15}" + "".join(f"{part:<{WIDE}}" for part in parts) + "(above 0: memory helps)"]
    for arm, by_part in checkpoint.against_persist.items():
        values = [by_part[part][results.setting.weighting] for part in parts]
        lines.append(f"{arm:<15}" + "".join(f"{interval(value, 4, signed=True):<{WIDE}}" for value in values))
    return lines


def _inner(results: Results, checkpoint: CheckpointResults) -> list[str]:
    """Returns inner losses by TTT layer: means over frames; the gain over all frames and in the last window; its
    trend."""
    lines = [
        f"{'inner losses':<15}{'l(W0)':>8}{'before':>8}{'after':>8}  "
        f" {'gain: l(W0) - before':<{WIDE}}{'gain in the last window':<{WIDE}}per 1,000 frames"
    ]
    for layer, values in checkpoint.inner.get(checkpoint.main, {}).items():
        means = "".join(f"{_number(values[name]):>8}" for name in ("loss_base", "loss_before", "loss_after"))
        digits = 4 if values["loss_base"].mean < 1 else 2  # inner losses grow with the heads' width
        gains = "".join(f"{interval(values[name], digits, signed=True):<{WIDE}}" for name in ("gain", LAST, TREND))
        lines.append(f"{f'TTT layer {layer}':<15}{means}   {gains}")
    return lines if len(lines) > 1 else []


def _between(results: Results) -> list[str]:
    first, head = results.checkpoints[0], results.setting.weighting
    rows = list(dict.fromkeys([head, "semantic", "acoustic", "text"]))[:4]
    rows = [row for row in rows if first.losses[first.main][row].n]
    wide = max(len(checkpoint.info.name) for checkpoint in results.checkpoints) + 2
    lines = [
        f"checkpoints: loss minus that of {first.info.name}, by the same {results.unit} (below 0: better)",
        f"{'':<{wide}}{'arm':<9}{head:>8}   " + "".join(f"{row:<{WIDE}}" for row in rows),
    ]
    for checkpoint in results.checkpoints:
        differences = results.between.get(checkpoint.info.name)
        cells = [f"{interval(differences[row], 4, signed=True):<{WIDE}}" for row in rows] if differences else []
        loss = _number(checkpoint.losses[checkpoint.main][head])
        lines.append(f"{checkpoint.info.name:<{wide}}{checkpoint.main:<9}{loss:>8}   {''.join(cells)}")
    return lines


def _number(value: Estimate, digits: int = 3, times: float = 1) -> str:
    return f"{times * value.mean:.{digits}f}" if value.n else "-"
