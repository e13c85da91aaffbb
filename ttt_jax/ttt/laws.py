"""The laws of the TTT layer, each tried once with the programs that XLA compiles on this machine.

`python -m ttt_jax.doctor` prints them. They are numbered as in `tests/ttt/test_ttt_laws.py`, which tries more sizes.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ttt_jax.config import MoshiConfig, TTTConfig
from ttt_jax.ttt.inner import Network, TTTState
from ttt_jax.ttt.layer import TTTLayer, init_state
from ttt_jax.utils.xla import QUICK, known_options

ROWS, FRAMES, WIDTH, HEADS = 2, 24, 16, 2
TTT = TTTConfig(layers="0", mini_batch=4, horizon=40.0)
"""A horizon so short that almost half of what was learned decays within `FRAMES` frames."""

EXACT = {"float64": 0.0, "float32": 0.0}
ROUNDING = {"float64": 1e-10, "float32": 1e-4}
DIFFERENCES = {"float64": 1e-5, "float32": 2e-2}
"""Errors allowed by type, in units of `_off`: same bits, another order of sums, finite differences."""

Params = dict[str, np.ndarray]


class Finding(NamedTuple):
    """One law, tried."""

    law: int  # its number
    text: str
    error: float  # how far the layer is from it; NaN if it could not be tried
    allowed: float
    problem: Exception | None  # why it could not be tried

    @property
    def holds(self) -> bool:
        """Whether the error is within what is allowed; NaN never is."""
        return self.error <= self.allowed


def layer_apply(
    params: Params, x: jax.Array, mask: jax.Array, state: TTTState, cfg: MoshiConfig
) -> tuple[jax.Array, TTTState]:
    """The project's layer: x [B, T, D], mask bool [B, T] and a state to the output [B, T, D] and the state after it."""
    return TTTLayer(cfg).apply({"params": params}, x, mask, state)[:2]


def check_laws(apply: Callable = layer_apply, dtype: str = "float64") -> list[Finding]:
    """Tries all laws; a layer that raises is a finding, too.

    Args:
      apply: pure function with the arguments and results of `layer_apply`.
      dtype: "float64", or "float32", with looser tolerances, for devices that lack it.
    """
    with jax.enable_x64(dtype == "float64"), jax.default_matmul_precision("highest"):
        trial, findings = _trial(apply, dtype), []
        for law, text, measure, allowed in LAWS:
            try:
                error, problem = measure(trial), None
            except Exception as raised:  # noqa: BLE001  a compiler may break in any way
                error, problem = math.nan, raised
            findings.append(Finding(law, text, error, allowed[dtype], problem))
        return findings


@dataclasses.dataclass(frozen=True)
class _Trial:
    """A layer and what it is tried on."""

    apply: Callable
    call: Callable  # the same, compiled
    cfg: MoshiConfig
    params: Params
    x: np.ndarray  # [B, T, D]
    gaps: np.ndarray  # bool [B, T]: row 0 is all valid, row 1 has gaps, so that the rows differ in phase

    def run(
        self, x: np.ndarray, mask: np.ndarray | bool = True, state: TTTState | None = None, **changed: np.ndarray
    ) -> tuple[np.ndarray, TTTState]:
        """One call: all frames valid, from a fresh state, unless these are given, with parameters changed by name."""
        mask = np.broadcast_to(mask, x.shape[:2])
        state = init_state(self.cfg, ROWS) if state is None else state
        out, state = self.call({**self.params, **changed}, x, mask, state, cfg=self.cfg)
        return np.asarray(out), state

    def run_in_parts(self, cuts: Sequence[int] = range(1, FRAMES)) -> tuple[np.ndarray, TTTState]:
        """Calls one after the other over the frames with gaps, cut at these frames; unless given, frame by frame."""
        outs, state = [], None
        for x, mask in zip(np.split(self.x, cuts, 1), np.split(self.gaps, cuts, 1), strict=True):
            out, state = self.run(x, mask, state)
            outs.append(out)
        return np.concatenate(outs, 1), state


def _trial(apply: Callable, dtype: str) -> _Trial:
    cfg = MoshiConfig(dim=WIDTH, num_heads=HEADS, num_layers=1, dtype=dtype, ttt=TTT)
    rng = np.random.default_rng(0)
    x = rng.standard_normal((ROWS, FRAMES, WIDTH)).astype(dtype)
    gaps = rng.random((ROWS, FRAMES)) < 0.7
    gaps[0] = True
    shapes = jax.eval_shape(lambda key: TTTLayer(cfg).init(key, x, gaps, init_state(cfg, ROWS)), jax.random.key(0))
    # Nothing 0 and nothing 1, so that nothing drops out unseen.
    params = {
        name: ((name == "norm" or name.endswith("scale")) + 0.3 * rng.standard_normal(leaf.shape)).astype(dtype)
        for name, leaf in shapes["params"].items()
    }
    return _Trial(apply, _jit(apply, static_argnames="cfg"), cfg, params, x, gaps)


