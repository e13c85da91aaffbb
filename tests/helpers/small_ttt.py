"""One small TTT layer, its settings and what the tests of its laws call."""

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.helpers import reference_ttt
from tests.helpers.contract import Module
from tests.helpers.drawing import pieces, quick_jit, random_like, random_params
from ttt_jax.config import MoshiConfig, TTTConfig
from ttt_jax.ttt.layer import TTTLayer, init_state

TOL = 1e-10
ROWS, FRAMES, DIM, HEADS = 2, 24, 16, 2
PARTS = ((12, 12), (1,) * FRAMES, (*(1,) * 5, 12, *(1,) * 7))
"""Splits of `FRAMES` by calls of two lengths: each length compiles anew."""
NETWORKS = {"linear": (), "mlp2": (4,), "mlp3": (2, 2), "mlp5": (2, 1, 3, 2)}
VARIANTS = {
    "as trained from scratch": {},
    "no decay": {"horizon": None},
    "bound": {"max_displacement": 0.5},
    "bound, no decay": {"max_displacement": 0.2, "horizon": None},
    "rope": {"rope": True},
    "no norms around": {"pre_norm": False, "post_norm": False, "base_lr": 0.3},
}

networks = pytest.mark.parametrize("hidden", NETWORKS.values(), ids=NETWORKS.keys())
shallow_networks = pytest.mark.parametrize(
    "hidden",
    [
        pytest.param(hidden, id=name, marks=() if name == "mlp2" else pytest.mark.slow)
        for name, hidden in NETWORKS.items()
    ],
)


def grid(*default, fused=False):
    """Inner networks and mini-batch sizes; pairs that are not in `default` are slow. With `fused` also the 2-layer MLP
    and the linear network by the fused path ("fused-4", "fused_linear-4"), and an argument `impl`."""
    networks = [(name, hidden, "xla") for name, hidden in NETWORKS.items()]
    if fused:
        networks += [("fused", NETWORKS["mlp2"], "pallas"), ("fused_linear", NETWORKS["linear"], "pallas")]
    return pytest.mark.parametrize(
        ("hidden", "mini_batch", "impl") if fused else ("hidden", "mini_batch"),
        [
            pytest.param(
                *((hidden, b, impl) if fused else (hidden, b)),
                id=f"{name}-{b}",
                marks=() if f"{name}-{b}" in default else pytest.mark.slow,
            )
            for name, hidden, impl in networks
            for b in (1, 4, 16, 64)
        ],
    )


pairs = grid("linear-1", "mlp2-4", "fused-4", fused=True)
"""Laws that hold by the same lines of code for every network: one pair each of b = 1 and of more, and one of the fused
path, which runs its plain chain here (tests/ttt/conftest.py)."""


def config(hidden=(4,), mini_batch=4, dtype="float64", **ttt) -> MoshiConfig:
    """A layer whose memory decays within the test; narrow heads take the rate of wide ones; scans go in groups with a
    rest."""
    ttt = {"horizon": 100.0, "base_lr": min(1.0, 8 / mini_batch), "remat_group": 5, **ttt}
    return MoshiConfig(
        dim=DIM,
        num_heads=HEADS,
        num_layers=1,
        dtype=dtype,
        ttt=TTTConfig(layers="0", hidden=hidden, mini_batch=mini_batch, **ttt),
    )


def apply(params, x, mask, state, cfg):
    return TTTLayer(cfg).apply({"params": params}, x, mask, state)[:2]


def measure(params, x, mask, state, cfg, measured=True):
    """Output, state and measurement."""
    return TTTLayer(cfg).apply({"params": params}, x, mask, state, measured)


call = quick_jit(apply, static_argnames="cfg")
measured_call = quick_jit(measure, static_argnames="cfg")


@partial(quick_jit, static_argnames="cfg")
def value_and_grads(params, x, mask, state, weights, cfg):
    """A loss that reads outputs and state alike, and its gradients to parameters, x and the carried weights."""

    def loss(params, x, moved):
        out, new = apply(params, x, mask, state._replace(displacement=moved[0], open_steps=moved[1]), cfg)
        return sum(
            (a * b).sum() for a, b in zip(jax.tree.leaves((out, new[:2])), jax.tree.leaves(weights), strict=True)
        )

    return jax.value_and_grad(loss, argnums=(0, 1, 2))(params, x, state[:2])


