"""From codes to losses: every recording from a fresh state, many side by side, by the one path of evaluation
(`eval.streaming.runner`).

Recordings of like length share calls of one shape, filled up with masked frames and repeated rows. What else is in a
call changes a recording's losses by rounding only; the same recordings make the same calls, and so the same bits.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import jax
import numpy as np

from eval.benchmarks.rules import Text, Voice
from eval.streaming.runner import stream
from ttt_jax.config import MoshiConfig
from ttt_jax.data.frames import ABSENT
from ttt_jax.data.text import PAD
from ttt_jax.errors import InputError
from ttt_jax.moshi import model


class Entry(NamedTuple):
    """A recording in a text policy and a voice."""

    codes: np.ndarray
    """int32 [Q, T]."""
    text: Text
    voice: Voice

    @property
    def key(self) -> str:
        """Unique by content."""
        digest = hashlib.sha256(np.ascontiguousarray(self.codes, np.int32).tobytes())
        return f"{digest.hexdigest()} {self.codes.shape[1]} {self.text} {self.voice}"


class Losses(NamedTuple):
    """Losses of a recording."""

    frames: int
    nats: dict[str, np.ndarray]
    """By arm: sums over the frames of each of the voice's codebooks, float64 [Q]; not finite where the model is."""


def call_rows(frames: int, arms: int, batch: int | None) -> int:
    """Returns recordings of a call of so many frames under so many arms: `batch`, or what keeps a device busy.

    With twice as many, three arms of the 7B did not fit on an H200.
    """
    return batch or max(1, (1024 if jax.default_backend() == "cpu" else 4096) // (frames * arms))


def call_frames(frames: int) -> int:
    """Returns the length of the calls for recordings of so many frames: 32, 48, 64, 96, 128 and so on.

    Each length compiles a program, so there are few; a call is at least two thirds full from 33 frames on.
    """
    power = 1 << max(5, (frames - 1).bit_length())
    return power * 3 // 4 if power > 32 and frames <= power * 3 // 4 else power


def check(cfg: MoshiConfig, texts: Sequence[Text], voices: Sequence[Voice], name: str) -> None:
    """Raises `InputError` unless the model of checkpoint `name` reads all `texts` and predicts the streams of all
    `voices`."""
    if "padding" in texts and cfg.text_card <= PAD:
        raise InputError(f"{name} has {cfg.text_card} text pieces and so no padding (id {PAD}): give --text absent.")
    if "user" in voices and cfg.dep_q < cfg.n_q:
        raise InputError(
            f"{name} predicts {cfg.dep_q} of {cfg.n_q} codebooks, Moshi's and not the user's, as all released Moshi"
            " weights do: give --voice moshi."
        )


def score(
    params: model.Params,
    cfg: MoshiConfig,
    entries: Sequence[Entry],
    silence: np.ndarray,
    arms: Sequence[str],
    batch: int | None = None,
    is_known: Callable[[int], bool] = lambda i: False,
) -> Iterator[list[tuple[int, Losses]]]:
    """Scores entries, call by call: yields (index, losses) of the entries of each.

    Args:
      silence: codes of the stream that does not speak, int32 [Q, frames of the longest entry or more].
      arms: names of `eval.streaming.arms` without resets; batch: recordings of a call.
      is_known: whether the losses of an entry are known; calls in which all are, are left out.
    """
    by_length: dict[int, list[int]] = {}
    for i, entry in enumerate(entries):
        by_length.setdefault(call_frames(entry.codes.shape[1] + cfg.max_delay), []).append(i)
    for length, members in sorted(by_length.items()):
        rows, short = call_rows(length, len(arms), batch), _short(cfg, length)
        for start in range(0, len(members), rows):
            chosen = members[start : start + rows]
            if all(is_known(i) for i in chosen):
                continue
            frames = [_frames(entries[i], silence, cfg) for i in chosen]
            frames += frames[:1] * (rows - len(chosen))  # calls of fewer rows would be another program
            scores = stream(params, frames, short, arms, chunk=length, reset_every=length)
            found = zip(chosen, scores, strict=False)
            yield [(i, _losses(entries[i], {arm: of.nats for arm, of in file.arms.items()})) for i, file in found]


def _short(cfg: MoshiConfig, frames: int) -> MoshiConfig:
    """Returns the model with attention windows no longer than a call: the same predictions, smaller KV caches.

    Where that would stack its layers otherwise than its parameters are, returns it as it is.
    """
    least = max(frames, cfg.attention_sink + 1)
    windows = tuple((layer, min(context, least)) for layer, context in cfg.layer_context)
    short = dataclasses.replace(cfg, context=min(cfg.context, least), layer_context=windows)
    return short if [run.name for run in short.runs] == [run.name for run in cfg.runs] else cfg


def _frames(entry: Entry, silence: np.ndarray, cfg: MoshiConfig) -> np.ndarray:
    """Returns tokens int32 [1 + n_q, T + max_delay]: behind the recording come frames of nothing, in which its delayed
    codes are scored."""
    books, length = entry.codes.shape
    frames = np.full((cfg.num_streams, length + cfg.max_delay), ABSENT, np.int32)
    if entry.text == "padding":
        frames[0] = PAD
    speaks, silent = (1, 1 + books) if entry.voice == "moshi" else (1 + books, 1)
    frames[speaks : speaks + books, :length] = entry.codes
    frames[silent : silent + books, :length] = silence[:, :length]
    return frames


def _losses(entry: Entry, nats: dict[str, np.ndarray]) -> Losses:
    """Returns the losses of an entry from those of its frames, float32 [S, T + max_delay] by arm."""
    books, length = entry.codes.shape
    first = 1 if entry.voice == "moshi" else 1 + books
    rows = {arm: values[first : first + books].astype(np.float64) for arm, values in nats.items()}
    # Each token once; where the model diverged NaN stands for a loss, too, and stays.
    return Losses(length, {arm: np.array([_total(row, length) for row in values]) for arm, values in rows.items()})


def _total(row: np.ndarray, length: int) -> float:
    """Returns the sum of the losses of one codebook; NaN unless all `length` of them are numbers."""
    known = row[np.isfinite(row)]
    return float(known.sum()) if len(known) == length else math.nan
