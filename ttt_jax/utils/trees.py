"""Nested dicts of parameters, whose leaves have paths such as "layers/layers_29_31/ttt/gate"."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import jax

Tree = dict[str, Any]


def named(tree: Any) -> dict[str, Any]:
    """Returns the leaves of any tree by their paths."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def nested(leaves: Mapping[str, Any]) -> Tree:
    """Returns the nested dict with these leaves by path."""
    tree: Tree = {}
    for path, leaf in leaves.items():
        *parents, name = path.split("/")
        branch = tree
        for key in parents:
            branch = branch.setdefault(key, {})
        branch[name] = leaf
    return tree


def pick(tree: Tree, wanted: Collection[str]) -> Tree:
    """Returns the part of `tree` with the leaves whose paths are `wanted`."""
    return nested({path: leaf for path, leaf in named(tree).items() if path in wanted})


def merge(*parts: Tree) -> Tree:
    """Returns the tree with the leaves of all `parts`."""
    return nested({path: leaf for part in parts for path, leaf in named(part).items()})
