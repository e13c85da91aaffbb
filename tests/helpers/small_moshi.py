"""One small model for the tests of its laws: two layers with TTT, one without and with a shorter window."""

from __future__ import annotations

import dataclasses
import itertools
from functools import cache, partial

import jax
import numpy as np
import pytest

from tests.helpers.contract import Module
from tests.helpers.drawing import quick_jit, random_params
from ttt_jax.config import DepthConfig, MoshiConfig, TTTConfig
from ttt_jax.moshi import model
from ttt_jax.moshi.loss import token_losses

TOL = 1e-10
ROWS, FRAMES = 2, 16
PARTS = ((8, 8), (1,) * FRAMES, (*(1,) * 5, 8, *(1,) * 3))
"""Splits of `FRAMES` by calls of two lengths, since each compiles for seconds; a call of 8 is longer than the
windows."""
SMALL = MoshiConfig(
    dim=16,
    num_layers=3,
    num_heads=2,
    hidden=24,
    context=6,
    layer_context=((2, 3),),
    n_q=4,
    dep_q=3,
    card=45,
    text_card=47,
    delays=(0, 0, 1, 2, 2),
    dtype="float64",
    depth=DepthConfig(dim=8, num_layers=1, num_heads=2, hidden=12),
    ttt=TTTConfig(layers="0-1", hidden=(2,), mini_batch=4),
)
"""The configuration of all default tests: one run of layers with TTT and one without."""
DEEP = dataclasses.replace(
    SMALL, num_layers=5, layer_context=((3, 3),), ttt=dataclasses.replace(SMALL.ttt, layers="1-3")
)
"""A plain layer, two with TTT, one with TTT and a shorter window, one plain: four runs."""
SHALLOW = dataclasses.replace(
    SMALL, num_layers=2, layer_context=(), ttt=dataclasses.replace(SMALL.ttt, layers="0-1", hidden=())
)
"""One run of two layers, for the grid of inner networks."""
NETWORKS = {"linear": (), "mlp2": (2,), "mlp3": (2, 2)}


def _grid():
    params = [pytest.param(SMALL, id="small"), pytest.param(DEEP, id="deep", marks=pytest.mark.slow)]
    params.append(pytest.param(dataclasses.replace(SMALL, attention_sink=2), id="sink", marks=pytest.mark.slow))
    for (name, hidden), b in itertools.product(NETWORKS.items(), (1, 4, 16, 64)):
        cfg = dataclasses.replace(SHALLOW, ttt=dataclasses.replace(SHALLOW.ttt, hidden=hidden, mini_batch=b))
        params.append(pytest.param(cfg, id=f"{name}-{b}", marks=pytest.mark.slow))
    return pytest.mark.parametrize("cfg", params)


configs = _grid()
"""`SMALL`; all else is slow: more runs, an attention sink, and inner networks by mini-batch sizes."""
PREDICTED = 1 + SMALL.dep_q
CARDS = np.array([SMALL.text_card] + SMALL.n_q * [SMALL.card])


@partial(quick_jit, static_argnames=("cfg", "measured"))
def forward(params, frames, mask, state, cfg, measured=False):
    """Outputs with rows and frames in front, [B, T, ...], with the tokens' losses; the state."""
    out, state = model.forward(params, frames, mask, state, cfg, measured)
    by_time = out._replace(
        targets=out.targets.swapaxes(1, 2),
        target_mask=out.target_mask.swapaxes(1, 2),
        ttt=jax.tree.map(lambda x: x.swapaxes(0, 1).swapaxes(1, 2), out.ttt),
    )
    return (by_time, token_losses(out).swapaxes(1, 2)), state


reset_rows = quick_jit(model.reset_rows, static_argnames="cfg")
reset_ttt_rows = quick_jit(model.reset_ttt_rows)


def floats(state):
    """The part of a state that has gradients: keys and values, displacements, open steps."""
    return {name: (run.kv_cache, run.ttt[:2] if run.ttt else ()) for name, run in state.layers.items()}


def with_floats(state, moved):
    """The state with another `floats`."""
    layers = {}
    for name, (kv_cache, ttt) in moved.items():
        old = state.layers[name].ttt
        layers[name] = model.RunState(kv_cache, old._replace(displacement=ttt[0], open_steps=ttt[1]) if ttt else old)
    return state._replace(layers=layers)


