"""The page: sections, style, scripts and data in one file that needs no network. Imports no jax."""

from __future__ import annotations

import base64
import datetime
import hashlib
from collections.abc import Sequence
from html import escape
from importlib import metadata
from pathlib import Path
from string import Template

from eval.report import diagnostics, markup, pairs, persistence, recalls, streams
from eval.report.collect import Collected, LeftOut, Source
from eval.report.parts import Cell, Figure, Section, Table, listed, words
from eval.report.runs import Runs
from ttt_jax.errors import InputError
from ttt_jax.utils.command import version

MARKER = '<meta name="generator" content="python -m eval report">'
"""Stands near the start of every page; only a file with it is replaced."""
HEAD = 4096
"""Bytes of a file in which the marker is looked for."""
FILES = Path(__file__).with_name("page")


def check(path: Path) -> None:
    """Raises `InputError` unless a page may be written to `path`: nothing is there, or a page of this command."""
    if path.is_dir():
        raise InputError(f"--out {path} is a folder: give the name of a file.")
    if not path.absolute().parent.is_dir():
        raise InputError(f"--out {path} cannot be written, as {path.parent} is no folder: make it first.")
    if not path.exists():
        return
    try:
        with path.open("rb") as file:
            ours = MARKER.encode() in file.read(HEAD)
    except OSError as error:
        raise InputError(f"--out {path} cannot be read ({error.strerror}): give another file.") from None
    if not ours:
        raise InputError(f"--out {path} is a file that this command did not write: give another one, or remove it.")


def render(collected: Collected, runs: Runs, title: str) -> tuple[bytes, list[LeftOut]]:
    """Returns the page in UTF-8, and all results that are not on it or only in part."""
    left_out = [*collected.left_out]
    sources = collected.sources
    found = [
        *pairs.sections(runs, sources),
        *streams.sections(runs, sources, left_out),
        *recalls.sections(runs, sources),
        *persistence.sections(runs, sources),
        *diagnostics.sections(runs, sources, left_out),
    ]
    differences = runs.differences()
    if differences is not None:
        lead = (
            "Where the configurations of the runs differ, and where their weights come from. A dash: the field is not"
            " there."
        )
        found.append(Section("configuration", "Configurations", lead, [differences]))
    found.append(_origin(sources, left_out))
    figures = [block for section in found for block in section.blocks if isinstance(block, Figure)]
    parts, number = [], 0
    for section in found:
        parts.append(markup.section(section, number))
        number += sum(isinstance(block, Figure) for block in section.blocks)
    table = runs.table(sources)
    tags = dict.fromkeys(tag for run in runs.all for tag in run.tags)
    known = [{"key": run.key, "tags": run.tags} for run in runs.all]
    script = (FILES / "report.js").read_text("utf-8")
    library, plotly = _library()
    now = datetime.datetime.now().astimezone()
    page = Template((FILES / "report.html").read_text("utf-8")).substitute(
        marker=MARKER,
        policy=f"default-src 'none'; script-src {_hash(library)} {_hash(script)}; style-src 'unsafe-inline';"
        " img-src data: blob:; base-uri 'none'; form-action 'none'",
        title=escape(title),
        made=escape(
            f"{_count(len(runs.all), 'run')}, {_count(len(sources), 'result folder')}; made on {now:%d %B %Y, %H:%M %Z}"
            f" with ttt_jax {version()}"
        ),
        time=now.isoformat(timespec="minutes"),
        links="".join(f'<li><a href="#{part.name}">{escape(part.title)}</a></li>' for part in found),
        chips=markup.chips(tags),
        runs=markup.table(table, [run.key for run in runs.all], "runs-table"),
        sections="\n".join(parts),
        plotly=escape(f"plotly {plotly}"),
        style=(FILES / "report.css").read_text("utf-8"),
        library=library,
        script=script,
        data=markup.data(
            {"runs": known, "figures": [figure._asdict() | {"runs": sorted(figure.runs)} for figure in figures]}
        ),
    )
    return page.encode("utf-8", "backslashreplace"), left_out


def _library() -> tuple[str, str]:
    """Returns plotly.js with its notice of the licence, and the version of the package plotly, which brings it."""
    from plotly.offline import get_plotlyjs

    script = get_plotlyjs().replace("\r\n", "\n")  # as a browser reads it, so that its hash is right
    return script, metadata.version("plotly")


def _hash(script: str) -> str:
    """Returns the source expression that allows a script of this text and no other."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'"


def _origin(sources: Sequence[Source], left_out: Sequence[LeftOut]) -> Section:
    """Returns the section that names every result folder, and what is not on the page."""
    rows = []
    for source in sources:
        machine = source.about.get("evaluated_with") or {}
        versions = machine.get("versions") or {}
        seconds = (source.about.get("cost") or {}).get("seconds")
        names = listed(info.name for info in source.checkpoints)
        written = datetime.datetime.fromtimestamp((source.folder / "results.json").stat().st_mtime)
        rows.append(
            (
                Cell(str(source.folder)),
                Cell(source.command),
                words(names),
                words(versions.get("ttt_jax")),
                words(versions.get("jax")),
                words(machine.get("device")),
                Cell(f"{seconds:.0f}", seconds) if isinstance(seconds, int | float) else words(None),
                Cell(f"{written:%Y-%m-%d %H:%M}"),
            )
        )
    blocks = []
    if rows:
        heads = ("Folder", "Command", "Checkpoints", "ttt_jax", "jax", "Device", "Seconds", "File written")
        caption = "Every result folder that this page shows; versions are those that made the numbers."
        blocks.append(Table("Result folders", caption, heads, rows))
    if left_out:
        caption = "Results that are not on this page, or only in part. What was not run is not listed."
        rows = [(Cell(entry.path), Cell(entry.reason)) for entry in left_out]
        blocks.append(Table("Left out", caption, ("Where", "Why"), rows))
    return Section("origin", "Sources", "Where the numbers come from: folders, versions and devices.", blocks)


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'s' * (number != 1)}"
