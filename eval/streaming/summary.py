"""Results of streaming files through checkpoints: estimates by stream, arm, position and layer, and results.json.

Everything here reads what `eval.streaming.scores` stored, one file at a time, and imports no jax: `python -m eval draw` works where no
model could run.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from eval.results import schema
from eval.stats.estimates import Estimate, band, file_mean, group_means, interval, slope, windows
from eval.streaming.scores import FileScores, Inner, load
from ttt_jax.config import FRAME_RATE
from ttt_jax.errors import InputError
from ttt_jax.utils.paths import file_name

COMMAND, FORMAT = "python -m eval stream", 2
"""What marks results.json as this command's, and its version."""

FRAMES = "frames"
"""Folder of the scores in a result folder."""

WEIGHTINGS: dict[str, str] = {
    "equal": "all codebooks alike",
    "kyutai": "100 on the first codebook, 1 on the others (the audio loss of arXiv 2410.00037)",
    "semantic": "the first codebook only",
    "acoustic": "all codebooks but the first, alike",
}
"""How a frame's codebooks become one number, by name. The text is never part of it: it has a row of its own."""

ALL, LATER, BEYOND = "all frames", "after the first reset", "beyond the attention window"
RESETTING = ("reset", "permuted")
"""Arms whose memory changes at a stroke every `Setting.reset_every` frames."""
UNIT = "speaker"
"""What files of one `FileInfo.group` share."""
FIRST, LAST, TREND = "first frame", "last window", "slope"

NOTES = {
    "estimates": "mean over units with a 95 % interval (Student's t) and the number of units n; a unit is a file, or the mean"
    " over the files of one group where several share one; null was not measured; every stream starts from a fresh state",
    "weightings": WEIGHTINGS,
    "losses": "nats per token by arm and row: a stream, or a weighting of the codebooks, which counts frames where all its"
    " codebooks are scored",
    "losses_later": f"losses {LATER}, on the files that are longer",
    "entropy": "of the predictions, nats",
    "accuracy": "share of tokens that were thought the likeliest: no other was strictly likelier, so ties count as right",
    "against_unigram": "unigram minus the arm `main`, paired by file; `mean` is the headline weighting of the setting",
    "against_persist": "arm minus persist, paired by file: above 0 memory helps",
    BEYOND: "frames from the number on that is the attention window: beyond what one layer sees. With L layers attention can"
    " relay information over up to L windows, so these frames are not beyond all that the model sees without memory",
    "against_off": "KL(arm || off) in nats and the share of changed likeliest tokens, by the headline weighting of the setting",
    "by_position": "headline weighting, for kl and changed too, in consecutive windows of the setting's length; a window that a"
    " file fills to less than half is left out for that file; displacement (norm over that of W0) and rate by TTT layer",
    "slopes": "change per 1,000 frames by least squares on the frames of each file; files shorter than two windows give none",
    "inner": "by arm and TTT layer, mean over heads: loss_base l(W0), loss_before l(W before the frame), loss_after l(W after"
    " it); gain = l(W0) - l(W before), what memory brought before seeing the frame; immediate = l(W before) - l(W after)",
    "between": "loss of the arm `main` of a checkpoint minus that of the first, paired by file: below 0 it is better",
}
"""What the numbers in results.json are."""

Tree = dict[str, Any]
"""Nested by name; leaves of one file are float64 arrays, [] or [windows]; leaves of results are `Estimate`s or lists of them."""


@dataclasses.dataclass(frozen=True)
class Setting:
    """What summarising and drawing need to know of an evaluation."""

    streams: tuple[str, ...]
    """Names of the scored streams: text, then codebook 1 to Q."""
    arms: dict[str, str]
    """Meaning of each arm that was run, by name, in the order of reports."""
    reset_every: int
    """Frames between resets, in the arm that resets."""
    chunk: int
    """Frames of a call; does not change any number."""
    window: int = 250
    """Frames that a position averages."""
    weighting: str = "equal"
    """Headline weighting of the codebooks, one of `WEIGHTINGS`."""
    text: str = ""
    """Where the text stream came from."""
    frame_rate: float = FRAME_RATE
    about: dict[str, Any] = dataclasses.field(default_factory=dict)
    """What else results.json should say: voice, codec, seed."""

    def __post_init__(self) -> None:
        if self.weighting not in WEIGHTINGS:
            raise InputError(f"the weighting {self.weighting!r} is unknown: give one of {', '.join(WEIGHTINGS)}.")
        if self.window < 1:
            raise InputError(f"a window of {self.window} frames is too short: give 1 or more.")


