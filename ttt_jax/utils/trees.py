"""Nested dicts of parameters by path: "layers/layers_29_31/ttt/gate". Parts of a tree are nested as it is, without the
other leaves."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import jax

Tree = dict[str, Any]


def named(tree: Any) -> dict[str, Any]:
    """The leaves of any tree by their paths."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def nested(leaves: Mapping[str, Any]) -> Tree:
    """The nested dict whose leaves these are."""
    tree: Tree = {}
    for path, leaf in leaves.items():
        *parents, name = path.split("/")
        branch = tree
        for key in parents:
            branch = branch.setdefault(key, {})
        branch[name] = leaf
    return tree


def pick(tree: Tree, wanted: Collection[str]) -> Tree:
    """The leaves whose paths are `wanted`."""
    return nested({path: leaf for path, leaf in named(tree).items() if path in wanted})


def merge(*parts: Tree) -> Tree:
    """The tree that has the leaves of all `parts`."""
    return nested({path: leaf for part in parts for path, leaf in named(part).items()})
