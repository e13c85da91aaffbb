"""The fused kernels on a Hopper GPU: laws of the layer, and accuracy beside the scan.

    JAX_PLATFORMS=cuda,cpu python -m pytest -n 0 tests/kernels/test_hopper.py

Calls of 2,048 frames; splits of a call are made by masks, so that a setting compiles one program for each path.
"""

import dataclasses
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.helpers.drawing import assert_close, assert_same_bits
from tests.helpers.hopper import HEADS, Setting, value_and_grads
from ttt_jax.config import MoshiConfig, TTTConfig
from ttt_jax.kernels import choice
from ttt_jax.ttt import laws
from ttt_jax.ttt.inner import inner_scan
from ttt_jax.ttt.loop import inner_loop

WHY_NOT = choice.why_not(TTTConfig(impl="pallas"), 128, 2048, jnp.dtype("float32"))
pytestmark = pytest.mark.skipif(WHY_NOT is not None, reason=f"the fused kernels do not run here: {WHY_NOT}")

ROUNDING = 2e-3
"""Between two orders of sums, in units of the larger of 1 and a leaf's greatest magnitude: products multiply float16
numbers, off by up to 4.9e-4 each."""
WORSE = 1.5
"""Error that is allowed, in errors of the scan with TF32 products."""

SETTINGS = [Setting(128, b) for b in (1, 4, 16, 64)] + [Setting(64, b) for b in (16, 40)]
SETTINGS += [Setting(width, b, hidden=()) for width, b in ((128, 1), (128, 16), (128, 64), (64, 40))]
settings = pytest.mark.parametrize(
    "setting", SETTINGS, ids=lambda s: f"{'mlp' if s.hidden else 'linear'}-{s.width}-{s.mini_batch}"
)
networks = pytest.mark.parametrize("hidden", [(4,), ()], ids=["mlp", "linear"])
widths = pytest.mark.parametrize("width", [64, 128])


@pytest.fixture(autouse=True)
def memory_stays_small():
    """Stands for the fixture that forgets programs: here they are to be shared, and there are few."""


def kernel(*args):
    """The inner loop on the kernels, measured."""
    *args, cfg = args
    return inner_loop(*args, dataclasses.replace(cfg, impl="pallas"), measured=True)


@pytest.fixture(scope="module")
def programs():
    """The kernels' path, the scan and the scan in float64 by setting, compiled side by side."""

    def lowered(setting, scan, dtype):
        with jax.enable_x64(dtype == np.float64), jax.default_matmul_precision("default"):
            return jax.jit(partial(value_and_grads, scan, setting.cfg)).lower(*setting.drawn(0, dtype))

    kinds = {"kernel": (kernel, np.float32), "scan": (measured_scan, np.float32), "exact": (measured_scan, np.float64)}
    ahead = {(s, name): lowered(s, *kind) for s in SETTINGS for name, kind in kinds.items()}
    with ThreadPoolExecutor(8) as pool:
        return dict(zip(ahead, pool.map(lambda program: program.compile(), ahead.values()), strict=True))


def measured_scan(*args):
    return inner_scan(*args, measured=True)


def run(program, args, weights):
    """Results and gradients in NumPy."""
    with jax.enable_x64(weights[0].dtype == np.float64):
        return jax.device_get(program(args, weights))


def errors(got, exact):
    """Error of each leaf in norm, relative to the leaf, by name."""
    found = {}
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(exact), strict=True):
        if norm := np.linalg.norm(b):
            found[jax.tree_util.keystr(path)] = np.linalg.norm(a.astype(np.float64) - b) / norm
    return found


# The layer


def test_this_machine_takes_them_by_itself():
    assert choice.chain(TTTConfig(), 128, 2048, jnp.dtype("float32")).__name__ == "ttt_jax.kernels.hopper"
    with jax.default_device(jax.devices("cpu")[0]):
        assert choice.chain(TTTConfig(), 128, 2048, jnp.dtype("float32")) is None


@networks
@widths
def test_laws_that_a_device_can_break(width, hidden):
    """Their law on gradients takes finite differences, for which float16 is too coarse; gradients are compared with
    those in float64 below."""
    ttt = dataclasses.replace(laws.TTT, impl="pallas", hidden=hidden)
    layer = MoshiConfig(dim=HEADS * width, num_heads=HEADS, num_layers=1, ttt=ttt)
    allowed = {1: ROUNDING, 2: ROUNDING, 4: 0, 6: 0}
    found = {finding.law: finding for finding in laws.check_laws(dtype="float32", layer=layer)}
    assert [found[law] for law in allowed if not found[law].error <= allowed[law]] == []


# The inner loop


