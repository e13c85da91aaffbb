"""`python -m eval stream`: checkpoints x files x arms, scored frame by frame, stored, summed up, drawn."""

from __future__ import annotations

import argparse
import dataclasses
import re
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from eval.inputs import checkpoints as models_
from eval.inputs import dataset as speech_
from eval.inputs.checkpoints import Checkpoint
from eval.inputs.dataset import EvalFile, Skipped
from eval.results import folder as folders
from eval.streaming import arms as arms_
from eval.streaming import plots, scores, table
from eval.streaming.runner import batches, stream
from eval.streaming.summary import (
    FRAMES,
    CheckpointInfo,
    FileInfo,
    Results,
    Setting,
    read_results,
    scores_path,
    summarise,
    write_results,
)
from ttt_jax.config import FRAME_RATE
from ttt_jax.data import corpus as corpora
from ttt_jax.data import unigram
from ttt_jax.errors import InputError
from ttt_jax.utils.command import PARTIAL, cost, keep_compiled, machine, shortened
from ttt_jax.utils.paths import file_name

PERIOD, WINDOW, ROWS = 1250, 250, 8
"""Where nothing else is asked for: frames between resets (of a run: its training chunk; here the 100 s of Kyutai's fine-tuning), frames
that a position averages, files side by side."""


@dataclasses.dataclass(frozen=True)
class Asked:
    """How to stream and what to measure."""

    arms: tuple[str, ...] | None = None
    """Names of arms; None: those that mean something for the checkpoint."""
    reset_every: int | None = None
    """Frames between resets; None: a training chunk of the first checkpoint."""
    chunk: int | None = None
    """Most frames of a call; None: what suits the device."""
    batch: int | None = None
    """Files side by side; None: what suits the model."""
    window: int | None = None
    """Frames that a position averages; None: 250, of short files 125."""
    weighting: str = "equal"
    """Headline weighting of the codebooks."""
    inner: bool | None = None
    """Whether to measure inner losses; None: where there are TTT layers."""
    frames: int | None = None
    """First frames of each file that are streamed; None: all."""
    data: str | None = None
    """Of which the files are, for the record; None: the run's own."""

    def __post_init__(self) -> None:
        for name in ("reset_every", "chunk", "batch", "window", "frames"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"--{name.replace('_', '-')} {value} is out of range: give 1 or more.")


def main(options: argparse.Namespace) -> int:
    """Evaluate as the command line asks; the exit code: 0, or 3 if files were skipped. Raises `InputError`."""
    asked = Asked(
        None if options.arms is None else tuple(arm.strip() for arm in options.arms.split(",")),
        options.reset_every,
        options.chunk,
        options.batch,
        options.window,
        options.weighting,
        options.figure5,
        options.frames,
        options.data,
    )
    models = models_.load_all(options.checkpoints)
    keep_compiled(models[0].cache_dir / "compiled")
    for model in models:
        _check(model, asked)
    skipped: list[Skipped] = []
    if options.data:
        files, skipped = speech_.read(options.data, models, asked.frames)
        corpus = None
    else:
        if len(models) > 1:
            raise InputError(
                "there is no --data: give a manifest or a folder of python -m eval prepare (only a single run brings its own held-out files)."
            )
        corpus = own_corpus(models)
        files, skipped = speech_.of_corpus(corpus)
        files = [file._replace(frames=file.frames[:, : asked.frames]) for file in files]
    for reason in shortened([one.reason for one in skipped]):
        print(f"skipped: {reason}", file=sys.stderr)
    found = folders.find(options.out, "eval", options.checkpoints[0], options.data)
    return PARTIAL if evaluate(models, files, skipped, corpus, asked, found) else 0


def of_run(model: Checkpoint, corpus: corpora.Corpus, folder: Path) -> None:
    """Evaluate a run on its own held-out files, as `python -m train` does at its end.

    What an earlier evaluation of the same run has left in `folder` is replaced, of whatever step it was.
    """
    evaluate([model], *speech_.of_corpus(corpus), corpus, Asked(), folder, of_its_run=True)