@dataclasses.dataclass(frozen=True)
class CheckpointInfo:
    """A checkpoint that was evaluated."""

    name: str
    """Of its folder under frames/, as `file_name` writes it; no two are alike."""
    context: int
    """Attention window, frames."""
    ttt_layers: tuple[int, ...]
    """Indices of the layers that carry a TTT layer, in the order of `eval.streaming.scores.Inner`."""
    about: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Path, step, codec, versions: whatever results.json should say of it."""


@dataclasses.dataclass(frozen=True)
class FileInfo:
    """A file that was streamed."""

    name: str
    """How reports call it; no two are alike."""
    group: str
    """Speaker; its own name if it shares none with another."""
    frames: int
    npz: str
    """Name of its scores in the folder of each checkpoint."""
    joints: tuple[int, ...] = ()
    """Frames at which another recording begins, where several were joined."""
    digest: str = ""
    """Of what was streamed."""


@dataclasses.dataclass(frozen=True)
class CheckpointResults:
    """What was found for one checkpoint; `NOTES` says what each tree holds."""

    info: CheckpointInfo
    arms: list[str]
    """Arms that it was run under, in the order of the setting."""
    main: str
    """The arm that stands for it: persist, or off for a model without TTT layers."""
    losses: Tree
    """By arm (and "unigram") and row: streams, then weightings."""
    losses_later: Tree
    """The same after the first reset, by arm and row."""
    entropy: Tree
    """By arm and row."""
    accuracy: Tree
    """By arm and row."""
    against_unigram: Tree
    """By row, and "mean": the headline weighting."""
    against_persist: Tree
    """By arm, part of the file (`ALL`, `LATER`, `BEYOND`) and row."""
    against_off: Tree
    """By arm: kl and changed, by the headline weighting."""
    by_position: Tree
    """Lists over windows: losses, against_persist, kl and changed by arm; displacement and rate by arm and layer."""
    slopes: Tree
    """losses and against_persist, by arm."""
    inner: Tree
    """By arm, layer, quantity and part (`ALL`, `FIRST`, `LAST`, `TREND`)."""
    by_file: dict[str, dict[str, dict[str, float]]]
    """Loss of each file, by its name, arm and row."""
    verdict: str
    """One sentence on kept memory against cleared memory."""


@dataclasses.dataclass(frozen=True)
class Results:
    """All that is said about one evaluation."""

    setting: Setting
    checkpoints: list[CheckpointResults]
    between: Tree
    """By the name of every checkpoint but the first: its rows, and "by_position"."""
    files: list[FileInfo]
    skipped: list[dict[str, str]]
    """Name and reason of files that were not streamed."""

    @property
    def units(self) -> int:
        """Independent units: files, or groups where several files share one."""
        return len({file.group for file in self.files})

    @property
    def unit(self) -> str:
        """What the units are, in the plural."""
        return _unit(self.files)


def weights(weighting: str, codebooks: int) -> np.ndarray:
    """Weight of each codebook, float64 [codebooks]."""
    first = np.arange(codebooks) == 0
    by_name = {"equal": first | True, "kyutai": np.where(first, 100, 1), "semantic": first, "acoustic": ~first}
    return by_name[weighting].astype(np.float64)


def aggregate(values: np.ndarray, weighting: str) -> np.ndarray:
    """Weighted mean over the codebooks of each frame, [1 + Q, T] (text first) -> float64 [T].

    NaN where a codebook that has a weight is not scored: a mean over fewer codebooks would not compare.
    """
    weight = weights(weighting, len(values) - 1)
    used = weight > 0
    if not used.any():
        return np.full(values.shape[-1], np.nan)
    return weight[used] @ values[1:][used].astype(np.float64) / weight.sum()


def scores_path(folder: Path, checkpoint: CheckpointInfo, file: FileInfo) -> Path:
    """Where a result folder holds the scores of a file under a checkpoint."""
    return folder / FRAMES / file_name(checkpoint.name) / file.npz


def load_scores(folder: Path, checkpoint: CheckpointInfo, file: FileInfo, setting: Setting) -> FileScores:
    """Scores of a file. Raises `InputError` if they are missing, damaged, or those of something else."""
    path = scores_path(folder, checkpoint, file)
    scores = load(path)
    shape = (len(setting.streams), file.frames)
    for arm, own in scores.arms.items():
        if own.nats.shape != shape or (own.inner and own.inner.rate.shape != (len(checkpoint.ttt_layers), shape[1])):
            raise InputError(
                f"{path} holds {own.nats.shape} scores for {arm}, but {file.name} has {shape} under {checkpoint.name}: run"
                " python -m eval stream again."
            )
    return scores


def measure(scores: FileScores, setting: Setting, checkpoint: CheckpointInfo) -> Tree:
    """One file under one checkpoint: the numbers of `CheckpointResults` before they are averaged over files.

    Args:
      scores: of the file, S streams and T frames; setting and checkpoint: what they are scores of.

    Returns:
      A tree whose leaves are float64 arrays, [] or [windows]; NaN was not measured.
    """
    arms = {arm: scores.arms[arm] for arm in setting.arms if arm in scores.arms}
    head, size = setting.weighting, setting.window
    nats = {arm: _rows(own.nats, setting) for arm, own in arms.items()}
    main = main_arm(list(arms))
    persist = nats.get("persist")
    difference = {
        arm: {row: rows[row] - persist[row] for row in rows}
        for arm, rows in nats.items()
        if persist is not None and arm != "persist"
    }
    unigram = {} if scores.unigram is None else {"unigram": _rows(scores.unigram, setting)}
    better = {row: values - nats[main][row] for row, values in unigram.get("unigram", {}).items()}
    parts = {ALL: 0, LATER: setting.reset_every, BEYOND: checkpoint.context}
    against_off = {arm: own.against_off for arm, own in arms.items() if own.against_off is not None}
    off = {
        name: {arm: aggregate(getattr(own, name), head) for arm, own in against_off.items()}
        for name in ("kl", "changed")
    }
    inner = {arm: own.inner for arm, own in arms.items() if own.inner is not None}

    def slopes(by_arm: dict[str, np.ndarray]) -> Tree:
        return {arm: _slope(values, size) for arm, values in by_arm.items()}

    def positions(by_arm: dict[str, np.ndarray]) -> Tree:
        return {arm: windows(values, size) for arm, values in by_arm.items()}

    def by_layer(name: str) -> Tree:
        return {
            arm: {
                str(layer): windows(values, size)
                for layer, values in zip(checkpoint.ttt_layers, getattr(own, name), strict=True)
            }
            for arm, own in inner.items()
        }

    headline = {arm: rows[head] for arm, rows in nats.items()}
    minus_persist = {arm: rows[head] for arm, rows in difference.items()}
    return {
        "losses": {arm: _means(rows) for arm, rows in (nats | unigram).items()},
        "losses_later": {
            arm: _means({row: values[setting.reset_every :] for row, values in rows.items()})
            for arm, rows in nats.items()
        },
        "entropy": {arm: _means(_rows(own.entropy, setting)) for arm, own in arms.items()},
        "accuracy": {arm: _means(_rows(_first(own.rank), setting)) for arm, own in arms.items()},
        "against_unigram": _means(better | ({"mean": better[head]} if better else {})),
        "against_persist": {
            arm: {part: _means({row: values[start:] for row, values in rows.items()}) for part, start in parts.items()}
            for arm, rows in difference.items()
        },
        "against_off": {arm: {name: file_mean(by_arm[arm]) for name, by_arm in off.items()} for arm in against_off},
        "by_position": {
            "losses": positions(headline),
            "against_persist": positions(minus_persist),
            **{name: positions(by_arm) for name, by_arm in off.items()},
            "displacement": by_layer("displacement"),
            "rate": by_layer("rate"),
        },
        "slopes": {"losses": slopes(headline), "against_persist": slopes(minus_persist)},
        "inner": {arm: _inner(own, setting, checkpoint) for arm, own in inner.items()},
    }


def main_arm(arms: Sequence[str]) -> str:
    """The arm that stands for a checkpoint."""
    return next(arm for arm in ("persist", "off", *arms) if arm in arms)


def inner_losses(inner: Inner) -> dict[str, np.ndarray]:
    """The three inner losses and what memory and the frame's own step brought, float64 [L, T] each."""
    base, before, after = (getattr(inner, f"loss_{name}").astype(np.float64) for name in ("base", "before", "after"))
    return {
        "loss_base": base,
        "loss_before": before,
        "loss_after": after,
        "gain": base - before,
        "immediate": before - after,
    }


