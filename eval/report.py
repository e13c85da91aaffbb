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
    averaged: list[str]
    """The streams that "mean" averages: those with tokens in every file (speech without transcripts has no text)."""
    files: list[dict[str, Any]]
    """Name and length of every file, with each arm's mean loss over the averaged streams."""
    losses: dict[str, dict[str, Estimate]]
    """nats per token by arm (and "unigram") and stream, and their mean over streams."""
    against_unigram: dict[str, Estimate]
    """unigram minus persist by stream, paired by file: what the model knows beyond how often tokens occur."""
    against_persist: dict[str, dict[str, Estimate]]
    """arm minus persist, mean over streams, paired by file: over all frames, and after the first chunk."""
    loss_by_position: dict[str, list[Estimate]]
    """nats per token by arm, mean over streams, in consecutive windows of `window` frames."""
    difference_by_position: dict[str, list[Estimate]]
    """arm minus persist, paired by file, in the same windows."""
    displacement: list[Estimate]
    """Displacement over base norm, mean over TTT layers, under persist, in the same windows."""
    window: int
    chunk: int
    context: int
    codec: str


def summarise(
    scores: dict[str, Scores],
    tables: list[np.ndarray],
    streams: list[str],
    names: Sequence[str],
    chunk: int,
    window: int,
    context: int,
    codec: str,
) -> Results:
    """From per-frame scores by arm to what is reported.

    Args:
      scores: by arm; tables: of `unigram.fit`; streams: names of the predicted streams; names: of the files.
      chunk: frames between resets; window: frames that a position averages; context: attention window; codec: its name.
    """
    persist = scores["persist"]
    scored = np.isfinite(persist.nats)
    tokens = np.where(scored, persist.tokens, -1)
    nats = {arm: score.nats for arm, score in scores.items()} | {"unigram": unigram.nats(tables, tokens)}
    present = scored.any(-1).all(0)  # streams with tokens in every file

    per_file = {arm: file_mean(values) for arm, values in nats.items()}  # [B, S]
    # A frame counts where all averaged streams are scored: not in the first max_delay frames of a file.
    by_frame = {arm: values[:, present].mean(1) for arm, values in nats.items()}  # [B, T]
    difference = {arm: by_frame[arm] - by_frame["persist"] for arm in scores if arm != "persist"}

    def by_stream(values: np.ndarray) -> dict[str, Estimate]:  # [B, S]
        return {name: estimate(values[:, i]) for i, name in enumerate(streams)} | {
            "mean": estimate(values[:, present].mean(1))
        }

    def by_position(values: np.ndarray) -> list[Estimate]:  # [B, T]
        return [estimate(column) for column in windows(values, window).T]

    lengths = scored.any(1).sum(-1)
    return Results(
        streams=streams,
        averaged=[name for name, there in zip(streams, present, strict=True) if there],
        files=[
            {"name": name, "frames": int(frames), "loss": {arm: per_file[arm][i, present].mean() for arm in nats}}
            for i, (name, frames) in enumerate(zip(names, lengths, strict=True))
        ],
        losses={arm: by_stream(values) for arm, values in per_file.items()},
        against_unigram=by_stream(per_file["unigram"] - per_file["persist"]),
        against_persist={
            arm: {"all frames": estimate(file_mean(d)), "after the first chunk": estimate(file_mean(d[:, chunk:]))}
            for arm, d in difference.items()
        },
        loss_by_position={arm: by_position(values) for arm, values in by_frame.items()},
        difference_by_position={arm: by_position(values) for arm, values in difference.items()},
        displacement=by_position(file_mean(persist.displacement.swapaxes(1, 2))),
        window=window,
        chunk=chunk,
        context=context,
        codec=codec,
    )


def table(results: Results) -> str:
    """The results for a terminal."""
    arms = [*ARMS, "unigram"]
    frames = [file["frames"] for file in results.files]
    lines = [
        f"{len(frames)} held-out files, {min(frames)} to {max(frames)} frames ({sum(frames) / FRAME_RATE / 60:.1f} minutes"
        f" in all), codec {results.codec},",
        f"attention window {results.context} frames, memory cleared every {results.chunk} frames in reset;"
        " [95 % interval over files]",
        "",
        "nats per token" + "".join(f"{arm:>9}" for arm in arms) + "   better than unigram by",
    ]
    for name in [*results.streams, "mean"]:
        cells = "".join(f"{_number(results.losses[arm][name].mean):>9}" for arm in arms)
        lines.append(f"{name:<14}{cells}   {_interval(results.against_unigram[name], 3)}")
    lines += ["", "by position     files   memory kept             reset minus kept            off minus kept"]
    reach = results.window / FRAME_RATE
    for i, kept in enumerate(results.loss_by_position["persist"][: _shown(results)]):
        cells = [_interval(results.difference_by_position[arm][i], 4) for arm in ("reset", "off")]
        where = f"{i * reach:.0f} to {(i + 1) * reach:.0f} s"
        lines.append(f"{where:<15}{kept.n:>6}   {_interval(kept, 3):<24}{cells[0]:<28}{cells[1]}")
    lines += ["", "What memory brings: loss of the arm minus loss with memory kept, nats per token"]
    for arm, parts in results.against_persist.items():
        cells = ", ".join(f"{part} {_interval(value, 4)}" for part, value in parts.items())
        lines += [f"  {arm:<8}{ARMS[arm].meaning}:", f"          {cells}"]
    return "\n".join([*lines, "", verdict(results)])