def evaluate(
    models: Sequence[Checkpoint],
    files: Sequence[EvalFile],
    skipped: Sequence[Skipped],
    corpus: corpora.Corpus | None,
    asked: Asked,
    folder: Path,
    of_its_run: bool = False,
) -> int:
    """Stream `files` through `models` under the arms asked for, each from a fresh state; print the results and store them.

    Args:
      skipped: files that could not be used, for the record; corpus: whose training data the unigram baseline is fitted to, if any;
        folder: of the results; of_its_run: whether it may hold results of another step of the same run.

    Returns:
      How many files were skipped, those included whose predictions were no finite numbers.

    Raises `InputError` before anything is streamed if the folder holds results of something else.
    """
    if asked.arms and "permuted" in asked.arms and len({file.group for file in files}) < 2:
        raise InputError(
            "the arm permuted exchanges memories between speakers (files, where speakers are not named), but there is one: give files"
            " of two or leave it out."
        )
    first, longest = models[0], max(file.frames.shape[1] for file in files)
    folders.make(folder)  # what cannot be is told before the work
    _check_replaced(folder, models, files, skipped, asked, of_its_run)
    period = _period(models, asked)
    chunk = asked.chunk or calls(models)
    tables = unigram.fit(unigram.some(corpus.recordings), first.cfg.target_streams.values()) if corpus else None
    minutes = sum(file.frames.shape[1] for file in files) / FRAME_RATE / 60
    names = ", ".join(model.name for model in models)
    print(f"streaming {minutes:.1f} minutes of speech, {len(files)} files, through {names} ...", flush=True)
    infos = [_info(i, file) for i, file in enumerate(files)]
    checkpoints, run_arms = [], dict.fromkeys(arm for model in models for arm in _arms(model, asked))
    failed: dict[str, str] = {}
    new = Path(tempfile.mkdtemp(dir=folder, prefix=".results.", suffix=".tmp"))
    try:
        for model in models:
            own = new / FRAMES / file_name(model.name)
            own.mkdir(parents=True)
            partners = _stream(model, files, infos, tables, asked, period, chunk, own, failed)
            about = model.about | ({"permuted_with": partners} if partners else {})
            checkpoints.append(CheckpointInfo(model.name, model.cfg.context, model.cfg.ttt_layers, about))
        if len(failed) == len(files):
            raise InputError(next(iter(failed.values())))
        setting = Setting(
            streams=tuple(first.cfg.target_streams),
            arms={arm: entry.meaning for arm, entry in arms_.ARMS.items() if arm in run_arms},
            reset_every=period,
            chunk=chunk,
            window=asked.window or (WINDOW if longest >= 8 * WINDOW else WINDOW // 2),
            weighting=asked.weighting,
            text=_text_policy(files),
            about={"data": asked.data, "codec": files[0].codec},
        )
        left_out = [*skipped, *(Skipped(name, reason) for name, reason in failed.items())]
        infos = [info for info in infos if info.name not in failed]
        results = summarise(setting, checkpoints, infos, [one._asdict() for one in left_out], new)
        spent = cost()
        write_results(new, results, {"evaluated_with": machine(), "cost": spent})
        # Another command may have written here meanwhile.
        old = _check_replaced(folder, models, files, skipped, asked, of_its_run)
        folders.replace(folder, new, old)
    except BaseException:
        shutil.rmtree(new, ignore_errors=True)
        raise
    print(f"\n{table.table(results)}\n")
    for path in (folder / folders.RESULTS, folder / FRAMES, *plots.draw_all(folder)):
        print(path)
    print(f"took {spent['seconds']:.0f} s and at most {spent['peak_gigabytes']:.1f} GB of memory")
    return len(left_out)


def _stream(
    model: Checkpoint,
    files: Sequence[EvalFile],
    infos: Sequence[FileInfo],
    tables: list[np.ndarray] | None,
    asked: Asked,
    period: int,
    chunk: int,
    folder: Path,
    failed: dict[str, str],
) -> dict[str, str]:
    """Stream all files through a model and store their scores in `folder`; whose memory each had in the arm permuted.

    Files whose predictions are no finite numbers get a sentence in `failed`.
    """
    from tqdm import tqdm

    own = _arms(model, asked)
    measured = _measures_inner(model, asked)
    permuted, partner_of = "permuted" in own, {}
    total = sum(file.frames.shape[1] for file in files)
    with tqdm(total=total, desc=model.name, unit="frame", unit_scale=True, leave=False, mininterval=0.5) as bar:
        for batch in batches(
            [file.frames.shape[1] for file in files], asked.batch or rows(model), least=2 if permuted else 1
        ):
            some = [files[i] for i in batch]
            partners = _partners(some) if permuted else None
            found = stream(
                model.params,
                [file.frames for file in some],
                model.cfg,
                own,
                chunk=chunk,
                period=period,
                measured=measured,
                partners=partners,
                on_frames=bar.update,
            )
            for place, (i, got) in enumerate(zip(batch, found, strict=True)):
                if tables is not None:
                    got = got._replace(unigram=unigram.nats(tables, got.tokens).astype(np.float32))
                if reason := diverged(model, files[i], got):
                    failed[files[i].name] = reason
                    tqdm.write(f"skipped: {reason}", file=sys.stderr)
                    continue
                scores.save(folder / infos[i].npz, got)
                if partners is not None:
                    partner_of[files[i].name] = some[partners[place]].name
    return partner_of


def diverged(model: Checkpoint, file: EvalFile, found: scores.FileScores) -> str | None:
    """A sentence if the predictions of a file are not all finite numbers; None if they are."""
    bad = scores.not_finite(found)
    return bad and (
        f"{model.name} under {bad[0]} gives no finite predictions of {file.name} from frame {bad[1]} on: its fast weights"
        " or its weights have diverged, so lower ttt.base_lr or bound them (ttt.horizon, ttt.max_displacement)."
    )


def _partners(files: Sequence[EvalFile]) -> list[int]:
    """For each file of a batch the longest one of another speaker."""
    found = []
    for file in files:
        others = [i for i, other in enumerate(files) if other.group != file.group]
        if not others:
            raise InputError(
                f"the arm permuted finds no file of another speaker beside {file.name} among the {len(files)} that go side by side: raise"
                " --batch."
            )
        found.append(max(others, key=lambda i: files[i].frames.shape[1]))
    return found


def _check_replaced(
    folder: Path,
    models: Sequence[Checkpoint],
    files: Sequence[EvalFile],
    skipped: Sequence[Skipped],
    asked: Asked,
    of_its_run: bool,
) -> list[str]:
    """Names of earlier results in `folder`. Raises `InputError` if they, or what else has such a name, are not to be replaced."""
    names = [FRAMES, *plots.figures([model.name for model in models])]
    found = folders.stored(folder, folders.RESULTS, _read, names)
    if found is None:
        return []
    old, subject = found
    if not (of_its_run and _is_same_run(old, models[0])):
        folders.check(folder, subject, _subject(models, files, skipped, asked))
    infos = [own.info for own in old.checkpoints]
    ours = {scores_path(folder, info, file) for info in infos for file in old.files}
    foreign = next((path for path in (folder / FRAMES).rglob("*") if not path.is_dir() and path not in ours), None)
    if foreign is not None:
        raise InputError(
            f"{folder} holds {foreign.relative_to(folder)}, which is no result of an evaluation: give another --out."
        )
    return [FRAMES, *plots.figures([info.name for info in infos])]


def _read(folder: Path) -> tuple[Results, folders.Subject]:
    results = read_results(folder)
    return results, _subject_of(results)


def _subject(
    models: Sequence[Checkpoint], files: Sequence[EvalFile], skipped: Sequence[Skipped], asked: Asked
) -> folders.Subject:
    """What is asked for."""
    return folders.Subject(
        asked.data or folders.OWN_DATA,
        {file.name: file.digest for file in files},
        frozenset(one.name for one in skipped),
        tuple(folders.checkpoint(model.name, model.about) for model in models),
        {"--reset-every": _period(models, asked)},
        _measured([_arms(model, asked) for model in models], [_measures_inner(model, asked) for model in models]),
        {file.name: file.frames.shape[1] for file in files},
    )


def _subject_of(old: Results) -> folders.Subject:
    """What stored results are of."""
    return folders.Subject(
        old.setting.about.get("data") or folders.OWN_DATA,
        {file.name: file.digest for file in old.files},
        frozenset(one["name"] for one in old.skipped),
        tuple(folders.checkpoint(own.info.name, own.info.about) for own in old.checkpoints),
        {"--reset-every": old.setting.reset_every},
        _measured([own.arms for own in old.checkpoints], [bool(own.inner) for own in old.checkpoints]),
        {file.name: file.frames for file in old.files},
    )


def _measured(arms: Sequence[Sequence[str]], inner: Sequence[bool]) -> frozenset[str]:
    """Of each checkpoint in words."""
    which = [f" of checkpoint {i + 1}" if len(arms) > 1 else "" for i in range(len(arms))]
    found = [f"the arm {arm}{one}" for one, names in zip(which, arms, strict=True) for arm in names]
    return frozenset([*found, *(f"inner losses{one}" for one, is_there in zip(which, inner, strict=True) if is_there)])


def _is_same_run(old: Results, model: Checkpoint) -> bool:
    """Whether results are of the run that made `model` and no other, perhaps of another step, on its own held-out files.

    Where the run lies and how it is spread over devices may have changed.
    """
    if len(old.checkpoints) != 1 or old.setting.about.get("data") is not None:
        return False

    def of_run(about: dict[str, Any]) -> dict[str, Any]:
        free = ("run_dir", "mesh", "accumulate", "remat")
        config = {name: value for name, value in (about.get("config") or {}).items() if name not in free}
        same = ("train", "heldout", "codec", "tokenizer", "base")
        return config | {f"meta {name}": about.get(name) for name in same}

    return of_run(old.checkpoints[0].info.about) == of_run(model.about)


def _info(index: int, file: EvalFile) -> FileInfo:
    safe = re.sub(r"[^A-Za-z0-9._-]+", "_", file.name)
    npz = f"{index:04d}-{safe[-80:]}.npz"
    return FileInfo(file.name, file.group, file.frames.shape[1], npz, file.boundaries, file.digest)


def _arms(model: Checkpoint, asked: Asked) -> tuple[str, ...]:
    """In the order of reports."""
    names = asked.arms or (arms_.DEFAULT if model.cfg.ttt_layers else arms_.WITHOUT_TTT)
    return tuple(arm for arm in arms_.ARMS if arm in names)


def _measures_inner(model: Checkpoint, asked: Asked) -> bool:
    return bool(model.cfg.ttt_layers) if asked.inner is None else asked.inner


def _period(models: Sequence[Checkpoint], asked: Asked) -> int:
    """Frames between resets."""
    return asked.reset_every or models[0].chunk or PERIOD


def _check(model: Checkpoint, asked: Asked) -> None:
    """Raise `InputError` if a checkpoint cannot be evaluated as asked."""
    if asked.arms is not None:
        arms_.check(asked.arms, model.cfg, model.name)
    if asked.inner and not model.cfg.ttt_layers:
        raise InputError(
            f"{model.name} has no TTT layers, so there are no inner losses for Figure 5: leave --figure5 out, or give a checkpoint with"
            " TTT layers."
        )


def rows(model: Checkpoint) -> int:
    """Files side by side that suit a model."""
    return 1 if model.cfg.dtype == "bfloat16" else ROWS


def calls(models: Sequence[Checkpoint]) -> int:
    """Frames of a call that suit the device: on a GPU long ones read the weights seldom, on a CPU short ones stay in its caches."""
    longest = max(max(model.cfg.contexts) for model in models)
    return 250 if jax.default_backend() == "cpu" else max(1000, 4 * longest)


def own_corpus(models: Sequence[Checkpoint]) -> corpora.Corpus:
    """The corpus of a single run, or of runs that share one, with its held-out files. Raises `InputError` if there is none or it has changed."""
    model = models[0]
    data = {
        one.corpus and (one.corpus.train, one.corpus.heldout, one.corpus.codec, one.corpus.tokenizer) for one in models
    }
    if None in data or len(data) > 1:
        raise InputError(
            "there is no --data: give a manifest or a folder of python -m eval prepare (only runs of the same data bring their own held-out"
            " files)."
        )
    corpus = corpora.load(model.corpus, *corpora.load_coders(model.corpus, model.cfg.card, model.cfg.text_card))
    # The unigram model is fitted to the training data, the codes mean nothing with another codec.
    for part, found in corpus.describe().items():
        for one in models:
            if part not in ("heldout", "validation") and found != one.about[part]:
                if part == "train" and corpus.absent[part]:
                    raise InputError(corpus.absent[part][0].reason)
                raise InputError(
                    f"{part} is not what {one.name} was trained with ({found}, but its meta.json has {one.about[part]}): bring the old"
                    " one back."
                )
    if not corpus.heldout:
        raise InputError(f"{model.name} was trained without held-out files: give some with --data.")
    return corpus


def _text_policy(files: Sequence[EvalFile]) -> str:
    known = [file.text_known.mean() for file in files]
    if min(known) == 1:
        return "text known and scored"
    if max(known) == 0:
        return "text not known: fed as nothing (-1), not scored"
    return (
        f"text known in {sum(share > 0 for share in known)} of {len(files)} files; fed as nothing (-1) and not scored where it is"
        " not known"
    )
