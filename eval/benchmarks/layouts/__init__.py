"""Readers of the official layouts on disk: folders of recordings become tasks. They know no model and import no jax."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ttt_jax.utils import config_json
from ttt_jax.utils.paths import absolute

MINI_FILE = "mini.json"
"""Marks a set that `python -m eval make-mini` made; lies in its root."""
MINI_PREFIX = "mini-"
"""Before the name of a task of such a set, so that its scores are never taken for those of the real benchmark."""
LEVELS = 2
"""Folders above the recordings in which `MINI_FILE` is looked for."""


def mini(folder: Path) -> Any | None:
    """Returns the content of the nearest `MINI_FILE` in `folder` or up to `LEVELS` folders above; None without one.

    Raises `InputError` if it is not JSON.
    """
    folder = absolute(folder)
    for place in (folder, *folder.parents)[: LEVELS + 1]:
        if (place / MINI_FILE).exists():
            return config_json.read_json(place / MINI_FILE, "the mark that make-mini left")
    return None
