"""Shared by the tests of conversions: refusals, the command line in a process, the hub's cache, cases for the night."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.places import ROOT
from ttt_jax.convert import kyutai
from ttt_jax.errors import InputError


def nightly(*cases, default=1):
    """Cases of a parametrised test, each once; those after the first `default` are slow. A tuple is a case of several
    arguments."""
    unique = [case for i, case in enumerate(cases) if case not in cases[:i]]
    tuples = [case if isinstance(case, tuple) else (case,) for case in unique]
    return [pytest.param(*case, marks=pytest.mark.slow if i >= default else ()) for i, case in enumerate(tuples)]


def change_config(source, **changes):
    """Changes or (with `...`) removes keys of config.json."""
    c = json.loads((source / "config.json").read_text()) | changes
    (source / "config.json").write_text(json.dumps({key: value for key, value in c.items() if value is not ...}))


def info_of(folder):
    """The config.json in a folder."""
    return json.loads((folder / "config.json").read_text())


def refused(source, *words, out="ours", **options):
    """The message of a conversion that must fail: one sentence with all of `words`, and nothing left behind."""
    folder = Path(source).parent
    out = folder / out
    before = sorted(folder.iterdir())
    with pytest.raises(InputError) as caught:
        kyutai(source, out, **options)
    message = str(caught.value)
    for text in words:
        assert text in message, message
    assert "\n" not in message
    assert message.endswith(".")
    assert sorted(folder.iterdir()) == before
    return message


def same(a, b):
    """Requires equal names, shapes, types and bits."""
    assert a.keys() == b.keys()
    for name in a:
        assert (a[name].dtype, a[name].shape) == (b[name].dtype, b[name].shape), name
        assert a[name].tobytes() == b[name].tobytes(), name


def run(folder, *args, **environment):
    """Runs `python -m ttt_jax.convert` in a process."""
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    env = {**os.environ, "PYTHONPATH": path, "HF_HOME": str(folder / "hub"), **environment}
    command = [sys.executable, "-m", "ttt_jax.convert", *map(str, args)]
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=120)


def assert_one_sentence(done, *words):
    """Requires that a process ended in one sentence with all of `words`."""
    assert done.returncode == 2, done.stderr
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    for text in words:
        assert text in line
    assert "Traceback" not in done.stderr


def cached_by_hub(source, folder):
    """Copies `source` into the hub's cache under `folder` as the repository some/one. Returns the folder of the
    snapshot."""
    repository = folder / "hub" / "hub" / "models--some--one"
    snapshot = repository / "snapshots" / "0123456789abcdef0123456789abcdef01234567"
    shutil.copytree(source, snapshot)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(snapshot.name)
    return snapshot
