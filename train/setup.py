"""A run apart from its steps: checks before it starts or is resumed, its folder, the content of its checkpoints."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
import os
import signal
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from train import dry_run, initial_params, trackers
from train.config import TrainConfig
from train.partition import fit
from train.step import TrainState, state_like
from ttt_jax.checkpoints import weights
from ttt_jax.checkpoints.run_checkpoints import FOLDER, open_run
from ttt_jax.codec import MIMI, MIMI_AT, Codec
from ttt_jax.config import TTTConfig
from ttt_jax.data import corpus as corpora
from ttt_jax.data import unigram
from ttt_jax.data.corpus import Corpus, CorpusConfig
from ttt_jax.data.frames import Recording
from ttt_jax.data.text import Tokenizer
from ttt_jax.distributed import sharding
from ttt_jax.errors import InputError
from ttt_jax.kernels import choice
from ttt_jax.utils import config_json
from ttt_jax.utils.command import keep_compiled, machine
from ttt_jax.utils.paths import local
from ttt_jax.utils.trees import Tree, merge, pick

log = logging.getLogger("train")


class Run(NamedTuple):
    """A run that is ready to train."""

    cfg: TrainConfig
    mesh: Mesh
    rows: range
    """Rows of a batch that this process reads."""
    corpus: Corpus
    meta: dict[str, Any]
    """What every checkpoint stores beside the configuration: versions, codec, data, base."""


def prepare(cfg: TrainConfig, run_dir: Path, load: Callable[..., Corpus] = corpora.load) -> Run:
    """Returns a new run of `cfg` in `run_dir` and writes nothing; `load` opens its files. Raises `InputError`."""
    if not _is_free(run_dir):
        raise InputError(
            f"run_dir {run_dir} is taken: give another --run-dir, or go on with the run in it by --resume {run_dir}."
        )
    writable = next(folder for folder in (run_dir, *run_dir.absolute().parents) if folder.exists())
    if not os.access(writable, os.W_OK):
        raise InputError(f"run_dir {run_dir} cannot be made ({writable} is not writable): give another --run-dir.")
    trackers.check(cfg.tensorboard, cfg.wandb)
    if cfg.model.ttt_layers:
        choice.chain(*inner_loop(cfg))
    initial_params.check_base(cfg)
    cfg = with_codec_of_base(cfg)
    codec, tokenizer = corpora.load_coders(cfg.data, cfg.model.card, cfg.model.text_card)
    cfg = fit(fit_model(dataclasses.replace(cfg, run_dir=str(run_dir), data=cfg.data.resolved()), codec, tokenizer))
    cfg = dataclasses.replace(cfg, base=None if cfg.base is None else str(local(cfg.base).absolute()))
    mesh = find_mesh(cfg)
    corpus = load(cfg.data, codec, tokenizer)
    check_data(cfg, corpus)
    meta = {**machine(), **corpus.describe(), "base": initial_params.base_of(cfg), "stored": initial_params.stored(cfg)}
    return Run(cfg, mesh, sharding.local_rows(mesh, cfg.data.batch), corpus, meta)


def reopen(run_dir: Path, **changes: Any) -> Run:
    """Returns the run in `run_dir` as its latest whole checkpoint describes it, with `changes` of fields.

    Raises `InputError` if there is none, or if data, codec, tokenizer or base weights are not those of its training.
    """
    meta = open_run(run_dir).meta()
    cfg = config_json.from_dict(TrainConfig, meta.pop("config"), f"the checkpoint in {run_dir}")
    cfg = dataclasses.replace(cfg, run_dir=str(run_dir), **changes)
    keep_compiled(cfg.data.cache_dir / "compiled")
    trackers.check(cfg.tensorboard, cfg.wandb)
    mesh = find_mesh(cfg)
    corpus = corpora.load(cfg.data, *corpora.load_coders(cfg.data, cfg.model.card, cfg.model.text_card))
    check_data(cfg, corpus)
    described = corpus.describe()
    if {key: meta.get(key) for key in described} != described:
        if corpus.missing:
            raise InputError(f"the data differ from those that {run_dir} was trained on: {corpus.missing[0].reason}")
        raise InputError(
            f"the data, codec or tokenizer differ from those that {run_dir} was trained on (see its meta.json): bring"
            " the old ones back, or start a new run with --from."
        )
    if initial_params.base_of(cfg) != meta["base"]:
        raise InputError(
            f"the weights in {cfg.base} are not those that {run_dir} started from (digest"
            f" {meta['base']['digest'][:12]}): bring the old ones back."
        )
    return Run(cfg, mesh, sharding.local_rows(mesh, cfg.data.batch), corpus, {**meta, **machine()})


def over_seeds(cfg: TrainConfig, seeds: Iterable[int]) -> list[TrainConfig]:
    """Returns `cfg` with each of `seeds`, in folders that end in the seed."""
    folder = str(Path(cfg.run_dir)) if cfg.run_dir else f"runs/{cfg.name}-{time.strftime('%Y%m%d-%H%M%S')}"
    return [dataclasses.replace(cfg, seed=seed, run_dir=f"{folder}-{seed}") for seed in seeds]


def check_alike(cfgs: Sequence[TrainConfig]) -> None:
    """Raises `InputError` unless one program can train all of `cfgs` side by side."""
    if len(cfgs) == 1:
        return
    shared, first = [_shared(cfg) for cfg in cfgs], cfgs[0]
    for cfg, fields in zip(cfgs, shared, strict=True):
        for name, value in fields.items():
            if value != shared[0][name]:
                raise InputError(
                    f"{cfg.run_dir} and {first.run_dir} differ in {name}: give runs that train together the same but"
                    " for seed and files."
                )
    folders = [cfg.run_dir for cfg in cfgs]
    if None in folders or len(set(folders)) < len(folders):
        raise InputError(
            f"the run_dirs {folders} of runs that train together are not all given and different: give each its own."
        )
    for name in ("base", "eval_every", "sample_every", "tensorboard", "wandb"):
        if getattr(first, name):
            raise InputError(
                f"{name}={getattr(first, name)} is for a run by itself: runs that train together do without, so leave"
                " it out or give 0."
            )
    if jax.process_count() > 1:
        raise InputError(
            f"runs train together in one process, but there are {jax.process_count()}: start it without --launch."
        )


def keep_in_memory() -> Callable[..., Corpus]:
    """Returns a `ttt_jax.data.corpus.load` that opens equal data once and keeps files in memory.

    Otherwise steps of many small models would wait for files.
    """
    opened: dict[CorpusConfig, Corpus] = {}

    def kept(recording: Recording) -> Recording:
        return dataclasses.replace(recording, read=functools.cache(recording.read))

    def load(data: CorpusConfig, codec: Any, tokenizer: Any) -> Corpus:
        key = CorpusConfig(**{field.name: getattr(data, field.name) for field in dataclasses.fields(CorpusConfig)})
        if key not in opened:
            corpus = corpora.load(data, codec, tokenizer)
            train = (source._replace(recordings=tuple(map(kept, source.recordings))) for source in corpus.train)
            opened[key] = corpus._replace(train=tuple(train))
        return opened[key]

    return load


def make_folder(run: Run) -> None:
    """Makes the folder of a new run, with its config.json and meta.json."""
    run.meta["unigram"] = _unigram(run.cfg, run.corpus)
    folder = Path(run.cfg.run_dir)
    folder.mkdir(parents=True, exist_ok=True)
    config_json.write_json(folder / "config.json", config_json.to_dict(run.cfg))
    config_json.write_json(folder / "meta.json", run.meta)


def with_codec_of_base(cfg: TrainConfig) -> TrainConfig:
    """Returns `cfg` with the place of the base's Mimi for the codec "mimi". Raises `InputError` if it has none."""
    if cfg.base is None or cfg.data.codec != MIMI:
        return cfg
    base = local(cfg.base)
    if weights.codec(base) is None:
        raise InputError(
            f"{base} has no Mimi, which data.codec='mimi' asks for: convert it again from a folder that has one, or"
            " give mimi:PATH."
        )
    return dataclasses.replace(cfg, data=dataclasses.replace(cfg.data, codec=f"{MIMI_AT}{base}"))