def verdict(results: Results) -> str:
    """One sentence on kept memory against memory cleared at every chunk."""
    value = results.against_persist["reset"]["after the first chunk"]
    if value.n == 0:
        return f"No file is longer than a chunk of {results.chunk} frames: there was no memory to clear."
    if value.n < 2:
        return "One file gives no interval: nothing can be said about whether keeping the memory helps."
    if value.low <= 0 <= value.high:
        return f"Keeping the memory across chunks makes no clear difference here: {_interval(value, 4)} nats over {value.n} files."
    share = 100 * abs(value.mean) / results.losses["reset"]["mean"].mean
    change = "lowers" if value.mean > 0 else "raises"
    return (
        f"Keeping the memory across chunks {change} the loss by {abs(value.mean):.4f} nats ({share:.2f} %) over {value.n} files,"
        f" 95 % interval {min(abs(value.low), abs(value.high)):.4f} to {max(abs(value.low), abs(value.high)):.4f}."
    )


def _shown(results: Results) -> int:
    """Leading windows that more than half of the files reach; an interval over the few left says nothing."""
    counts = [value.n for value in results.loss_by_position["persist"]]
    return sum(count > len(results.files) / 2 for count in counts)


def _number(value: float) -> str:
    return f"{value:.3f}" if np.isfinite(value) else "-"


def _interval(value: Estimate, digits: int) -> str:
    """Differences (four digits) carry a sign."""
    if value.n == 0:
        return "-"
    form = f"{'+' if digits > 3 else ''}.{digits}f"
    bounds = f" [{value.low:{form}}, {value.high:{form}}]" if value.n > 1 else ""
    return f"{value.mean:{form}}{bounds}"


def write(results: Results, scores: dict[str, Scores], about: dict[str, Any], folder: Path) -> list[Path]:
    """Write results.json, frames.npz (every frame of every arm) and memory.png to `folder`; their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    nats = {f"nats/{arm}": score.nats.astype(np.float32) for arm, score in scores.items()}
    frames = io.BytesIO()
    np.savez_compressed(frames, tokens=scores["persist"].tokens, displacement=scores["persist"].displacement, **nats)
    paths = {"results": folder / "results.json", "frames": folder / "frames.npz", "picture": folder / "memory.png"}
    content = {
        "note": "nats per token; every stream starts from a fresh state; estimates are means over files with 95 % intervals"
        " (Student's t); null was not measured",
        **about,
        "paths": {what: str(path) for what, path in paths.items()},
        "arms": {name: arm.meaning for name, arm in ARMS.items()},
        **dataclasses.asdict(results),
        "verdict": verdict(results),
    }
    write_atomically(paths["frames"], frames.getvalue())
    write_atomically(paths["picture"], _draw(results))
    write_atomically(paths["results"], (json.dumps(_plain(content), indent=1, allow_nan=False) + "\n").encode())
    return list(paths.values())


def _plain(value: Any) -> Any:
    """JSON has no NaN: what was not measured is null."""
    if isinstance(value, Estimate):
        return {"mean": _plain(value.mean), "low": _plain(value.low), "high": _plain(value.high), "n": value.n}
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float | np.floating):
        return float(value) if np.isfinite(value) else None
    return value


COLOURS = {"persist": "#1b6ca8", "reset": "#d1495b", "frozen": "#7d8597", "off": "#edae49"}


def _draw(results: Results) -> bytes:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (loss, gain, state) = plt.subplots(3, 1, figsize=(8, 9), sharex=True, constrained_layout=True)
    shown = _shown(results)
    seconds = (np.arange(shown) + 0.5) * results.window / FRAME_RATE

    def band(axis, values: list[Estimate], colour: str, label: str, shift: float = 0.0) -> None:
        mean, low, high = (np.array([getattr(v, field) for v in values[:shown]]) for field in ("mean", "low", "high"))
        error = np.nan_to_num(np.stack([mean - low, high - mean]))
        axis.errorbar(
            seconds + shift, mean, error, color=colour, marker="o", markersize=3, capsize=2, lw=1.4, label=label
        )

    band(loss, results.loss_by_position["persist"], COLOURS["persist"], "memory kept")
    loss.set_ylabel("nats per token")
    loss.set_title("Loss with memory kept")
    for i, (arm, values) in enumerate(results.difference_by_position.items()):
        band(gain, values, COLOURS[arm], arm, 0.4 * (i - 1))
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
    files = ", ".join(str(value.n) for value in results.loss_by_position["persist"][:shown])
    title = f"Held-out speech, frame by frame, codec {results.codec}; bars: 95 % over files (per point: {files})"
    figure.suptitle(title, fontsize=10)
    picture = io.BytesIO()
    figure.savefig(picture, dpi=120, format="png")
    plt.close(figure)
    return picture.getvalue()
