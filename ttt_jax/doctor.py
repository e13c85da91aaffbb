"""`python -m ttt_jax.doctor`: what is installed, what JAX runs on, whether the TTT layer keeps its laws on this machine.

Starts without jax, so that it can tell when jax is missing. What is needed is read from `pyproject.toml` or, for a wheel,
from its metadata, never repeated here.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import hashlib
import operator
import os
import re
import shutil
import sys
import textwrap
from collections.abc import Callable, Iterable, Iterator, Sequence
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import ttt_jax
from ttt_jax.command import PACKAGES, run
from ttt_jax.config import MoshiConfig, TTTConfig

if TYPE_CHECKING:
    import jax
    import numpy as np

    from ttt_jax.ttt.inner import TTTState

    Params = dict[str, np.ndarray]

PYTHON = (3, 11)
"""Oldest Python: `tomllib`, which reads the other bounds, came with it."""

OPERATORS = {">=": operator.ge, "<=": operator.le, "==": operator.eq, ">": operator.gt, "<": operator.lt}

ROWS, FRAMES, WIDTH, HEADS, MINI_BATCH = 2, 24, 16, 2, 4
UNEVEN = (11, 1, 1, 11)
"""A split that cuts mini-batches, of few lengths: each compiles once."""

EXACT = {"float64": 0.0, "float32": 0.0}
ROUNDING = {"float64": 1e-10, "float32": 1e-4}
DIFFERENCES = {"float64": 1e-5, "float32": 2e-2}
"""Errors allowed by type: same bits, another order of sums, finite differences; in units of the larger of 1 and the greatest
magnitude, finite differences in units of the gradient's norm."""
STEP = {"float64": 1e-6, "float32": 1e-2}
"""Step of the finite differences."""


def main(args: Sequence[str]) -> int:
    """Print the report; the exit code: 0 all is well, 1 something that the commands need is missing or a law fails."""
    argparse.ArgumentParser(
        prog="python -m ttt_jax.doctor",
        description="Show versions, devices and what is missing, and try the laws of the TTT layer on this machine.",
        epilog="Takes about ten seconds. Exit code 0: all is well; 1: something needed is missing or a law fails.",
    ).parse_args(args)
    _show_versions()
    if sys.version_info < PYTHON:
        print(f"\nThis Python is too old: install {PYTHON[0]}.{PYTHON[1]} or later and make the environment with it.")
        return 1
    complete = _show_packages()
    sound = _show_devices() and _show_laws()
    print()
    if not complete:
        print("Something that the commands need is missing: pip install -e '.[all]' brings all of it.")
    elif not sound:
        print("JAX does not start or a law fails: results of this installation would mean nothing.")
    if not (complete and sound):
        return 1
    print("All is well. Next, from a clone:")
    print("  python -m train                                             a small model, minutes on a CPU")
    print("  pip install -e '.[all,test]' && python -m pytest            the tests")
    return 0


def _show_versions() -> None:
    print("Versions")
    _line("python", f"{sys.version.split()[0]} at {sys.executable}")
    _line("ttt_jax", ttt_jax.__version__)
    for name in PACKAGES:
        _line(name, installed(name) or "not installed")


def _line(name: str, text: str) -> None:
    print(f"  {name:18}{text}")


# What is missing


