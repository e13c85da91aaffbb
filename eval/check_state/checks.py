"""The checks of `python -m eval check-state`.

A recording goes through `forward` frame by frame in row 0 of two rows. Row 1 is, in three streams, other audio; the
same audio with its TTT states cleared before every frame; and idle. Digests (SHA-256) of the TTT states show whether
they change.
"""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

from eval.check_state.results import Check
from ttt_jax.checkpoints import stream_state
from ttt_jax.config import MoshiConfig
from ttt_jax.moshi import model
from ttt_jax.moshi.loss import token_losses
from ttt_jax.moshi.model import Params, State
from ttt_jax.ttt.network import total
from ttt_jax.ttt.state import TTTState

CALL = 7
"""Frames of the shorter calls that streaming is compared with; no divisor of the usual mini-batches."""
TOLERANCES = {"float64": (1e-9, 1e-9), "float32": (1e-4, 1e-4), "bfloat16": (1.0, 0.1)}
"""By type of the activations: nats, and relative difference of the states, that calls of other lengths may differ by.
In bfloat16 random weights of 12 layers gave differences of up to 0.15 nats and 0.012."""

Step = tuple[jax.Array, State]
"""Losses in nats [B, 1 + Q, T] and the next state."""
Call = Callable[[Params, np.ndarray, np.ndarray, State], Step]
"""From parameters, frames [B, K, T], mask [B, T] and state."""


class Trace(NamedTuple):
    """A stream of N calls of B rows through L TTT layers; index 0 of the first axis is the fresh state."""

    digest: np.ndarray
    """SHA-256 of displacement and steps of the open mini-batch, str [N + 1, L, B]."""
    nats: np.ndarray
    """Losses, float [B, 1 + Q, T]."""
    state: State
    """After the last frame."""


class Report(NamedTuple):
    """All checks of a recording."""

    checks: list[Check]
    trace: Trace
    """The stream whose row 1 reads other audio."""

    @property
    def passed(self) -> bool:
        """Whether every check passed."""
        return all(check.passed for check in self.checks)

    @property
    def meaning(self) -> str:
        """The result in one sentence."""
        changes, builds, *_ = self.checks
        if not changes.passed:
            return "The fast weights do not persist: frames leave them unchanged, so nothing is learned or kept."
        if not builds.passed:
            return "The fast weights are reset: every frame changes them, but always from the same start."
        if self.passed:
            return "The fast weights persist: every frame changes them, from where the frame before left them."
        failed = "; ".join(check.what for check in self.checks if not check.passed)
        return f"The fast weights change from frame to frame, but cannot be relied on, as this fails: {failed}."


@partial(jax.jit, static_argnames="cfg")
def forward(params: Params, frames: np.ndarray, mask: np.ndarray, state: State, cfg: MoshiConfig) -> Step:
    """`ttt_jax.moshi.model.forward` as a `Call`, in the highest precision so that calls of other lengths compare."""
    with jax.default_matmul_precision("highest"):
        outputs, state = model.forward(params, frames, mask, state, cfg)
    return token_losses(outputs), state


@partial(jax.jit, static_argnames="cfg")
def reset_first(state: State, cfg: MoshiConfig) -> State:
    """Resets row 0 of two."""
    return model.reset_rows(state, np.array([True, False]), cfg)


_init_state = jax.jit(model.init_state, static_argnums=(0, 1))
_clear = jax.jit(model.reset_ttt_rows)


def check(params: Params, frames: np.ndarray, cfg: MoshiConfig, call: Call | None = None) -> Report:
    """Runs all checks of `call`, by default `forward`, on frames int32 [K, T] of one recording, T of at least 2."""
    call = call or partial(forward, cfg=cfg)
    length = frames.shape[1]
    both, row_0 = np.ones((2, length), bool), np.array([[True], [False]])
    other, same = np.stack([frames, frames[:, ::-1]]), np.stack([frames, frames])
    before, params = digest_of(params), jax.device_put(params, jax.devices()[0])
    with ThreadPoolExecutor() as pool:  # programs of longer calls compile while frames stream
        sizes = dict.fromkeys((min(CALL, length), length))
        longer = {size: pool.submit(stream, call, params, other, both, cfg, size) for size in sizes}
        kept = stream(call, params, other, both, cfg)
        cleared = stream(call, params, same, both, cfg, cleared=np.array([False, True]))
        idle = stream(call, params, other, both & row_0, cfg)
        longer = {size: future.result() for size, future in longer.items()}
    after = digest_of(params)
    parameters = f"SHA-256 {before[:12]} before, {after[:12]} after"
    changed = kept.digest[1:] != kept.digest[:-1]
    carried = cleared.digest[2:, :, :1] != cleared.digest[2:, :, 1:]  # equal to the cleared row: nothing was carried
    beside = [(trace.digest[..., 0] != kept.digest[..., 0]).any(1).sum() for trace in (cleared, idle)]
    neighbours = "{} frames differ beside a row that is cleared at every frame, {} beside an idle one".format(*beside)
    checks = [
        at_every_frame("the fast weights change at every frame", changed, "no change", cfg, 1),
        at_every_frame("each frame starts from what the last one left", carried, "as if cleared before it", cfg, 2),
        survives_saving(kept.state, cfg),
        resets_one_row(kept.state, cfg),
        Check("a row does not depend on its neighbour", not any(beside), neighbours),
        Check("the checkpoint's parameters stay as they are", before == after, parameters),
        equals_longer_calls(kept, longer, cfg),
    ]
    return Report(checks, kept)


