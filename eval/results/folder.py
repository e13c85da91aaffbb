"""Folders of results: their names, what may be replaced in them, and how. Imports no jax.

Results are replaced by results of the same data, checkpoints and question. Anything else is refused.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from eval.results.schema import FRAMES, RESULTS, CheckpointInfo, FileInfo, Skipped, scores_path
from ttt_jax.data.manifest import MANIFEST
from ttt_jax.errors import InputError
from ttt_jax.utils.files import run_and_step
from ttt_jax.utils.paths import local, whole_name

OWN_DATA = "the held-out files of its run"
"""`Subject.data` where no --data was given."""

Results = TypeVar("Results")


class Subject(NamedTuple):
    """Data, checkpoints and question of results."""

    data: str
    """As the command line gave it."""
    files: dict[str, str]
    """Digests of the tokens that were streamed, by the file's name."""
    skipped: frozenset[str]
    """Names of files that could not be used."""
    checkpoints: tuple[tuple[str, str | None], ...]
    """Name and digest of the weights of each."""
    setting: dict[str, Any]
    """Options that change numbers, by flag."""
    measured: frozenset[str] = frozenset()
    """What was measured, in words: results are replaced only if all of it is measured again."""


def subject(
    data: str | None,
    files: Sequence[FileInfo],
    skipped: Sequence[Skipped],
    checkpoints: Iterable[tuple[str, str | None]],
    setting: dict[str, Any],
    measured: Iterable[str] = (),
) -> Subject:
    """Returns the subject of results on `files`; the rest as in `Subject`."""
    digests, skipped_names = {file.name: file.digest for file in files}, frozenset(file.name for file in skipped)
    return Subject(data or OWN_DATA, digests, skipped_names, tuple(checkpoints), setting, frozenset(measured))


def checkpoint(name: str, about: dict[str, Any]) -> tuple[str, str | None]:
    """Returns an entry of `Subject.checkpoints`, from what results store about a checkpoint."""
    step, weights = about.get("step"), about.get("weights")
    parts = [*([f"step {step}"] if step is not None else []), f"weights {(weights or 'unknown')[:12]}"]
    return f"{name} ({', '.join(parts)})", weights


def find(out: str | None, kind: str, checkpoint: str, data: str | None) -> Path:
    """Returns the folder of results: `out`, or KIND or KIND-DATA in the checkpoint's folder; for RUN/checkpoints/STEP
    with the step.

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
    """Makes `folder` unless it exists. Raises `InputError` if it cannot be made or written to."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--out {folder} cannot be made ({error.strerror}): give another folder.") from None
    if not os.access(folder, os.W_OK):
        raise InputError(f"--out {folder} cannot be written: give another folder.")


def stored(folder: Path, read: Callable[[Path], Results], others: Iterable[str]) -> Results | None:
    """Returns what `read` reads from results.json in `folder`; None if there are no results.

    Raises `InputError` if it, or one of the command's `others`, is not this command's.
    """
    if os.path.lexists(folder / RESULTS):
        try:
            return read(folder)
        except InputError as error:
            raise InputError(
                f"{folder} holds a {RESULTS} that is not this command's, or damaged"
                f" ({str(error).rsplit(': ', 1)[0]}): give another --out, or remove it."
            ) from None
    if (there := next((name for name in others if os.path.lexists(folder / name)), None)) is not None:
        raise InputError(
            f"{folder} holds {there}, but no {RESULTS} that says what it is of: give another --out, or remove it."
        )
    return None


def check(folder: Path, old: Subject, new: Subject) -> None:
    """Raises `InputError` unless results of `new` may replace those of `old` in `folder`."""
    if (difference := next(_differences(old, new), None)) is not None:
        raise InputError(f"{folder} holds results {difference}: give another folder by --out, or remove this one.")


def _differences(old: Subject, new: Subject) -> Iterator[str]:
    # A file that was skipped may be usable now, or the other way round.
    before, now = (subject.files.keys() | subject.skipped for subject in (old, new))
    for name in sorted(now - before):
        yield f"on {old.data} without {name}, but {new.data}, as asked for, has that file"
    for name in sorted(before - now):
        yield f"on {old.data} with {name}, but {new.data}, as asked for, does not have that file"
    for name in sorted(old.files.keys() & new.files.keys()):
        if old.files[name] != new.files[name]:
            yield f"on {old.data}, but {name} has other content or another length in {new.data}, as asked for"
    if [weights for _, weights in old.checkpoints] != [weights for _, weights in new.checkpoints]:
        before, now = (", ".join(name for name, _ in subject.checkpoints) for subject in (old, new))
        yield f"of {before}, not of {now}"
    for name, value in new.setting.items():
        if old.setting.get(name) != value:
            yield f"with {name} {old.setting.get(name)}, not {value}"
    for name in sorted(old.measured - new.measured):
        yield f"of {name}, which would not be measured again"


def check_frames(folder: Path, checkpoints: Sequence[CheckpointInfo], files: Sequence[FileInfo]) -> None:
    """Raises `InputError` if a file among the scores in `folder` is none of `files` under `checkpoints`."""
    ours = {scores_path(folder, checkpoint.name, file) for checkpoint in checkpoints for file in files}
    foreign = next((path for path in (folder / FRAMES).rglob("*") if not path.is_dir() and path not in ours), None)
    if foreign is not None:
        raise InputError(
            f"{folder} holds {foreign.relative_to(folder)}, which is no result of an evaluation: give another --out."
        )


@contextlib.contextmanager
def staged(folder: Path) -> Iterator[Path]:
    """Yields a new folder in `folder` for results that `replace` then moves.

    If an error is raised, removes it, and `folder` too if that is empty then.
    """
    new = Path(tempfile.mkdtemp(dir=folder, prefix=".results.", suffix=".tmp"))
    try:
        yield new
    except BaseException:
        shutil.rmtree(new, ignore_errors=True)
        with contextlib.suppress(OSError):
            folder.rmdir()
        raise


def replace(folder: Path, new: Path, old: Sequence[str]) -> None:
    """Moves the content of the folder `new` to the place of results.json and `old`, names of earlier results.

    results.json is removed first and moved last: where it is, its results are whole. Until all is in place, the earlier
    results are in a folder beside.
    """
    aside = Path(tempfile.mkdtemp(dir=folder, prefix=".old.", suffix=".tmp"))
    for name in (RESULTS, *old):
        if os.path.lexists(folder / name):
            (folder / name).rename(aside / name)
    for path in sorted(new.iterdir(), key=lambda path: path.name == RESULTS):
        path.rename(folder / path.name)
    new.rmdir()
    shutil.rmtree(aside, ignore_errors=True)
