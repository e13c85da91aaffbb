"""The results of streaming held-out files: numbers by stream, arm and position, results.json, a table, a picture."""

from __future__ import annotations

import dataclasses
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from eval import unigram
from eval.arms import ARMS
from eval.statistics import Estimate, estimate, file_mean, windows
from eval.stream import Scores
from ttt_jax.config import FRAME_RATE
from ttt_jax.files import write_atomically


@dataclasses.dataclass(frozen=True)
class Results:
    """All that is said about one evaluation; every number is a mean over files with a 95 % interval."""

    streams: list[str]
    """Names of the predicted streams: text, then own codebooks 1 to Q."""
    files: list[dict[str, Any]]
    """Name and length of every file, with each arm's mean loss over all streams."""
    losses: dict[str, dict[str, Estimate]]
    """nats per token by arm (and "unigram") and stream, and their mean over streams."""
    against_unigram: dict[str, Estimate]
    """unigram minus persist by stream, paired by file: what the model knows beyond how often tokens occur."""
    against_persist: dict[str, dict[str, Estimate]]
    """arm minus persist, mean over streams, paired by file: over all frames, and after the first chunk."""
    by_position: dict[str, list[Estimate]]
    """arm minus persist in consecutive windows of `window` frames; for persist itself its loss."""
    displacement: list[Estimate]
    """Displacement over base norm, mean over TTT layers, under persist, in the same windows."""
    window: int
    chunk: int
    context: int


def summarise(
    scores: dict[str, Scores], tables: list[np.ndarray], names: Sequence[str], chunk: int, window: int, context: int
) -> Results:
    """From per-frame scores by arm, and `unigram.fit`'s tables, to what is reported."""
    streams = ["text", *(f"codebook {k}" for k in range(1, len(tables)))]
    persist = scores["persist"]
    scored = np.isfinite(persist.nats)
    tokens = np.where(scored, persist.tokens, -1)
    nats = {arm: score.nats for arm, score in scores.items()} | {"unigram": unigram.nats(tables, tokens)}

    def by_stream(values: np.ndarray) -> dict[str, Estimate]:  # [B, S] -> by stream and their mean
        return {name: estimate(values[:, i]) for i, name in enumerate(streams)} | {"mean": estimate(values.mean(1))}

    per_file = {arm: file_mean(values) for arm, values in nats.items()}  # [B, S]
    frame_loss = {
        arm: values.mean(1) for arm, values in nats.items()
    }  # [B, T]; NaN in a stream's first and a file's padded frames
    difference = {arm: frame_loss[arm] - frame_loss["persist"] for arm in scores if arm != "persist"}
    in_windows = {"persist": windows(frame_loss["persist"], window)} | {
        arm: windows(d, window) for arm, d in difference.items()
    }
    lengths = scored.any(1).sum(-1)
    return Results(
        streams=streams,
        files=[
            {"name": name, "frames": int(frames), "loss": {arm: float(per_file[arm][i].mean()) for arm in nats}}
            for i, (name, frames) in enumerate(zip(names, lengths, strict=True))
        ],
        losses={arm: by_stream(values) for arm, values in per_file.items()},
        against_unigram=by_stream(per_file["unigram"] - per_file["persist"]),
        against_persist={
            arm: {"all frames": estimate(file_mean(d)), "after the first chunk": estimate(file_mean(d[:, chunk:]))}
            for arm, d in difference.items()
        },
        by_position={arm: [estimate(column) for column in values.T] for arm, values in in_windows.items()},
        displacement=[estimate(column) for column in windows(persist.displacement.mean(1), window).T],
        window=window,
        chunk=chunk,
        context=context,
    )


def table(results: Results) -> str:
    """The results for a terminal."""
    arms = [*ARMS, "unigram"]
    frames = [file["frames"] for file in results.files]
    lines = [
        f"{len(frames)} held-out files, {min(frames)} to {max(frames)} frames ({sum(frames) / FRAME_RATE / 60:.1f} minutes in all), "
        f"attention window {results.context} frames, memory cleared every {results.chunk} frames in reset",
        "",
        "nats per token" + "".join(f"{arm:>10}" for arm in arms) + "   better than unigram by [95 %, files]",
    ]
    for name in [*results.streams, "mean"]:
        cells = "".join(f"{results.losses[arm][name].mean:10.3f}" for arm in arms)
        lines.append(f"{name:<14}{cells}   {results.against_unigram[name]}")
    lines += ["", "What memory brings: loss of the arm minus loss with memory kept, nats per token [95 %, files]"]
    for arm, parts in results.against_persist.items():
        cells = ", ".join(f"{part} {_signed(value)}" for part, value in parts.items())
        lines.append(f"  {arm:<8}{cells}   ({ARMS[arm].meaning})")
    return "\n".join([*lines, "", verdict(results)])


