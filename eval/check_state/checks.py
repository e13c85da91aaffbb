"""The checks of `python -m eval check-state`.

A recording goes through `forward` one frame at a time, in row 0 of two rows, beside three neighbours: other audio; the same
audio with its TTT states cleared before every frame; and nothing at all. What the TTT states are is told by their SHA-256.
"""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

from ttt_jax.checkpoints import stream_state
from ttt_jax.config import MoshiConfig
from ttt_jax.moshi import model
from ttt_jax.moshi.loss import token_losses
from ttt_jax.moshi.model import Params, State
from ttt_jax.ttt.inner import TTTState

CALL = 7
"""Frames of the shorter calls that streaming is compared with: no divisor of the usual mini-batches."""
TOLERANCES = {"float64": (1e-9, 1e-9), "float32": (1e-4, 1e-4), "bfloat16": (1.0, 0.1)}
"""By type of the activations: nats, and relative difference of the states, by which calls of other lengths may differ.

In bfloat16 a sum in another order gives hidden vectors other last bits of their 8, which every layer carries on: up to 0.15 nats
and 0.012 were seen on random weights of 12 layers."""

Call = Callable[[Params, np.ndarray, np.ndarray, State], tuple[jax.Array, State]]
"""From parameters, frames [B, K, T], mask [B, T] and state to losses in nats [B, 1 + Q, T] and the state after the call."""


class Check(NamedTuple):
    """One property, whether it holds, and the figure that says so."""

    what: str
    passed: bool
    figure: str


class Trace(NamedTuple):
    """A stream of T frames in B rows through L TTT layers; index 0 of the first axis is the fresh state."""

    digest: np.ndarray
    """SHA-256 of displacement and open gradient sums, str [T + 1, L, B]."""
    step: np.ndarray
    """Norm of what the frame changed in the fast weights, in norms of the base, float [T + 1, L, B]."""
    displacement: np.ndarray
    """Norm of the fast weights minus the base, in norms of the base, float [T + 1, L, B]."""
    nats: np.ndarray
    """Losses, float [B, 1 + Q, T]."""
    state: State
    """After the last frame."""


class Report(NamedTuple):
    """What the check found."""

    checks: list[Check]
    trace: Trace
    """Of the stream whose row 1 reads other audio."""
    meaning: str
    """One sentence."""

    @property
    def passed(self) -> bool:
        """Whether every check did."""
        return all(check.passed for check in self.checks)


@partial(jax.jit, static_argnames="cfg")
def forward(
    params: Params, frames: np.ndarray, mask: np.ndarray, state: State, cfg: MoshiConfig
) -> tuple[jax.Array, State]:
    """`ttt_jax.moshi.model.forward` as a `Call`; products of the highest precision, so that calls of other lengths compare."""
    with jax.default_matmul_precision("highest"):
        outputs, state = model.forward(params, frames, mask, state, cfg)
    return token_losses(outputs), state


def check(params: Params, frames: np.ndarray, cfg: MoshiConfig, call: Call | None = None) -> Report:
    """All checks on one recording.

    Args:
      params: of a model with TTT layers; frames: int32 [K, T], at least 2.
      call: what is checked; unset: `forward`.
    """
    call = call or partial(forward, cfg=cfg)
    length = frames.shape[1]
    everything = np.ones((2, length), bool)
    first = everything & np.array([[True], [False]])
    beside = {"other audio": np.stack([frames, frames[:, ::-1]]), "itself": np.stack([frames, frames])}
    before, params = digest_of(params), jax.device_put(params, jax.devices()[0])
    with ThreadPoolExecutor() as pool:  # programs for longer calls compile while frames stream
        longer = {
            n: pool.submit(chunked, call, params, beside["other audio"], n, cfg) for n in (min(CALL, length), length)
        }
        kept = stream(call, params, beside["other audio"], everything, cfg)
        cleared = stream(call, params, beside["itself"], everything, cfg, cleared=np.array([False, True]))
        idle = stream(call, params, beside["other audio"], first, cfg)
        chunks = {n: one.result() for n, one in longer.items()}
    changes, builds = changes_at_every_frame(kept, cfg), builds_on_the_frames_before(cleared, cfg)
    checks = [
        changes,
        builds,
        survives_saving(kept.state, cfg),
        resets_one_row(kept.state, cfg),
        feels_no_neighbour(kept, cleared, idle),
        keeps_parameters(before, digest_of(params)),
        equals_chunks(kept, chunks, cfg),
    ]
    return Report(checks, kept, interpretation(changes.passed, builds.passed, [c.what for c in checks if not c.passed]))


@partial(jax.jit, static_argnames="cfg")
def reset_first(state: State, cfg: MoshiConfig) -> State:
    """Row 0 of two fresh."""
    return model.reset_rows(state, np.array([True, False]), cfg)


_init_state = jax.jit(model.init_state, static_argnums=(0, 1))
_clear = jax.jit(model.reset_ttt_rows)


def fresh_state(cfg: MoshiConfig, rows: int) -> State:
    """A fresh state, on the device for good: `call` would be compiled again for one that may still move."""
    return jax.device_put(_init_state(cfg, rows), jax.devices()[0])


