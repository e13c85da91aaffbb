"""The results of `python -m eval stream`: what results.json holds. Imports no jax."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, ClassVar

from eval.results import schema
from eval.results.schema import CheckpointInfo, FileInfo, Skipped, Tree
from eval.streaming.weighting import WEIGHTINGS
from ttt_jax.errors import InputError

ALL, LATER, BEYOND = "all frames", "after the first reset", "beyond the attention window"
RESETTING = ("reset", "permuted")
"""Arms whose memory changes at a stroke every `Setting.reset_every` frames."""
LAST, TREND = "gain in the last window", "slope of the gain"

NOTES = {
    "estimates": "mean over units with a 95 % interval (Student's t) and the number of units n; a unit is a file, or"
    " the mean over the files of one group where several share one; null was not measured; every stream starts from"
    " a fresh state",
    "weightings": WEIGHTINGS,
    "losses": "nats per token by arm and row: a stream, or a weighting of the codebooks, which counts frames where"
    " all its codebooks are scored",
    "losses_later": f"losses {LATER}, on the files that are longer",
    "entropy": "of the predictions, nats",
    "accuracy": "top-1: share of tokens to which no other was strictly likelier, so ties count as right",
    "against_unigram": "unigram minus the arm `main`, paired by file",
    "against_persist": "arm minus persist, paired by file: above 0 memory helps",
    BEYOND: "frames beyond what one layer sees. With L layers attention can relay information over up to L windows, so"
    " these frames are not beyond all that the model sees without memory",
    "against_off": "KL(arm || off) in nats and the share of changed top-1 tokens, by the headline weighting",
    "by_position": "headline weighting, in consecutive windows of the setting's length; a window that a file fills to"
    " less than half is left out for that file; displacement (norm over that of W0) and rate by TTT layer",
    "slopes": "change per 1,000 frames by least squares on the frames of each file; files shorter than two windows"
    " give none",
    "inner": "by arm and TTT layer, mean over heads: loss_base l(W0), loss_before l(W before the frame), loss_after"
    " l(W after it); gain = l(W0) - l(W before), what memory brought before seeing the frame",
    "between": "loss of the arm `main` of a checkpoint minus that of the first, paired by file: below 0 it is better",
}
"""What the numbers in results.json are."""


@dataclasses.dataclass(frozen=True)
class Setting:
    """What summarising and drawing need to know of an evaluation."""

    streams: tuple[str, ...]
    """Names of the scored streams: text, then codebook 1 to Q."""
    arms: dict[str, str]
    """Meaning of each arm that was run, by name, in the order of reports."""
    reset_every: int
    """Frames between resets, in the arm that resets."""
    window: int = 250
    """Frames that a position averages."""
    weighting: str = "equal"
    """Headline weighting of the codebooks, one of `WEIGHTINGS`."""
    text: str = ""
    """Where the text stream came from."""
    about: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Data and codec."""

    def __post_init__(self) -> None:
        if self.window < 1:
            raise InputError(f"a window of {self.window} frames is too short: give 1 or more.")


@dataclasses.dataclass(frozen=True)
class CheckpointResults:
    """The numbers of one checkpoint; `NOTES` explains each tree."""

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
    """By row."""
    against_persist: Tree
    """By arm, part of the file (`ALL`, `LATER`, `BEYOND`) and row."""
    against_off: Tree
    """By arm: kl and changed, by the headline weighting."""
    by_position: Tree
    """Lists over windows: losses, against_persist and kl by arm; displacement and rate by arm and layer."""
    slopes: Tree
    """losses and against_persist, by arm."""
    inner: Tree
    """By arm, layer and quantity: the inner losses, the gain, `LAST` and `TREND`."""
    verdict: str
    """One sentence on kept memory against cleared memory."""


@dataclasses.dataclass(frozen=True)
class Results:
    """The results of one evaluation."""

    COMMAND: ClassVar[str] = "python -m eval stream"
    FORMAT: ClassVar[int] = 4

    setting: Setting
    checkpoints: list[CheckpointResults]
    between: Tree
    """By the name of every checkpoint but the first: its rows, and "by_position"."""
    files: list[FileInfo]
    skipped: list[Skipped]

    @property
    def units(self) -> int:
        """Number of independent units: files, or groups where several files share one."""
        return schema.units(self.files)[0]

    @property
    def unit(self) -> str:
        """What the units are, in the plural."""
        return schema.units(self.files)[1]


def write(folder: Path, results: Results, about: dict[str, Any]) -> Path:
    """Writes results.json to `folder` as `eval.results.schema.write`; returns its path."""
    counts = {"files": len(results.files), "skipped": len(results.skipped), "units": results.units}
    return schema.write(folder, results, {**about, "notes": NOTES, "counts": counts | {"unit": results.unit}})


def read(folder: Path) -> Results:
    """Returns the results that `write` wrote to `folder`. Raises `InputError` as `eval.results.schema.read`."""
    return schema.read(folder, Results)
