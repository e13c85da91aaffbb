"""The laws of the TTT layer that a device or a compiler can break, each tried once on this machine.

`python -m ttt_jax.doctor` prints them. Numbers are those of docs/design.md; the tests try all laws, on more sizes.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ttt_jax.config import MoshiConfig, TTTConfig
from ttt_jax.ttt.layer import TTTLayer, init_state
from ttt_jax.ttt.network import Network
from ttt_jax.ttt.state import TTTState
from ttt_jax.utils.xla import QUICK, known_options

ROWS, FRAMES = 2, 24
TTT = TTTConfig(layers="0", mini_batch=4, horizon=40.0)
"""A horizon so short that almost half of what was learned decays within `FRAMES` frames."""
LAYER = MoshiConfig(dim=16, num_heads=2, num_layers=1, ttt=TTT)

EXACT = {"float64": 0.0, "float32": 0.0}
ROUNDING = {"float64": 1e-10, "float32": 1e-4}
DIFFERENCES = {"float64": 1e-5, "float32": 2e-2}
"""Allowed errors by type, in units of `_off`: same bits, another order of sums, finite differences."""

Params = dict[str, np.ndarray]


class Finding(NamedTuple):
    """The result of one law."""

    law: int  # its number
    text: str
    error: float  # distance of the layer from the law; NaN if the law could not be tried
    allowed: float
    problem: Exception | None  # why the law could not be tried

    @property
    def holds(self) -> bool:
        """Whether the error is within what is allowed; NaN never is."""
        return self.error <= self.allowed


def layer_apply(
    params: Params, x: jax.Array, mask: jax.Array, state: TTTState, cfg: MoshiConfig
) -> tuple[jax.Array, TTTState]:
    """The project's layer: x [B, T, D], mask bool [B, T] and a state to the output [B, T, D] and the new state."""
    return TTTLayer(cfg).apply({"params": params}, x, mask, state)[:2]


def check_laws(apply: Callable = layer_apply, dtype: str = "float64", layer: MoshiConfig = LAYER) -> list[Finding]:
    """Tries all laws; a layer that raises is a finding, too.

    Args:
      apply: pure function with the arguments and results of `layer_apply`.
      dtype: "float64", or "float32", with looser tolerances, for devices without float64.
      layer: sizes of the layer; `FRAMES` frames end a mini-batch.
    """
    with jax.enable_x64(dtype == "float64"), jax.default_matmul_precision("highest"):
        trial, findings = _Trial(apply, dataclasses.replace(layer, dtype=dtype)), []
        for law, text, measure, allowed in LAWS:
            try:
                error, problem = measure(trial), None
            except Exception as raised:  # noqa: BLE001  a compiler may break in any way
                error, problem = math.nan, raised
            findings.append(Finding(law, text, error, allowed[dtype], problem))
        return findings


class _Trial:
    """A layer with random parameters and frames: x [B, T, D], gaps bool [B, T] (row 0 is all valid, row 1 has gaps)."""

    def __init__(self, apply: Callable, cfg: MoshiConfig):
        dtype, rng = cfg.dtype, np.random.default_rng(0)
        self.apply, self.call, self.cfg = apply, _jit(apply, static_argnames="cfg"), cfg
        self.x = rng.standard_normal((ROWS, FRAMES, cfg.dim)).astype(dtype)
        self.gaps = rng.random((ROWS, FRAMES)) < 0.7
        self.gaps[0] = True
        init = lambda key: TTTLayer(cfg).init(key, self.x, self.gaps, init_state(cfg, ROWS))["params"]  # noqa: E731
        # Nothing 0 and nothing 1, so that nothing drops out unseen.
        self.params = {
            name: ((name == "norm" or name.endswith("scale")) + 0.3 * rng.standard_normal(leaf.shape)).astype(dtype)
            for name, leaf in jax.eval_shape(init, jax.random.key(0)).items()
        }

    def run(
        self, x: np.ndarray, mask: np.ndarray | bool = True, state: TTTState | None = None, **changed: np.ndarray
    ) -> tuple[np.ndarray, TTTState]:
        """One call; by default all frames are valid and the state is fresh. `changed`: parameters by name."""
        mask = np.broadcast_to(mask, x.shape[:2])
        state = init_state(self.cfg, ROWS) if state is None else state
        out, state = self.call({**self.params, **changed}, x, mask, state, cfg=self.cfg)
        return np.asarray(out), state


def _jit(function: Callable, **options: Any) -> Callable:
    """`jax.jit`; on CPU with little optimisation: each program runs a few times only."""
    if jax.default_backend() == "cpu":
        options["compiler_options"] = known_options(QUICK)
    return jax.jit(function, **options)


def _off(got: Any, expected: Any) -> float:
    """Largest difference over the leaves of two trees, in units of the larger of 1 and the leaf's greatest
    magnitude."""
    pairs = zip(jax.tree.leaves(jax.device_get(got)), jax.tree.leaves(jax.device_get(expected)), strict=True)
    # NumPy's maximum, unlike Python's, is NaN if one is.
    return float(np.max([np.abs(a - b).max() / max(1.0, np.abs(b).max()) for a, b in pairs]))


