"""Scores of a streamed file, frame by frame, and their file: one npz for each file and checkpoint."""

from __future__ import annotations

import io
import zipfile
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ttt_jax.errors import InputError
from ttt_jax.utils.files import write_atomically


class Inner(NamedTuple):
    """Inner losses and state of the TTT layers, mean over heads, float32 [L, T], in the order of the layers."""

    loss_base: np.ndarray
    """l(W0; x_t), W0 the learned base."""
    loss_before: np.ndarray
    """l(W_{t-1}; x_t), before the frame's own step."""
    loss_after: np.ndarray
    """l(W_t; x_t), after it."""
    displacement: np.ndarray
    """Norm of W_t - W0 over that of W0."""
    rate: np.ndarray
    """Inner rate eta."""


class Against(NamedTuple):
    """How far predictions lie from those of the arm `off`, float32 [S, T]; NaN where nothing was scored."""

    kl: np.ndarray
    """KL(arm || off), nats."""
    changed: np.ndarray
    """Whether the top-1 token is another one: 0 or 1."""


class ArmScores(NamedTuple):
    """One file under one arm: S streams (text, then Moshi's codebooks), T frames of the delayed grid.

    NaN where nothing was scored; all but `nats` is None where losses alone were stored.
    """

    nats: np.ndarray
    """Cross-entropy of the token, float32 [S, T]."""
    entropy: np.ndarray | None = None
    """Of the prediction, nats, float32 [S, T]."""
    rank: np.ndarray | None = None
    """Number of tokens that were strictly likelier than the right one, float32 [S, T]."""
    against_off: Against | None = None
    """None where `off` was not run, and for `off` itself."""
    inner: Inner | None = None
    """None where it was not measured."""


class FileScores(NamedTuple):
    """One file under all arms."""

    tokens: np.ndarray
    """Scored tokens, int32 [S, T]; -1 where nothing was scored."""
    arms: dict[str, ArmScores]
    unigram: np.ndarray | None = None
    """Cross-entropy under the memory-less baseline, float32 [S, T]; None without training data."""


def not_finite(scores: FileScores) -> tuple[str, int] | None:
    """Returns the first arm and frame with a scored token whose loss is not a finite number; None if there is none."""
    for arm, values in scores.arms.items():
        if arm != "permuted":  # it ends with its partner; its memory comes from persist, which is checked
            bad = ((scores.tokens >= 0) & ~np.isfinite(values.nats)).any(0)
            if bad.any():
                return arm, int(bad.argmax())
    return None


def losses_only(scores: FileScores) -> FileScores:
    """Returns tokens and losses alone: all that `python -m eval compare` needs, in a third of the space or less."""
    return FileScores(scores.tokens, {arm: ArmScores(values.nats) for arm, values in scores.arms.items()})


def save(path: Path, scores: FileScores) -> None:
    """Writes the scores of a file, at once or not at all."""
    arrays = {"tokens": scores.tokens, "unigram": scores.unigram}
    for arm, values in scores.arms.items():
        arrays |= {f"{arm}/{name}": getattr(values, name) for name in ("nats", "entropy", "rank")}
        for part in (values.against_off, values.inner):
            arrays |= {f"{arm}/{name}": array for name, array in (part._asdict() if part else {}).items()}
    content = io.BytesIO()
    np.savez_compressed(content, **{name: array for name, array in arrays.items() if array is not None})
    write_atomically(path, content.getvalue())


def load(path: Path) -> FileScores:
    """Returns what `save` wrote. Raises `InputError` if the file is missing or damaged."""
    arrays = load_arrays(path, "python -m eval stream")
    names = list(dict.fromkeys(name.split("/")[0] for name in arrays if "/" in name))
    try:
        return FileScores(arrays["tokens"], {arm: _arm(arrays, arm) for arm in names}, arrays.get("unigram"))
    except KeyError as error:
        raise InputError(f"{path} cannot be read ({error}): run python -m eval stream again.") from None


def load_arrays(path: Path, command: str) -> dict[str, np.ndarray]:
    """Returns the arrays of an npz file that `command` wrote. Raises `InputError` if the file is missing or damaged."""
    try:
        with np.load(path) as file:
            return {name: file[name] for name in file.files}
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise InputError(f"{path} cannot be read ({error}): run {command} again.") from None


def _arm(arrays: dict[str, np.ndarray], arm: str) -> ArmScores:
    def part(kind: type) -> tuple | None:
        fields = [arrays.get(f"{arm}/{name}") for name in kind._fields]
        return None if fields[0] is None else kind(*fields)

    entropy, rank = (arrays.get(f"{arm}/{name}") for name in ("entropy", "rank"))
    return ArmScores(arrays[f"{arm}/nats"], entropy, rank, part(Against), part(Inner))