def stream(
    call: Call,
    params: Params,
    frames: np.ndarray,
    mask: np.ndarray,
    cfg: MoshiConfig,
    cleared: np.ndarray | None = None,
) -> Trace:
    """Two rows one frame at a time from a fresh state.

    Args:
      frames: [B, K, T]; mask: bool [B, T]; cleared: rows (bool [B]) whose TTT states are cleared before every frame.
    """
    state = fresh_state(cfg, len(frames))
    base = base_norms(params, cfg)
    weights = fast_weights(state, cfg)
    digests, steps, moved, nats = [digests_of(weights)], [norms(weights) / base], [norms(weights) / base], []
    for t in range(frames.shape[2]):
        if cleared is not None:
            state = _clear(state, cleared)
        losses, state = call(params, frames[:, :, t : t + 1], mask[:, t : t + 1], state)
        before, weights = weights, fast_weights(state, cfg)
        digests.append(digests_of(weights))
        steps.append(norms(weights, before) / base)
        moved.append(norms(weights) / base)
        nats.append(np.asarray(losses))
    return Trace(np.array(digests), np.array(steps), np.array(moved), np.concatenate(nats, 2), state)


def chunked(call: Call, params: Params, frames: np.ndarray, size: int, cfg: MoshiConfig) -> tuple[np.ndarray, State]:
    """Losses [B, 1 + Q, T] and the last state of the same rows in calls of `size` frames, the last one filled up with masked ones."""
    length = frames.shape[2]
    state, nats = fresh_state(cfg, len(frames)), []
    padded = np.pad(frames, ((0, 0), (0, 0), (0, -length % size)))
    mask = np.broadcast_to(np.arange(padded.shape[2]) < length, (len(frames), padded.shape[2]))
    for start in range(0, length, size):
        piece = slice(start, start + size)
        losses, state = call(params, padded[:, :, piece], mask[:, piece], state)
        nats.append(np.asarray(losses))
    return np.concatenate(nats, 2)[:, :, :length], state


# TTT states on the host


def fast_weights(state: State, cfg: MoshiConfig) -> list[TTTState]:
    """The state of each TTT layer in the order of the stack, NumPy leaves [B, ...]."""
    found = []
    for run in (run for run in cfg.runs if run.has_ttt):
        of_run = jax.tree.map(np.asarray, state.layers[run.name].ttt)
        found += [jax.tree.map(lambda leaf, i=i: leaf[i], of_run) for i in range(run.stop - run.start)]
    return found


def digest_of(tree: object) -> str:
    """SHA-256 over the bytes of all leaves."""
    sha = hashlib.sha256()
    for leaf in jax.tree.leaves(tree):
        # A copy: jax keeps what it has brought to the host once, and would show that again.
        leaf = jax.device_put(leaf, may_alias=False) if isinstance(leaf, jax.Array) else leaf
        sha.update(np.ascontiguousarray(leaf).reshape(-1).view(np.uint8))
    return sha.hexdigest()


def digests_of(weights: list[TTTState]) -> list[list[str]]:
    """By layer and row: of displacement and open sums, not of the count, which every frame changes anyway."""
    return [[digest_of(jax.tree.map(lambda leaf, r=r: leaf[r], w[:2])) for r in range(len(w.count))] for w in weights]


def norms(weights: list[TTTState], before: list[TTTState] | None = None) -> np.ndarray:
    """Norm of the fast weights minus those `before` (unset: minus the base), [L, B]."""

    def vectors(w: TTTState) -> np.ndarray:
        # What the next frame starts from: the steps of the mini-batch that is still open count.
        now = jax.tree.map(np.subtract, w.displacement, w.open_sum) if w.open_sum else w.displacement
        return np.concatenate([leaf.reshape(len(leaf), -1) for leaf in jax.tree.leaves(now)], 1)

    now = [vectors(w) for w in weights]
    then = [vectors(w) for w in before] if before else [np.zeros_like(v) for v in now]
    return np.array([np.linalg.norm(a - b, axis=1) for a, b in zip(now, then, strict=True)])


def base_norms(params: Params, cfg: MoshiConfig) -> np.ndarray:
    """Norm of the learned start of each TTT layer, [L, 1]."""
    squares = []
    for run in (run for run in cfg.runs if run.has_ttt):
        leaves = [
            np.asarray(leaf) for name, leaf in params["layers"][run.name]["ttt"].items() if name.startswith("inner_")
        ]
        squares += [sum(float((leaf[i] ** 2).sum()) for leaf in leaves) for i in range(run.stop - run.start)]
    return np.sqrt(np.array(squares))[:, None]


# The checks


def changes_at_every_frame(kept: Trace, cfg: MoshiConfig) -> Check:
    """A state that stays the same over a frame has learned nothing from it."""
    changed = kept.digest[1:] != kept.digest[:-1]
    return _at_every_frame("the fast weights change at every frame", changed, "no change", cfg, 1)


