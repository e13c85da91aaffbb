"""What streaming a file gave, frame by frame, and its place on disk: one npz per file."""

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
    """What TTT layers did, float32 [L, T]: layers in the order of `MoshiConfig.ttt_layers`, mean over heads."""

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
    """Whether the likeliest token is another one: 0 or 1."""


class ArmScores(NamedTuple):
    """One file under one arm: S streams (text, then own codebooks), T frames of the delayed grid; NaN where nothing was scored."""

    nats: np.ndarray
    """Cross-entropy of the token, float32 [S, T]."""
    entropy: np.ndarray
    """Of the prediction, nats, float32 [S, T]."""
    rank: np.ndarray
    """Tokens thought likelier than the right one, float32 [S, T]; 0: it was the likeliest."""
    against_off: Against | None
    """None where `off` was not run, and for `off` itself."""
    inner: Inner | None
    """None where it was not measured."""


class FileScores(NamedTuple):
    """One file under all arms."""

    tokens: np.ndarray
    """Scored tokens, int32 [S, T]; -1 where nothing was scored."""
    arms: dict[str, ArmScores]
    unigram: np.ndarray | None
    """Cross-entropy under the memory-less baseline, float32 [S, T]; None without training data."""


def not_finite(scores: FileScores) -> tuple[str, int] | None:
    """The first arm and frame whose predictions are not finite numbers though there was a token to score; None if all are."""
    for arm, own in scores.arms.items():
        if arm != "permuted":  # which ends with its partner; what it takes comes from persist
            bad = ((scores.tokens >= 0) & ~np.isfinite(own.nats)).any(0)
            if bad.any():
                return arm, int(bad.argmax())
    return None


def save(path: Path, scores: FileScores) -> None:
    """Write the scores of a file, at once or not at all."""
    arrays = {"tokens": scores.tokens}
    if scores.unigram is not None:
        arrays["unigram"] = scores.unigram
    for arm, own in scores.arms.items():
        arrays |= {f"{arm}/{name}": getattr(own, name) for name in ("nats", "entropy", "rank")}
        for part in (own.against_off, own.inner):
            arrays |= {f"{arm}/{name}": array for name, array in (part._asdict() if part else {}).items()}
    content = io.BytesIO()
    np.savez_compressed(content, **arrays)
    write_atomically(path, content.getvalue())


def load(path: Path) -> FileScores:
    """What `save` wrote. Raises `InputError` if that is not there or not whole."""
    try:
        with np.load(path) as file:
            arrays = {name: file[name] for name in file.files}
        names = list(dict.fromkeys(name.split("/")[0] for name in arrays if "/" in name))
        return FileScores(arrays["tokens"], {arm: _arm(arrays, arm) for arm in names}, arrays.get("unigram"))
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise InputError(f"{path} cannot be read ({error}): run python -m eval stream again.") from None


def _arm(arrays: dict[str, np.ndarray], arm: str) -> ArmScores:
    def part(kind: type) -> tuple | None:
        fields = [arrays.get(f"{arm}/{name}") for name in kind._fields]
        return None if fields[0] is None else kind(*fields)

    own = (arrays[f"{arm}/{name}"] for name in ("nats", "entropy", "rank"))
    return ArmScores(*own, part(Against), part(Inner))
