"""Parts of the page as HTML. Every text is escaped here, so a name is never markup. Imports no jax."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Sequence
from html import escape
from typing import Any

from eval.report.parts import NOTHING, Cell, Figure, Note, Section, Table
from eval.results.schema import plain

DIGITS = 6
"""Significant digits of numbers in figures."""


def section(part: Section, first: int) -> str:
    """Returns a section as HTML; its figures are numbered from `first`."""
    blocks, number = [], first
    for is_figure, group in itertools.groupby(part.blocks, lambda block: isinstance(block, Figure)):
        group = list(group)
        for i, block in enumerate(group):
            if is_figure:  # two stand side by side, so that of an odd number the first takes both places
                blocks.append(figure(block, number, wide=i == 0 and len(group) % 2 == 1))
                number += 1
            else:
                blocks.append(note(block) if isinstance(block, Note) else table(block))
    return (
        f'<section id="{part.name}" aria-labelledby="{part.name}-title">\n<h2 id="{part.name}-title">'
        f'{escape(part.title)}</h2>\n<p class="lead">{escape(part.lead)}</p>\n<div class="cards">\n'
        + "\n".join(blocks)
        + "\n</div>\n</section>"
    )


def figure(part: Figure, number: int, wide: bool = False) -> str:
    """Returns a figure; the script draws figure `number` of the data into it."""
    choices = list(dict.fromkeys(one.choice for one in part.series if one.choice))
    choice = ""
    if len(choices) > 1:
        options = "".join(f"<option>{escape(name)}</option>" for name in choices)
        choice = f"<label>{escape(part.choice)} <select>{options}</select></label>"
    return (
        f'<figure class="card plotted{" wide" * wide}" data-figure="{number}"{_runs(part.runs)}>\n'
        f"<h3>{escape(part.title)}</h3>{choice}\n"
        f'<div class="plot" role="img" aria-label="{escape(f"{part.title}. {part.caption}")}"></div>\n'
        f"<figcaption>{escape(part.caption)}</figcaption>\n"
        f'<div class="tools"><details><summary>Data table</summary></details>{_csv(part.title)}</div>\n</figure>'
    )


def table(part: Table, keys: Sequence[str] = (), name: str = "") -> str:
    """Returns a table.

    Args:
      keys: of each row's run, for a filter; name: its anchor, if it has one.
    """
    numeric = [any(row[i].value is not None for row in part.rows) for i in range(len(part.heads))]
    heads = "".join(
        f'<th scope="col"{_class("number" if is_number else "")}>{escape(head)}</th>'
        for head, is_number in zip(part.heads, numeric, strict=True)
    )
    rows = []
    for i, row in enumerate(part.rows):
        key = f' data-run="{keys[i]}"' if keys else ""
        first, *rest = (f"{_data(cell, *of)}>{_content(cell)}" for cell, *of in zip(row, numeric, strict=True))
        cells = "".join(f"<td{cell}</td>" for cell in rest)
        rows.append(f'<tr{key}><th scope="row"{first}</th>{cells}</tr>')
    anchor = f' id="{name}"' if name else ""
    return (
        f'<div class="card tabled{" apart" * part.apart}"{_runs(part.runs)}>\n'
        f'<div class="head"><h3>{escape(part.title)}</h3>{_csv(part.title)}</div>\n'
        f'<p>{escape(part.caption)}</p>\n<div class="scroll" tabindex="0" role="region"'
        f' aria-label="{escape(part.title)}"><table{anchor}>\n<thead><tr>{heads}</tr></thead>\n<tbody>\n'
        + "\n".join(rows)
        + "\n</tbody></table></div>\n</div>"
    )


def note(part: Note) -> str:
    """Returns a note or a warning."""
    kind = "warning" if part.warning else "note"
    return f'<p class="card {kind}"{_runs(part.runs)}>{escape(part.text)}</p>'


def chips(tags: Iterable[str]) -> str:
    """Returns a button for each tag."""
    buttons = "".join(f'<button type="button" class="chip" aria-pressed="false">{escape(tag)}</button>' for tag in tags)
    return f'<div class="chips" role="group" aria-label="Show runs with these tags">{buttons}</div>' if buttons else ""


def data(content: Any) -> str:
    """Returns JSON that may stand in a script element: nothing in it ends the element."""
    text = json.dumps(_short(plain(content)), ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    text = text.encode("utf-8", "backslashreplace").decode()  # of bytes in a name that are not UTF-8
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


def _short(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.{DIGITS}g}")
    if isinstance(value, dict):
        return {name: _short(item) for name, item in value.items()}
    return [_short(item) for item in value] if isinstance(value, list) else value


def _runs(keys: Iterable[str]) -> str:
    keys = sorted(keys)
    return f' data-runs="{" ".join(keys)}"' if keys else ""


def _csv(title: str) -> str:
    return f'<button type="button" class="csv" aria-label="{escape(f"CSV: {title}")}">CSV</button>'


def _class(names: str) -> str:
    return f' class="{names}"' if names else ""


def _data(cell: Cell, numeric: bool) -> str:
    """Returns the attributes of a cell; those of a `numeric` column are aligned as numbers."""
    value = "" if cell.value is None else f' data-value="{cell.value!r}"'
    bounds = "" if cell.bounds is None else f' data-low="{cell.bounds[0]!r}" data-high="{cell.bounds[1]!r}"'
    names = [*(["number"] if numeric else []), *(["none"] if cell == NOTHING else [])]
    return value + bounds + _class(" ".join(names))


def _content(cell: Cell) -> str:
    text = escape(cell.text)
    if cell.kind == "tags":
        return " ".join(f'<span class="tag">{escape(tag)}</span>' for tag in cell.text.split(", "))
    if cell.kind == "code":
        return f"<code>{text}</code>"
    return f'<span class="{cell.kind}">{text}</span>' if cell.kind else text
