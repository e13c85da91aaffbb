"""Imports go downward: a module imports from its own room and from rooms below it."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers.places import ROOT

ROOMS = (
    ("ttt_jax.errors",),
    ("ttt_jax.utils",),
    ("ttt_jax.config",),
    ("ttt_jax.distributed",),
    ("ttt_jax.nn",),
    ("ttt_jax.kernels",),
    ("ttt_jax.ttt",),
    ("ttt_jax.moshi",),
    ("ttt_jax.codec",),
    ("ttt_jax.data",),
    ("ttt_jax.checkpoints",),
    ("ttt_jax.convert",),
    ("ttt_jax.serve",),
    ("ttt_jax.doctor",),
    ("train", "eval"),
    ("experiments", "bench", "corpus", "tests"),
)
"""From the lowest to the highest. Rooms of one line do not import each other, but for those of the last."""
FREE = {"ttt_jax": {"__version__"}}
"""Names of a package's own `__init__.py` that every module may import."""

CORE = {"jax", "flax", "numpy", "safetensors", "ml_dtypes", "ttt_jax"}
"""Packages that come with every installation; modules of `ttt_jax` import others where they use them."""


def room(module: str) -> str | None:
    """The room of a module; None for other packages."""
    names = (name for line in ROOMS for name in line)
    return next((name for name in names if module == name or module.startswith(f"{name}.")), None)


def level(name: str) -> int:
    """The line of a room."""
    return next(i for i, line in enumerate(ROOMS) if name in line)


def modules(root: Path) -> Iterator[tuple[str, Path]]:
    """Name and path of every module of the project."""
    for top in ("ttt_jax", "train", "eval", "experiments", "bench", "corpus"):
        for path in sorted((root / top).rglob("*.py")):
            parts = path.relative_to(root).with_suffix("").parts
            yield ".".join(parts[:-1] if parts[-1] == "__init__" else parts), path


def imports(tree: ast.Module, package: str) -> Iterator[tuple[int, str]]:
    """Line and full name of every import of a module, also within functions; `package` resolves relative ones."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = package.split(".")
                base = ".".join([*parents[: len(parents) - node.level + 1], *([base] if base else [])])
            yield from ((node.lineno, f"{base}.{alias.name}") for alias in node.names)


def problems(root: Path) -> list[str]:
    """A sentence for each import that does not go downward."""
    found = []
    for module, path in modules(root):
        source = room(module)
        if source is None:  # ttt_jax/__init__.py, which offers names of the rooms
            assert module == "ttt_jax", f"{module} is in no room: name it in ROOMS"
            continue
        package = module if path.name == "__init__.py" else module.rpartition(".")[0]
        for line, name in imports(ast.parse(path.read_text()), package):
            target = room(name)
            if target is None:
                base, _, attribute = name.rpartition(".")
                if name.split(".")[0] == "ttt_jax" and attribute not in FREE.get(base, ()):
                    found.append(f"{module}, line {line}: {name} is in no room")
            elif target != source and not (level(target) < level(source) or level(source) == len(ROOMS) - 1):
                found.append(f"{module}, line {line}: {source} is not above {target} ({name})")
    return found


def test_imports_go_downward():
    assert problems(ROOT) == []


def test_the_library_loads_no_optional_package_when_imported():
    found = []
    for module, path in modules(ROOT):
        if room(module) is None or (module.startswith("ttt_jax.") and not module.endswith("__main__")):
            tree = ast.parse(path.read_text())
            tree.body = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
            packages = {name.split(".")[0] for _, name in imports(tree, module)}
            found += [f"{module}: {name}" for name in packages - CORE - sys.stdlib_module_names]
    assert found == []


@pytest.mark.parametrize(
    ("module", "line", "problem"),
    [
        ("ttt_jax/nn/new.py", "from ttt_jax.moshi import model", "ttt_jax.nn is not above ttt_jax.moshi"),
        ("ttt_jax/nn/new.py", "from ..moshi.model import forward", "ttt_jax.nn is not above ttt_jax.moshi"),
        ("ttt_jax/nn/new.py", "from .. import moshi", "ttt_jax.nn is not above ttt_jax.moshi"),
        ("ttt_jax/nn/new.py", "def late():\n    import ttt_jax.ttt.layer", "ttt_jax.nn is not above ttt_jax.ttt"),
        ("ttt_jax/nn/new.py", "from ttt_jax import Moshi", "ttt_jax.Moshi is in no room"),
        ("eval/streaming/new.py", "from train.config import TrainConfig", "eval is not above train"),
        ("train/new.py", "import eval.__main__", "train is not above eval"),
        ("train/new.py", "from tests.helpers import micro", "train is not above tests"),
        ("train/new.py", "from ttt_jax.moshi import model\nfrom train import step", None),
        ("ttt_jax/utils/new.py", "from ttt_jax import __version__\nimport jax", None),
    ],
)
def test_a_planted_import_is_found(tmp_path, module, line, problem):
    path = tmp_path / module
    path.parent.mkdir(parents=True)
    path.write_text(line)
    found = problems(tmp_path)
    assert len(found) == (problem is not None)
    assert problem is None or problem in found[0]