def installed(name: str) -> str | None:
    """Version of the distribution `name`; None if it is not installed."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def needs() -> dict[str, list[str]]:
    """Requirements by extra of ttt_jax, such as "optax>=0.2.5"; those of every installation under "core"."""
    pyproject = Path(__file__).resolve().parent.parent / "pyproject.toml"
    if not pyproject.is_file():
        extras = metadata.metadata("ttt_jax").get_all("Provides-Extra")
        return {extra or "core": _of_extra("ttt_jax", extra) for extra in (None, *extras)}
    # In a checkout the metadata of an editable installation may be older than the file.
    import tomllib

    project = tomllib.loads(pyproject.read_text(encoding="utf-8"))["project"]
    declared = project["optional-dependencies"]

    def written_out(requirement: str) -> list[str]:
        own = re.fullmatch(r"ttt_jax\[(.*)\]", requirement)
        return [need for extra in own[1].split(",") for need in declared[extra]] if own else [requirement]

    extras = {extra: [need for one in named for need in written_out(one)] for extra, named in declared.items()}
    return {"core": project["dependencies"], **extras}


def _of_extra(name: str, extra: str | None) -> list[str]:
    """Requirements of the installed distribution `name` that belong to `extra`, None for those that belong to no extra."""
    parts = (requirement.partition(";") for requirement in metadata.requires(name) or [])
    marked = ((need.strip(), re.search(r"""extra == ['"](.+?)['"]""", marker)) for need, _, marker in parts)
    return [need for need, match in marked if (match and match[1]) == extra]


def unmet(requirement: str) -> list[str]:
    """What is wrong with the distribution that `requirement` names and with those that its extras ask for; [] if nothing."""
    name, extras, bounds = re.fullmatch(r"([\w.-]+)(?:\[(.*)\])?(.*)", requirement).groups()
    version = installed(name)
    if version is None:
        return [f"{name} is not installed"]
    if not fits(version, bounds):
        return [f"{name} {version} is not {bounds}"]
    inner = (need for extra in (extras or "").split(",") if extra for need in _of_extra(name, extra.strip()))
    return [problem for need in inner for problem in unmet(need)]


def fits(version: str, bounds: str) -> bool:
    """Whether `version` keeps `bounds` such as ">=0.9,<0.13"; by the numbers alone, and bounds of other kinds are passed over."""
    numbers = lambda text: tuple(int(n) for n in re.match(r"[\d.]*", text)[0].split(".") if n)  # noqa: E731
    found = re.findall(r"(>=|<=|==|>|<)\s*([\d.]+)(?![\d.]*\*)", bounds)
    return all(OPERATORS[sign](numbers(version), numbers(bound)) for sign, bound in found)


def _show_packages() -> bool:
    """Prints what each extra lacks and how to get it; whether the commands have what they need."""
    print("\nPackages")
    declared, complete = needs(), True
    whole = {*declared["core"], *declared.pop("all")}  # "all" is what the commands need
    for extra, requirements in declared.items():
        problems = [problem for need in requirements for problem in unmet(need)]
        needed = whole.issuperset(requirements)
        complete &= not (needed and problems)
        _line(extra, "ok" if not problems else "MISSING" if needed else "absent, not needed by the commands")
        for problem in problems:
            _line("", problem)
        if problems:
            _line("", "pip install -e ." if extra == "core" else f"pip install -e '.[{extra}]'")
    return complete


# Devices


def _show_devices() -> bool:
    """Prints the host and what JAX runs on; whether JAX runs at all."""
    print("\nMachine")
    _line("host", f"{os.cpu_count()} cores{_host_memory()}")
    try:
        import jax

        devices = jax.devices()
    except Exception as error:  # noqa: BLE001  a plugin may break in any way, and JAX asserts where it finds no device
        chosen = os.environ.get("JAX_PLATFORMS")
        _line("JAX", f"does not start{f' with JAX_PLATFORMS={chosen}' if chosen else ''}: {_first_line(error)}")
        return False
    for device in devices:
        limit = (device.memory_stats() or {}).get("bytes_limit")
        memory = f", {limit / 1e9:.1f} GB of memory for JAX" if limit else ""
        _line(f"device {device.id}", f"{device.device_kind} ({device.platform}){memory}")
    if {device.platform for device in devices} == {"cpu"} and shutil.which("nvidia-smi"):
        print(textwrap.fill(unused_gpu(), 98, initial_indent="  ", subsequent_indent="  ", break_on_hyphens=False))
    return True


def _host_memory() -> str:
    with contextlib.suppress(AttributeError, ValueError, OSError):  # not every system tells
        return f", {os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE') / 1e9:.1f} GB of memory"
    return ""


