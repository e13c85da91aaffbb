"""Arms of an experiment on memory: the same weights and files, the TTT layers' state treated differently.

All arms go through one program side by side: an arm is a `vmap` over the few parameters that it sets and over the state
from the first TTT layer on. The layers before it, delayed tokens and positions are shared and computed once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from ttt_jax.config import MoshiConfig, Run
from ttt_jax.errors import InputError
from ttt_jax.moshi import model


class Arm(NamedTuple):
    """One setting."""

    meaning: str
    sets: tuple[tuple[str, float], ...] = ()
    """Parameters of the TTT layers, and their value everywhere."""
    at_reset: Literal["keeps", "clears", "takes another's"] = "keeps"
    """Effect of a reset, every `reset_every` frames, on the TTT state."""


ARMS: dict[str, Arm] = {
    "persist": Arm("memory kept from the first frame to the last"),
    "reset": Arm("memory cleared at every reset", at_reset="clears"),
    # sigmoid(-inf) is exactly 0: the inner rate vanishes and the fast weights stay at W0.
    "frozen": Arm("fast weights held at their learned start, no updates", (("rate_bias", -jnp.inf),)),
    "off": Arm("gates closed, TTT layers add nothing", (("gate", 0.0),)),
    "permuted": Arm("at every reset the memory that persist has learned on another file", at_reset="takes another's"),
}
"""By name, in the order of reports."""

SETTABLE = {name for arm in ARMS.values() for name, _ in arm.sets}
DEFAULT = ("persist", "reset", "frozen", "off")
WITHOUT_TTT = ("off",)
"""Arms of a model without TTT layers."""


def check(names: Sequence[str], cfg: MoshiConfig, name: str) -> None:
    """Raises `InputError` unless the arms `names` can be run with the model of checkpoint `name`."""
    unknown = [arm for arm in names if arm not in ARMS]
    if unknown or not names:
        raise InputError(f"the arm {(unknown or [''])[0]!r} does not exist: give some of {', '.join(ARMS)}.")
    if len(set(names)) < len(names):
        raise InputError(f"the arms {', '.join(names)} name one twice: give each once.")
    if not cfg.ttt_layers and tuple(names) != WITHOUT_TTT:
        raise InputError(
            f"{name} has no TTT layers, so the arms {', '.join(names)} would all be the same: give --arms off, or"
            " leave --arms out."
        )
    if "permuted" in names and "persist" not in names:
        raise InputError("the arm permuted takes the memories of the arm persist: add persist to --arms.")


def resets(names: Sequence[str]) -> bool:
    """Returns whether a reset changes the state of any of the arms."""
    return any(ARMS[name].at_reset != "keeps" for name in names)


def set_params(params: model.Params, names: Sequence[str]) -> model.Params:
    """Returns `params` in which the leaves that any arm may set have a leading axis of arms (with several arms)."""

    def stack(path: tuple, leaf: jax.Array) -> jax.Array:
        if not _is_settable(path):
            return leaf
        values = [dict(ARMS[arm].sets).get(path[-1].key) for arm in names]
        stacked = [leaf if value is None else jnp.full_like(leaf, value) for value in values]
        return jnp.stack(stacked) if len(names) > 1 else stacked[0]

    return jax.tree_util.tree_map_with_path(stack, params)


def init_state(cfg: MoshiConfig, batch: int, names: Sequence[str]) -> model.State:
    """Returns a fresh state; with several arms its leaves from the first TTT layer on have a leading axis of arms."""
    state = model.init_state(cfg, batch)
    if len(names) == 1:
        return state
    layers = dict(state.layers)
    for run in _runs_by_arm(cfg):
        layers[run.name] = jax.tree.map(lambda leaf: jnp.stack([leaf] * len(names)), layers[run.name])
    return state._replace(layers=layers)


def over_arms(step: Callable[[model.Params, model.State], Any], cfg: MoshiConfig, names: Sequence[str]) -> Callable:
    """Returns `step`, a call of `model.forward`, for all arms: its outputs have a leading axis of arms."""
    if len(names) == 1:

        def alone(params: model.Params, state: model.State) -> Any:
            outputs, state = step(params, state)
            return jax.tree.map(lambda leaf: leaf[None], outputs), state

        return alone
    by_arm = _runs_by_arm(cfg)
    of_state = model.State(None, None, None, {run.name: 0 if run in by_arm else None for run in cfg.runs})

    def side_by_side(params: model.Params, state: model.State) -> Any:
        of_params = jax.tree_util.tree_map_with_path(lambda path, _: 0 if _is_settable(path) else None, params)
        return jax.vmap(step, in_axes=(of_params, of_state), out_axes=(0, of_state))(params, state)

    return side_by_side


def reset(state: model.State, resets_now: jax.Array, partners: jax.Array, names: Sequence[str]) -> model.State:
    """Returns the state after a reset, if `resets_now`, of the TTT states; all else is carried.

    `partners`, int32 [B], are the rows whose memory each row takes in `permuted`.
    """
    if not resets(names):
        return state

    def of_arm(i: int, leaf: jax.Array) -> jax.Array:
        match ARMS[names[i]].at_reset:
            case "keeps":
                return leaf[i]
            case "clears":
                return jnp.zeros_like(leaf[i])
            case "takes another's":
                return leaf[names.index("persist")][:, partners]  # [L, B, ...]

    def of_leaf(leaf: jax.Array) -> jax.Array:
        stacked = leaf if len(names) > 1 else leaf[None]
        changed = jnp.stack([of_arm(i, stacked) for i in range(len(names))])
        return jnp.where(resets_now, changed if len(names) > 1 else changed[0], leaf)

    layers = {name: run._replace(ttt=jax.tree.map(of_leaf, run.ttt)) for name, run in state.layers.items()}
    return state._replace(layers=layers)


def _is_settable(path: tuple) -> bool:
    """Returns whether an arm may set the parameter at `path`."""
    return len(path) > 1 and path[-2].key == "ttt" and path[-1].key in SETTABLE


def _runs_by_arm(cfg: MoshiConfig) -> list[Run]:
    """Returns the runs of layers whose state depends on the arm: from the first with TTT layers on."""
    first = next((i for i, run in enumerate(cfg.runs) if run.has_ttt), len(cfg.runs))
    return list(cfg.runs[first:])
