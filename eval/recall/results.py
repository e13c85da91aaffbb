"""The results of `python -m eval recall`: what results.json holds. Imports no jax."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

from eval.results import schema
from eval.results.schema import CheckpointInfo, FileInfo, Skipped
from eval.stats.estimates import Estimate
from eval.stats.paired import MeanTest
from eval.streaming.weighting import WEIGHTINGS
from ttt_jax.config import FRAME_RATE

HEARD, WHO = "heard-before", "who-is-it"
KINDS: dict[str, str] = {
    HEARD: "an excerpt is played again after a gap of other speech of the same speaker; control: another excerpt of the"
    " speaker was played first",
    WHO: "a speaker returns after a gap in which another one spoke; control: a third one spoke first",
}
"""Kinds of recall by name, in the order of reports, and what is played."""

WINDOW, REACH, BEYOND = "within one layer's window", "within attention's reach", "beyond attention's reach"
"""Where a gap lies; only beyond the reach a benefit can be the fast weights' doing alone."""
EXCERPTS = "excerpts"
"""Units of a gap that excerpts of one speaker only can fill; with several, a unit is a speaker or a file."""
TEXT = "text"

NOTES = {
    "benefit": "nats per token of the second playing: its loss where the control was played first minus its loss where"
    " the same was, mean over the item's two excerpts, so that how hard each is cancels; above 0 it was recalled",
    "scored": "the second playing without its first frames: the longest delay of the model and `cue` frames more, from"
    " which the model can tell what is being played again",
    "losses": "nats per token of the second playing where the same was played first (heard) and where the control was"
    " (unheard), by the headline weighting",
    "weightings": WEIGHTINGS,
    "weighting": "mean of the frames of each codebook, then over the codebooks; those of which no token is known are"
    " left out",
    "estimates": "mean over units with a 95 % interval (Student's t) and the number of units n: speakers (files, where"
    " speakers are not named); where one speaker only has enough speech for a gap, the excerpts, and then the interval"
    " speaks for that speaker alone; null was not measured",
    "tests": "benefit under persist minus that under the other arm, by unit; p of the two-sided paired t test, p_holm"
    " adjusted over the gaps (Holm)",
    "between": "benefit of a checkpoint under `main` minus that of the first, by unit, on items that both have scored;"
    " above 0 it recalls more; tested as `tests`",
    "half": "gap at which half of the benefit under `main` at the first gap beyond attention's reach is left, each gap"
    " compared with the first over the units that it has; linear in the logarithm of the gap between the gaps that were"
    " played; null: more than half is left at the longest; interval"
    " from 10,000 bootstrap samples of the units",
    "reset": "the arm reset clears the memory every 125 frames (10 s), also at the first frame of the second playing;"
    " what attention relays across a reset can enter the new memory, so it may lie a little off 0 where frozen and off"
    " are 0",
}
"""What the numbers in results.json are."""


@dataclasses.dataclass(frozen=True)
class Setting:
    """The question, and what the numbers depend on."""

    kinds: list[str]
    """Of `KINDS`, in their order."""
    excerpt: int
    """Frames of an excerpt."""
    items: int
    """Items that were asked for, for each kind and gap."""
    gaps: list[int]
    """Gaps that were asked for, frames."""
    cue: int
    """First frames of the second playing that are not scored, beside the model's longest delay."""
    seed: int
    weighting: str
    """Headline weighting of the codebooks, one of `WEIGHTINGS`."""
    arms: dict[str, str]
    """Meaning of each arm that was run, by name, in the order of reports."""
    about: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Data and codec."""


class Dropped(NamedTuple):
    """A gap that the data cannot fill."""

    kind: str
    gap: int
    """Frames."""
    reason: str
    """One sentence."""


@dataclasses.dataclass(frozen=True)
class ArmAtGap:
    """One arm at one gap."""

    benefit: Estimate
    """By the headline weighting, nats per token."""
    heard: Estimate
    """Loss of the second playing where the same was played first."""
    unheard: Estimate
    """Loss of the second playing where the control was played first."""
    by_row: dict[str, Estimate]
    """Benefit by row: `TEXT` (of no units where the text is not known), then each of `WEIGHTINGS`."""


@dataclasses.dataclass(frozen=True)
class Against:
    """Benefit under persist minus that under another arm."""

    test: MeanTest
    p_holm: float
    """p adjusted over the gaps."""


@dataclasses.dataclass(frozen=True)
class AtGap:
    """All arms at one gap."""

    gap: int
    """Frames between the two playings."""
    where: str
    """`WINDOW`, `REACH` or `BEYOND`."""
    items: int
    """Items that were scored."""
    failed: int
    """Items left out because a prediction was not finite."""
    units: int
    unit: str
    """What the units are, in the plural."""
    arms: dict[str, ArmAtGap]
    against: dict[str, Against]
    """By the other arm: reset and frozen, where they were run."""

    @property
    def seconds(self) -> float:
        """The gap in seconds."""
        return self.gap / FRAME_RATE


@dataclasses.dataclass(frozen=True)
class Half:
    """The gap at which half of the benefit is left."""

    first: int
    """Gap that the whole benefit is taken at, frames: the shortest beyond attention's reach."""
    seconds: float | None
    """None: more than half is left at the longest gap."""
    low: float | None
    """Lower bound of the 95 % interval, seconds; None: beyond the longest gap."""
    high: float | None
    """Upper bound; None: beyond the longest gap."""


@dataclasses.dataclass(frozen=True)
class Curve:
    """One kind of recall by one checkpoint."""

    gaps: list[AtGap]
    """By gap, the shortest first."""
    half: Half | None
    """None: there is no benefit to halve."""
    verdict: str
    """One sentence."""


@dataclasses.dataclass(frozen=True)
class CheckpointRecall:
    """What one checkpoint recalls."""

    info: CheckpointInfo
    arms: list[str]
    """Arms that it was run under, in the order of the setting."""
    main: str
    """The arm that stands for it: persist, or off for a model without TTT layers."""
    curves: dict[str, Curve]
    """By kind; a kind or gap of which no item was scored has none."""
    failed: int = 0
    """Items, of all kinds and gaps, that were left out because a prediction was not finite."""


@dataclasses.dataclass(frozen=True)
class Between:
    """Benefit of a checkpoint minus that of the first, on the same items."""

    gap: int
    """Frames."""
    test: MeanTest
    p_holm: float
    """p adjusted over the gaps."""


@dataclasses.dataclass(frozen=True)
class RecallResults:
    """The results of one run of the command."""

    COMMAND: ClassVar[str] = "python -m eval recall"
    FORMAT: ClassVar[int] = 1

    setting: Setting
    checkpoints: list[CheckpointRecall]
    dropped: list[Dropped]
    files: list[FileInfo]
    skipped: list[Skipped]
    between: dict[str, dict[str, list[Between]]] = dataclasses.field(default_factory=dict)
    """By the name of every checkpoint but the first, and kind."""


def write(folder: Path, results: RecallResults, about: dict[str, Any]) -> Path:
    """Writes results.json to `folder` as `eval.results.schema.write`; returns its path."""
    return schema.write(folder, results, {**about, "kinds_of_recall": KINDS, "notes": NOTES})


def read(folder: Path) -> RecallResults:
    """Returns the results that `write` wrote to `folder`. Raises `InputError` as `eval.results.schema.read`."""
    return schema.read(folder, RecallResults)
