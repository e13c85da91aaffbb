"""The runs that results are of: one entry for each checkpoint, and how they differ. Imports no jax."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from eval.report.collect import PAIRS, STREAM, Collected, Source
from eval.report.parts import NOTHING, Cell, Row, Table, estimate, words
from eval.results.folder import OWN_DATA
from eval.results.schema import CheckpointInfo
from ttt_jax.errors import InputError
from ttt_jax.utils.files import run_and_step

ORIGIN = ("codec", "tokenizer", "train", "base", "stored")
"""What results store of where weights come from, beside the configuration."""
NOT_COMPARED = ("run_dir",)
"""Fields of a configuration that tell nothing about a run."""


@dataclasses.dataclass
class Run:
    """A checkpoint with results, or the folder of a run without any."""

    key: str
    """Its name in the page's code."""
    name: str
    """Unique."""
    info: CheckpointInfo | None
    about: dict[str, Any]
    """What any of its results store about it."""
    folder: Path | None = None
    """Of the run, if it was found."""
    tags: list[str] = dataclasses.field(default_factory=list)

    @property
    def config(self) -> dict[str, Any]:
        """Configuration of the training; {} if it is not known."""
        return _dict(self.about.get("config"))


class Runs:
    """All runs of the page."""

    def __init__(self, collected: Collected, tags: Sequence[str] = ()) -> None:
        """Raises `InputError` if one of the `tags`, RUN=TAG,TAG, is of no run."""
        self.all: list[Run] = []
        self._of: dict[tuple[Path, str], Run] = {}
        known: dict[tuple, Run] = {}
        for source in collected.sources:
            for info in source.checkpoints:
                run = known.setdefault(_identity(info), Run("", info.name, info, {}))
                # Some results store less of a checkpoint than others.
                run.about = {**info.about, **run.about}
                run.folder = run.folder or _folder(source, info, collected.runs)
                self._of[source.folder, info.name] = run
        shown = {run.folder for run in known.values()}
        alone = [Run("", folder.name, None, {}, folder) for folder in collected.runs if folder not in shown]
        for i, run in enumerate([*known.values(), *alone]):
            run.key = f"r{i}"
            self.all.append(run)
            if not run.config and run.folder is not None:
                run.about = {"config": _config(run.folder), **run.about}
        self._name()
        for run in self.all:
            run.tags = _own_tags(run)
        for text in tags:
            self._tag(text)

    def of(self, source: Source, name: str) -> Run:
        """Returns the run of a checkpoint that a result calls `name`."""
        return self._of[source.folder, name]

    def table(self, sources: Sequence[Source]) -> Table:
        """Returns the table of all runs: what they are, losses by arm, accuracies."""
        measured = self._measured(sources)
        columns = list(dict.fromkeys(name for by_name in measured.values() for name in by_name))
        rows = [[*_facts(run), *(measured[run.key].get(name, NOTHING) for name in columns)] for run in self.all]
        heads = [*FACTS, *columns]
        used = [i for i in range(len(heads)) if i == 0 or any(row[i] != NOTHING for row in rows)]
        caption = "A row is a checkpoint; losses are nats per token, accuracies percent, with 95 % intervals."
        return Table("Runs", caption, [heads[i] for i in used], [[row[i] for i in used] for row in rows])

    def differences(self) -> Table | None:
        """Returns the fields of the configurations in which runs differ; None without a difference."""
        known = [run for run in self.all if run.config]
        fields = [_flat(run.config | _origin(run)) for run in known]
        names = dict.fromkeys(name for by_name in fields for name in by_name if name not in NOT_COMPARED)
        rows: list[Row] = []
        for name in names:
            values = [_shown(by_name[name]) if name in by_name else None for by_name in fields]
            if len(set(values)) > 1:
                rows.append([Cell(name, kind="code"), *map(words, values)])
        if not rows:
            return None
        caption = f"The {len(rows)} fields in which the configurations of these {len(known)} runs differ."
        heads, keys = ["Field", *(run.name for run in known)], frozenset(run.key for run in known)
        return Table("Fields that differ", caption, heads, rows, keys)

    def _measured(self, sources: Sequence[Source]) -> dict[str, dict[str, Cell]]:
        """Returns cells by run and column."""
        measured: dict[str, dict[str, Cell]] = {run.key: {} for run in self.all}
        streams = [source for source in sources if source.command == STREAM]
        several = len({(_data(source), source.results.setting.weighting) for source in streams}) > 1
        for source in streams:
            setting = source.results.setting
            where = f", {_data(source)}, {setting.weighting}" if several else ""
            for checkpoint in source.results.checkpoints:
                cells = measured[self.of(source, checkpoint.info.name).key]
                for arm, rows in checkpoint.losses.items():
                    cells[f"Loss {arm}{where}"] = estimate(rows[setting.weighting], 3)
                accuracy = checkpoint.accuracy[checkpoint.main][setting.weighting]
                cells[f"Top-1 %{where}"] = estimate(accuracy, 1, scale=100)
        benchmarks = [source for source in sources if source.command == PAIRS]
        several = len({(subset(source), source.results.setting.rule) for source in benchmarks}) > 1
        for source in benchmarks:
            rule = source.results.setting.rule
            where = f", {subset(source)}, {rule}" if several else ""
            for task in source.results.tasks:
                for view in task.views:
                    cells = measured[self.of(source, view.checkpoint).key]
                    accuracy = estimate(view.accuracies[rule], 1, scale=100)
                    cells.setdefault(f"{task.title} %{where}", accuracy)  # the first view is the headline
        return measured

    def _name(self) -> None:
        """Makes names unique by step, then by digest, then by number."""
        for end in (
            lambda run: f", step {run.about['step']}" if run.about.get("step") is not None else "",
            lambda run: f", weights {run.about['weights'][:8]}" if run.about.get("weights") else "",
            lambda run: f" ({run.key.removeprefix('r')})",
        ):
            names = [run.name for run in self.all]
            for run in [run for run in self.all if names.count(run.name) > 1]:
                run.name += end(run)

    def _tag(self, text: str) -> None:
        name, equals, tags = text.rpartition("=")
        words = [tag.strip() for tag in tags.split(",") if tag.strip()]
        if not equals or not words:
            raise InputError(f"--tag {text} does not give tags to a run: write RUN=tag,tag.")
        path = Path(os.path.realpath(name))
        of = [run for run in self.all if name in (run.name, run.info and run.info.name) or path == run.folder]
        if not of:
            known = ", ".join(run.name for run in self.all)
            raise InputError(f"--tag {text} names no run of the page: give one of {known}.")
        for run in of:
            run.tags = list(dict.fromkeys([*run.tags, *words]))


