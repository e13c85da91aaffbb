"""Streams files through the model under every arm: each frame is scored once, in calls of any length, the state is
carried."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from eval.streaming import arms as arms_
from eval.streaming.scores import Against, ArmScores, FileScores, Inner
from ttt_jax.config import MoshiConfig
from ttt_jax.moshi import model

SEGMENT = 512
"""Least number of frames of a dispatch, so that short calls do not wait for the host."""


class Scored(NamedTuple):
    """Scores of a call, leading axis arms, A; streams S = 1 + Q: text, then Moshi's codebooks."""

    nats: jax.Array  # [A, B, S, T]
    entropy: jax.Array
    rank: jax.Array
    against_off: Against | None
    inner: Inner | None  # [A, L, B, T]


def score(outputs: model.Outputs, off: int | None) -> Scored:
    """Scores predictions of several arms, leading axis A, against the targets that they share, masked or not.

    Args:
      off: index of the arm `off`, for the comparison with it.
    """

    def of_streams(logits: jax.Array, targets: jax.Array) -> tuple[jax.Array, ...]:  # [A, B, T, ..., V], [A, B, T, ...]
        logp = jax.nn.log_softmax(logits)
        index = jnp.clip(targets, 0, logits.shape[-1] - 1)[..., None]
        target_logp = jnp.take_along_axis(logp, index, -1)
        p = jnp.exp(logp)
        parts = [-target_logp[..., 0], -(p * logp).sum(-1), (logp > target_logp).sum(-1).astype(jnp.float32)]
        if off is not None:
            best = logp.argmax(-1)
            parts += [(p * (logp - logp[off])).sum(-1), (best != best[off]).astype(jnp.float32)]
        return tuple(parts)

    text = of_streams(outputs.text_logits, outputs.targets[:, :, 0])
    audio = of_streams(outputs.audio_logits, jnp.moveaxis(outputs.targets[:, :, 1:], 2, 3))
    both = [jnp.concatenate([t[:, :, None], jnp.moveaxis(a, 3, 2)], 2) for t, a in zip(text, audio, strict=True)]
    inner = None
    if outputs.ttt is not None:
        inner = Inner(*(values.mean(-1) for values in (*outputs.ttt.inner, outputs.ttt.rate)))
    return Scored(*both[:3], Against(*both[3:]) if off is not None else None, inner)


@partial(jax.jit, static_argnames=("cfg", "arms", "measured"), donate_argnames="state")
def scan_calls(
    params: model.Params,
    frames: jax.Array,
    mask: jax.Array,
    resets_now: jax.Array,
    partners: jax.Array,
    state: model.State,
    cfg: MoshiConfig,
    arms: tuple[str, ...],
    measured: bool,
) -> tuple[model.State, tuple[Scored, jax.Array, jax.Array]]:
    """Runs N calls of T frames, one after the other.

    Args:
      params, state: of `arms.set_params`, `arms.init_state`; frames: int32 [N, B, K, T]; mask: bool [N, B, T].
      resets_now: bool [N], calls that begin with a reset; partners: of `arms.reset`.

    Returns:
      The state and by call: scores, targets int32 [B, S, T], whether scored bool [B, S, T].
    """
    off = arms.index("off") if "off" in arms and len(arms) > 1 else None

    def body(state: model.State, call: tuple[jax.Array, ...]):
        frames, mask, resets_now = call
        state = arms_.reset(state, resets_now, partners, arms)

        def forward(params: model.Params, state: model.State):
            return model.forward(params, frames, mask, state, cfg, measured)

        outputs, state = arms_.over_arms(forward, cfg, arms)(params, state)
        return state, (score(outputs, off), outputs.targets[0], outputs.target_mask[0])

    return jax.lax.scan(body, state, (frames, mask, resets_now))


class Plan(NamedTuple):
    """How streams are cut into calls of equal shape."""

    starts: np.ndarray
    """First frame of each call, int [N]."""
    lengths: np.ndarray
    """Its frames, int [N], at most `frames`: the call before a reset may be shorter, filled up with masked
    frames."""
    frames: int
    resets: np.ndarray
    """Whether it begins with a reset, bool [N]; the first does not, there is nothing to clear yet."""


