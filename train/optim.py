"""The optimiser: AdamW, clipped by the global norm, with a learning rate for each group of parameters."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import jax
import optax

from train.config import TrainConfig

RULES = (
    (r".*_lora_[ab]", "lora", True),
    (r".*/ttt/gate", "gate", False),
    # W0 is not decayed: the inner layer norm hides its scale from the outer loss, but that scale sets how far an inner
    # step moves the network. Decay would shrink it and so raise the inner learning rate.
    (r".*/ttt/(inner_[wb]\d+|rate_weight|rate_bias|(ln|post_norm)_(scale|bias)|norm|[a-z]+_bias)", "ttt", False),
    (r".*/ttt/[a-z]+_kernel", "ttt", True),
    (r"(.*/)?(norm\d|out_norm)", "base", False),
    (r"(.*/)?((text|audio)_emb(_up)?|text_head|extra_heads|heads|input|qkv|out|gate_up|down)", "base", True),
)
"""(pattern of a parameter's path, its group, whether it is decayed); the first match of the whole path decides."""

GROUPS = ("base", "lora", "ttt", "gate")


def groups(params: Any) -> Any:
    """Returns the tree of `params` with the group at every leaf. Raises `ValueError` for a path that no rule covers."""
    return _by_rule(params, 1)


def decayed(params: Any) -> Any:
    """Returns the tree of `params` with True where weight decay applies."""
    return _by_rule(params, 2)


def schedules(cfg: TrainConfig) -> dict[str, Callable]:
    """Returns each group's learning rate by step, from 0: linear warm-up, then cosine decay to the final fraction."""
    optim = cfg.optim
    peaks = {"base": optim.lr, "lora": optim.lr, "ttt": optim.ttt_lr, "gate": optim.gate_lr}
    warmup = min(optim.warmup_steps, cfg.steps // 2)
    return {
        group: optax.warmup_cosine_decay_schedule(
            # Step 0 learns already; the ramp ends at step `warmup`.
            init_value=peak / (warmup + 1),
            peak_value=peak,
            warmup_steps=warmup,
            decay_steps=max(cfg.steps, 1),
            end_value=peak * optim.final_fraction,
        )
        for group, peak in peaks.items()
    }


def make_optimizer(cfg: TrainConfig) -> optax.GradientTransformation:
    """Returns the optimiser of a run. The groups share the clipping and AdamW, and differ in the learning rate."""
    optim = cfg.optim
    rates = {group: optax.scale_by_learning_rate(schedule) for group, schedule in schedules(cfg).items()}
    return optax.chain(
        optax.clip_by_global_norm(optim.clip_norm),
        optax.scale_by_adam(b1=optim.beta1, b2=optim.beta2, eps=1e-8),
        optax.add_decayed_weights(optim.weight_decay, mask=decayed),
        optax.multi_transform(rates, groups),
    )


def _by_rule(params: Any, column: int) -> Any:
    def find(path, _):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        for rule in RULES:
            if re.fullmatch(rule[0], name):
                return rule[column]
        raise ValueError(f"no rule says how the parameter {name} is trained: add it to train.optim.RULES.")

    return jax.tree_util.tree_map_with_path(find, params)