def stream(
    call: Call,
    params: Params,
    frames: np.ndarray,
    mask: np.ndarray,
    cfg: MoshiConfig,
    size: int = 1,
    cleared: np.ndarray | None = None,
) -> Trace:
    """Streams rows from a fresh state in calls of `size` frames, the last one filled up with masked frames.

    Args:
      frames: [B, K, T]; mask: bool [B, T]; cleared: rows (bool [B]) whose TTT states are cleared before every call.
    """
    length, filler = frames.shape[2], -frames.shape[2] % size
    frames, mask = np.pad(frames, ((0, 0), (0, 0), (0, filler))), np.pad(mask, ((0, 0), (0, filler)))
    state = fresh_state(cfg, len(frames))
    digests, nats = [digests_of(fast_weights(state, cfg))], []
    for start in range(0, length, size):
        if cleared is not None:
            state = _clear(state, cleared)
        losses, state = call(params, frames[:, :, start : start + size], mask[:, start : start + size], state)
        digests.append(digests_of(fast_weights(state, cfg)))
        nats.append(np.asarray(losses))
    return Trace(np.array(digests), np.concatenate(nats, 2)[:, :, :length], state)


def fresh_state(cfg: MoshiConfig, rows: int) -> State:
    """Returns a fresh state, placed on the device for good; `call` would compile again for one that may still move."""
    return jax.device_put(_init_state(cfg, rows), jax.devices()[0])


def fast_weights(state: State, cfg: MoshiConfig) -> list[TTTState]:
    """Returns the state of each TTT layer in the order of the stack, NumPy leaves [B, ...]."""
    layers = []
    for run in (run for run in cfg.runs if run.has_ttt):
        stacked = jax.tree.map(np.asarray, state.layers[run.name].ttt)
        layers += [jax.tree.map(lambda leaf, i=i: leaf[i], stacked) for i in range(run.stop - run.start)]
    return layers


def digest_of(tree: object) -> str:
    """Returns the SHA-256 of the bytes of all leaves."""
    sha = hashlib.sha256()
    for leaf in jax.tree.leaves(tree):
        # A copy: jax caches the host value of an array, and would not show a later change.
        leaf = jax.device_put(leaf, may_alias=False) if isinstance(leaf, jax.Array) else leaf
        sha.update(np.ascontiguousarray(leaf).reshape(-1).view(np.uint8))
    return sha.hexdigest()


def digests_of(weights: list[TTTState]) -> list[list[str]]:
    """Returns digests by layer and row of displacement and open steps, without the count, which every frame changes."""
    return [[digest_of(jax.tree.map(lambda leaf, r=r: leaf[r], w[:2])) for r in range(len(w.count))] for w in weights]


def vectors(state: State, cfg: MoshiConfig) -> Iterator[np.ndarray]:
    """Yields fast weights minus base of each TTT layer, [B, weights], after the steps of the open mini-batch."""
    for w in fast_weights(state, cfg):
        now = (
            jax.tree.map(np.subtract, w.displacement, total(w.open_steps, np.ones(len(w.count))))
            if w.open_steps
            else w.displacement
        )
        yield np.concatenate([leaf.reshape(len(leaf), -1) for leaf in jax.tree.leaves(now)], 1)


def at_every_frame(what: str, holds: np.ndarray, otherwise: str, cfg: MoshiConfig, first: int) -> Check:
    """Checks that bool [frames, L, rows] holds everywhere; frames count from `first`."""
    for layer, good in zip(cfg.ttt_layers, holds.all(2).T, strict=True):
        if not good.all():
            where = f"{(~good).sum()} of {len(good)} frames, first at frame {first + int(np.argmin(good))}"
            return Check(what, False, f"layer {layer}: {otherwise} at {where}")
    layers = len(cfg.ttt_layers)
    return Check(what, True, f"{len(holds)} of {len(holds)} frames in {layers} layer{'s' * (layers > 1)}")


def survives_saving(state: State, cfg: MoshiConfig) -> Check:
    """Checks that a file gives the whole state back."""
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
    """Checks that a reset of row 0 makes it fresh and leaves row 1."""
    states = (reset_first(state, cfg), state, fresh_state(cfg, 2))
    after, before, fresh = (np.array(digests_of(fast_weights(s, cfg))) for s in states)
    is_fresh, is_kept = bool((after[:, 0] == fresh[:, 0]).all()), bool((after[:, 1] == before[:, 1]).all())
    figure = f"row 0 is{' NOT' * (not is_fresh)} fresh, row 1 is{' NOT' * (not is_kept)} as it was"
    return Check("a reset clears its own row and no other", is_fresh and is_kept, figure)


def equals_longer_calls(kept: Trace, longer: dict[int, Trace], cfg: MoshiConfig) -> Check:
    """Checks losses and last states of the stream against those of longer calls."""
    norm = partial(np.linalg.norm, axis=1)
    nats, states = [], []
    for trace in longer.values():
        nats.append(np.abs(kept.nats - trace.nats).max())
        for here, there in zip(vectors(kept.state, cfg), vectors(trace.state, cfg), strict=True):
            states.append(norm(here - there) / np.where(norm(here) > 0, norm(here), 1))
    (nats, states), allowed = (np.max(nats), np.max(states)), TOLERANCES[cfg.dtype]
    figure = f"losses differ by {nats:.1e} nats (allowed {allowed[0]:g}), states by {states:.1e} ({allowed[1]:g})"
    what = f"frame by frame equals calls of {' and '.join(map(str, longer))} frames"
    return Check(what, bool(nats <= allowed[0] and states <= allowed[1]), figure)  # NaN fails