def verdict(results: Results) -> str:
    """One sentence on kept memory against memory cleared at every chunk."""
    value = results.against_persist["reset"]["after the first chunk"]
    if value.n < 2:
        return "One file gives no interval: nothing can be said about whether keeping the memory helps."
    if value.low <= 0 <= value.high:
        return f"Keeping the memory across chunks makes no clear difference here: {_signed(value)} nats over {value.n} files."
    share = 100 * abs(value.mean) / results.losses["reset"]["mean"].mean
    change = "lowers" if value.mean > 0 else "raises"
    return (
        f"Keeping the memory across chunks {change} the loss by {abs(value.mean):.4f} nats ({share:.2f} %) over {value.n} files,"
        f" 95 % interval {min(abs(value.low), abs(value.high)):.4f} to {max(abs(value.low), abs(value.high)):.4f}."
    )


def _signed(value: Estimate) -> str:
    return f"{value.mean:+.4f} [{value.low:+.4f}, {value.high:+.4f}]"


def write(results: Results, scores: dict[str, Scores], meta: dict[str, Any], folder: Path) -> list[Path]:
    """Write results.json, frames.npz (every frame of every arm) and memory.png to `folder`; their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    content = {"about": "nats per token; estimates are means over files with 95 % intervals (Student's t)", **meta}
    content |= dataclasses.asdict(results) | {"verdict": verdict(results)}
    nats = {f"nats/{arm}": score.nats.astype(np.float32) for arm, score in scores.items()}
    frames = io.BytesIO()
    np.savez_compressed(frames, tokens=scores["persist"].tokens, displacement=scores["persist"].displacement, **nats)
    contents = {
        "results.json": (json.dumps(_plain(content), indent=1, allow_nan=False) + "\n").encode(),
        "frames.npz": frames.getvalue(),
        "memory.png": _draw(results),
    }
    for name, data in contents.items():
        write_atomically(folder / name, data)
    return [folder / name for name in contents]


def _plain(value: Any) -> Any:
    """JSON has no NaN: what was not measured is null."""
    if isinstance(value, Estimate):
        return {"mean": _plain(value.mean), "low": _plain(value.low), "high": _plain(value.high), "n": value.n}
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float):
        return value if np.isfinite(value) else None
    return value


COLOURS = {"persist": "#1b6ca8", "reset": "#d1495b", "frozen": "#7d8597", "off": "#edae49"}


def _draw(results: Results) -> bytes:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (loss, gain, state) = plt.subplots(3, 1, figsize=(8, 9), sharex=True, constrained_layout=True)
    # Where few files are left an interval says nothing and would squeeze all others: results.json has those windows.
    counts = [value.n for value in results.displacement]
    shown = sum(count > max(counts) / 2 for count in counts)
    seconds = (np.arange(shown) + 0.5) * results.window / FRAME_RATE

    def band(axis, values: list[Estimate], colour: str, label: str, shift: float = 0.0) -> None:
        mean, low, high = (np.array([getattr(v, field) for v in values[:shown]]) for field in ("mean", "low", "high"))
        error = np.nan_to_num(np.stack([mean - low, high - mean]))
        axis.errorbar(
            seconds + shift, mean, error, color=colour, marker="o", markersize=3, capsize=2, lw=1.4, label=label
        )

    band(loss, results.by_position["persist"], COLOURS["persist"], "memory kept")
    loss.set_ylabel("nats per token")
    loss.set_title("Loss with memory kept")
    for i, arm in enumerate(arm for arm in results.by_position if arm != "persist"):
        band(gain, results.by_position[arm], COLOURS[arm], arm, 0.4 * (i - 1))
    gain.axhline(0, color="black", lw=0.8)
    gain.set_ylabel("nats per token\n(above 0: memory helps)")
    gain.set_title("What memory brings: loss of the arm minus loss with memory kept")
    gain.legend(frameon=False, ncols=3)
    band(state, results.displacement, COLOURS["persist"], "memory kept")
    state.set_ylabel("displacement / base norm")
    state.set_title("How far the fast weights have moved")
    state.set_xlabel("seconds of speech")
    state.set_ylim(bottom=0)
    for axis in (loss, gain, state):
        axis.axvline(results.context / FRAME_RATE, color="black", lw=0.8, ls=":")
        axis.grid(alpha=0.25)
    loss.annotate(
        "attention window",
        (results.context / FRAME_RATE, loss.get_ylim()[1]),
        (3, -10),
        textcoords="offset points",
        fontsize=8,
    )
    files = ", ".join(map(str, counts[:shown]))
    figure.suptitle(f"Held-out speech, frame by frame; bars: 95 % over files (files per point: {files})", fontsize=10)
    picture = io.BytesIO()
    figure.savefig(picture, dpi=120, format="png")
    plt.close(figure)
    return picture.getvalue()
