"""Paths and names: expands words of a command line, and handles file names in any bytes, Unicode form and behind links.

A word that exists as a path is a path, whatever its characters.
"""

from __future__ import annotations

import hashlib
import os
import stat
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from ttt_jax.errors import InputError

_LONGEST = 150
"""Bytes of a name that `file_name` keeps. Most file systems allow 255; callers add a prefix or suffix."""


def local(name: str | Path) -> Path:
    """Returns the path `name`. A leading ~ stands for a home folder unless a file has that very name.

    Raises `InputError` if the name is empty, which as a path would be the current folder.
    """
    if name == "":
        raise InputError("an empty name was given: give the path of a file or folder (is a variable unset?).")
    path = Path(name)
    if str(path).startswith("~") and not os.path.lexists(path):
        try:
            return path.expanduser()
        except RuntimeError:  # no such user
            return path
    return path


def exists(name: str) -> bool:
    """Returns whether something exists at the path `name`."""
    try:
        return bool(name) and local(name).exists()
    except (OSError, ValueError):  # too long a name, a zero byte
        return False


def listed(text: str, is_item: Callable[[str], bool]) -> list[str]:
    """Returns the items that `text` joins by commas. An item is the longest text that `is_item` accepts."""
    items, parts = [], text.split(",")
    while parts:
        end = next((end for end in range(len(parts), 1, -1) if is_item(",".join(parts[:end]))), 1)
        items.append(",".join(parts[:end]))
        parts = parts[end:]
    return items


def whole_name(path: Path) -> str:
    """Returns the name of a file or folder with all its dots; for `.` and `..` the name of that folder."""
    return path.name if path.name not in ("", "..") else path.resolve().name


def file_name(name: str) -> str:
    """Returns `name` as a file's: / becomes %2F, % becomes %25, and a digest replaces the end of a long name."""
    name = name.replace("%", "%25").replace("/", "%2F")
    content = os.fsencode(name)
    if len(content) <= _LONGEST:
        return name
    kept = content[: _LONGEST - 17].decode("utf-8", "ignore")
    return f"{kept}-{hashlib.sha256(content).hexdigest()[:16]}"


class Missing(NamedTuple):
    """Why there is no file at a path, and advice. After the path they make a sentence."""

    problem: str
    advice: str


def printable(text: str) -> str:
    """Returns `text` with escapes for line ends, control characters and bytes that are not UTF-8."""
    breaks = ("Cc", "Cs", "Zl", "Zp")
    return "".join(c.encode("unicode_escape").decode() if unicodedata.category(c) in breaks else c for c in text)


def portable(path: str | Path) -> str:
    """Returns a name for JSON, the same in every locale: bytes that are not UTF-8 become surrogates (PEP 383)."""
    return os.fsencode(path).decode("utf-8", "surrogateescape")


def native(name: str) -> str:
    """Returns a name from JSON in this system's locale, the inverse of `portable`.

    Raises `UnicodeEncodeError` if surrogates stand for no bytes, so that no file can have the name.
    """
    return os.fsdecode(name.encode("utf-8", "surrogateescape"))


def absolute(path: str | Path) -> Path:
    """Returns the absolute path. Follows no link, so its folders are those that the user sees."""
    return Path(os.path.abspath(path))


def place(path: Path) -> Path:
    """Returns the name of a file in its real folder. Two links to one content are two files; a file that is reached
    through two links to its folder is one."""
    return Path(os.path.realpath(path.parent), path.name)


def spelled(path: Path) -> Path:
    """Returns the existing path that equals `path` up to composed or decomposed Unicode (NFC, NFD); else `path`.

    Systems write different forms, and a manifest must be readable on all. The exact name has precedence.
    """
    if os.path.lexists(path) or str(path).isascii():
        return path
    existing = Path(path.anchor)
    for part in path.relative_to(path.anchor).parts:
        forms = [part, *(unicodedata.normalize(form, part) for form in ("NFC", "NFD"))]
        existing = next((existing / form for form in forms if os.path.lexists(existing / form)), None)
        if existing is None:
            return path
    return existing


def beside(path: Path, ending: str) -> Path | None:
    """Returns the file beside `path` with the same name and another ending, also a broken link, if there is one."""
    exact = path.with_suffix(ending)
    if os.path.lexists(exact):
        return None if os.path.isdir(exact) else exact
    other = spelled(exact)
    # Two forms of a name are two names: it may belong to another file.
    return other if other != exact and not os.path.lexists(other.with_suffix(path.suffix)) else None


def missing(path: Path) -> Missing | None:
    """Returns why there is no file at `path`; None if there is one."""
    try:
        mode = os.stat(path).st_mode
    except (FileNotFoundError, NotADirectoryError):
        if os.path.islink(path):
            fetch = "fetch it, for example by git annex get or huggingface-cli download"
            return Missing("is a link to what is not here", fetch)
        return Missing("is not there", "bring it back or leave it out")
    except OSError as error:
        return Missing(f"cannot be read ({error.strerror})", "mend that or leave it out")
    return None if stat.S_ISREG(mode) else Missing("is no file", "give a file or leave it out")
