"""`python -m eval recall`: what is left of speech that was heard before a gap, for checkpoints x arms x gaps."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from tyro.conf import Positional, arg

from eval.results import folder as folders
from eval.results.schema import RESULTS, CheckpointInfo, FileInfo, Skipped
from eval.streaming.weighting import Weighting
from ttt_jax.config import FRAME_RATE
from ttt_jax.errors import InputError
from ttt_jax.utils.command import PARTIAL, cost, keep_compiled, machine

if TYPE_CHECKING:
    from eval.inputs.evaluation_set import EvaluationSet
    from eval.recall.items import Item
    from eval.recall.play import Played
    from eval.recall.results import Dropped, RecallResults, Setting
    from ttt_jax.checkpoints.loading import Checkpoint

GAPS = "10,30,60,120,300,600,1800,3600"


@dataclasses.dataclass(frozen=True)
class Options:
    """Spoken recall: play an excerpt, a gap of other speech, and the excerpt again. How much easier is it than where
    another excerpt was played first?

    heard-before: the excerpt and the speech in the gap are of one speaker; control: another excerpt of that speaker.

    who-is-it: a speaker returns, with new words, after a gap in which another one spoke; control: a third one spoke
    first. The manifest must name the speakers.

    All is done with the memory kept, cleared every 10 s and before the second playing (reset), frozen and off. A gap
    within attention's reach is marked: there, attention may remember. The same seed and data give the same items for
    every checkpoint (docs/evaluation/recall.md).

    Exit code: 0 done, 2 an input to mend, 3 done but some files or items were left out.
    """

    checkpoints: Annotated[Positional[tuple[str, ...]], arg(metavar="CHECKPOINT [CHECKPOINT ...]")] = ()
    """Folder of a run, of one of its checkpoints (RUN/checkpoints/STEP), or of converted weights; several are asked
    about the same items."""
    data: Annotated[str | None, arg(metavar="PATH")] = None
    """Manifest, folder that `python -m eval prepare` made, audio or codes; unset: the runs' own held-out files, for
    converted weights those of the embedded corpus."""
    kind: Literal["heard-before", "who-is-it"] | None = None
    """Kind of recall; unset: both."""
    gaps: Annotated[str, arg(metavar="S,S,...")] = GAPS
    """Seconds between the playings; those that the data cannot fill without repeating itself are dropped."""
    excerpt: Annotated[float, arg(metavar="S")] = 4.0
    """Seconds of what is played, 2 to 8."""
    items: Annotated[int, arg(metavar="N")] = 32
    """Items of each kind and gap, spread over speakers."""
    seed: int = 0
    """Seed of the items."""
    batch: Annotated[int | None, arg(metavar="N")] = None
    """Items side by side, of four streams each; unset: 4, or 1 in bfloat16."""
    weighting: Weighting = "equal"
    """How the codebooks become one loss in table, tests and figure (kyutai: 100 on the first); all are stored."""
    out: Annotated[str | None, arg(metavar="FOLDER")] = None
    """Folder for the results; unset: recall, or recall-DATA with --data, in the first checkpoint's folder. Results of
    the same data, checkpoints and question are replaced, a folder with other results is refused."""

    def __post_init__(self) -> None:
        for name in ("items", "batch"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"--{name} {value} is out of range: give 1 or more.")
        if self.seed < 0:
            raise InputError(f"--seed {self.seed} is negative: give 0 or more.")
        if not 2 <= self.excerpt <= 8:
            raise InputError(f"--excerpt {self.excerpt:g} is out of range: give 2 to 8 seconds.")
        self.gap_frames  # noqa: B018 - wrong gaps are reported at once

    @property
    def excerpt_frames(self) -> int:
        """Frames of an excerpt."""
        return round(self.excerpt * FRAME_RATE)

    @property
    def gap_frames(self) -> list[int]:
        """Frames of the gaps, the shortest first. Raises `InputError` if one is no length of time."""
        frames = set()
        for text in self.gaps.split(","):
            try:
                seconds = float(text)
            except ValueError:
                seconds = math.nan
            if not 0.08 <= seconds <= 24 * 3600:
                raise InputError(
                    f"--gaps {self.gaps} has {text.strip()!r}: give seconds from 0.08 (a frame) to 86400, joined by"
                    " commas."
                )
            frames.add(round(seconds * FRAME_RATE))
        return sorted(frames)

    @property
    def kinds(self) -> list[str]:
        """Kinds of recall, in the order of reports."""
        from eval.recall.results import KINDS

        return [kind for kind in KINDS if self.kind in (None, kind)]


def main(options: Options) -> int:
    """Runs the command; returns the exit code: 0, or 3 if files or items were left out. Raises `InputError`."""
    from eval.inputs import dataset, evaluation_set
    from eval.recall import items
    from ttt_jax.checkpoints import loading

    paths = options.checkpoints
    if not paths:
        raise InputError("there is no checkpoint: give the folder of a run or of converted weights.")
    checkpoints = loading.load_all(paths, keep=len(paths) == 1)
    keep_compiled(checkpoints[0].cache_dir / "compiled")
    trained_here = any(checkpoint.corpus is not None for checkpoint in checkpoints)
    data = options.data or (None if trained_here else str(dataset.embedded()))
    inputs = evaluation_set.load(data, checkpoints, None)
    made = items.build(
        inputs.files, options.kinds, options.excerpt_frames, options.gap_frames, options.items, options.seed
    )
    folder = folders.find(options.out, "recall", paths[0], options.data)
    results = evaluate(checkpoints, inputs, made, options, folder)
    return PARTIAL if results.skipped or any(one.failed for one in results.checkpoints) else 0


def evaluate(
    checkpoints: Sequence[Checkpoint],
    inputs: EvaluationSet,
    made: tuple[list[Item], list[Dropped]],
    options: Options,
    folder: Path,
) -> RecallResults:
    """Plays the items to all checkpoints, prints, stores and draws the results.

    Raises `InputError` before anything is played if no gap can be filled, or `folder` holds results that are not to be
    replaced.
    """
    from eval.recall import analysis, figure, results, table
    from eval.results import schema
    from eval.streaming.arms import ARMS, DEFAULT, WITHOUT_TTT
    from eval.streaming.score_files import checkpoint_info, file_infos
    from ttt_jax.utils.files import write_atomically

    items, dropped = made
    reasons = table.dropped(dropped)
    if not items:
        raise InputError(f"no gap can be filled: {reasons[0]}; give more or longer recordings or other --gaps.")
    for reason in reasons:
        print(f"dropped: {reason}")
    arms = {checkpoint.name: DEFAULT if checkpoint.cfg.ttt_layers else WITHOUT_TTT for checkpoint in checkpoints}
    setting = _setting(options, inputs, [name for name in ARMS if any(name in names for names in arms.values())])
    infos = file_infos(inputs.files)
    checkpoint_infos = [checkpoint_info(checkpoint, brief=True) for checkpoint in checkpoints]
    subject = _subject(setting, infos, inputs.skipped, checkpoint_infos)
    folders.make(folder)
    replaced(folder, subject)  # errors are reported before the work
    print(f"playing {len(items)} items to {', '.join(arms)} ...", flush=True)
    played: dict[str, list[Played]] = {}
    recalls = []
    with folders.staged(folder) as new:
        for checkpoint, info in zip(checkpoints, checkpoint_infos, strict=True):
            names = arms[checkpoint.name]
            of_checkpoint = played[checkpoint.name] = _played(checkpoint, items, names, options.batch)
            curves = analysis.curves(of_checkpoint, info, names[0], setting, schema.units(infos)[1])
            failed = sum(one.losses is None for one in of_checkpoint)
            if failed:
                print(f"left out: {failed} items of which {checkpoint.name} gives no finite predictions")
            recalls.append(results.CheckpointRecall(info, list(names), names[0], curves, failed))
        if not any(one.curves for one in recalls):
            raise InputError(
                f"{recalls[0].info.name} gives no finite predictions of any item: its fast weights or its weights have"
                " diverged, so lower ttt.base_lr or bound them (ttt.horizon, ttt.max_displacement)."
            )
        by_name = {one.info.name: (played[one.info.name], one.main) for one in recalls}
        first, *others = by_name
        between = {name: analysis.between(by_name[first], by_name[name], setting) for name in others}
        made_results = results.RecallResults(setting, recalls, dropped, infos, inputs.skipped, between)
        spent = cost()
        results.write(new, made_results, {"evaluated_with": machine(), "cost": spent})
        write_atomically(new / table.ITEMS, table.items_csv(played).encode("utf-8", "backslashreplace"))
        figures = figure.write_figures(made_results, new)
        old = replaced(folder, subject)  # again: another command may have written there meanwhile
        folders.replace(folder, new, old)
    print(f"\n{table.table(made_results)}\n")
    for name in (RESULTS, table.ITEMS, *(path.name for path in figures)):
        print(folder / name)
    print(f"took {spent['seconds']:.0f} s and at most {spent['peak_gigabytes']:.1f} GB of memory")
    return made_results


def _setting(options: Options, inputs: EvaluationSet, arms: Sequence[str]) -> Setting:
    from eval.recall import results
    from eval.recall.items import CALL
    from eval.recall.play import CUE
    from eval.streaming.arms import ARMS

    meanings = {name: ARMS[name].meaning for name in arms}
    if "reset" in meanings:
        meanings["reset"] = f"memory cleared every {CALL / FRAME_RATE:g} s and where the second playing begins"
    return results.Setting(
        kinds=options.kinds,
        excerpt=options.excerpt_frames,
        items=options.items,
        gaps=options.gap_frames,
        cue=CUE,
        seed=options.seed,
        weighting=options.weighting,
        arms=meanings,
        about={"data": options.data, "codec": inputs.files[0].codec},
    )


def _played(checkpoint: Checkpoint, items: Sequence[Item], arms: Sequence[str], batch: int | None) -> list[Played]:
    """Plays all items to a checkpoint, whose weights are read now if it has none. Raises `InputError`."""
    from tqdm import tqdm

    from eval.recall.play import CUE, of_model, play
    from ttt_jax.checkpoints import loading

    params, cfg = loading.params_of(checkpoint), checkpoint.cfg
    together = batch or (1 if cfg.dtype == "bfloat16" else 4)
    player = of_model(params, cfg, arms)
    played = []
    with tqdm(total=len(items), desc=checkpoint.name, unit="item", leave=False, mininterval=0.5) as bar:
        for one in play(items, player, cfg.max_delay + CUE, together):
            played.append(one)
            bar.update()
    return played


def replaced(folder: Path, subject: folders.Subject) -> list[str]:
    """Returns names of the earlier results in `folder` that results of `subject` replace. Raises `InputError` if they
    are not to be replaced."""
    from eval.recall import figure, results, table

    names = [table.ITEMS, *figure.FILES]
    earlier = folders.stored(folder, results.read, names)
    if earlier is None:
        return []
    infos = [checkpoint.info for checkpoint in earlier.checkpoints]
    folders.check(folder, _subject(earlier.setting, earlier.files, earlier.skipped, infos), subject)
    return names


def _subject(
    setting: Setting, files: Sequence[FileInfo], skipped: Sequence[Skipped], checkpoints: Sequence[CheckpointInfo]
) -> folders.Subject:
    question = {
        "--excerpt (frames)": setting.excerpt,
        "--items": setting.items,
        "--seed": setting.seed,
        "--weighting": setting.weighting,
    }
    measured = [f"{kind} at {gap / FRAME_RATE:g} s" for kind in setting.kinds for gap in setting.gaps]
    pairs = [folders.checkpoint(info.name, info.about) for info in checkpoints]
    return folders.subject(setting.about.get("data"), files, skipped, pairs, question, measured)
