"""The licence that a model card names: README.md with front matter in YAML, as the Hugging Face hub has it."""

from __future__ import annotations

import re

UNKNOWN = "unknown"
FRONT = re.compile(r"\s*---[ \t]*\r?\n(.*?\n)---", re.DOTALL)
FOLDED = re.compile(r"[>|][+-]?")
"""Starts a value that stands on the following lines."""


def licence(card: str) -> str:
    """The licence, several joined by commas; what is no licence of the hub's list with its name and link; or "unknown".

    Of YAML only what cards use is read: words, quoted or not, lists in brackets or one entry a line, folded lines.
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
    """The front matter of a card, from which `licence` reads `licence` again; "" if it is unknown."""
    if licence == UNKNOWN:
        return ""
    if re.fullmatch(r"[\w.-]+", licence):
        return f"---\nlicense: {licence}\n---\n\n"
    return f"---\nlicense: other\nlicense_name: '{licence}'\n---\n\n"


def _values(front: str, key: str) -> list[str]:
    """What the top-level `key` holds: one value or those of a list."""
    lines = front.splitlines()
    start = next((i for i, line in enumerate(lines) if re.match(rf"{key}\s*:(\s|$)", line)), None)
    if start is None:
        return []
    first = _scalar(lines[start].split(":", 1)[1])
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
    return [value for value in [first, *items] if value]


def _scalar(text: str) -> str:
    """A plain or quoted value without quotes and comment; "" for null."""
    text = text.strip()
    if text[:1] in ("'", '"') and text.find(text[0], 1) > 0:
        return text[1 : text.find(text[0], 1)]
    text = re.sub(r"(^|\s)#.*", "", text).strip()
    return "" if text in ("~", "null") else text
