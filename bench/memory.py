"""How long the fast weights of a TTT layer stay alive and what they keep: ``python -m bench.memory``."""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from ttt_jax.config import MoshiConfig, TTTConfig
from ttt_jax.moshi import model
from ttt_jax.moshi.delays import columns
from ttt_jax.ttt import inner
from ttt_jax.ttt.layer import TTTLayer, init_state

CALL = 512  # frames of a call
PERIOD = 39 * CALL  # frames after which the speech repeats, so that the early and the late change meet the same frames
EARLY, LATE, END = 2 * CALL, 80 * CALL, 45_000


def activations(params, cfg: MoshiConfig, frames: np.ndarray) -> jax.Array:
    """What the first TTT layer of a model reads, [1, T, dim], of tokens int32 [K, T]."""

    @jax.jit
    def call(frames, state):
        read = []

        def keep(fun, args, kwargs, context):
            if isinstance(context.module, TTTLayer) and context.method_name == "__call__":
                read.append(args[0])
            return fun(*args, **kwargs)

        mask = jnp.ones((1, CALL), bool)
        with nn.intercept_methods(keep):
            grid, history = columns(state.history, frames, mask, cfg)
            _, state, _ = model.temporal(params, grid.inputs, mask, state, cfg)
        return read[0], state._replace(history=history)

    state, outs = model.init_state(cfg, 1), []
    for start in range(0, frames.shape[1], CALL):
        x, state = call(jnp.asarray(frames[None, :, start : start + CALL]), state)
        outs.append(x)
    return jnp.concatenate(outs, 1)


@partial(jax.jit, static_argnames="cfg")
def _call(params, x, state, cfg):
    _, state, m = TTTLayer(cfg).apply({"params": params}, x, jnp.ones(x.shape[:2], bool), state, True)
    return state, m


def ratios(params, state):
    base = sum((p**2).sum(tuple(range(1, p.ndim))) for n, p in params.items() if n.startswith("inner_"))
    moved = sum((d[0] ** 2).sum(tuple(range(1, d.ndim - 1))) for d in jax.tree.leaves(state.displacement))
    return np.asarray(jnp.sqrt(moved / base))


def change_map(params, key):
    k = params["v_kernel"]
    return {**params, "v_kernel": jax.random.normal(key, k.shape) * k.std(), "v_bias": jax.random.permutation(key, params["v_bias"])}


def study(cfg: MoshiConfig, x: jax.Array, key, params=None) -> dict:
    """x: one period."""
    mask = jnp.ones((1, CALL), bool)
    if params is None:
        params = jax.jit(TTTLayer(cfg).init)(key, x[:, :CALL], mask, init_state(cfg, 1))["params"]
    other = change_map(params, jax.random.key(77))
    frozen = {**params, "rate_bias": jnp.full_like(params["rate_bias"], -jnp.inf)}
    state, r = init_state(cfg, 1), {}
    before, base, moved = [], [], []
    recall = {}
    frames = 0
    while frames < END:
        if frames in (EARLY, LATE):
            _, m = _call(other, x[:, frames % PERIOD :][:, :CALL], state, cfg)
            r["early" if frames == EARLY else "late"] = float(m.inner.loss_before.mean())
            r.setdefault("new_base", float(m.inner.loss_base.mean()))
        if frames in (CALL, EARLY, 4*CALL, 4608, 9216, 36*CALL):
            _, m = _call(frozen, x[:, :CALL], state, cfg)
            recall[frames] = float((m.inner.loss_base - m.inner.loss_before).mean())
        state, m = _call(params, x[:, frames % PERIOD :][:, :CALL], state, cfg)
        before.append(float(m.inner.loss_before.mean())); base.append(float(m.inner.loss_base.mean()))
        moved.append(np.asarray(m.inner.displacement[0, -1]))
        frames += CALL
    moved = np.stack(moved)
    r |= dict(disp_1k=moved[1].max(), disp_4500=moved[8].max(), disp_45k=moved[87].max(), disp_max=moved.max(), growth=(moved[87] / moved[8]).max(),
      plastic=r["late"] / r["early"], base=np.mean(base), b1=before[0], before_early=np.mean(before[1:10]), before_late=np.mean(before[-10:]), recall=recall)
    return r