@settings
def test_errors_are_those_of_the_scan(programs, setting):
    args, weights = setting.drawn(0, np.float64)
    exact = run(programs[setting, "exact"], args, weights)
    narrow = jax.tree.map(lambda x: x.astype(np.float32) if x.dtype == np.float64 else x, (args, weights))
    got, scan = (run(programs[setting, name], *narrow) for name in ("kernel", "scan"))
    ours, theirs = errors(got, exact), errors(scan, exact)
    print(f"\n{setting}: {max(ours[name] / max(theirs[name], 1e-7) for name in ours):.2f} times the scan's error")
    assert {
        name: (ours[name], theirs[name]) for name in ours if not ours[name] <= WORSE * max(theirs[name], 1e-7)
    } == {}


@settings
def test_two_runs_are_equal(programs, setting):
    drawn = setting.drawn(1)
    assert_same_bits(*(run(programs[setting, "kernel"], *drawn) for _ in range(2)))


@settings
def test_the_scan_differs_by_rounding_only(programs, setting):
    drawn = setting.drawn(2)
    (kernel, _), (scan, _) = (run(programs[setting, name], *drawn) for name in ("kernel", "scan"))
    assert_close(kernel, scan, ROUNDING)


@settings
def test_any_split_gives_the_same_results(programs, setting):
    args, weights = setting.drawn(3)
    *front, state, inputs, mask = args
    (whole, z, _), _ = run(programs[setting, "kernel"], args, weights)
    new, outs = state, []
    ends = (0, 1, 37, setting.frames // 2, setting.frames)
    for start, end in zip(ends[:-1], ends[1:], strict=True):
        here = mask & (np.arange(setting.frames) >= start) & (np.arange(setting.frames) < end)
        (new, out, _), _ = run(programs[setting, "kernel"], (*front, new, inputs, here), weights)
        outs.append(out)
    assert_close((new, sum(outs)), (whole, z), ROUNDING)


@settings
def test_masked_frames_may_hold_anything(programs, setting):
    args, weights = setting.drawn(4)
    *front, inputs, mask = args
    spoilt = jax.tree.map(lambda x: np.where(mask.reshape(*mask.shape, *(1,) * (x.ndim - 2)), x, np.nan), inputs)
    clean = run(programs[setting, "kernel"], args, weights)
    assert_same_bits(run(programs[setting, "kernel"], (*front, spoilt, mask), weights), clean)
    assert all((x[~mask] == 0).all() for x in jax.tree.leaves((clean[0][1], clean[1][4])))


@settings
def test_rows_are_independent(programs, setting):
    args, weights = setting.drawn(5)
    spoilt = jax.tree.map(
        lambda x: x * np.array([1, np.nan], x.dtype).reshape(-1, *(1,) * (x.ndim - 1)), args[3].displacement
    )
    (clean, z, _), _ = run(programs[setting, "kernel"], args, weights)
    neighbour = (*args[:3], args[3]._replace(displacement=spoilt), *args[4:])
    (got, of_got, _), _ = run(programs[setting, "kernel"], neighbour, weights)
    row = lambda tree: jax.tree.map(lambda x: x[0], tree)  # noqa: E731
    assert_same_bits(row((got, of_got)), row((clean, z)))
    assert np.isnan(of_got[1][args[5][1]]).all()


@settings
def test_a_frame_changes_nothing_before_it(programs, setting):
    args, weights = setting.drawn(6)
    *front, inputs, mask = args
    frame = setting.frames // 3
    later = jax.tree.map(
        lambda x: np.where(np.arange(len(x[0])).reshape(-1, *(1,) * (x.ndim - 2)) < frame, x, x[:, ::-1]), inputs
    )
    before, after = (run(programs[setting, "kernel"], (*front, x, mask), weights)[0][1] for x in (inputs, later))
    assert_same_bits(after[:, :frame], before[:, :frame])
    assert (after[0, frame] != before[0, frame]).any()


@settings
def test_no_rate_leaves_the_weights_alone(programs, setting):
    args, weights = setting.drawn(7)
    fresh = jax.tree.map(np.zeros_like, args[3])
    inputs = args[4]._replace(eta=np.zeros_like(args[4].eta))
    (state, _, measured), _ = run(programs[setting, "kernel"], (*args[:3], fresh, inputs, args[5]), weights)
    assert all((x == 0).all() for x in jax.tree.leaves(state[:2]))
    assert_close((measured.loss_before, measured.loss_after), (measured.loss_base,) * 2, 1e-5)
    assert (measured.displacement == 0).all()


@pytest.mark.parametrize("mapped", ["base", "scale"])
def test_arms_side_by_side_are_those_one_by_one(mapped):
    setting = Setting(128, 16, frames=64)
    arms = [setting.drawn(seed)[0] for seed in (0, 1)]
    own = {"base": 0, "scale": 1}[mapped]  # the other one is shared
    shared = [x for i, x in enumerate(arms[0]) if i != own]

    def call(x):
        args = [*shared]
        args.insert(own, x)
        return kernel(*args, setting.cfg)[1]

    together = jax.jit(jax.vmap(call))(jax.tree.map(lambda *xs: np.stack(xs), *(arm[own] for arm in arms)))
    one_by_one = jax.jit(call)
    assert_close(together, np.stack([one_by_one(arm[own]) for arm in arms]), ROUNDING)