def unused_gpu() -> str:
    """What to do on a machine with an NVIDIA GPU where JAX sees CPUs only."""
    if chosen := os.environ.get("JAX_PLATFORMS"):
        return f"JAX leaves this machine's NVIDIA GPU alone, since JAX_PLATFORMS is {chosen}: unset it to use the GPU."
    (requirement,) = needs()["cuda"]
    if unmet(requirement):
        return f'JAX does not see this machine\'s NVIDIA GPU: pip install -U "{requirement}"'
    kinds = [kind for kind in metadata.metadata("jax").get_all("Provides-Extra") if re.fullmatch(r"cuda\d+", kind)]
    return (
        "JAX does not see this machine's NVIDIA GPU, though its CUDA libraries are installed: update the NVIDIA driver, "
        f"or install libraries that suit the driver, by another of jax's extras: {', '.join(kinds)}."
    )


def _first_line(error: BaseException) -> str:
    return textwrap.shorten(f"{type(error).__name__}: {error}".splitlines()[0], 80, placeholder=" ...")


# Laws


class Finding(NamedTuple):
    """One law, tried."""

    law: int
    """Its number in the tests of the layer's laws."""
    text: str
    """What it says."""
    error: float
    """How far the layer is from it; NaN if it could not be tried."""
    tolerance: float
    """How far it may be."""
    note: str = ""
    """Why it could not be tried."""

    @property
    def holds(self) -> bool:
        """Whether the error is within the tolerance; NaN never is."""
        return self.error <= self.tolerance


@dataclasses.dataclass(frozen=True)
class Trial:
    """A layer and what it is tried on."""

    apply: Callable
    """(params, x, mask, state, cfg) -> (out, state), not yet compiled."""
    call: Callable
    """The same, compiled."""
    cfg: MoshiConfig
    """Of one layer."""
    params: Params
    """Of the layer, random."""
    x: np.ndarray
    """Hidden vectors [B, T, dim]."""
    other: np.ndarray
    """More of them."""
    gaps: np.ndarray
    """bool [B, T]: row 0 is all valid, row 1 has gaps, so that the rows differ in phase."""

    @property
    def everywhere(self) -> np.ndarray:
        """bool [B, T], all valid."""
        return self.gaps | True

    def run(
        self, x: np.ndarray, mask: np.ndarray, state: TTTState | None = None, **changed: np.ndarray
    ) -> tuple[np.ndarray, TTTState]:
        """Output and state of one call, from a fresh state if none is given, with parameters changed by name."""
        import numpy as np

        from ttt_jax.ttt.layer import init_state

        state = init_state(self.cfg, ROWS) if state is None else state
        out, state = self.call({**self.params, **changed}, x, mask, state, cfg=self.cfg)
        return np.asarray(out), state

    def run_in_parts(self, parts: Sequence[int]) -> tuple[np.ndarray, TTTState]:
        """Output and state of calls of these lengths, one after the other, over frames with gaps."""
        import numpy as np

        outs, state, start = [], None, 0
        for part in parts:
            piece, start = slice(start, start + part), start + part
            out, state = self.run(self.x[:, piece], self.gaps[:, piece], state)
            outs.append(out)
        return np.concatenate(outs, 1), state


def layer_apply(
    params: Params, x: jax.Array, mask: jax.Array, state: TTTState, cfg: MoshiConfig
) -> tuple[jax.Array, TTTState]:
    """The project's layer: hidden vectors [B, T, dim], mask bool [B, T] and state to output [B, T, dim] and state."""
    from ttt_jax.ttt.layer import TTTLayer

    return TTTLayer(cfg).apply({"params": params}, x, mask, state)[:2]