def _jit(function: Callable, **options: Any) -> Callable:
    """`jax.jit`; on CPU with little optimisation: each program runs a few times only."""
    if jax.default_backend() == "cpu":
        options["compiler_options"] = known_options(QUICK)
    return jax.jit(function, **options)


def _off(got: Any, expected: Any) -> float:
    """Largest difference over the leaves of two trees, in units of the larger of 1 and the leaf's greatest magnitude."""
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
    whole = trial.run(trial.x, trial.gaps)
    return _off([trial.run_in_parts(), trial.run_in_parts((11, 12, 13))], [whole, whole])


def _causality(trial: _Trial) -> float:
    def before(frame: int) -> np.ndarray:
        return trial.run(np.where(np.arange(FRAMES)[:, None] < frame, trial.x, -trial.x))[0][:, :frame]

    out, frames = trial.run(trial.x)[0], range(1, FRAMES)
    return _off([before(frame) for frame in frames], [out[:, :frame] for frame in frames])


def _masked_content(trial: _Trial) -> float:
    poisoned = np.where(trial.gaps[..., None], trial.x, np.nan)
    out, state = trial.run(trial.x, trial.gaps)
    return _off(trial.run(poisoned, trial.gaps), (out * trial.gaps[..., None], state))  # masked frames come out as 0


def _masked_place(trial: _Trial) -> float:
    order = np.argsort(~trial.gaps, 1, kind="stable")
    packed = lambda frames: np.take_along_axis(frames, order[..., None], 1)  # noqa: E731
    out, state = trial.run(trial.x, trial.gaps)
    return _off((packed(out), state), trial.run(packed(trial.x), packed(trial.gaps[..., None])[..., 0]))


def _rows(trial: _Trial) -> float:
    x, mask = np.stack([trial.x[0], -trial.x[1]]), np.stack([trial.gaps[0], ~trial.gaps[1]])
    first = lambda tree: jax.tree.map(lambda leaf: leaf[0], tree)  # noqa: E731
    return _off(first(trial.run(x, mask)), first(trial.run(trial.x, trial.gaps)))


def _parameters(trial: _Trial) -> float:
    before = {name: leaf.copy() for name, leaf in trial.params.items()}
    trial.run_in_parts()
    return _off(trial.params, before)


def _closed_gate(trial: _Trial) -> float:
    return _off(trial.run(trial.x, gate=0 * trial.params["gate"])[0], trial.x)


def _no_rate(trial: _Trial) -> float:
    still = dataclasses.replace(trial.cfg, ttt=dataclasses.replace(TTT, base_lr=0.0))
    _, state = dataclasses.replace(trial, cfg=still).run_in_parts()
    return _off(state[:2], jax.tree.map(jnp.zeros_like, state[:2]))


def _base_gradient(trial: _Trial) -> float:
    rng, step = np.random.default_rng(1), 1e-6 if trial.cfg.dtype == "float64" else 1e-2
    draw = lambda leaf: rng.standard_normal(leaf.shape).astype(leaf.dtype)  # noqa: E731
    direction = {name: draw(leaf) for name, leaf in trial.params.items() if name.startswith("inner_")}
    weight, (_, state) = draw(trial.x), trial.run(trial.x)

    def loss(distance):
        # The carried state is a constant here, no function of the base: that is the cut.
        moved = {name: trial.params[name] + distance * leaf for name, leaf in direction.items()}
        return (weight * trial.apply(trial.params | moved, -trial.x, trial.gaps, state, trial.cfg)[0]).sum()

    value_and_slope = _jit(jax.value_and_grad(loss))
    above, below = value_and_slope(step)[0], value_and_slope(-step)[0]
    return _off(value_and_slope(0.0)[1], (above - below) / (2 * step))


LAWS: tuple[tuple[int, str, Callable[[_Trial], float], dict[str, float]], ...] = (
    (1, "parallel form = written-out descent", _descent, ROUNDING),
    (2, "one chunk = frame by frame = any split", _splits, ROUNDING),
    (3, "a frame changes nothing before it", _causality, EXACT),
    (4, "NaN in masked frames changes no bit", _masked_content, EXACT),
    (4, "masked frames take no place", _masked_place, ROUNDING),
    (4, "rows are independent", _rows, EXACT),
    (5, "parameters keep their bits", _parameters, EXACT),
    (6, "gate 0 returns the input", _closed_gate, EXACT),
    (6, "base_lr 0 leaves the state at zero", _no_rate, EXACT),
    (7, "gradient to W0 past a cut state", _base_gradient, DIFFERENCES),
)
"""Number, text, what measures the error, and the errors allowed by type."""
