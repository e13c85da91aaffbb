"""The notebook of the documents runs from its first cell to its last."""

import json
import os
import subprocess
import sys

import pytest

from tests.helpers.places import ROOT

NOTEBOOK = ROOT / "docs" / "tour.ipynb"


@pytest.mark.integration
def test_the_notebook_runs(tmp_path):
    cells = json.loads(NOTEBOOK.read_text())["cells"]
    script = tmp_path / "tour.py"
    script.write_text("\n\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"))
    # As users run it: optimised programs, an empty cache; figures are drawn, but not shown.
    env = {**os.environ, "XLA_FLAGS": "", "XDG_CACHE_HOME": str(tmp_path), "MPLBACKEND": "Agg", "TMPDIR": str(tmp_path)}
    words = [sys.executable, "-W", "ignore", str(script)]
    done = subprocess.run(words, cwd=NOTEBOOK.parent, env=env, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stderr[-3000:]
