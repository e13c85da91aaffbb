"""`python -m eval stream`: checkpoints x files x arms, scored frame by frame, stored, summarised and drawn."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from tyro.conf import Positional, arg

from eval.results import folder as folders
from eval.results.schema import FRAMES, RESULTS, CheckpointInfo, FileInfo, Skipped
from eval.streaming.weighting import Weighting
from ttt_jax.errors import InputError
from ttt_jax.utils.command import PARTIAL, cost, keep_compiled, machine

if TYPE_CHECKING:
    from eval.inputs.dataset import EvalFile
    from eval.inputs.evaluation_set import EvaluationSet
    from eval.streaming.results import Results
    from ttt_jax.checkpoints.loading import Checkpoint

RESET_EVERY, WINDOW = 1250, 250
"""Defaults: frames between resets for converted weights (the 100 s of Kyutai's fine-tuning), and frames that a position
averages."""


@dataclasses.dataclass(frozen=True)
class Options:
    """Stream speech through checkpoints and score every frame, with the memory kept, reset, frozen and off.

    Arms (same weights, files, attention and tokens; only the fast weights differ):

    persist: memory kept from the first frame to the last.

    reset: memory cleared every --reset-every frames.

    frozen: fast weights stay at their learned start, no updates.

    off: gates closed, TTT layers add nothing.

    permuted: every --reset-every frames the memory that persist has learned on another speaker's file, as long as that
    file goes on (a control; not among the default arms).

    Exit code: 0 done, 2 an input to mend, 3 done but some files were skipped.
    """

    checkpoints: Annotated[Positional[tuple[str, ...]], arg(metavar="CHECKPOINT [CHECKPOINT ...]")] = ()
    """Folder of a run, of one of its checkpoints (RUN/checkpoints/STEP), or of converted weights; several are
    compared."""
    data: Annotated[str | None, arg(metavar="PATH")] = None
    """Manifest, folder that `python -m eval prepare` made, audio or codes; unset: the run's own held-out files."""
    arms: Annotated[str | None, arg(metavar="ARM,ARM,...")] = None
    """Arms joined by commas; unset: persist,reset,frozen,off."""
    reset_every: Annotated[int | None, arg(metavar="N")] = None
    """Frames between resets; unset: a training chunk of the run, or 1250."""
    frames: Annotated[int | None, arg(metavar="N")] = None
    """First frames of each file that are streamed; unset: all."""
    chunk: Annotated[int | None, arg(metavar="N")] = None
    """Most frames of a call, memory against time; changes no number."""
    batch: Annotated[int | None, arg(metavar="N")] = None
    """Files side by side; unset: 8, or 1 in bfloat16 (permuted: at least 2)."""
    window: Annotated[int | None, arg(metavar="N")] = None
    """Frames that a position averages; unset: 250, or 125 for files below 2,000."""
    weighting: Weighting = "equal"
    """How the codebooks become one loss in table and figures (kyutai: 100 on the first); all are stored."""
    no_figure5: bool = False
    """Do not measure the inner losses of the TTT layers."""
    out: Annotated[str | None, arg(metavar="FOLDER")] = None
    """Folder for the results; unset: eval, or eval-DATA with --data, in the first checkpoint's folder. Results of the
    same data, checkpoints and question are replaced, and without --data and --out those of an earlier step of the run;
    a folder with other results is refused."""

    def __post_init__(self) -> None:
        for name in ("reset_every", "chunk", "batch", "window", "frames"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"--{name.replace('_', '-')} {value} is out of range: give 1 or more.")

    @property
    def arm_names(self) -> list[str] | None:
        """Names of the arms; None: those that fit a checkpoint."""
        return None if self.arms is None else [arm.strip() for arm in self.arms.split(",")]

    def arms_of(self, checkpoint: Checkpoint) -> tuple[str, ...]:
        """Returns the arms that a checkpoint is run under, in the order of reports."""
        from eval.streaming.arms import ARMS, DEFAULT, WITHOUT_TTT

        names = self.arm_names or (DEFAULT if checkpoint.cfg.ttt_layers else WITHOUT_TTT)
        return tuple(arm for arm in ARMS if arm in names)


def main(options: Options) -> int:
    """Runs the command; returns the exit code: 0, or 3 if files were skipped. Raises `InputError`."""
    from eval.inputs import evaluation_set
    from eval.streaming import arms
    from ttt_jax.checkpoints import loading

    paths = options.checkpoints
    if not paths:
        raise InputError("there is no checkpoint: give the folder of a run or of converted weights.")
    checkpoints = loading.load_all(paths, keep=len(paths) == 1)
    keep_compiled(checkpoints[0].cache_dir / "compiled")
    for checkpoint in checkpoints if options.arms is not None else ():
        arms.check(options.arm_names, checkpoint.cfg, checkpoint.name)
    if not options.data and len(checkpoints) > 1:
        raise InputError(
            "there is no --data: give a manifest or a folder of python -m eval prepare (only a single run brings its"
            " own held-out files)."
        )
    inputs = evaluation_set.load(options.data, checkpoints, options.frames)
    folder = folders.find(options.out, "eval", paths[0], options.data)
    return PARTIAL if evaluate(checkpoints, inputs, options, folder).skipped else 0


def evaluate(checkpoints: Sequence[Checkpoint], inputs: EvaluationSet, options: Options, folder: Path) -> Results:
    """Streams files through checkpoints, prints, stores and draws the results.

    Raises `InputError` before anything is streamed if `folder` holds results that are not to be replaced.
    """
    from eval.streaming import plots, results, table
    from eval.streaming.arms import ARMS
    from eval.streaming.score_files import checkpoint_info, file_infos, score_files
    from eval.streaming.summary import summarise
    from ttt_jax.config import FRAME_RATE
    from ttt_jax.data import unigram

    files, skipped, corpus = inputs
    if "permuted" in options.arms_of(checkpoints[0]) and len({file.group for file in files}) < 2:
        raise InputError(
            "the arm permuted exchanges memories between speakers (files, where speakers are not named), but there"
            " is one: give files of two or leave it out."
        )
    infos, checkpoint_infos = file_infos(files), [checkpoint_info(checkpoint) for checkpoint in checkpoints]
    arms = {checkpoint.name: options.arms_of(checkpoint) for checkpoint in checkpoints}
    inner = [checkpoint.name for checkpoint in checkpoints if checkpoint.cfg.ttt_layers and not options.no_figure5]
    reset_every = options.reset_every or checkpoints[0].chunk or RESET_EVERY
    subject = _subject(options.data, infos, skipped, checkpoint_infos, reset_every, arms, inner)
    own_run = checkpoint_infos[0] if options.data is None and options.out is None else None
    folders.make(folder)
    replaced(folder, subject, own_run)  # errors are reported before the work
    longest, minutes = max(file.frames for file in infos), sum(file.frames for file in infos) / FRAME_RATE / 60
    print(f"streaming {minutes:.1f} minutes of speech, {len(files)} files, through {', '.join(arms)} ...", flush=True)
    streams = checkpoints[0].cfg.target_streams
    with folders.staged(folder) as new:
        outcome = score_files(
            checkpoints,
            files,
            arms,
            new,
            reset_every=reset_every,
            chunk=options.chunk,
            batch=options.batch,
            inner=inner,
            baseline=unigram.fit(unigram.some(corpus.recordings), streams.values()) if corpus else None,
        )
        setting = results.Setting(
            streams=tuple(streams),
            arms={name: arm.meaning for name, arm in ARMS.items() if any(name in names for names in arms.values())},
            reset_every=reset_every,
            window=options.window or (WINDOW if longest >= 8 * WINDOW else WINDOW // 2),
            weighting=options.weighting,
            text=_text_policy(files),
            about={"data": options.data, "codec": files[0].codec},
        )
        checkpoint_infos = [
            dataclasses.replace(info, about=info.about | {"permuted_with": partners}) if partners else info
            for info in checkpoint_infos
            for partners in [outcome.partners.get(info.name)]
        ]
        left_out = [*skipped, *(Skipped(name, reason) for name, reason in outcome.failed.items())]
        infos = [info for info in infos if info.name not in outcome.failed]
        evaluated = summarise(setting, checkpoint_infos, infos, left_out, new)
        spent = cost()
        results.write(new, evaluated, {"evaluated_with": machine(), "cost": spent})
        old = replaced(folder, subject, own_run)  # again: another command may have written there meanwhile
        folders.replace(folder, new, old)
    print(f"\n{table.table(evaluated)}\n")
    for path in (folder / RESULTS, folder / FRAMES, *plots.draw_all(folder)):
        print(path)
    print(f"took {spent['seconds']:.0f} s and at most {spent['peak_gigabytes']:.1f} GB of memory")
    return evaluated


def replaced(folder: Path, subject: folders.Subject, own_run: CheckpointInfo | None = None) -> list[str]:
    """Returns names of the earlier results in `folder` that results of `subject` replace.

    If the folder is that of the run of `own_run`, results of another step of it are replaced whatever their subject.

    Raises `InputError` if they are not to be replaced.
    """
    from eval.streaming import plots, results

    names = [FRAMES, *plots.figures([name for name, _ in subject.checkpoints])]
    earlier = folders.stored(folder, results.read, names)
    if earlier is None:
        return []
    if own_run is None or not _is_other_step(earlier, own_run):
        folders.check(folder, _subject_of(earlier), subject)
    infos = [checkpoint.info for checkpoint in earlier.checkpoints]
    folders.check_frames(folder, infos, earlier.files)
    return [FRAMES, *plots.figures([info.name for info in infos])]


def _subject(
    data: str | None,
    files: Sequence[FileInfo],
    skipped: Sequence[Skipped],
    checkpoints: Sequence[CheckpointInfo],
    reset_every: int,
    arms: dict[str, Sequence[str]],
    inner: Sequence[str],
) -> folders.Subject:
    measured = []
    for i, checkpoint in enumerate(checkpoints):
        where = f" of checkpoint {i + 1}" if len(checkpoints) > 1 else ""
        measured += [f"the arm {arm}{where}" for arm in arms[checkpoint.name]]
        measured += [f"inner losses{where}"] if checkpoint.name in inner else []
    pairs = [folders.checkpoint(checkpoint.name, checkpoint.about) for checkpoint in checkpoints]
    return folders.subject(data, files, skipped, pairs, {"--reset-every": reset_every}, measured)


def _subject_of(stored: Results) -> folders.Subject:
    infos = [checkpoint.info for checkpoint in stored.checkpoints]
    arms = {checkpoint.info.name: checkpoint.arms for checkpoint in stored.checkpoints}
    inner = [checkpoint.info.name for checkpoint in stored.checkpoints if checkpoint.inner]
    setting = stored.setting
    return _subject(setting.about.get("data"), stored.files, stored.skipped, infos, setting.reset_every, arms, inner)


def _is_other_step(stored: Results, checkpoint: CheckpointInfo) -> bool:
    """Returns whether results are of another step of the run that made `checkpoint`, on its own held-out files.

    The run may have moved or be spread over devices differently.
    """
    if len(stored.checkpoints) != 1 or stored.setting.about.get("data") is not None:
        return False

    def run(about: dict[str, Any]) -> dict[str, Any]:
        free = ("run_dir", "mesh", "accumulate", "remat")
        config = {name: value for name, value in (about.get("config") or {}).items() if name not in free}
        return config | {f"meta {name}": about.get(name) for name in ("train", "heldout", "codec", "tokenizer", "base")}

    old, new = stored.checkpoints[0].info.about, checkpoint.about
    return bool(new.get("config")) and run(old) == run(new) and old.get("weights") != new.get("weights")


def _text_policy(files: Sequence[EvalFile]) -> str:
    known = [file.text_known.mean() for file in files]
    if min(known) == 1:
        return "text known and scored"
    if max(known) == 0:
        return "text not known: fed as nothing (-1), not scored"
    return (
        f"text known in {sum(share > 0 for share in known)} of {len(files)} files; fed as nothing (-1) and not scored"
        " where it is not known"
    )