def fit_model(cfg: TrainConfig, codec: Codec, tokenizer: Tokenizer) -> TrainConfig:
    """Returns `cfg` with the model fitted to codec and tokenizer. Raises `InputError` if they do not fit."""
    name = None if cfg.base is None else f"the checkpoint in {cfg.base}"
    model = corpora.fit_model(cfg.model, codec, tokenizer, name)
    # The default inner rate may change in later versions: the run stores its own.
    ttt = dataclasses.replace(model.ttt, base_lr=model.inner_lr)
    return dataclasses.replace(cfg, model=dataclasses.replace(model, ttt=ttt))


def inner_loop(cfg: TrainConfig) -> tuple[TTTConfig, int, int, np.dtype]:
    """Returns what `choice` asks about the calls of the inner loop that a step makes."""
    dtype = jnp.promote_types(cfg.model.dtype, jnp.float32)
    return cfg.model.ttt, cfg.model.head_dim, cfg.data.chunk, dtype


def find_mesh(cfg: TrainConfig) -> Mesh:
    """Returns the mesh of `cfg`. Raises `InputError` if it does not fit the devices, the rows or the model."""
    mesh = sharding.make_mesh(cfg.mesh.data, cfg.mesh.fsdp, cfg.mesh.tensor)
    sharding.check_rows(mesh, cfg.data.batch, cfg.accumulate)
    state_like(cfg, mesh)
    return mesh