@cache
def init_shapes(cfg):
    x, mask = jnp.zeros((1, 1, cfg.dim), cfg.dtype), jnp.ones((1, 1), bool)
    return jax.eval_shape(lambda key: TTTLayer(cfg).init(key, x, mask, init_state(cfg, 1))["params"], jax.random.key(0))


def setting(cfg, seed, frames=FRAMES, rows=ROWS):
    """Random parameters and hidden vectors (NumPy: slicing them compiles nothing), and the generator for more."""
    rng = np.random.default_rng(seed)
    return (
        random_params(init_shapes(cfg), rng, cfg.dtype),
        rng.standard_normal((rows, frames, cfg.dim)).astype(jnp.dtype(cfg.dtype)),
        rng,
    )


def carried_state(cfg, rng, rows=ROWS):
    """A state that a stream could have left, in NumPy: weights moved, rows at any phase."""
    b = cfg.ttt.mini_batch
    state = init_state(cfg, rows)
    count = rng.integers(0, 3 * b, rows)
    small = lambda leaf: 0.2 * np.asarray(leaf)  # noqa: E731
    moved = jax.tree.map(small, random_like(state.displacement, rng))
    open_steps = up_to(count % b, jax.tree.map(small, random_like(state.open_steps, rng)))
    return state._replace(displacement=moved, open_steps=open_steps, count=np.asarray(count, np.int32))


def up_to(phase, steps):
    """Steps [B, H, b, ...] of the slots before the phase of each row, 0 in the others."""
    return jax.tree.map(lambda leaf: leaf * (np.arange(leaf.shape[2]) < phase[:, None])[:, None, :, None], steps)


def module(cfg, tolerance=TOL) -> Module:
    """The layer as `tests.helpers.contract.verify` takes it."""

    def of_row(tree, index):
        return jax.tree.map(lambda leaf: np.asarray(leaf)[index], tree)

    def reset(state, rows):
        def keep(leaf):
            return np.where(rows.reshape(-1, *(1,) * (np.ndim(leaf) - 1)), 0, leaf).astype(leaf.dtype)

        return jax.tree.map(keep, state)

    def spoil(state):
        nan = lambda leaf: leaf * np.array([1, np.nan], leaf.dtype).reshape(-1, *(1,) * (leaf.ndim - 1))  # noqa: E731
        return state._replace(displacement=jax.tree.map(nan, state[0]), open_steps=jax.tree.map(nan, state[1]))

    return Module(
        call=partial(call, cfg=cfg),
        gradients=lambda *args: value_and_grads(*args, cfg=cfg)[1],
        scored=lambda out: out,
        carried=lambda state: state[:2],
        fresh=lambda state: jax.tree.map(np.zeros_like, state),
        reset=reset,
        row=of_row,
        spoil=spoil,
        draw=lambda x, rng: rng.standard_normal(x.shape).astype(x.dtype),
        garbage=lambda x, rng: rng.choice(np.array([np.nan, np.inf, np.finfo(x.dtype).max], x.dtype), x.shape),
        tolerance=tolerance,
    )


def run_split(params, x, mask, state, cfg, parts):
    outs = []
    for piece in pieces(parts):
        out, state = call(params, x[:, piece], mask[:, piece], state, cfg=cfg)
        outs.append(np.asarray(out))
    return np.concatenate(outs, 1), state


def reference(params, x, mask, state, cfg):
    """Output and state of the written-out descent."""
    return measured_reference(params, x, mask, state, cfg)[:2]


def measured_reference(params, x, mask, state, cfg):
    return reference_ttt.ttt_layer(
        params,
        np.asarray(x, np.float64),
        np.asarray(mask),
        state,
        heads=cfg.num_heads,
        base_lr=cfg.inner_lr,
        ttt=cfg.ttt,
    )
