"""What names on a command line stand for, and names made of names. What exists as a path is a path, whatever characters it has."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from pathlib import Path

_LONGEST = 150
"""Bytes of a name that `file_name` keeps: most file systems allow 255, and something may stand before and behind it."""


def local(name: str | Path) -> Path:
    """The path that `name` is; a ~ in front stands for a home folder unless there is a file of that very name."""
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
    """The items that `text` joins by commas. An item may have commas itself: it is the longest one from its start that `is_item`."""
    found, parts = [], text.split(",")
    while parts:
        end = next((end for end in range(len(parts), 1, -1) if is_item(",".join(parts[:end]))), 1)
        found.append(",".join(parts[:end]))
        parts = parts[end:]
    return found


def whole_name(path: Path) -> str:
    """The name of a file or folder with all its dots; of `.` and `..` that of the folder itself."""
    return path.name if path.name not in ("", "..") else path.resolve().name


def escaped(name: str) -> str:
    """`name` for a line of text: what cannot be printed, such as a line end or a byte that is no UTF-8, and \\ as an escape."""
    plain = lambda c: c.isprintable() and c != "\\"  # noqa: E731
    return "".join(c if plain(c) else c.encode("unicode_escape").decode() for c in name)


def file_name(name: str) -> str:
    """`name` as that of one file or folder: / is written %2F, % as %25, and a digest stands for the end of a long one."""
    name = name.replace("%", "%25").replace("/", "%2F")
    content = os.fsencode(name)
    if len(content) <= _LONGEST:
        return name
    kept = content[: _LONGEST - 17].decode("utf-8", "ignore")
    return f"{kept}-{hashlib.sha256(content).hexdigest()[:16]}"