def _inner(inner: Inner, setting: Setting, checkpoint: CheckpointInfo) -> Tree:
    """By layer, quantity and part of the file."""
    found: Tree = {str(layer): {} for layer in checkpoint.ttt_layers}
    for name, values in inner_losses(inner).items():
        for layer, row in zip(checkpoint.ttt_layers, values, strict=True):
            long_enough = len(row) >= setting.window
            found[str(layer)][name] = {
                ALL: file_mean(row),
                FIRST: row[0],
                LAST: file_mean(row[-setting.window :]) if long_enough else np.float64("nan"),
                TREND: _slope(row, setting.window),
            }
    return found


def _rows(values: np.ndarray, setting: Setting) -> dict[str, np.ndarray]:
    """Frames by stream and by weighting: [S, T] -> float64 [T] each."""
    own = {name: values[i].astype(np.float64) for i, name in enumerate(setting.streams)}
    return own | {weighting: aggregate(values, weighting) for weighting in WEIGHTINGS}


def _means(rows: dict[str, np.ndarray]) -> Tree:
    return {name: file_mean(values) for name, values in rows.items()}


def _first(rank: np.ndarray) -> np.ndarray:
    """1 where the right token was the likeliest, 0 where not, NaN where nothing was scored."""
    return np.where(np.isfinite(rank), rank == 0, np.nan)