def builds_on_the_frames_before(cleared: Trace, cfg: MoshiConfig) -> Check:
    """Row 1 read the same audio as row 0 and was cleared before every frame: states that are equal were not carried."""
    carried = cleared.digest[2:, :, 0] != cleared.digest[2:, :, 1]
    return _at_every_frame(
        "each frame starts from what the last one left", carried[..., None], "as if cleared before it", cfg, 2
    )


def _at_every_frame(what: str, holds: np.ndarray, otherwise: str, cfg: MoshiConfig, first: int) -> Check:
    """`holds`: bool [frames, L, rows], the frames counted from `first`."""
    for layer, found in zip(cfg.ttt_layers, holds.all(2).T, strict=True):
        if not found.all():
            frame = first + int(np.argmin(found))
            figure = f"layer {layer}: {otherwise} at {(~found).sum()} of {len(found)} frames, first at frame {frame}"
            return Check(what, False, figure)
    layers = len(cfg.ttt_layers)
    return Check(what, True, f"{len(holds)} of {len(holds)} frames in {layers} layer{'s' * (layers > 1)}")


def survives_saving(state: State, cfg: MoshiConfig) -> Check:
    """All of the state, through a file."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "state.safetensors"
        stream_state.save_state(path, state, cfg)
        loaded = stream_state.load_state(path, cfg)
        size = path.stat().st_size
    pairs = list(zip(*(jax.tree.leaves(tree) for tree in (state, loaded)), strict=True))
    differing = sum(np.asarray(a).tobytes() != np.asarray(b).tobytes() for a, b in pairs)
    figure = f"{differing} of {len(pairs)} tensors differ, {size / 1e6:.1f} MB"
    return Check("saved and loaded, the state is the same to the bit", not differing, figure)


def resets_one_row(state: State, cfg: MoshiConfig) -> Check:
    """Row 0 is reset, row 1 is not."""
    after = reset_first(state, cfg)
    got, had, fresh = (np.array(digests_of(fast_weights(s, cfg))) for s in (after, state, fresh_state(cfg, 2)))
    is_fresh, is_kept = (got[:, 0] == fresh[:, 0]).all(), (got[:, 1] == had[:, 1]).all()
    figure = f"row 0 {'is' if is_fresh else 'is NOT'} fresh, row 1 {'is' if is_kept else 'is NOT'} as it was"
    return Check("a reset clears its own row and no other", bool(is_fresh and is_kept), figure)


def feels_no_neighbour(kept: Trace, cleared: Trace, idle: Trace) -> Check:
    """Row 0 read the same in all three."""
    others = {"a row that is cleared at every frame": cleared, "an idle row": idle}
    differing = {name: int((t.digest[..., 0] != kept.digest[..., 0]).any(1).sum()) for name, t in others.items()}
    figure = f"the same {kept.digest[1:, :, 0].size} digests beside other audio, a cleared row and an idle one"
    if any(differing.values()):
        told = (f"{n} frames other beside {name}" for name, n in differing.items() if n)
        figure = f"{', '.join(told)} than beside other audio"
    return Check("a row does not depend on its neighbour", not any(differing.values()), figure)


def keeps_parameters(before: str, after: str) -> Check:
    """Learning goes into the state, not into the weights of the checkpoint."""
    figure = (
        f"SHA-256 {before[:12]} before and after" if before == after else f"SHA-256 {before[:12]}, then {after[:12]}"
    )
    return Check("the checkpoint's parameters stay as they are", before == after, figure)


def equals_chunks(kept: Trace, chunks: dict[int, tuple[np.ndarray, State]], cfg: MoshiConfig) -> Check:
    """Losses and states of the stream against those of longer calls."""
    nats, relative = TOLERANCES[cfg.dtype]
    apart = max(float(np.abs(kept.nats - losses).max()) for losses, _ in chunks.values())
    states = max(_relative(kept.state, state, cfg) for _, state in chunks.values())
    figure = (
        f"losses differ by up to {apart:.1e} nats (allowed {nats:g}), states by {states:.1e} (allowed {relative:g})"
    )
    what = f"frame by frame equals calls of {' and '.join(map(str, chunks))} frames"
    return Check(what, apart <= nats and states <= relative, figure)  # of NaN neither holds


def _relative(a: State, b: State, cfg: MoshiConfig) -> float:
    """Largest norm of the difference of a TTT layer's fast weights, relative to how far they have moved."""
    here, there = fast_weights(a, cfg), fast_weights(b, cfg)
    apart, moved = norms(here, there), norms(here)
    return float((apart / np.where(moved > 0, moved, 1)).max())


# What is printed


def interpretation(changes: bool, builds: bool, failed: list[str]) -> str:
    """What the first two checks mean, in one sentence; `failed` names all that did not pass."""
    if changes and builds and failed:
        return f"The fast weights move on from frame to frame, but cannot be relied on, since this does not hold: {'; '.join(failed)}."
    if changes and builds:
        return "The fast weights persist: every frame moves them on from where the frame before left them."
    if changes:
        return "The fast weights are reset: every frame moves them, but from the same start, and what it taught is gone at the next."
    return "The fast weights do not persist: frames pass and leave them as they were, so nothing is learned or nothing of it is kept."
