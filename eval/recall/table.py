"""The results of `python -m eval recall` as a table for a terminal, and as rows of items.csv. Imports no jax."""

from __future__ import annotations

import csv
import io
import math
import textwrap
from collections.abc import Iterator, Mapping, Sequence

from eval.recall.analysis import benefits, heard, unheard
from eval.recall.play import ROWS, Played
from eval.recall.results import KINDS, CheckpointRecall, Curve, Dropped, RecallResults
from eval.stats.estimates import Estimate, interval
from eval.stats.paired import MeanTest
from eval.stats.verdict import p_cell
from eval.streaming.weighting import WEIGHTINGS
from ttt_jax.config import FRAME_RATE
from ttt_jax.utils.command import shortened

ITEMS = "items.csv"
WIDTH = 120
DIGITS = 5
"""Of a benefit in nats: arms without memory are 0 to all of them."""


def table(results: RecallResults) -> str:
    """Returns the results for a terminal: the setting, and for each checkpoint and kind a row for each gap
    and arm, at most `WIDTH` characters wide unless names are long."""
    blocks = [_head(results)]
    for checkpoint in results.checkpoints:
        for kind, curve in checkpoint.curves.items():
            blocks.append(_curve(checkpoint, kind, curve))
    first = results.checkpoints[0].info.name
    for name, by_kind in results.between.items():
        for kind, gaps in by_kind.items():
            rows = [["gap", "benefit more", "p"]]
            rows += [[f"{one.gap / FRAME_RATE:g} s", _interval(one.test), p_cell(one.p_holm)] for one in gaps]
            blocks.append(
                [f"{name} minus {first}, {kind}, on the same items: above 0 it recalls more", *_aligned(rows)]
            )
    return "\n\n".join("\n".join(line.rstrip() for line in block) for block in blocks)


def dropped(gaps: Sequence[Dropped]) -> list[str]:
    """Returns a sentence for each reason for which gaps were dropped."""
    by_reason: dict[tuple[str, str], list[str]] = {}
    for kind, gap, reason in gaps:
        by_reason.setdefault((kind, reason), []).append(f"{gap / FRAME_RATE:g}")
    return shortened([f"{kind} at {', '.join(at)} s: {reason}" for (kind, reason), at in by_reason.items()])


def _head(results: RecallResults) -> list[str]:
    setting = results.setting
    width = max(map(len, setting.arms))
    lines = [
        f"excerpts of {setting.excerpt / FRAME_RATE:g} s, at most {setting.items} items a gap, seed {setting.seed};"
        f" codebooks weighted {setting.weighting}: {WEIGHTINGS[setting.weighting]}",
        "benefit: nats per token that having heard it saves the second time [95 % interval over units]; p: persist"
        " against this arm, adjusted over the gaps (Holm)",
        *(f"  {arm:<{width}}  {meaning}" for arm, meaning in setting.arms.items()),
    ]
    return [part for line in lines for part in _wrapped(line)]


def _curve(checkpoint: CheckpointRecall, kind: str, curve: Curve) -> list[str]:
    rows = [["gap", "", "items", "arm", "benefit", "p"]]
    for point in curve.gaps:
        items = f"{point.items}" + (f" of {point.items + point.failed}" if point.failed else "")
        about = [f"{point.seconds:g} s", point.where, f"{items}, {point.units} {point.unit}"]
        for arm, own in point.arms.items():
            p = p_cell(point.against[arm].p_holm) if arm in point.against else ""
            rows.append([*about, arm, interval(own.benefit, DIGITS, signed=True), p])
            about = [""] * len(about)
    title = f"{checkpoint.info.name}, {kind}: {KINDS[kind]}"
    return [*_wrapped(title), *_aligned(rows), *_wrapped(curve.verdict)]


def _wrapped(text: str) -> list[str]:
    return textwrap.wrap(text, WIDTH, subsequent_indent="    ")


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return ["  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)) for row in rows]


def _interval(test: MeanTest) -> str:
    return interval(Estimate(test.mean, test.low, test.high, test.n), DIGITS, signed=True)


def items_csv(played: Mapping[str, Sequence[Played]]) -> str:
    """Returns the items by checkpoint as CSV: a line for each item and arm, nats per token."""
    content = io.StringIO()
    writer = csv.writer(content, lineterminator="\n")
    names = ["checkpoint", "kind", "gap_seconds", "item", "unit", "same", "control", "arm"]
    writer.writerow([*names, *(f"{what}_{row}" for row in ROWS for what in ("benefit", "heard", "unheard"))])
    for checkpoint, items in played.items():
        for one in items:
            writer.writerows([checkpoint, *cells] for cells in _cells(one))
    return content.getvalue()


def _cells(played: Played) -> Iterator[list[object]]:
    item = played.item
    about = [item.kind, item.gap / FRAME_RATE, item.number, item.unit, *item.excerpts]
    if played.losses is None:
        yield [*about, "not finite", *[""] * (3 * len(ROWS))]
        return
    for arm, losses in played.losses.items():
        values = zip(benefits(losses), heard(losses), unheard(losses), strict=True)
        yield [*about, arm, *("" if math.isnan(value) else f"{value:.7g}" for row in values for value in row)]