def check_laws(apply: Callable = layer_apply, dtype: str = "float64") -> Iterator[Finding]:
    """Tries the laws of a TTT layer one by one.

    Args:
      apply: pure function (params, x, mask, state, cfg) -> (out, state), as `layer_apply`.
      dtype: "float64", or "float32" with looser tolerances for devices that lack it.
    """
    import jax

    with jax.enable_x64(dtype == "float64"), jax.default_matmul_precision("highest"):
        trial = _trial(apply, dtype)
        for law, text, measure, tolerance in LAWS:
            try:
                error, note = measure(trial), ""
            except Exception as problem:  # noqa: BLE001  a compiler or library may break in any way: that is a finding
                error, note = float("nan"), _first_line(problem)
            yield Finding(law, text, error, tolerance[dtype], note)


def _trial(apply: Callable, dtype: str) -> Trial:
    import jax
    import numpy as np

    from ttt_jax.ttt.layer import TTTLayer, init_state

    ttt = TTTConfig(layers="0", mini_batch=MINI_BATCH)
    cfg = MoshiConfig(dim=WIDTH, num_heads=HEADS, num_layers=1, dtype=dtype, ttt=ttt)
    rng = np.random.default_rng(0)
    x, other = rng.standard_normal((2, ROWS, FRAMES, WIDTH)).astype(dtype)
    gaps = rng.random((ROWS, FRAMES)) < 0.7
    gaps[0] = True
    init = lambda key: TTTLayer(cfg).init(key, x, gaps, init_state(cfg, ROWS))["params"]  # noqa: E731
    shapes = jax.eval_shape(init, jax.random.key(0))
    # Nothing 0 and nothing 1, so that nothing drops out unseen.
    params = {
        name: ((name == "norm" or name.endswith("scale")) + 0.3 * rng.standard_normal(leaf.shape)).astype(dtype)
        for name, leaf in shapes.items()
    }
    return Trial(apply, _jit(apply, static_argnames="cfg"), cfg, params, x, other, gaps)


def _jit(function: Callable, **options: Any) -> Callable:
    """`jax.jit`, on CPU with little optimisation: compiles several times as fast, and everything here runs few times."""
    import jax

    quick = {"xla_backend_optimization_level": 0, "xla_cpu_use_fusion_emitters": False}
    if jax.default_backend() == "cpu":
        with contextlib.suppress(Exception):  # XLA raises no type of its own for an option that it does not know
            jax.jit(lambda: 0, compiler_options=quick)()
            options["compiler_options"] = quick
    return jax.jit(function, **options)


def _worst(errors: Iterable[float]) -> float:
    """The largest error; NaN if one is, which Python's own maximum could lose."""
    import numpy as np

    return float(np.max([*errors]))


def _off(got: Any, expected: Any) -> float:
    """Largest difference over the leaves of two trees, in units of the larger of 1 and the leaf's greatest magnitude."""
    import jax
    import numpy as np

    leaves = zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True)
    pairs = ((np.asarray(a, np.float64), np.asarray(b, np.float64)) for a, b in leaves)
    return _worst(np.abs(a - b).max() / max(1.0, np.abs(b).max()) for a, b in pairs)


def _descent(trial: Trial) -> float:
    import jax

    out, state = trial.run(trial.x, trial.everywhere)
    written_out = _jit(jax.vmap(lambda x: _written_out(trial.params, x, trial.cfg)))
    return _off((out, state.displacement), written_out(trial.x))


