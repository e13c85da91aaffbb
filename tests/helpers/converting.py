"""What tests of conversions share: refusals, merged adapters, the command line in a process, the hub's cache, nightly
cases."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest

from tests.helpers.places import ROOT
from ttt_jax.checkpoints import weights
from ttt_jax.config import TTTConfig
from ttt_jax.convert import kyutai
from ttt_jax.errors import InputError
from ttt_jax.moshi import model

TTT = TTTConfig(layers="0,1", hidden=(), gate_init=0.25)
"""The TTT layers of the fixture `with_ttt`."""


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


def refused(source, *words, out="ours", call=kyutai, **options):
    """The message of a conversion that must fail: one sentence with all of `words`, and nothing left behind."""
    folder = Path(source).parent
    out = folder / out
    before = sorted(folder.iterdir())
    with pytest.raises(InputError) as caught:
        call(source, out, **options)
    message = str(caught.value)
    for text in words:
        assert text in message, message
    assert "\n" not in message
    assert message.endswith(".")
    assert sorted(folder.iterdir()) == before
    return message


def layout(tree):
    """Shape and type of every leaf by its path."""
    return {jax.tree_util.keystr(path): (leaf.shape, leaf.dtype) for path, leaf in jax.tree.leaves_with_path(tree)}


def shapes_of(tree):
    """Shape of every leaf by its path."""
    return {path: shape for path, (shape, _) in layout(tree).items()}


def parameters_of(cfg):
    """Shapes and types of a model's parameters."""
    return jax.eval_shape(lambda key: model.init_params(cfg, key), jax.random.key(0))


def run(folder, *args, module="ttt_jax.convert", **environment):
    """Runs `python -m MODULE ARGS` in `folder`, in a process whose caches lie there too."""
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    caches = {"HF_HOME": str(folder / "hub"), "XDG_CACHE_HOME": str(folder / "cache"), "JAX_PLATFORMS": "cpu"}
    env = {**os.environ, "PYTHONPATH": path, **caches, **environment}
    command = [sys.executable, "-m", module, *map(str, args)]
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


def with_adapters(w, a, scaling):
    """W + scaling B A of every map, in float32."""
    merged = dict(w)
    for name in a:
        if name.endswith(".lora_A.weight"):
            module = name.removesuffix(".lora_A.weight")
            up, down = a[f"{module}.lora_B.weight"].astype(np.float32), a[name].astype(np.float32)
            key = f"{module}.weight"
            merged[key] = (w[key].astype(np.float32) + np.float32(scaling) * up @ down).astype(w[key].dtype)
    return merged


def close(a, b):
    """Equal but for the last bit: sums in another order."""
    assert a.keys() == b.keys()
    for name in a:
        eps = ml_dtypes.finfo(a[name].dtype).eps
        x, y = a[name].astype(np.float32), b[name].astype(np.float32)
        np.testing.assert_allclose(x, y, rtol=2 * eps, atol=16 * 2**-23, err_msg=name)


def arrives(source, plain, *notes, **options):
    """Convert `source` and require every bit of `plain` and a note for each of `notes`; the plan."""
    out = source.parent / f"{source.name}-ours"
    plan = kyutai(source, out, **options)
    info = info_of(out)
    codec = (weights.MIMI, "codec.json")
    assert {name: about for name, about in info["files"].items() if name not in codec} == plain["files"]
    assert info["model"] == plain["model"]
    expected = ("no tokenizer", "licence", "Mimi (")
    notices = [note for note in plan.notes if not any(words in note for words in expected)]
    assert len(notices) == len(notes), notices
    for note, words in zip(notices, notes, strict=True):
        assert words in note
    return plan