def plan(length: int, chunk: int, reset_every: int | None) -> Plan:
    """Cuts a stream of `length` frames into calls of at most `chunk` frames, none of which crosses a reset.

    Calls of streams of all lengths have few shapes, so that few programs are compiled: the rest of the last call is
    masked.
    """
    frames = math.ceil(reset_every / math.ceil(reset_every / chunk)) if reset_every else chunk
    frames = min(frames, _bucket(length))
    whole = reset_every or math.ceil(length / frames) * frames
    starts = np.array([at + i for at in range(0, length, whole) for i in range(0, min(whole, length - at), frames)])
    ends = np.minimum(np.append(starts[1:], length), (starts // whole + 1) * whole)
    return Plan(starts, ends - starts, frames, (starts % whole == 0) & (starts > 0))


def _bucket(count: int) -> int:
    """Returns the least power of two that is not below `count`."""
    return 1 << (count - 1).bit_length()


def stream(
    params: model.Params,
    files: Sequence[np.ndarray],
    cfg: MoshiConfig,
    arms: Sequence[str],
    *,
    chunk: int,
    reset_every: int,
    measured: bool = False,
    partners: Sequence[int] | None = None,
    on_frames: Callable[[int], None] = lambda frames: None,
) -> list[FileScores]:
    """Streams files side by side, each from a fresh state, under every arm; nothing crosses files.

    Args:
      files: int32 [K, T_i] each; arms: names that `arms.check` let pass.
      chunk: most frames of a call; it does not change the numbers beyond rounding. reset_every: frames after which
        `reset` clears and `permuted` exchanges memories.
      measured: whether to measure inner losses; partners: for each file the one whose memory it takes in `permuted`,
        which counts as long as that one goes on. on_frames: called with the number of frames newly scored.

    Returns:
      Scores of every file; `unigram` is left None.
    """
    arms, lengths = tuple(arms), np.array([file.shape[1] for file in files])
    calls = plan(int(lengths.max()), chunk, reset_every if arms_.resets(arms) else None)
    per_scan = min(max(1, SEGMENT // calls.frames), _bucket(len(calls.starts)))
    edited, state = arms_.set_params(params, arms), arms_.init_state(cfg, len(files), arms)
    others = jnp.asarray(range(len(files)) if partners is None else partners, jnp.int32)
    ends = [*calls.starts[::per_scan], lengths.max()]
    counts = np.diff([np.minimum(lengths, end).sum() for end in ends])
    outs, waiting = [], None

    def collect(out: tuple) -> None:
        outs.append(jax.device_get(out))
        on_frames(int(counts[len(outs) - 1]))

    try:
        for first in range(0, len(calls.starts), per_scan):
            block = _block(files, calls, first, per_scan)
            state, out = scan_calls(edited, *block, others, state, cfg=cfg, arms=arms, measured=measured)
            if waiting is not None:
                collect(waiting)  # the scan before, while this one computes
            waiting = out
        collect(waiting)
    except BaseException:
        with contextlib.suppress(RuntimeError):  # of a state that has just been donated
            jax.block_until_ready(state)  # an interpreter that ends while a program runs would crash
        raise
    joined = jax.tree.map(partial(_join, calls), *outs)
    scores = [_file_scores(*joined, row, length, arms) for row, length in enumerate(lengths)]
    if "permuted" in arms:
        for file, other in zip(scores, partners, strict=True):
            end = (lengths[other] // reset_every + 1) * reset_every
            file.arms["permuted"] = jax.tree.map(partial(_until, end=end), file.arms["permuted"])
    return scores


def _until(values: np.ndarray, end: int) -> np.ndarray:
    """Returns values [S, T], NaN from frame `end` on."""
    return np.where(np.arange(values.shape[1]) < end, values, np.float32(np.nan))


def _block(files: Sequence[np.ndarray], calls: Plan, first: int, count: int) -> tuple[jax.Array, ...]:
    """Returns frames [N, B, K, T], masks [N, B, T] and resets [N] of `count` calls from `first` on.

    Calls beyond the last are masked.
    """
    frames = np.full((count, len(files), files[0].shape[0], calls.frames), -1, np.int32)
    mask = np.zeros((count, len(files), calls.frames), bool)
    resets_now = np.zeros(count, bool)
    for i, call in enumerate(range(first, min(first + count, len(calls.starts)))):
        resets_now[i] = calls.resets[call]
        for row, file in enumerate(files):
            part = file[:, calls.starts[call] : calls.starts[call] + calls.lengths[call]]
            frames[i, row, :, : part.shape[1]] = part
            mask[i, row, : part.shape[1]] = True
    return jnp.asarray(frames), jnp.asarray(mask), jnp.asarray(resets_now)


def _join(calls: Plan, *scans: np.ndarray) -> np.ndarray:
    """Returns the values of all calls in their place in time, [N, ..., T of a call] by scan -> [..., T]."""
    values = (call for scan in scans for call in scan)  # masked calls may follow the last one
    return np.concatenate([call[..., :length] for length, call in zip(calls.lengths, values, strict=False)], -1)


def _file_scores(
    scored: Scored, targets: np.ndarray, present: np.ndarray, row: int, length: int, arms: tuple[str, ...]
) -> FileScores:
    """Returns the scores of one file, without the padding."""
    present = present[row, :, :length]

    def of_streams(values: np.ndarray) -> np.ndarray:  # [B, S, T]
        return np.where(present, values[row, :, :length], np.float32(np.nan))

    def of_arm(i: int) -> ArmScores:
        against = inner = None
        if scored.against_off is not None and arms[i] != "off":
            against = Against(*(of_streams(values[i]) for values in scored.against_off))
        if scored.inner is not None:
            inner = Inner(*(values[i, :, row, :length] for values in scored.inner))
        return ArmScores(*(of_streams(values[i]) for values in scored[:3]), against, inner)

    tokens = np.where(present, targets[row, :, :length], -1)
    return FileScores(tokens, {arm: of_arm(i) for i, arm in enumerate(arms)}, None)


def batches(lengths: Sequence[int], rows: int, least: int = 1) -> Iterator[list[int]]:
    """Yields files in batches of at most `rows`, never fewer than `least`, like lengths together; sizes are alike."""
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    count = min(math.ceil(len(order) / rows), len(order) // least)
    for part in np.array_split(np.array(order), count):
        yield part.tolist()