def _written_out(params: Params, x: jax.Array, cfg: MoshiConfig) -> tuple[jax.Array, Any]:
    """The layer on one row x [T, dim], frame by frame; every W_i is formed, by `jax.grad` of the inner loss.

    Returns the output [T, dim] and the displacement after the last frame, [H, I, O] and [H, O] of each map; T is a multiple
    of the mini-batch size.
    """
    import jax
    import jax.numpy as jnp

    p, heads, width = params, cfg.num_heads, cfg.head_dim
    base = [(p[f"inner_w{n}"], p[f"inner_b{n}"]) for n in range(len(cfg.ttt.hidden) + 1)]

    def standard(y, eps, ddof=0):
        return (y - y.mean(-1, keepdims=True)) / jnp.sqrt(y.var(-1, keepdims=True, ddof=ddof) + eps)

    def predict(weights, y):
        for n, (w, b) in enumerate(weights):
            y = jnp.einsum("HI,HIO->HO", jax.nn.gelu(y) if n else y, w) + b
        return p["ln_scale"] * standard(y, 1e-8) + p["ln_bias"]

    def loss(weights, k, target):
        return 0.5 * ((predict(weights, k) - target) ** 2).sum()

    def frame(carry, numbered):
        (start, fast), (i, x) = carry, numbered
        h = p["norm"] * x / jnp.sqrt((x * x).mean() + 1e-8)
        q, k, v = ((h @ p[f"{name}_kernel"] + p[f"{name}_bias"]).reshape(heads, width) for name in "qkv")
        q, k = (y / jnp.sqrt((y * y).sum(-1, keepdims=True) + 1e-12) for y in (q, k))
        target = p["ln_scale"] * standard(v - k, 1e-10, ddof=1) + p["ln_bias"]
        rate = cfg.inner_lr / width * jax.nn.sigmoid(p["rate_weight"] @ h + p["rate_bias"])
        gradient = jax.grad(loss)(start, k, target)
        fast = jax.tree.map(lambda w, g: w - rate.reshape(heads, *(1,) * (g.ndim - 1)) * g, fast, gradient)
        z = standard((q + predict(fast, q)).reshape(-1), 1e-6) * p["post_norm_scale"] + p["post_norm_bias"]
        closes = (i + 1) % cfg.ttt.mini_batch == 0
        start = jax.tree.map(lambda new, old: jnp.where(closes, new, old), fast, start)
        return (start, fast), x + jnp.tanh(p["gate"]) * (z @ p["out_kernel"] + p["out_bias"])

    base = jax.tree.map(jnp.asarray, base)
    (_, fast), out = jax.lax.scan(frame, (base, base), (jnp.arange(len(x)), x))
    return out, jax.tree.map(jnp.subtract, fast, base)


def _splits(trial: Trial) -> float:
    whole = trial.run(trial.x, trial.gaps)
    return _worst(_off(trial.run_in_parts(parts), whole) for parts in ((1,) * FRAMES, UNEVEN))


def _causality(trial: Trial) -> float:
    out, errors = trial.run(trial.x, trial.everywhere)[0], []
    for frame in range(1, FRAMES):
        changed = trial.x.copy()
        changed[:, frame] = trial.other[:, frame]
        errors.append(_off(trial.run(changed, trial.everywhere)[0][:, :frame], out[:, :frame]))
    return _worst(errors)


def _masked_content(trial: Trial) -> float:
    poisoned = trial.x.copy()
    poisoned[~trial.gaps] = float("nan")
    out, state = trial.run(trial.x, trial.gaps)
    return _off(trial.run(poisoned, trial.gaps), (out * trial.gaps[..., None], state))  # masked frames come out as 0


def _masked_place(trial: Trial) -> float:
    import numpy as np

    order = np.argsort(~trial.gaps, 1, kind="stable")
    packed = lambda frames: np.take_along_axis(frames, order[..., None], 1)  # noqa: E731
    out, state = trial.run(trial.x, trial.gaps)
    return _off((packed(out), state), trial.run(packed(trial.x), packed(trial.gaps[..., None])[..., 0]))


def _rows(trial: Trial) -> float:
    import jax

    changed, mask = trial.x.copy(), trial.gaps.copy()
    changed[1:], mask[1:] = trial.other[1:], ~mask[1:]
    first = lambda tree: jax.tree.map(lambda leaf: leaf[0], tree)  # noqa: E731
    return _off(first(trial.run(changed, mask)), first(trial.run(trial.x, trial.gaps)))


