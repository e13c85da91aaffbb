"""Options that all benchmarks of pairs share. Imports no jax."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Annotated, Literal

from tyro.conf import Positional, arg

from eval.benchmarks.rules import DEFAULT, RULES, Text, Voice
from ttt_jax.errors import InputError

if TYPE_CHECKING:
    from ttt_jax.checkpoints.loading import Checkpoint

ARMS = ("persist", "frozen", "off")
"""Arms that differ within a recording: on, frozen, off."""


@dataclasses.dataclass(frozen=True)
class Options:
    """Options of all benchmarks of pairs."""

    checkpoints: Annotated[Positional[tuple[str, ...]], arg(metavar="CHECKPOINT [CHECKPOINT ...]")] = ()
    """Folder of a run, of one of its checkpoints (RUN/checkpoints/STEP), or of converted weights; all others are
    compared with the first, and must have its codec."""
    data: Annotated[str | None, arg(metavar="FOLDER")] = None
    """Where the recordings lie, as docs/evaluation/benchmark_data.md describes; unset: corpus/mini, a small set of
    synthetic speech."""
    split: Literal["dev", "test"] | None = None
    """Of sWUGGY and sBLIMP; unset: dev where it exists, else test."""
    limit: Annotated[int | None, arg(metavar="N")] = None
    """Most items of a task, drawn by --seed from all its groups; unset: all."""
    seed: int = 0
    """Of the subset and of the bootstrap."""
    arms: Annotated[str | None, arg(metavar="ARM,ARM,...")] = None
    """Memory within a recording: persist (on), frozen (no updates), off; the others are compared with the first. Unset:
    all, or off for a model without TTT layers."""
    text: Annotated[str, arg(metavar="TEXT,TEXT")] = "absent"
    """What the model reads in the text stream: absent, padding, or both joined by a comma."""
    voice: Annotated[str, arg(metavar="VOICE,VOICE")] = "moshi"
    """The stream that speaks and is scored: moshi, user (where the model predicts it), or both."""
    rule: Annotated[str, arg(metavar="RULE")] = DEFAULT
    """Headline rule, a weighting of the codebooks (kyutai, semantic, acoustic, equal) and a normalisation (mean, sum);
    all are stored."""
    batch: Annotated[int | None, arg(metavar="N")] = None
    """Recordings side by side, memory against time; changes scores by rounding only. Unset: by the device."""
    submission: bool = False
    """Also write files that ZeroSpeech's own toolkit reads."""
    verify: bool = False
    """Only say which benchmarks and recordings are there, and what is wrong with them; needs no checkpoint."""
    out: Annotated[str | None, arg(metavar="FOLDER")] = None
    """Folder for the results; unset: the command's name, with the data's, in the first checkpoint's folder. Results of
    the same question are replaced, a folder with other results is refused."""

    def __post_init__(self) -> None:
        for name in ("limit", "batch"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"--{name} {value} is out of range: give 1 or more.")
        if self.seed < 0:
            raise InputError(f"--seed {self.seed} is negative: give 0 or more.")
        if self.rule not in RULES:
            raise InputError(f"--rule {self.rule!r} is no rule: give one of {', '.join(RULES)}.")
        for flag, known in {"text": ("absent", "padding"), "voice": ("moshi", "user"), "arms": ARMS}.items():
            given = _listed(getattr(self, flag))
            if unknown := next((name for name in given if name not in known), None):
                raise InputError(f"--{flag} {unknown!r} is unknown: give one of {', '.join(known)}, or some by commas.")
            if len(set(given)) < len(given):
                raise InputError(f"--{flag} {','.join(given)} names one twice: give each once.")
        if not self.checkpoints and not self.verify:
            raise InputError("there is no checkpoint: give the folder of a run or of converted weights, or --verify.")

    @property
    def texts(self) -> tuple[Text, ...]:
        """What the model reads in the text stream."""
        return _listed(self.text)

    @property
    def voices(self) -> tuple[Voice, ...]:
        """Streams that speak."""
        return _listed(self.voice)

    def arms_of(self, checkpoint: Checkpoint) -> tuple[str, ...]:
        """Returns the arms that a checkpoint is run under."""
        return _listed(self.arms) or (ARMS if checkpoint.cfg.ttt_layers else ("off",))


def _listed(text: str | None) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(",")) if text else ()
