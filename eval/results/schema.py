"""results.json: written at once or not at all, in a form that people can read, and known to be as it was written."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from pathlib import Path
from typing import Any

import numpy as np

from eval.stats.estimates import Estimate
from ttt_jax.errors import InputError
from ttt_jax.utils import config_json
from ttt_jax.utils.files import write_atomically


def write(folder: Path, content: dict[str, Any]) -> Path:
    """Write `content` and its checksum to results.json in `folder`, at once or not at all; the path."""
    content = plain(content)
    path = folder / "results.json"
    write_atomically(path, as_json(content | {"checksum": _checksum(content)}))
    return path


def read(folder: Path, command: str, version: int) -> dict[str, Any]:
    """The content that `write` wrote to `folder`.

    Args:
      command, version: what the content must state as "command" and "format".

    Raises:
      InputError: there is no results.json, it is another command's or of another version, or it is not as it was written.
    """
    path = folder / "results.json"
    stored = config_json.read_json(path, f"results.json in a folder that {command} wrote")
    found = (stored.get("command"), stored.get("format")) if isinstance(stored, dict) else None
    if found != (command, version):
        known = found is not None and isinstance(found[0], str) and isinstance(found[1], int)
        what = f"is of format {found[1]} of {found[0]}" if known else "does not say of which command and format it is"
        raise InputError(f"{path} {what}, but format {version} of {command} is read: run {command} again.")
    if stored.pop("checksum", None) != _checksum(stored):
        raise InputError(
            f"{path} is not as it was written (its checksum does not match its content): run {command} again."
        )
    return stored


def _checksum(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def as_json(content: Any) -> bytes:
    """A file of JSON, an entry a line, lists of numbers on one; the rest as `plain` says."""
    text = json.dumps(plain(content), indent=1, ensure_ascii=False, allow_nan=False)
    return (_NUMBERS.sub(lambda found: f"[{' '.join(found[1].split())}]", text) + "\n").encode(
        "utf-8", "backslashreplace"
    )


_NUMBERS = re.compile(r"\[\n((?:\s+(?:-?\d[\d.e+-]*|null),?\n)+)\s*\]")
"""A list of numbers, each on a line of its own. No string matches: JSON writes their line ends as \\n."""


def plain(value: Any) -> Any:
    """`value` as JSON knows it: dataclasses and estimates as objects, arrays' numbers as numbers, NaN as null."""
    if isinstance(value, Estimate):
        return plain(value._asdict())
    if dataclasses.is_dataclass(value):
        return {field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, np.ndarray | np.generic):
        return plain(value.tolist())
    if isinstance(value, float):
        return value if np.isfinite(value) else None
    return str(value) if isinstance(value, Path) else value
