"""What the commands of benchmarks of pairs do: from a folder of recordings to results."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eval.benchmarks.commands.options import Options
from eval.benchmarks.layouts import MINI_PREFIX, find
from eval.benchmarks.pairs import Task
from eval.benchmarks.scored import Scored, View
from eval.benchmarks.subset import limit
from eval.results import folder as folders
from eval.results.schema import RESULTS, CheckpointInfo, Skipped
from ttt_jax.errors import InputError
from ttt_jax.utils.command import PARTIAL, cost, keep_compiled, machine, shortened
from ttt_jax.utils.paths import local

if TYPE_CHECKING:
    from eval.benchmarks.results import BenchmarkResults, Setting
    from ttt_jax.checkpoints.loading import Checkpoint
    from ttt_jax.codec import Codec

MINI = Path(__file__).parents[3] / "corpus" / "mini"
"""The shipped set of `python -m eval make-mini`."""
SUBMISSION = "submission"


def main(options: Options, command: str, *names: str) -> int:
    """Runs the command `python -m eval COMMAND` on the benchmarks `names`, without on all.

    Returns the exit code: 0, or 3 if something could not be used. Raises `InputError`.
    """
    data = MINI if options.data is None else local(options.data)
    found = find.find(data, options.split, names)
    if options.verify:
        return verify(found, data)
    if not found.tasks:
        reason = [*found.broken, *found.absent][0].reason.removesuffix(".")
        raise InputError(f"{data} holds no benchmark that can be used: {reason}.")
    tasks = [limit(task, options.limit, options.seed) if options.limit else task for task in found.tasks]
    return _score(options, command, data, tasks, found.broken)


def verify(found: find.Found, data: Path) -> int:
    """Prints which benchmarks lie in a folder and what is wrong with them; returns the exit code."""
    from eval.benchmarks.results import titled

    print(f"{data}:")
    wrong = list(found.broken)
    for task in found.tasks:
        problems = [*task.problems, *find.check(task)]
        items = len({pair.item for pair in task.pairs})
        title = titled(task.name, task.split)
        counts = ((len(task.pairs), "pair"), (items, "item"), (len(problems), "problem"))
        pairs, of_items, found_wrong = (f"{count:,} {noun}{'s' * (count != 1)}" for count, noun in counts)
        print(f"  {title}: {pairs} of {of_items}, {found_wrong}")
        for line in shortened([f"{problem.name}: {problem.reason}" for problem in problems]):
            print(f"    {line}")
        wrong += problems
    for kind, entries in {"cannot be read": found.broken, "is not there": found.absent}.items():
        for name, reason in entries:
            print(f"  {name} {kind}: {reason}")
    if not found.tasks and not found.broken:
        raise InputError(f"{data} holds no benchmark: see docs/evaluation/benchmark_data.md for what is looked for.")
    return PARTIAL if wrong else 0


def _score(options: Options, command: str, data: Path, tasks: list[Task], broken: Sequence[Skipped]) -> int:
    """Scores the pairs of all tasks under all checkpoints, prints and stores the results; returns the exit code."""
    from eval.benchmarks import figure, results, summary, table
    from eval.benchmarks.scoring import measure
    from eval.benchmarks.scoring.losses import check
    from eval.streaming.score_files import checkpoint_info
    from ttt_jax.checkpoints import loading

    paths = options.checkpoints
    checkpoints = loading.load_all(paths, keep=len(paths) == 1)
    keep_compiled(checkpoints[0].cache_dir / "compiled")
    for checkpoint in checkpoints:
        check(checkpoint.cfg, options.texts, options.voices, checkpoint.name)
        if not checkpoint.cfg.ttt_layers and options.arms_of(checkpoint) != ("off",):
            raise InputError(f"{checkpoint.name} has no TTT layers: give --arms off, or leave --arms out.")
    codec = _codec(checkpoints)
    infos = [checkpoint_info(checkpoint, brief=True) for checkpoint in checkpoints]
    setting = _setting(options, checkpoints, codec)
    folder = folders.find(options.out, command, paths[0], options.data)
    facts = [(results.titled(task.name, task.split), task.about) for task in tasks]
    subject = _subject(setting, facts, infos)
    folders.make(folder)
    replaced(folder, subject)  # errors are reported before the work
    with folders.staged(folder) as new:
        scored, problems = measure.scores(options, checkpoints, tasks, codec)
        by_task = list(zip(tasks, scored, strict=True))
        summaries = [summary.summarise(task, views, options.rule) for task, views in by_task]
        summaries = [
            dataclasses.replace(task, problems=[*task.problems, *extra])
            for task, extra in zip(summaries, problems, strict=True)
        ]
        if not any(view.scored for task in summaries for view in task.views):
            first = next((f"; the first: {problem.reason}" for task in summaries for problem in task.problems), "")
            raise InputError(f"no pair could be scored{first.removesuffix('.')}.")
        comparisons = summary.compare(by_task, options.rule, options.seed)
        evaluated = results.BenchmarkResults(setting, infos, summaries, comparisons, summary.means(summaries))
        spent = cost()
        about = {"evaluated_with": machine(), "cost": spent, "broken": list(broken)}
        results.write(new, evaluated, about)
        results.write_pairs(new, by_task, options.rule)
        if options.submission:
            _submit(new / SUBMISSION, by_task, options.rule)
        folders.replace(folder, new, replaced(folder, subject))
    print(f"\n{table.table(evaluated)}\n")
    for line in shortened([f"{name} cannot be read: {reason}" for name, reason in broken]):
        print(line, file=sys.stderr)
    submissions = [folder / SUBMISSION] if (folder / SUBMISSION).is_dir() else []
    if submissions and (options.limit or any(task.problems for task in summaries if _is_submitted(task.name))):
        print("submission files lack recordings, so ZeroSpeech's toolkit refuses them", file=sys.stderr)
    for path in (folder / RESULTS, folder / results.PAIRS, *submissions, *figure.draw(evaluated, folder)):
        print(path)
    print(f"took {spent['seconds']:.0f} s and at most {spent['peak_gigabytes']:.1f} GB of memory")
    return PARTIAL if broken or any(task.problems for task in summaries) else 0


def _codec(checkpoints: Sequence[Checkpoint]) -> Codec:
    """Returns the codec of all checkpoints.

    Raises `InputError` if they have several, none that encodes audio, or one that a model does not fit.
    """
    from ttt_jax.checkpoints import loading
    from ttt_jax.codec import CodecInfo

    codec, _ = loading.coders(checkpoints[0])
    if isinstance(codec, CodecInfo):
        raise InputError(
            f"{checkpoints[0].name} was trained on code files, whose codec is not here to encode recordings with: give"
            " a run that was trained on audio, or converted weights with their Mimi."
        )
    for checkpoint in checkpoints:
        if (checkpoint.codec or {}).get("digest") != codec.digest:
            raise InputError(
                f"{checkpoint.name} has another codec than {checkpoints[0].name} ({codec.name}): evaluate them apart."
            )
        books, entries = checkpoint.cfg.n_q, checkpoint.cfg.card
        if (books, entries) != (2 * codec.num_codebooks, codec.cardinality):
            raise InputError(
                f"{checkpoint.name} reads {books} codebooks of {entries} entries, but its codec {codec.name} gives two"
                f" streams of {codec.num_codebooks} codebooks of {codec.cardinality}: give it the codec that it was"
                " trained with."
            )
    return codec


def _setting(options: Options, checkpoints: Sequence[Checkpoint], codec: Codec) -> Setting:
    from eval.benchmarks.results import Setting
    from eval.streaming.arms import ARMS as meanings

    used = {arm for checkpoint in checkpoints for arm in options.arms_of(checkpoint)}
    return Setting(
        rule=options.rule,
        data="corpus/mini" if options.data is None else options.data,
        split=options.split or "",
        limit=options.limit,
        seed=options.seed,
        texts=options.texts,
        voices=options.voices,
        arms={name: arm.meaning for name, arm in meanings.items() if name in used},
        codec={"name": codec.name, "digest": codec.digest},
        flush_frames=max(checkpoint.cfg.max_delay for checkpoint in checkpoints),
        about={"other stream": "codes of silence", "batch": options.batch},
    )


def _subject(
    setting: Setting, tasks: Iterable[tuple[str, dict[str, Any]]], infos: Sequence[CheckpointInfo]
) -> folders.Subject:
    """Returns what results are about; `tasks`: title and facts (`Task.about`, of all pairs before a limit) of each."""
    digests = {
        title: f"{about.get('gold_sha256') or about.get('names_sha256')} {about.get('pairs')} pairs"
        for title, about in tasks
    }
    question = {
        "--limit": setting.limit,
        "--seed": setting.seed,
        "--text": ",".join(setting.texts),
        "--voice": ",".join(setting.voices),
        "--arms": ",".join(setting.arms),
        "--rule": setting.rule,
        "codec": f"{setting.codec['name']} (digest {setting.codec['digest'][:12]})",
    }
    pairs = tuple(folders.checkpoint(info.name, info.about) for info in infos)
    return folders.Subject(setting.data, digests, frozenset(), pairs, question)


def replaced(folder: Path, subject: folders.Subject) -> list[str]:
    """Returns names of the earlier results in `folder` that results of `subject` replace.

    Raises `InputError` if they are not to be replaced.
    """
    from eval.benchmarks import figure, results

    names = [results.PAIRS, SUBMISSION, *figure.FILES]
    earlier: BenchmarkResults | None = folders.stored(folder, results.read, names)
    if earlier is None:
        return []
    tasks = [(task.title, task.about) for task in earlier.tasks]
    folders.check(folder, _subject(earlier.setting, tasks, earlier.checkpoints), subject)
    return names


def _is_submitted(task: str) -> bool:
    from eval.benchmarks import submission

    return task.removeprefix(MINI_PREFIX) in submission.FOLDERS


def _submit(folder: Path, tasks: Sequence[tuple[Task, dict[View, Scored]]], rule: str) -> None:
    """Writes the scores of every view as submission files, a folder for each view."""
    from eval.benchmarks import submission
    from ttt_jax.utils.paths import file_name

    for task, views in tasks:
        if not _is_submitted(task.name):
            continue
        for view, scored in views.items():
            values = {}
            for side, found in (("right", scored.right), ("wrong", scored.wrong)):
                paths = [getattr(pair, side).stem for pair in task.pairs]
                values |= dict(zip(paths, found[rule].tolist(), strict=True))
            submission.write(folder / file_name(" ".join(view)), task, values)
