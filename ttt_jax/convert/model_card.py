"""Reads and writes the licence in a model card: README.md with front matter in YAML, as on the Hugging Face hub."""

from __future__ import annotations

import json
import re

UNKNOWN = "unknown"
FRONT = re.compile(r"\s*---[ \t]*\r?\n(.*?\n)---", re.DOTALL)
WORD = re.compile(r"(?!null$)[\w.-]+")
"""A licence of the hub's list; null means none."""
QUOTED = re.compile(r"""'((?:[^']|'')*)'|("(?:[^"\\]|\\.)*")""")
FOLDED = re.compile(r"[>|][+-]?\s*(#.*)?")
"""Starts a value on the following lines."""


def licence(card: str) -> str:
    """Returns the licence, several joined by commas, or "unknown"; for "other" its name and link.

    Reads the part of YAML that cards use: words, quoted or not, lists in brackets or one entry a line, folded lines.
    """
    front = FRONT.match(card.removeprefix("\ufeff"))
    if front is None:
        return UNKNOWN
    named = _values(front[1], "license")
    if named == ["other"]:
        name, link = (" ".join(_values(front[1], key)) for key in ("license_name", "license_link"))
        if name or link:
            return " ".join(part for part in (name or "other", f"({link})" if link else "") if part)
    return ", ".join(named) or UNKNOWN


def front_matter(licence: str) -> str:
    """Returns the front matter of a card with this licence; "" if it is unknown."""
    if licence == UNKNOWN:
        return ""
    names = licence.split(", ")
    if all(WORD.fullmatch(name) for name in names):
        value = f" {licence}" if len(names) == 1 else "".join(f"\n- {name}" for name in names)
        return f"---\nlicense:{value}\n---\n\n"
    quoted = licence.replace("'", "''")
    return f"---\nlicense: other\nlicense_name: '{quoted}'\n---\n\n"


def _values(front: str, key: str) -> list[str]:
    """Returns the value, or the values of a list, of the top-level `key`."""
    lines = front.splitlines()
    start = next((i for i, line in enumerate(lines) if re.match(rf"(['\"]?){key}\1\s*:(\s|$)", line)), None)
    if start is None:
        return []
    first = lines[start].split(":", 1)[1].strip()
    below = []
    for line in lines[start + 1 :]:
        if line.strip() and not re.match(r"\s|-", line):
            break
        below.append(line.strip())
    if FOLDED.fullmatch(first):
        return [" ".join(filter(None, below))]
    if first.startswith("["):
        inside = " ".join([first, *below]).removeprefix("[").split("]")[0]
        return [value for part in inside.split(",") if (value := _scalar(part))]
    items = [_scalar(line.removeprefix("-")) for line in below if re.match(r"-(\s|$)", line)]
    return [value for value in [_scalar(first), *items] if value]


def _scalar(text: str) -> str:
    """Returns a plain or quoted value without quotes and comment; "" for null."""
    text = text.strip()
    if quoted := QUOTED.match(text):
        single, double = quoted.groups()
        if double is None:
            return single.replace("''", "'")
        try:
            return " ".join(json.loads(double).split())
        except ValueError:  # one of YAML's escapes that JSON does not have
            return double[1:-1]
    text = re.sub(r"(^|\s)#.*", "", text).strip()
    return "" if text in ("~", "null") else text
