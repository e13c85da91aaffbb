"""Reads and writes the licence in a model card: README.md with front matter in YAML, as on the Hugging Face hub."""

from __future__ import annotations

import re

UNKNOWN = "unknown"
FRONT = re.compile(r"\s*---[ \t]*\r?\n(.*?\n)---", re.DOTALL)
WORD = re.compile(r"(?!null$)[\w.-]+")
"""A licence of the hub's list; null means none."""


def licence(card: str) -> str:
    """Returns the licence, several joined by commas, or "unknown"; for "other" its name and link."""
    import yaml

    front = FRONT.match(card.removeprefix("\ufeff"))
    try:
        fields = yaml.safe_load(front[1]) if front else None
    except yaml.YAMLError:
        return UNKNOWN
    if not isinstance(fields, dict):
        return UNKNOWN

    def values(key: str) -> list[str]:
        value = fields.get(key)
        return [str(item).strip() for item in (value if isinstance(value, list) else [value]) if item]

    named = values("license")
    if named == ["other"]:
        name, link = values("license_name"), values("license_link")
        return " ".join([*(name or named), *(f"({url})" for url in link)])
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