@partial(quick_jit, static_argnames="cfg")
def value_and_grads(params, frames, mask, state, weights, cfg):
    """A loss that weighs every token's loss [B, T, 1 + Q] and the carried floats; its gradients to parameters and
    carried floats."""

    def loss(params, moved):
        outputs, new = model.forward(params, frames, mask, with_floats(state, moved), cfg)
        read = jax.tree.leaves((token_losses(outputs).swapaxes(1, 2), floats(new)))
        return sum((a * b).sum() for a, b in zip(read, jax.tree.leaves(weights), strict=True))

    return jax.value_and_grad(loss, argnums=(0, 1))(params, floats(state))


@cache
def init_shapes(cfg):
    return jax.eval_shape(partial(model.init_params, cfg), jax.random.key(0))


def setting(cfg, seed, frames=FRAMES, rows=ROWS):
    """Random parameters and tokens [B, K, T], and the generator for more."""
    rng = np.random.default_rng(seed)
    tokens = random_tokens(rng, (rows, frames))
    return jax.tree.map(np.asarray, random_params(init_shapes(cfg), rng, cfg.dtype)), tokens, rng


def random_tokens(rng, shape):
    rows, frames = shape
    return rng.integers(0, CARDS[None, :, None], (rows, SMALL.num_streams, frames), dtype=np.int32)


@cache
def fresh(cfg, rows=ROWS):
    return jax.tree.map(np.asarray, model.init_state(cfg, rows))


def carried_state(cfg, rng):
    """A state that could be met, in NumPy: rows and layers at any phase, KV caches full or not yet."""
    b = cfg.ttt.mini_batch

    def of_run(run):
        normal = lambda x: rng.standard_normal(x.shape).astype(x.dtype)  # noqa: E731
        kv_cache, ttt = jax.tree.map(normal, run.kv_cache), run.ttt
        if ttt is None:
            return model.RunState(kv_cache, None)
        count = rng.integers(0, 3 * b, ttt.count.shape, dtype=np.int32)
        held = lambda x: (np.arange(x.shape[3]) < (count % b)[..., None])[:, :, None, :, None]  # noqa: E731
        return model.RunState(
            kv_cache,
            ttt._replace(
                displacement=jax.tree.map(lambda x: 0.2 * normal(x), ttt.displacement),
                open_steps=jax.tree.map(lambda x: 0.2 * normal(x) * held(x), ttt.open_steps),
                count=count,
            ),
        )

    layers = {name: of_run(run) for name, run in fresh(cfg).layers.items()}
    history = rng.integers(0, CARDS[None, :, None], fresh(cfg).history.shape, dtype=np.int32)
    position, key = rng.integers(0, 20, ROWS, dtype=np.int32), rng.integers(0, 9, (ROWS, 2), dtype=np.uint32)
    return model.State(history, position, key, layers)


def poisoned_floats(state, row=1):
    """The state with every float of one row NaN."""

    def poison(x):
        rows = (np.arange(ROWS) == row).reshape(-1, *(1,) * (x.ndim - 2))
        return np.where(rows, np.nan, x) if np.issubdtype(x.dtype, np.floating) else x

    return state._replace(layers=jax.tree.map(poison, state.layers))


def row_of(tree, row):
    """One row of a state, or of its `floats`."""
    if isinstance(tree, model.State):
        return *(leaf[row] for leaf in tree[:3]), row_of(tree.layers, row)
    return jax.tree.map(lambda x: np.asarray(x)[:, row], tree)


def module(cfg) -> Module:
    """The model as `tests.helpers.contract.verify` takes it; inputs are tokens [B, T, K]."""

    def call(params, x, mask, state):
        return forward(params, x.swapaxes(1, 2), mask, state, cfg=cfg)

    def gradients(params, x, mask, state, weights):
        of_params, of_carried = value_and_grads(params, x.swapaxes(1, 2), mask, state, weights, cfg=cfg)[1]
        return of_params, (), of_carried

    garbage = np.array([-(2**31), -7, -1, 3, 999, 2**31 - 1], np.int32)
    return Module(
        call=call,
        gradients=gradients,
        scored=lambda out: out[1],
        carried=floats,
        fresh=lambda state: fresh(cfg)._replace(key=state.key),  # a reset row keeps its key
        reset=lambda state, rows: jax.tree.map(np.asarray, reset_rows(state, rows, cfg=cfg)),
        row=row_of,
        spoil=poisoned_floats,
        draw=lambda x, rng: random_tokens(rng, x.shape[:2]).swapaxes(1, 2).copy(),
        garbage=lambda x, rng: rng.choice(garbage, x.shape),
        batch_axis=1,
        tolerance=TOL,
    )
