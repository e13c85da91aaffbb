"""Arms of an experiment on memory: the same weights and files, the TTT layers' state treated differently.

An arm that switches something off is an edit of the parameters, so every arm runs the same compiled program; attention
rings, delayed tokens and positions are carried alike in all.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp

from ttt_jax.moshi.model import Params


class Arm(NamedTuple):
    """One setting."""

    meaning: str
    edit: Callable[[Params], Params]
    resets: bool
    """Whether the TTT states start anew at every chunk."""


def _edit_ttt(name: str, value: float) -> Callable[[Params], Params]:
    def edit(params: Params) -> Params:
        layers = {
            run: {**block, "ttt": {**block["ttt"], name: jnp.full_like(block["ttt"][name], value)}}
            if "ttt" in block
            else block
            for run, block in params["layers"].items()
        }
        return {**params, "layers": layers}

    return edit


ARMS: dict[str, Arm] = {
    "persist": Arm("memory kept from the first frame to the last", lambda params: params, False),
    "reset": Arm("memory cleared at the start of every chunk", lambda params: params, True),
    # sigmoid(-inf) is exactly 0: the inner rate vanishes and the fast weights stay at W0.
    "frozen": Arm("fast weights held at their learned start, no updates", _edit_ttt("rate_bias", -jnp.inf), False),
    "off": Arm("gates closed, TTT layers add nothing", _edit_ttt("gate", 0.0), False),
}
"""By name, in the order of reports."""
