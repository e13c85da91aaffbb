"""Numbers stored in tests/golden, compared to a tolerance; UPDATE_GOLDEN=1 writes them anew."""

from __future__ import annotations

import json
import os

import numpy as np

from tests.helpers.places import ROOT

GOLDEN = ROOT / "tests" / "golden"


def check(name: str, numbers: dict[str, float], rtol: float) -> None:
    """Compares `numbers` with those in tests/golden/NAME.json, each to the relative tolerance `rtol`.

    Update the file only in a change that is meant to change these numbers, and say in its message why they differ:
    UPDATE_GOLDEN=1 pytest TEST
    """
    path = GOLDEN / f"{name}.json"
    if os.environ.get("UPDATE_GOLDEN"):
        rounded = {key: float(f"{value:.8g}") for key, value in numbers.items()}
        path.write_text(json.dumps(rounded, indent=1) + "\n")
    stored = json.loads(path.read_text())
    assert numbers.keys() == stored.keys()
    different = {
        key: (value, stored[key])
        for key, value in numbers.items()
        if not np.isclose(value, stored[key], rtol=rtol, atol=0)
    }
    assert not different, f"{path} holds other numbers (got, stored): {different}"
