"""Files and folders written at once or not at all."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

from ttt_jax.errors import InputError


def write_atomically(path: Path, content: bytes | Iterable[memoryview]) -> None:
    """Writes `content`, whole or in blocks, to `path`.

    A reader sees the whole old file or the whole new one, also after a crash.
    """
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    try:
        with os.fdopen(handle, "wb") as file:
            file.writelines([content] if isinstance(content, bytes) else content)
        os.chmod(temporary, 0o644)  # mkstemp makes files that only their owner may read
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def file_digest(path: Path) -> str:
    """Returns the SHA-256, hex, of a file's content. Raises `InputError` if it cannot be read."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}): bring it back or leave it out.") from None


CHECKPOINTS = "checkpoints"
"""Folder of a run that holds its checkpoints, by step."""


def run_and_step(path: Path) -> tuple[Path, int | None] | None:
    """Returns a run's folder, and the step if `path` is one of its checkpoints (RUN/checkpoints/STEP); None if neither.

    `path` may be relative to the checkpoint (`.`) or a link.
    """
    for folder in (path, Path(os.path.realpath(path))):
        if (folder / CHECKPOINTS).is_dir():
            return folder, None
        if folder.parent.name == CHECKPOINTS and folder.name.isdecimal() and folder.is_dir():
            return folder.parent.parent, int(folder.name)
    return None


def check_new(folder: Path) -> None:
    """Raises `InputError` unless a folder can be made at `folder`: nothing is there, or an empty folder."""
    if folder.is_symlink():
        raise InputError(f"{folder} is a link: give a new folder.")
    if folder.is_dir():
        if any(folder.iterdir()):
            raise InputError(f"{folder} is not empty: give a new folder, or remove what is there.")
    elif os.path.lexists(folder):
        raise InputError(f"{folder} is a file: give a new folder.")
    if not folder.absolute().parent.is_dir():
        raise InputError(f"{folder.parent} is no folder, so {folder.name} cannot be made in it: make it first.")


def check_new_file(path: Path, ending: str) -> None:
    """Raises `InputError` unless a file can be made at `path`: nothing is there, and its name has the ending."""
    if os.path.lexists(path):
        raise InputError(f"{path} exists already: give a new file, or remove what is there.")
    if path.suffix != ending:
        raise InputError(f"{path} does not end in {ending}: give a new file with that ending.")
    if not path.absolute().parent.is_dir():
        raise InputError(f"{path.parent} is no folder, so {path.name} cannot be made in it: make it first.")


@contextlib.contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """Yields a temporary folder beside `folder`, renamed to it at the end and removed on an error or interrupt.

    Raises `InputError` as `check_new` does.
    """
    check_new(folder)
    temporary = Path(tempfile.mkdtemp(dir=folder.absolute().parent, prefix=f".{folder.name}.", suffix=".tmp"))
    try:
        yield temporary
        os.chmod(temporary, 0o755)  # mkdtemp makes folders that only their owner may enter
        for path in (*temporary.iterdir(), temporary):
            _to_disk(path)
        os.rename(temporary, folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _to_disk(path: Path) -> None:
    """Waits until `path` would survive a loss of power."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
