"""Paths and names: what words on a command line stand for, and file names in any bytes, Unicode form and behind any
links.

What exists as a path is a path, whatever characters it has.
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
"""Bytes of a name that `file_name` keeps: most file systems allow 255, and something may stand before and behind it."""


def local(name: str | Path) -> Path:
    """The path that `name` is; a ~ in front stands for a home folder unless there is a file of that very name.

    Raises:
        InputError: the name is empty. As a path it would be the current folder, which nobody meant who gave an unset
          variable.
    """
    if name == "":
        raise InputError(
            "an empty name was given: give the path of a file or folder, and see whether a variable is unset."
        )
    path = Path(name)
    if str(path).startswith("~") and not os.path.lexists(path):
        try:
            return path.expanduser()
        except RuntimeError:  # no such user
            return path
    return path


def exists(name: str) -> bool:
    """Whether `name` is the path of something."""
    try:
        return bool(name) and local(name).exists()
    except (OSError, ValueError):  # too long a name, a zero byte
        return False


def listed(text: str, is_item: Callable[[str], bool]) -> list[str]:
    """The items that `text` joins by commas. An item may have commas itself: it is the longest one from its start that
    `is_item`."""
    found, parts = [], text.split(",")
    while parts:
        end = next((end for end in range(len(parts), 1, -1) if is_item(",".join(parts[:end]))), 1)
        found.append(",".join(parts[:end]))
        parts = parts[end:]
    return found


def whole_name(path: Path) -> str:
    """The name of a file or folder with all its dots; of `.` and `..` that of the folder itself."""
    return path.name if path.name not in ("", "..") else path.resolve().name


def file_name(name: str) -> str:
    """`name` as that of one file or folder: / is written %2F, % as %25, and a digest stands for the end of a long
    one."""
    name = name.replace("%", "%25").replace("/", "%2F")
    content = os.fsencode(name)
    if len(content) <= _LONGEST:
        return name
    kept = content[: _LONGEST - 17].decode("utf-8", "ignore")
    return f"{kept}-{hashlib.sha256(content).hexdigest()[:16]}"


class Missing(NamedTuple):
    """Why there is no file under a name, and what to do about it; after the name they make a sentence."""

    problem: str
    advice: str


def printable(text: str) -> str:
    """Return `text` on one line and encodable: control characters, ends of lines and bytes that are not UTF-8 as
    escapes."""
    breaks = ("Cc", "Cs", "Zl", "Zp")
    return "".join(c.encode("unicode_escape").decode() if unicodedata.category(c) in breaks else c for c in text)


def portable(path: str | Path) -> str:
    """Return a name as JSON is to hold it, the same in every locale: bytes that are not UTF-8 as surrogates (PEP
    383)."""
    return os.fsencode(path).decode("utf-8", "surrogateescape")


def native(name: str) -> str:
    """Return a name from JSON as this system's locale has it, the inverse of `portable`.

    Raises:
        UnicodeEncodeError: surrogates that stand for no bytes, so that no file can have the name.
    """
    return os.fsdecode(name.encode("utf-8", "surrogateescape"))


def absolute(path: str | Path) -> Path:
    """Return the whole path as it is written: no link is followed, so its folders are those that the user sees."""
    return Path(os.path.abspath(path))


def place(path: Path) -> Path:
    """Return what tells a file from all others: its own name in the real folder that it stands in.

    Two links to one content are two files; one file that is reached through two links to its folder is one.
    """
    return Path(os.path.realpath(path.parent), path.name)


def spelled(path: Path) -> Path:
    """Return the path of what is there under this name in composed or decomposed Unicode (NFC, NFD); else `path`
    itself.

    Systems differ in the form that they write: one manifest is read on all. The exact name goes before its other forms.
    """
    if os.path.lexists(path) or str(path).isascii():
        return path
    found = Path(path.anchor)
    for part in path.relative_to(path.anchor).parts:
        forms = [part, *(unicodedata.normalize(form, part) for form in ("NFC", "NFD"))]
        found = next((found / form for form in forms if os.path.lexists(found / form)), None)
        if found is None:
            return path
    return found


def beside(path: Path, ending: str) -> Path | None:
    """Return the file next to `path` of the same name with another ending, be it a link to nothing; None if there is
    none."""
    exact = path.with_suffix(ending)
    if os.path.lexists(exact):
        return None if os.path.isdir(exact) else exact
    other = spelled(exact)
    # It may belong to a file of its own: names in two forms are two names.
    return other if other != exact and not os.path.lexists(other.with_suffix(path.suffix)) else None


def missing(path: Path) -> Missing | None:
    """Say why there is no file at `path`; None if there is one."""
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