def check_data(cfg: TrainConfig, corpus: Corpus) -> None:
    """Raises `InputError` if the corpus lacks files that the run needs."""
    for name in ("eval_every", "sample_every"):
        if getattr(cfg, name) and not corpus.validation:
            raise InputError(
                f"{name}={getattr(cfg, name)} needs files, but there are none to validate on: name some with"
                " --data.validation."
            )
    if cfg.sample_every and jax.process_count() > 1:
        raise InputError(f"sample_every={cfg.sample_every} works in one process only: leave it out.")


def arrays(run: Run, state: TrainState, frozen: Tree) -> dict[str, Any]:
    """Returns the arrays of a checkpoint."""
    params = merge(state.trainable, frozen)
    stored = params if run.meta["stored"] is None else pick(params, set(run.meta["stored"]))
    return {"params": stored, "state": rest(state)}


def rest(state: TrainState) -> dict[str, Any]:
    """Returns the state without the weights, which a checkpoint stores apart."""
    return {name: leaf for name, leaf in state._asdict().items() if name != "trainable"}


@contextlib.contextmanager
def compiling(what: str) -> Iterator[None]:
    """Reports that `what` is compiled, and the time."""
    log.info("compiling the %s (kept in %s for the next run) ...", what, jax.config.jax_compilation_cache_dir)
    begin = time.perf_counter()
    yield
    log.info("compiled in %.0f s", time.perf_counter() - begin)


@contextlib.contextmanager
def memory(cfg: TrainConfig) -> Iterator[None]:
    """Turns errors of too little memory into an `InputError`."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if (sentence := dry_run.too_large(error, cfg)) is not None:
            raise sentence from error
        raise


@contextlib.contextmanager
def interrupts() -> Iterator[list[int]]:
    """Yields the list of signals so far (Ctrl-C, SIGTERM). A second signal exits at once."""
    signals: list[int] = []

    def on_signal(number: int, *_: object) -> None:
        if signals:
            raise SystemExit(128 + number)
        signals.append(number)
        log.info("\nsaving a checkpoint after this step; a second signal stops at once")

    before = {number: signal.signal(number, on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield signals
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _is_free(run_dir: Path) -> bool:
    """Whether a run may begin in `run_dir`: missing, empty, or with a run that ended before its first checkpoint."""
    if not run_dir.exists():
        return True
    if not run_dir.is_dir():
        return False
    inside = {path.name for path in run_dir.iterdir()}
    begun = {"config.json", "meta.json"} <= inside and (run_dir / FOLDER).is_dir()
    return not inside or (begun and not any(path.name.isdecimal() for path in (run_dir / FOLDER).iterdir()))


def _shared(cfg: TrainConfig) -> dict[str, Any]:
    """The fields in which runs that train together are equal."""
    data = dataclasses.replace(cfg.data, train=None, heldout=None, validation=None)
    return {**vars(cfg), "name": "", "run_dir": None, "seed": 0, "data": data}


def _unigram(cfg: TrainConfig, corpus: Corpus) -> dict[str, float]:
    """Returns the nats of each stream of the training data under its unigram model, a baseline without any context."""
    names = list(cfg.model.target_streams)
    tables = unigram.fit(unigram.some(corpus.recordings), cfg.model.target_streams.values())
    total, counts = np.zeros(len(names)), np.zeros(len(names))
    for file in unigram.some(corpus.recordings):
        nats = unigram.nats(tables, file)
        total, counts = total + np.nansum(nats, -1), counts + np.isfinite(nats).sum(-1)
    return {
        name: loss / count for name, loss, count in zip(names, total.tolist(), counts.tolist(), strict=True) if count
    }
