"""What the page is made of: sections of figures, tables and notes. All of it is data; `eval.report.markup` escapes it.
Imports no jax."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from eval.stats.estimates import Estimate, interval
from ttt_jax.config import FRAME_RATE


class Cell(NamedTuple):
    """A cell of a table."""

    text: str
    value: float | None = None
    """What the column is sorted by and what the CSV holds, where the cell is a number."""
    bounds: tuple[float, float] | None = None
    """Of its 95 % interval; the CSV gives them columns of their own."""
    kind: str = ""
    """"good" or "bad" for a result, "code" for a digest, "tags" for words of a list."""


NOTHING = Cell("–")
"""What was not measured."""

Row = Sequence[Cell]


class Table(NamedTuple):
    """A table with a title and a sentence of what it shows."""

    title: str
    caption: str
    heads: Sequence[str]
    rows: Sequence[Row]
    runs: frozenset[str] = frozenset()
    """Keys of the runs that it is of; empty: of none in particular."""
    apart: bool = False
    """Whether it is set apart, as its numbers were not measured here."""


class Series(NamedTuple):
    """A curve, or a group of bars."""

    name: str
    x: Sequence[float | str]
    y: Sequence[float]
    low: Sequence[float] = ()
    """Bounds of 95 % intervals, or nothing."""
    high: Sequence[float] = ()
    n: Sequence[int] = ()
    """Units of each mean."""
    colour: str = "#000000"
    """#000000 becomes the page's colour of text."""
    dash: str = ""
    """"dash" or "dot" for a curve that may lie on another one."""
    run: str = ""
    """Key of its run, if a filter of the runs hides it."""
    choice: str = ""
    """Entry of the figure's choice that shows it."""


class Figure(NamedTuple):
    """A figure with a title and a sentence of what is seen."""

    title: str
    caption: str
    x: str
    """What the axis is, with its unit."""
    y: str
    series: Sequence[Series]
    runs: frozenset[str]
    kind: str = "lines"
    """"lines", "bars", or "points" with intervals along x."""
    marks: Sequence[tuple[float, str]] = ()
    """Places on the axis of numbers that a dotted line marks (x of lines and points, y of bars), with their words."""
    zero: bool = False
    """Whether a line at 0 is drawn."""
    from_zero: bool = False
    """Whether the axis of y begins at 0."""
    log: bool = False
    """Whether x is logarithmic."""
    choice: str = ""
    """What there is a choice of, such as TTT layer; the first entry is shown."""


class Note(NamedTuple):
    """A sentence or two; a warning if something is wrong."""

    text: str
    warning: bool = False
    runs: frozenset[str] = frozenset()


class Section(NamedTuple):
    """A part of the page."""

    name: str
    """Its anchor."""
    title: str
    lead: str
    """How to read it."""
    blocks: Sequence[Figure | Table | Note]


def estimate(value: Estimate, digits: int = 4, signed: bool = False, scale: float = 1.0) -> Cell:
    """Returns a mean with its interval, times `scale`, as a cell; `NOTHING` of no units."""
    if not value.n or not math.isfinite(value.mean):
        return NOTHING
    value = Estimate(value.mean * scale, value.low * scale, value.high * scale, value.n)
    bounds = (value.low, value.high) if math.isfinite(value.low + value.high) else None
    # Bounds of one unit are shown where its method has them (an accuracy of one item).
    text = interval(value._replace(n=2 if bounds else 1), digits, signed)
    return Cell(text, value.mean, bounds)


def number(value: float | None, form: str = ".4g") -> Cell:
    """Returns a number as a cell; `NOTHING` if it was not measured."""
    if value is None or not math.isfinite(value):
        return NOTHING
    return Cell(format(value, form), value)


def p_value(p: float | None) -> Cell:
    """Returns a p-value as a cell."""
    return Cell("< 0.001", p) if p is not None and p < 0.001 else number(p, ".3f")


def listed(names: Iterable[str], most: int = 4) -> str:
    """Returns different names as a list; of more than `most` the first, and how many others there are."""
    names = list(dict.fromkeys(names))
    rest = len(names) - most
    return ", ".join(names if rest <= 1 else [*names[:most], f"{rest} more"])


def of(name: str, sentence: str) -> str:
    """Returns a sentence that says of which run it is."""
    return sentence if sentence.startswith(name) else f"{name}: {sentence}"


def words(value: Any) -> Cell:
    """Returns a text as a cell; `NOTHING` of none."""
    return NOTHING if value is None or value == "" else Cell(str(value))


def curve(name: str, x: Sequence[float], values: Sequence[Estimate], scale: float = 1.0, **style: Any) -> Series:
    """Returns estimates at places as a series with intervals, times `scale`; places of no units are left out."""
    known = [(place, value) for place, value in zip(x, values, strict=False) if value.n and math.isfinite(value.mean)]
    places, kept = [place for place, _ in known], [value for _, value in known]
    means, lows, highs = ([scale * getattr(value, name) for value in kept] for name in ("mean", "low", "high"))
    return Series(name, places, means, lows, highs, [value.n for value in kept], **style)


def seconds(frames: float) -> float:
    """Returns the length of frames in seconds."""
    return frames / FRAME_RATE


def shades(count: int) -> list[str]:
    """Returns colours from blue over green to red, for layers in their order; all stand out on white and on black."""
    stops = ((64, 112, 200), (30, 150, 160), (90, 155, 70), (195, 135, 30), (205, 80, 65))
    colours = []
    for i in range(count):
        at = (len(stops) - 1) * (i / max(count - 1, 1))
        low = min(int(at), len(stops) - 2)
        mixed = (round(a + (at - low) * (b - a)) for a, b in zip(stops[low], stops[low + 1], strict=True))
        colours.append("#{:02x}{:02x}{:02x}".format(*mixed))
    return colours
