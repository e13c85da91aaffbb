"""Folders of results: how they are called, what may be replaced in them, and how. Imports no jax.

What is in a folder is replaced by the same again: the same data, checkpoints and question. Anything else is refused.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from ttt_jax.data.manifest import MANIFEST
from ttt_jax.errors import InputError
from ttt_jax.utils.files import run_and_step
from ttt_jax.utils.paths import local, whole_name

RESULTS = "results.json"
"""What says what a folder's results are of."""
OWN_DATA = "the held-out files of its run"
"""As `Subject.data`: none was asked for."""

Results = TypeVar("Results")


class Subject(NamedTuple):
    """What results are of."""

    data: str
    """As it was asked for."""
    files: dict[str, str]
    """Digests of the tokens that were streamed, by the file's name."""
    skipped: frozenset[str]
    """Names of files that could not be used."""
    checkpoints: tuple[tuple[str, str | None], ...]
    """Of each what it is called and the digest of its weights."""
    setting: dict[str, Any]
    """What other numbers would come of, by the name of its flag."""
    measured: frozenset[str] = frozenset()
    """What is stored of them: to replace it, as much has to be measured again."""
    frames: dict[str, int] = {}
    """How many of each file were streamed, where that is known; they are part of its digest."""


def checkpoint(name: str, about: dict[str, Any]) -> tuple[str, str | None]:
    """An entry of `Subject.checkpoints`, from what results say of a checkpoint."""
    step, weights = about.get("step"), about.get("weights")
    parts = [*([f"step {step}"] if step is not None else []), f"weights {(weights or 'unknown')[:12]}"]
    return f"{name} ({', '.join(parts)})", weights


def find(out: str | None, kind: str, checkpoint: str, data: str | None) -> Path:
    """The folder that results go to: `out`, or KIND or KIND-DATA in that of the checkpoint, for one of several of a run with its step.

    DATA is the whole name of the file or folder; of a manifest.jsonl, that of its folder.
    """
    if out is not None:
        return local(out)
    if data is not None:
        path = local(data)
        if path.name.removesuffix(".gz") == MANIFEST:
            path = path.parent
        kind = f"{kind}-{whole_name(path)}"
    path = local(checkpoint)
    run, step = run_and_step(path) or (path, None)
    return run / (kind if step is None else f"{kind}-{step}")


def make(folder: Path) -> None:
    """Make `folder` unless it is there. Raises `InputError` if it cannot be, or cannot be written to."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--out {folder} cannot be made ({error.strerror}): give another folder.") from None
    if not os.access(folder, os.W_OK):
        raise InputError(f"--out {folder} cannot be written: give another folder.")


def stored(folder: Path, record: str, read: Callable[[Path], Results], others: Iterable[str]) -> Results | None:
    """What `read` finds in `folder`; None if there are no results.

    Args:
      record: name of the file that `read` reads; others: names of what the command writes beside it.

    Raises `InputError` if what is there is another command's or nobody's, but would be replaced.
    """
    if os.path.lexists(folder / record):
        try:
            return read(folder)
        except InputError as error:
            because = f" ({str(error).rsplit(': ', 1)[0]})"
        except (AttributeError, IndexError, KeyError, TypeError, ValueError):
            because = ""
        raise InputError(
            f"{folder} holds a {record} that is not this command's, or damaged{because}: give another --out, or remove it."
        )
    if (there := next((name for name in others if os.path.lexists(folder / name)), None)) is not None:
        raise InputError(
            f"{folder} holds {there}, but no {record} that says what it is of: give another --out, or remove it."
        )
    return None


def check(folder: Path, old: Subject, new: Subject) -> None:
    """Raise `InputError` unless results of `new` may replace those of `old` in `folder`."""
    if (found := _difference(old, new)) is not None:
        raise InputError(f"{folder} holds results {found}: give another folder by --out, or remove this one.")


def _difference(old: Subject, new: Subject) -> str | None:
    if (where := _other_files(old, new)) is not None:
        return where
    if [weights for _, weights in old.checkpoints] != [weights for _, weights in new.checkpoints]:
        before, now = (", ".join(name for name, _ in one.checkpoints) for one in (old, new))
        return f"of {before}, not of {now}"
    for name, value in new.setting.items():
        if old.setting.get(name) != value:
            return f"with {name} {old.setting.get(name)}, not {value}"
    if lost := sorted(old.measured - new.measured):
        return f"of {lost[0]}, which would not be measured again"
    return None


def _other_files(old: Subject, new: Subject) -> str | None:
    """What tells the data of two results apart; a file that could not be used may be usable now, or the other way round."""
    before, now = (one.files.keys() | one.skipped for one in (old, new))
    if more := sorted(now - before):
        return f"on {old.data} without {more[0]}, but {new.data}, as asked for, has that file"
    if fewer := sorted(before - now):
        return f"on {old.data} with {fewer[0]}, but {new.data}, as asked for, does not have that file"
    other = (name for name in sorted(old.files.keys() & new.files.keys()) if old.files[name] != new.files[name])
    if (name := next(other, None)) is not None:
        before, now = (one.frames.get(name) for one in (old, new))
        if before != now:
            return f"of {before} frames of {name}, but {now} of them are asked for"
        return f"on {old.data}, but {name} has other tokens in {new.data}, as asked for"
    return None


def replace(folder: Path, new: Path, old: Sequence[str]) -> None:
    """Put what the folder `new` holds in the place of results.json and `old`, names of earlier results; `new` is gone then.

    results.json goes first and comes last: where it is, everything that it tells of is. Until all is in place, what was there before is
    kept in a folder beside.
    """
    aside = Path(tempfile.mkdtemp(dir=folder, prefix=".old.", suffix=".tmp"))
    for name in (RESULTS, *old):
        if os.path.lexists(folder / name):
            (folder / name).rename(aside / name)
    for path in sorted(new.iterdir(), key=lambda path: path.name == RESULTS):
        path.rename(folder / path.name)
    new.rmdir()
    shutil.rmtree(aside, ignore_errors=True)
