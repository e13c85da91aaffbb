"""ZeroSpeech 2021: sWUGGY (`lexical`) and sBLIMP (`syntactic`), whose `gold.csv` says which recordings belong together.

Columns, keys and bands as the challenge's own evaluation reads them (github.com/zerospeech/zerospeech2021).
"""

from __future__ import annotations

import csv
import io
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from eval.benchmarks.layouts import joining
from eval.benchmarks.layouts.joining import Recording
from eval.benchmarks.pairs import Task
from eval.results.schema import Skipped
from ttt_jax.errors import InputError
from ttt_jax.utils.files import file_digest
from ttt_jax.utils.paths import whole_name

GOLD = "gold.csv"
SPLITS = ("dev", "test")
LEXICAL, SYNTACTIC = "lexical", "syntactic"
"""Folders of the two benchmarks, also in submissions."""
BAND_STARTS = (0, 1, 5, 20, 100)
BANDS = ("oov", "1-5", "6-20", "21-100", ">100")
"""Official labels of the bands that begin at `BAND_STARTS`. They are off by one: a word that occurs 5 times is in 6-20.
They stand as they are, so that scores compare."""


class _Layout(NamedTuple):
    folder: str
    task: str
    key: tuple[str, ...]
    """Columns; without the voice they name the item."""
    labels: dict[str, Callable[[str], str]]
    """The label that a cell of the column of this name becomes."""


def lexical(folder: Path, split: str | None = None) -> Task:
    """Returns sWUGGY: words against non-words, a pair for each voice and id.

    Args:
      folder: holds `lexical`, or is it, or is the folder of a split within it.
      split: dev or test; None for dev where it exists, else test.

    Raises `InputError` if there is no such set, `gold.csv` lacks a column, or no pair is usable.
    """
    return _read(_LEXICAL, folder, split)


def syntactic(folder: Path, split: str | None = None) -> Task:
    """Returns sBLIMP: grammatical sentences against ungrammatical ones, a pair for each type, subtype, id and voice.

    An id is unique only within its subtype. Arguments and errors as of `lexical`, with the folder `syntactic`.
    """
    return _read(_SYNTACTIC, folder, split)


def band(frequency: float) -> str:
    """Returns the official label of a word that occurs `frequency` times in LibriSpeech; "" below 0 and for NaN."""
    return BANDS[bisect_right(BAND_STARTS, frequency) - 1] if frequency >= 0 else ""


def _frequency(cell: str) -> str:
    return band(float(cell)) if cell else ""


def _length(cell: str) -> str:
    return str(int(float(cell))) if cell else ""


_LEXICAL = _Layout(LEXICAL, "swuggy", ("voice", "id"), {"frequency": _frequency, "length": _length, "voice": str})
_SYNTACTIC = _Layout(
    SYNTACTIC, "sblimp", ("type", "subtype", "id", "voice"), {"type": str, "subtype": str, "voice": str}
)


def _read(layout: _Layout, folder: Path, split: str | None) -> Task:
    data, split = _find(layout.folder, folder, split)
    columns = dict.fromkeys(("filename", "correct", *layout.key, *layout.labels))
    rows, problems = _rows(data / GOLD, list(columns))
    files = Counter(row["filename"] for row in rows)
    recordings = [_recording(layout, data, row, files[row["filename"]]) for row in rows]
    about = {"folder": str(folder), "gold_sha256": file_digest(data / GOLD)}
    return joining.task(layout.task, split, tuple(layout.labels), recordings, problems, data, about)


def _find(name: str, folder: Path, split: str | None) -> tuple[Path, str]:
    """Returns the folder that holds `GOLD`, and its split."""
    if split not in (None, *SPLITS):
        raise InputError(f"there is no split {split}: give dev or test.")
    wanted = SPLITS if split is None else (split,)
    if (folder / GOLD).is_file():
        if whole_name(folder) in wanted:
            return folder, whole_name(folder)
        raise InputError(f"{folder} holds {GOLD} but is not called {' or '.join(wanted)}: rename it, or give another.")
    places = [base / split for base in (folder / name, folder) for split in wanted]
    for place in places:
        if (place / GOLD).is_file():
            return place, place.name
    for place in places:
        if place.is_dir():
            raise InputError(
                f"{place} has no {GOLD}, without which nobody knows which recordings belong together: take it from the"
                " present download (docs/evaluation/benchmark_data.md)."
            )
    splits = " or ".join(f"{name}/{split}" for split in wanted)
    raise InputError(f"{folder} holds no {splits}: give a folder in the layout of docs/evaluation/benchmark_data.md.")


def _rows(path: Path, columns: list[str]) -> tuple[list[dict[str, str]], list[Skipped]]:
    """Returns the rows of a table as text by column, and the lines that are none."""
    try:
        reader = csv.reader(io.StringIO(path.read_text(encoding="utf-8-sig")))
        lines = [(reader.line_num, [cell.strip() for cell in cells]) for cells in reader if cells]
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}): copy it again.") from None
    except (UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{path} is no table of comma-separated UTF-8 text ({error}): copy it again.") from None
    header = lines[0][1] if lines else []
    for column in columns:
        if header.count(column) != 1:
            what = "two columns" if column in header else "no column"
            raise InputError(
                f"{path} has {what} {column} (its first line is {','.join(header)[:200]!r}): it needs a header with"
                f" {', '.join(columns)}, once each."
            )
    rows, problems = [], []
    for number, cells in lines[1:]:
        if len(cells) == len(header):
            rows.append(dict(zip(header, cells, strict=True)))
        else:
            reason = f"it has {len(cells)} fields, the header has {len(header)}"
            problems.append(Skipped(f"line {number} of {path.name}", reason))
    return rows, problems


def _recording(layout: _Layout, data: Path, row: dict[str, str], uses: int) -> Recording:
    """Returns the recording of a row; `uses` rows name its file."""
    name, right = row["filename"], row["correct"] == "1"
    labels, problem = {}, ""
    for column, label in layout.labels.items() if right else ():
        try:
            labels[column] = label(row[column])
        except (ValueError, OverflowError):
            problem = f"{column} of {name} is {row[column]!r}, which is no number"
    if row["correct"] not in ("0", "1"):
        problem = f"correct of {name} is {row['correct']!r}: it must be 1 or 0"
    elif empty := [column for column in ("filename", *layout.key) if not row[column]]:
        problem = f"{empty[0]} is empty"
    elif name != Path(name).name or "\\" in name or "\0" in name:
        problem = f"filename {name!r} is a path: it must be the name of a file in the same folder"
    elif uses > 1:
        problem = f"duplicate: {uses} rows name the file {name}"
    key = tuple(row[column] for column in layout.key)
    item = tuple(row[column] for column in layout.key if column != "voice")
    return Recording(key, item, data / f"{name}.wav", right, labels, problem)
