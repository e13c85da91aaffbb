"""Talks side by side, each a row of one batch: they join, leave, pause, change, fork and are taken up again.

Not for several threads at once.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ttt_jax.errors import InputError
from ttt_jax.moshi.generate import RowSampling, Sampling
from ttt_jax.serve import speech
from ttt_jax.serve.speech import RowSettings, Speech, State
from ttt_jax.ttt.layer import Control

Memory = Literal["on", "frozen", "off"]
"""on: as trained; frozen: fast weights are read, but take no steps; off: the TTT layers add nothing."""
FirstFrame = Literal["twice", "once"]
"""What becomes of a talk's first frame: twice: Moshi hears it, as in training; once: it is lost, as in Kyutai's
server (`generate.generate`)."""


@dataclass(frozen=True)
class TalkSettings:
    """How a talk samples, and what it does with its memory. Raises `InputError` for values that cannot be."""

    sampling: Sampling = Sampling()
    memory: Memory = "on"
    gate: float | None = None
    """tanh(alpha) of all TTT layers, -1 to 1; None: as trained."""

    def __post_init__(self) -> None:
        for name, value in self.sampling._asdict().items():
            if not 0 <= value < 1 << 31:  # top-k is int32 on the device
                raise InputError(f"sampling {name}={value} cannot be: give 0 or a positive number below 2^31.")
        if self.memory not in ("on", "frozen", "off"):
            raise InputError(f"memory={self.memory!r} cannot be: give on, frozen or off.")
        if self.gate is not None and not -1 <= self.gate <= 1:
            raise InputError(f"gate={self.gate} cannot be: give -1 to 1, or none to take that of the weights.")


class Talk(NamedTuple):
    """One talk, to be saved or taken up: a value."""

    state: State
    """B = 1."""
    begun: bool
    """Whether the language model has read the initial tokens."""


class Reply(NamedTuple):
    """One step of a talk; fields as in `speech.Spoken`, of one row."""

    row: int
    audio: np.ndarray | None
    """float32 [S]; None in the first steps, before a frame is complete."""
    moshi: np.ndarray
    user: np.ndarray
    column: np.ndarray
    log_probs: np.ndarray | None
    inner: speech.Inner | None

    @property
    def text(self) -> int:
        """Text token of the newest complete frame; -1 without one."""
        return int(self.moshi[0])


class Talks:
    """At most `rows` talks. A step costs the same however many there are."""

    def __init__(self, speech: Speech, rows: int, measured: bool = False) -> None:
        """
        Args:
          measured: whether each step computes log-probabilities and measures the TTT layers. Steps that measure and
            steps that do not are two programs, whose results may differ by rounding.
        """
        if rows < 1:
            raise InputError(f"{rows} talks at once cannot be: give 1 or more.")
        self.speech, self.rows, self.measured = speech, rows, measured
        self._state = speech.init_state([0] * rows)
        self._free = list(range(rows))
        self._settings: list[TalkSettings] = [TalkSettings()] * rows
        self._on_device: RowSettings | None = None  # on the device; None after a change
        self._begun = np.zeros(rows, bool)
        self._drops = np.zeros(rows, bool)  # rows whose first frame is lost

    @property
    def free(self) -> int:
        """Number of talks that can join."""
        return len(self._free)

    def join(
        self,
        settings: TalkSettings = TalkSettings(),
        seed: int = 0,
        first_frame: FirstFrame = "twice",
        talk: Talk | None = None,
    ) -> int:
        """Begins a talk, or goes on with one, and returns its row.

        Args:
          seed: of a new talk's draws, 0 to 2^32 - 1; talks with equal seeds and inputs are equal.
          talk: the one to go on with.

        Raises:
          InputError: all rows are taken, or a value cannot be.
        """
        if not self._free:
            raise InputError(
                f"all {self.rows} talks are taken: wait until one ends, or start the server with more rows."
            )
        if first_frame not in ("twice", "once"):
            raise InputError(f'first_frame="{first_frame}" is no convention: give "twice" or "once".')
        self._check(settings)
        row, begun = self._free[0], talk is not None and talk.begun
        if talk is None:
            self._state = self.speech.begin(self._state, row, seed)
        else:
            self._state = speech.put(self._state, row, talk.state)
        self._free.pop(0)
        self._begun[row], self._drops[row] = begun, first_frame == "once" and not begun
        self._settings[row], self._on_device = settings, None
        return row

    def leave(self, row: int) -> None:
        """Ends a talk; nothing of it reaches the next talk of its row."""
        self._check_row(row)
        self._free.append(row)

    def change(self, row: int, settings: TalkSettings) -> None:
        """Changes how a talk goes on. Raises `InputError`."""
        self._check_row(row)
        self._check(settings)
        self._settings[row], self._on_device = settings, None

    def settings(self, row: int) -> TalkSettings:
        """How a talk goes on."""
        self._check_row(row)
        return self._settings[row]

    def take(self, row: int) -> Talk:
        """A copy of a talk as it stands."""
        self._check_row(row)
        return Talk(speech.take(self._state, row), bool(self._begun[row]))

    def take_memory(self, row: int) -> dict[str, Any]:
        """A copy of a talk's fast weights, for `put_memory`."""
        self._check_row(row)
        return speech.take_memory(self._state, row)

    def put_memory(self, row: int, memory: dict[str, Any] | None) -> None:
        """Replaces a talk's fast weights; None: by their learned start. What it heard and said stays."""
        self._check_row(row)
        memory = jax.tree.map(jnp.zeros_like, self.take_memory(row)) if memory is None else memory
        self._state = speech.put_memory(self._state, row, memory)

    def step(self, frames: Mapping[int, np.ndarray]) -> list[Reply]:
        """One frame of the talks that have one; the others pause.

        A new talk takes a step before its first frame, which reads initial tokens; a row then has two replies.

        Args:
          frames: by row, the user's samples, float [S], full scale 1.

        Returns:
          Replies in the order of steps, then of rows.

        Raises:
          InputError: a frame has another shape or is not finite; no talk has moved then.
        """
        audio = np.zeros((self.rows, self.speech.codec.frame_size), np.float32)
        for row, frame in frames.items():
            self._check_row(row)
            frame = np.asarray(frame)
            if frame.shape != audio.shape[1:] or not np.isfinite(frame).all():
                raise InputError(
                    f"row {row} has a frame of shape {list(frame.shape)} and {np.isfinite(frame).sum()} finite samples:"
                    f" give {audio.shape[1]} finite samples."
                )
            audio[row] = frame
        hears = self._mask(frames)
        replies = []
        if (begins := hears & ~self._begun).any():
            replies += self._step(audio, np.zeros_like(hears), begins)
            self._begun |= begins
            hears &= ~(begins & self._drops)
        if hears.any():
            replies += self._step(audio, hears, hears)
        return replies

    def _step(self, audio: np.ndarray, hears: np.ndarray, speaks: np.ndarray) -> list[Reply]:
        if self._on_device is None:
            self._on_device = _by_row(self._settings)
        spoken, self._state = self.speech.step(audio, hears, speaks, self._state, self._on_device, self.measured)
        return [_reply(spoken, int(row)) for row in np.flatnonzero(speaks)]

    def _mask(self, rows: Collection[int]) -> np.ndarray:
        mask = np.zeros(self.rows, bool)
        mask[list(rows)] = True
        return mask

    def _check_row(self, row: int) -> None:
        if not 0 <= row < self.rows or row in self._free:
            raise InputError(f"row {row} has no talk: name one that has joined.")

    def _check(self, settings: TalkSettings) -> None:
        most = self.speech.most
        for name in ("top_k", "text_top_k"):
            given, limit = getattr(settings.sampling, name), getattr(most, name)
            if limit and not 0 < given <= limit:
                raise InputError(f"sampling {name}={given} is more than is computed here: give 1 to {limit}.")


def _by_row(talks: list[TalkSettings]) -> RowSettings:
    """The settings of all rows, on the device."""
    samplings = [one.sampling for one in talks]
    kinds = {"temperature": jnp.float32, "top_k": jnp.int32, "text_temperature": jnp.float32, "text_top_k": jnp.int32}
    sampling = RowSampling(
        **{name: jnp.array([getattr(one, name) for one in samplings], kind) for name, kind in kinds.items()}
    )
    gates = [0.0 if one.memory == "off" else math.nan if one.gate is None else one.gate for one in talks]
    learns = jnp.array([one.memory != "frozen" for one in talks])
    return RowSettings(sampling, Control(learns, jnp.array(gates, jnp.float32)))


def _reply(spoken: speech.Spoken, row: int) -> Reply:
    there = spoken.moshi[row, 0] >= 0
    inner = None if spoken.inner is None else speech.Inner(*(part[:, row] for part in spoken.inner))
    log_probs = None if spoken.log_probs is None else spoken.log_probs[row]
    audio = spoken.audio[row].copy() if there else None  # a view would keep the audio of all rows
    return Reply(row, audio, spoken.moshi[row], spoken.user[row], spoken.column[row], log_probs, inner)