FACTS = ("Run", "Tags", "Step", "Preset", "Model", "TTT layers", "Inner model", "Type", "Seed", "Weights")


def _facts(run: Run) -> Row:
    info, model = run.info, _dict(run.config.get("model"))
    ttt = _dict(model.get("ttt"))
    layers = _ranges(info.ttt_layers) if info else _named(ttt.get("layers"))
    size = f"{model['dim']} × {model['num_layers']} layers" if {"dim", "num_layers"} <= model.keys() else None
    hidden = ttt.get("hidden")
    inner = None
    if isinstance(hidden, list) and layers:
        kind = f"MLP {' '.join(map(str, hidden))}" if hidden else "linear"
        inner = f"{kind}, mini-batch {ttt.get('mini_batch')}"
    seed = info.seed if info else run.config.get("seed")
    return (
        Cell(run.name),
        Cell(", ".join(run.tags), kind="tags") if run.tags else NOTHING,
        _whole(run.about.get("step")),
        words(run.config.get("name")),
        words(size),
        words(layers),
        words(inner),
        words(info.dtype if info else model.get("dtype")),
        _whole(seed),
        Cell(run.about["weights"][:12], kind="code") if run.about.get("weights") else NOTHING,
    )


def _ranges(layers: Sequence[int]) -> str:
    """Returns indices in rising order as text, three or more neighbours as a range."""
    parts = list[list[int]]()
    for layer in layers:
        if parts and parts[-1][-1] == layer - 1:
            parts[-1].append(layer)
        else:
            parts.append([layer])
    return ", ".join(f"{part[0]} to {part[-1]}" if len(part) > 2 else ", ".join(map(str, part)) for part in parts)


def _named(layers: Any) -> Any:
    """Returns the TTT layers of a configuration; None if it has none."""
    return None if layers == "none" else layers


def _own_tags(run: Run) -> list[str]:
    layers = _dict(_dict(run.config.get("model")).get("ttt")).get("layers")
    known = run.info is not None or layers is not None
    tags = ["TTT" if (run.info.ttt_layers if run.info else _named(layers)) else "no TTT"] if known else []
    if _dict(_dict(run.config.get("model")).get("lora")).get("rank"):
        tags.append("LoRA")
    if run.info and run.info.seed is None:
        tags.append("converted")
    return tags


def _identity(info: CheckpointInfo) -> tuple:
    """Returns what tells a checkpoint: its weights and their type, or what else is known of it."""
    weights = info.about.get("weights")
    return (weights, info.dtype) if weights else (info.name, info.about.get("step"), info.about.get("path"), info.dtype)


def _folder(source: Source, info: CheckpointInfo, runs: Sequence[Path]) -> Path | None:
    """Returns the folder of a checkpoint's run among `runs`: where it was, or around the results of it alone."""
    path = Path(os.path.realpath(info.about.get("path") or source.folder))
    run = run_and_step(path)
    around = [Path(os.path.realpath(source.folder.parent))] if len(source.checkpoints) == 1 else []
    return next((folder for folder in [*([run[0]] if run else []), *around] if folder in runs), None)


def _config(folder: Path) -> dict[str, Any]:
    try:
        return _dict(json.loads((folder / "config.json").read_bytes()))
    except (OSError, ValueError, RecursionError):
        return {}


def _dict(value: Any) -> dict[str, Any]:
    """Returns `value` if it is one: the configuration beside metrics has no checksum, and may be of another program."""
    return value if isinstance(value, dict) else {}


def _whole(value: Any) -> Cell:
    return Cell(str(value), value) if isinstance(value, int) else words(value)


def subset(source: Source) -> str:
    """Returns which items results of benchmarks of pairs are of; accuracies of others do not compare."""
    setting = source.results.setting
    limit = "all items" if setting.limit is None else f"at most {setting.limit} items of a task, seed {setting.seed}"
    return f"{setting.data}, {limit}"


def _data(source: Source) -> str:
    return source.results.setting.about.get("data") or OWN_DATA


def _flat(values: Mapping[str, Any], before: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in values.items():
        flat |= _flat(value, f"{before}{name}.") if isinstance(value, dict) else {f"{before}{name}": value}
    return flat


def _origin(run: Run) -> dict[str, Any]:
    """Returns what is stored of where weights come from, with short digests, so that a column stays narrow."""

    def short(name: str, value: Any) -> Any:
        if isinstance(value, dict):
            return {key: short(key, item) for key, item in value.items()}
        return value[:12] if name == "digest" and isinstance(value, str) else value

    return {name: short(name, run.about[name]) for name in ORIGIN if run.about.get(name) is not None}


def _shown(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