def _descent(trial: _Trial) -> float:
    out, state = trial.run(trial.x)
    written_out = _jit(jax.vmap(lambda x: _written_out(trial.params, x, trial.cfg)))
    return _off((out, state.displacement), written_out(trial.x))


def _written_out(p: Params, x: jax.Array, cfg: MoshiConfig) -> tuple[jax.Array, Network]:
    """The layer on one row, frame by frame; every W_i is formed, by `jax.grad` of the inner loss.

    Returns the output for x [T, D] and the displacement after the last frame, which must close a mini-batch.
    """
    heads, width, ttt = cfg.num_heads, cfg.head_dim, cfg.ttt
    base = [(jnp.asarray(p[f"inner_w{n}"]), jnp.asarray(p[f"inner_b{n}"])) for n in range(len(ttt.hidden) + 1)]
    kept = math.exp(-ttt.mini_batch / ttt.horizon)

    def standard(y, eps, ddof=0):
        return (y - y.mean(-1, keepdims=True)) / jnp.sqrt(y.var(-1, keepdims=True, ddof=ddof) + eps)

    def predict(weights, y):
        for n, (w, b) in enumerate(weights):
            y = jnp.einsum("HI,HIO->HO", jax.nn.gelu(y) if n else y, w) + b
        return p["ln_scale"] * standard(y, 1e-8) + p["ln_bias"]

    def frame(carry, numbered):
        (start, fast), (i, x) = carry, numbered
        h = p["norm"] * x / jnp.sqrt((x * x).mean() + 1e-8)
        q, k, v = ((h @ p[f"{name}_kernel"].T + p[f"{name}_bias"]).reshape(heads, width) for name in "qkv")
        q, k = (y / jnp.sqrt((y * y).sum(-1, keepdims=True) + 1e-12) for y in (q, k))
        target = p["ln_scale"] * standard(v - k, 1e-10, ddof=1) + p["ln_bias"]
        rate = cfg.inner_lr / width * jax.nn.sigmoid(p["rate_weight"] @ h + p["rate_bias"])
        gradient = jax.grad(lambda w: 0.5 * ((predict(w, k) - target) ** 2).sum())(start)
        fast = jax.tree.map(lambda w, g: w - rate.reshape(heads, *(1,) * (g.ndim - 1)) * g, fast, gradient)
        z = standard((q + predict(fast, q)).reshape(-1), 1e-6) * p["post_norm_scale"] + p["post_norm_bias"]
        closes = (i + 1) % ttt.mini_batch == 0
        fast = jax.tree.map(lambda w, w0: jnp.where(closes, w0 + kept * (w - w0), w), fast, base)
        start = jax.tree.map(lambda old, new: jnp.where(closes, new, old), start, fast)
        return (start, fast), x + jnp.tanh(p["gate"]) * (z @ p["out_kernel"].T + p["out_bias"])

    (_, fast), out = jax.lax.scan(frame, (base, base), (jnp.arange(len(x)), x))
    return out, jax.tree.map(jnp.subtract, fast, base)


def _splits(trial: _Trial) -> float:
    outs, state = [], None
    for frame in range(FRAMES):
        now = slice(frame, frame + 1)
        out, state = trial.run(trial.x[:, now], trial.gaps[:, now], state)
        outs.append(out)
    return _off((np.concatenate(outs, 1), state), trial.run(trial.x, trial.gaps))


def _masked_content(trial: _Trial) -> float:
    poisoned = np.where(trial.gaps[..., None], trial.x, np.nan)
    out, state = trial.run(trial.x, trial.gaps)
    return _off(trial.run(poisoned, trial.gaps), (out * trial.gaps[..., None], state))  # masked frames come out as 0


def _closed_gate(trial: _Trial) -> float:
    return _off(trial.run(trial.x, gate=0 * trial.params["gate"])[0], trial.x)


def _base_gradient(trial: _Trial) -> float:
    rng, step = np.random.default_rng(1), 1e-6 if trial.cfg.dtype == "float64" else 1e-2
    draw = lambda leaf: rng.standard_normal(leaf.shape).astype(leaf.dtype)  # noqa: E731
    direction = {name: draw(leaf) for name, leaf in trial.params.items() if name.startswith("inner_")}
    weight, (_, state) = draw(trial.x), trial.run(trial.x)

    def loss(distance):
        # The carried state is a constant here, no function of the base: the gradient ends there.
        moved = {name: trial.params[name] + distance * leaf for name, leaf in direction.items()}
        return (weight * trial.apply(trial.params | moved, -trial.x, trial.gaps, state, trial.cfg)[0]).sum()

    value_and_slope = _jit(jax.value_and_grad(loss))
    above, below = value_and_slope(step)[0], value_and_slope(-step)[0]
    return _off(value_and_slope(0.0)[1], (above - below) / (2 * step))


LAWS: tuple[tuple[int, str, Callable[[_Trial], float], dict[str, float]], ...] = (
    (1, "parallel form = written-out descent", _descent, ROUNDING),
    (2, "one chunk = frame by frame", _splits, ROUNDING),
    (4, "NaN in masked frames changes no bit", _masked_content, EXACT),
    (6, "gate 0 returns the input", _closed_gate, EXACT),
    (7, "gradient to W0 past a carried state", _base_gradient, DIFFERENCES),
)
"""Number, text, the function that measures the error, and the errors allowed by type."""