def _slope(values: np.ndarray, window: int) -> np.ndarray:
    return slope(values) if len(values) >= 2 * window else np.float64("nan")


def summarise(
    setting: Setting,
    checkpoints: Sequence[CheckpointInfo],
    files: Sequence[FileInfo],
    skipped: Sequence[dict[str, str]],
    folder: Path,
) -> Results:
    """Estimates from the scores that `folder` holds.

    The unit is the file. Where several files share a group (a speaker) they are averaged within it first, and the
    unit is the group: `Estimate.n` counts groups then. The arrays of one file are held at a time; of each file only its means
    stay.

    Args:
      setting: of the evaluation; checkpoints: at least one; files: those that every checkpoint was run on, at least one;
        skipped: name and reason of files that were not; folder: the result folder.

    Raises:
      InputError: scores of a file are missing or damaged.
    """
    groups = [file.group for file in files]
    found, compared = [], []
    for checkpoint in checkpoints:
        trees = [measure(load_scores(folder, checkpoint, file, setting), setting, checkpoint) for file in files]
        found.append(_checkpoint(setting, checkpoint, trees, files))
        compared.append([_of_main(tree, found[-1].main) for tree in trees])
    between = {
        own.info.name: _combine([_minus(tree, first) for tree, first in zip(trees, compared[0], strict=True)], groups)
        for own, trees in zip(found[1:], compared[1:], strict=True)
    }
    return Results(setting, found, between, list(files), list(skipped))


def _checkpoint(
    setting: Setting, info: CheckpointInfo, trees: list[Tree], files: Sequence[FileInfo]
) -> CheckpointResults:
    tree = _combine(trees, [file.group for file in files])
    arms = [arm for arm in setting.arms if arm in tree["losses"]]
    by_file = {
        file.name: {arm: {row: float(value) for row, value in rows.items()} for arm, rows in own["losses"].items()}
        for file, own in zip(files, trees, strict=True)
    }
    sentence = _verdict(setting, info, tree, _unit(files))
    return CheckpointResults(info, arms, main_arm(arms), **tree, by_file=by_file, verdict=sentence)


def _of_main(tree: Tree, arm: str) -> Tree:
    """What checkpoints are compared by: losses of `arm` by row and by position."""
    return {**tree["losses"][arm], "by_position": tree["by_position"]["losses"][arm]}


def _minus(one: Tree, other: Tree) -> Tree:
    return {name: one[name] - other[name] for name in one}


def _combine(trees: Sequence[Tree | None], groups: Sequence[str]) -> Tree:
    """Trees of files, one of the `groups` each, to one tree of estimates; what a file lacks was not measured there."""
    names = dict.fromkeys(name for tree in trees for name in tree or {})
    parts = {name: [(tree or {}).get(name) for tree in trees] for name in names}
    return {
        name: _combine(part, groups) if any(isinstance(item, dict) for item in part) else _estimates(part, groups)
        for name, part in parts.items()
    }


