"""Cells and tables of a report: numbers with their intervals, columns for a terminal, tables in Markdown."""

from __future__ import annotations

import math
from collections.abc import Sequence

from eval.stats.paired import Interval
from eval.stats.verdict import p_words

Row = Sequence[str]


def p_value(p: float) -> str:
    """Returns a p-value as a cell; "-" where there is none."""
    return "-" if math.isnan(p) else p_words(p).removeprefix("p ").removeprefix("= ")


def number(value: float, form: str, end: str = "") -> str:
    """Returns a number as a cell; "-" where there is none."""
    return f"{value:{form}}{end}" if math.isfinite(value) else "-"


def count(units: float) -> str:
    """Returns a number of units as a cell."""
    return "-" if math.isnan(units) else f"{units:,.0f}" if math.isfinite(units) else "more than a million"


def with_bounds(value: Interval, digits: int = 4) -> str:
    """Returns a mean with its interval as a cell."""
    if math.isnan(value.mean):
        return "-"
    bounds = "" if math.isnan(value.low) else f" [{value.low:+z.{digits}f}, {value.high:+z.{digits}f}]"
    return f"{value.mean:+z.{digits}f}{bounds}"


def percent(value: Interval) -> str:
    """Returns a share with its interval in percent as a cell."""
    return with_bounds(Interval(*(100 * number for number in value)), 1)


def aligned(heads: Row, rows: Sequence[Row]) -> list[str]:
    """Returns columns for a terminal; words aligned left, numbers right."""
    wide = [max(map(len, column)) for column in zip(heads, *rows, strict=True)]
    words = [any(cell[:1].isalpha() for cell in column) for column in zip(*rows, strict=True)] if rows else []
    return [
        "  ".join(
            cell.ljust(width) if left else cell.rjust(width) for cell, width, left in zip(row, wide, words, strict=True)
        ).rstrip()
        for row in [heads, *rows]
    ]


def pipes(heads: Row, rows: Sequence[Row]) -> str:
    """Returns a table in Markdown."""
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in lines)