def _digests(trial: Trial) -> float:
    digests = lambda: [hashlib.sha256(leaf.tobytes()).digest() for leaf in trial.params.values()]  # noqa: E731
    before = digests()
    trial.run_in_parts((1,) * FRAMES)
    return float(sum(a != b for a, b in zip(before, digests(), strict=True)))


def _closed_gate(trial: Trial) -> float:
    return _off(trial.run(trial.x, trial.everywhere, gate=0 * trial.params["gate"])[0], trial.x)


def _no_rate(trial: Trial) -> float:
    import jax

    still = dataclasses.replace(trial.cfg, ttt=dataclasses.replace(trial.cfg.ttt, base_lr=0.0))
    _, state = dataclasses.replace(trial, cfg=still).run_in_parts((1,) * FRAMES)
    return _off(state[:2], jax.tree.map(lambda leaf: 0 * leaf, state[:2]))


def _base_gradient(trial: Trial) -> float:
    import jax
    import numpy as np

    rng, step, dtype = np.random.default_rng(1), STEP[trial.cfg.dtype], trial.x.dtype
    weights = rng.standard_normal(trial.x.shape).astype(dtype)
    base = {name: leaf for name, leaf in trial.params.items() if name.startswith("inner_")}
    _, state = trial.run(trial.x, trial.everywhere)

    def loss(base):
        # The carried state is a constant here, no function of the base: that is the cut.
        return (weights * trial.apply(trial.params | base, trial.other, trial.everywhere, state, trial.cfg)[0]).sum()

    def moved(name: str, by: np.ndarray) -> float:
        out, _ = trial.run(trial.other, trial.everywhere, state, **{name: (base[name] + by).astype(dtype)})
        return (weights * out.astype(np.float64)).sum()

    errors = []
    for name, gradient in jax.tree.map(np.asarray, _jit(jax.grad(loss))(base)).items():
        direction = rng.standard_normal(gradient.shape)
        difference = (moved(name, step * direction) - moved(name, -step * direction)) / (2 * step)
        norm = np.linalg.norm(gradient)
        errors.append(abs(difference - (gradient * direction).sum()) / norm if norm > 0 else np.inf)
    carried = all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(state.displacement))
    return _worst(errors) if carried else float("inf")


LAWS: tuple[tuple[int, str, Callable[[Trial], float], dict[str, float]], ...] = (
    (1, "parallel form = written-out descent", _descent, ROUNDING),
    (2, "one chunk = frame by frame = any split", _splits, ROUNDING),
    (3, "a frame changes nothing before it", _causality, EXACT),
    (4, "NaN in masked frames changes no bit", _masked_content, EXACT),
    (4, "masked frames take no place", _masked_place, ROUNDING),
    (4, "rows are independent", _rows, EXACT),
    (5, "parameters keep their digest", _digests, EXACT),
    (6, "gate 0 returns the input", _closed_gate, EXACT),
    (6, "base_lr 0 leaves the state at zero", _no_rate, EXACT),
    (7, "gradient to W0 past a cut state", _base_gradient, DIFFERENCES),
)
"""Number, text, what measures the error, and the errors allowed by type."""


def _show_laws() -> bool:
    """Prints each law as it is tried; whether all hold."""
    if installed("flax") is None:
        return False  # said above
    import jax

    backend = jax.default_backend()
    dtype = "float64" if backend in ("cpu", "gpu") else "float32"  # a TPU has no float64
    print(f"\nLaws of the TTT layer, tried in {dtype} on {backend}: width {WIDTH}, {HEADS} heads, {FRAMES} frames")
    sound = True
    for found in check_laws(dtype=dtype):
        sound &= found.holds
        verdict = "PASS" if found.holds else "FAIL"
        error = f"error {found.error:.2g}, allowed {found.tolerance:g}"
        print(f"  {found.law} {found.text:40}{verdict}  {error}", flush=True)
        if found.note:
            print(f"    {found.note}", flush=True)
    return sound


if __name__ == "__main__":
    sys.exit(run(lambda: main(sys.argv[1:])))