def _estimates(leaves: list[np.ndarray | None], groups: Sequence[str]) -> Estimate | list[Estimate]:
    """One estimate of numbers; of arrays one for each entry, the shorter ones padded with NaN."""
    arrays = [np.asarray(np.nan if leaf is None else leaf, np.float64) for leaf in leaves]
    stacked = np.full((len(arrays), max(array.size for array in arrays)), np.nan)
    for row, array in zip(stacked, arrays, strict=True):
        row[: array.size] = array
    found = band(group_means(stacked, groups))
    estimates = [Estimate(*numbers) for numbers in zip(*(field.tolist() for field in found), strict=True)]
    return estimates if any(array.ndim for array in arrays) else estimates[0]


def _unit(files: Sequence[FileInfo]) -> str:
    return "files" if len({file.group for file in files}) == len(files) else f"{UNIT}s"


def _verdict(setting: Setting, info: CheckpointInfo, tree: Tree, unit: str) -> str:
    """One sentence on kept memory against memory cleared again and again."""
    if not info.ttt_layers:
        return f"{info.name} has no TTT layers: there is no memory to compare."
    if "reset" not in tree["against_persist"]:
        return "The arms persist and reset were not both run: nothing is said about whether keeping the memory helps."
    value = tree["against_persist"]["reset"][LATER][setting.weighting]
    if value.n == 0:
        return f"No file is longer than the {setting.reset_every} frames between resets: there was no memory to clear."
    if value.n < 2:
        return f"One {unit.removesuffix('s')} gives no interval: nothing can be said about whether keeping the memory helps."
    if value.low <= 0 <= value.high:
        return (
            f"Keeping the memory across resets makes no clear difference here: {interval(value, 4, signed=True)} nats over"
            f" {value.n} {unit}."
        )
    share = 100 * abs(value.mean) / tree["losses_later"]["reset"][setting.weighting].mean
    change = "lowers" if value.mean > 0 else "raises"
    bounds = sorted((abs(value.low), abs(value.high)))
    return (
        f"Keeping the memory across resets {change} the loss by {abs(value.mean):.4f} nats ({share:.2f} %) over {value.n}"
        f" {unit}, 95 % interval {bounds[0]:.4f} to {bounds[1]:.4f}."
    )


def write_results(folder: Path, results: Results, about: dict[str, Any]) -> Path:
    """Write results.json to `folder`, at once or not at all; its path.

    Args:
      folder: the result folder; results: of `summarise`; about: what else to say at the top (versions, cost, command); its
        NaN become null, too.
    """
    counts = {"files": len(results.files), "skipped": len(results.skipped), "units": results.units}
    content = {
        **about,
        "command": COMMAND,
        "format": FORMAT,
        "notes": NOTES,
        "counts": counts | {"unit": results.unit},
        **{field.name: getattr(results, field.name) for field in dataclasses.fields(results)},
    }
    return schema.write(folder, content)


def read_results(folder: Path) -> Results:
    """What `write_results` wrote to `folder`, without its `about`. Raises `InputError` as `eval.results.schema.read`."""
    found = schema.read(folder, COMMAND, FORMAT)
    return Results(
        setting=Setting(**found["setting"] | {"streams": tuple(found["setting"]["streams"])}),
        checkpoints=[_restore_checkpoint(own) for own in found["checkpoints"]],
        between=_restore(found["between"]),
        files=[FileInfo(**file | {"joints": tuple(file["joints"])}) for file in found["files"]],
        skipped=found["skipped"],
    )


def _restore_checkpoint(found: dict[str, Any]) -> CheckpointResults:
    info = CheckpointInfo(**found["info"] | {"ttt_layers": tuple(found["info"]["ttt_layers"])})
    return CheckpointResults(info, **{name: _restore(value) for name, value in found.items() if name != "info"})


def _restore(value: Any) -> Any:
    """The inverse of `eval.results.schema.plain` for what was measured."""
    if value is None:
        return float("nan")
    if isinstance(value, dict):
        own = {name: _restore(item) for name, item in value.items()}
        return Estimate(**own) if set(own) == set(Estimate._fields) else own
    return [_restore(item) for item in value] if isinstance(value, list) else value
