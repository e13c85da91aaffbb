"""A run's checkpoints on disk, by Orbax: weights apart from the rest, so that they can be read alone.

RUN/checkpoints/STEP/params      weights; of a fine-tuning run those that it changes
                     state       optimiser, state of the running streams
                     data        position in the training data (JSON)
                     meta        the resolved configuration and what it stands on (JSON)
                     integrity   sums over all of these, validation loss (JSON)
RUN/damaged/STEP                 a checkpoint that a resumed run found damaged

A checkpoint takes its name when it is complete, and loses it before it is removed: what is named STEP was whole once.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import logging
import math
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ttt_jax.checkpoints import checksums
from ttt_jax.checkpoints.checksums import Damaged
from ttt_jax.checkpoints.differences import differences
from ttt_jax.config import MoshiConfig
from ttt_jax.errors import InputError
from ttt_jax.utils import config_json, trees
from ttt_jax.utils.files import CHECKPOINTS, run_and_step

FOLDER = CHECKPOINTS
_MACHINE = (errno.EIO, errno.ESTALE, errno.ENOSPC, errno.EMFILE, errno.ENFILE, errno.ENOMEM)
"""Errors that say nothing of the files."""
DAMAGED = "damaged"

_UNFINISHED = ".orbax-checkpoint-tmp"
"""In the name of what Orbax is still writing."""
_PRUNED = f"pruned{_UNFINISHED}"
"""Where Orbax moves what is no longer kept."""

log = logging.getLogger("train")


class Saved(NamedTuple):
    """A checkpoint's content."""

    step: int
    params: Any
    state: Any
    """None if it was not asked for."""
    data: Any
    meta: dict[str, Any]
    digest: str
    """Of the weights, as `Checkpoints.digest` gives it."""


class Run(NamedTuple):
    """What evaluating a run needs."""

    config: MoshiConfig
    params: Any
    meta: dict[str, Any]
    """The whole resolved configuration under "config"; versions and digests of codec, tokenizer and corpus; "step", and "weights":
    the digest by which its weights are known."""


Like = Callable[[dict[str, Any]], tuple[Any, Any]]
"""From a checkpoint's meta: arrays, or their shapes, like the weights and like the state; None in place of the state: not read.
What has a sharding is placed by it."""


class Checkpoints:
    """The checkpoints of one run folder. Saves in the background; `close` waits for the last one."""

    def __init__(self, run_dir: Path, keep: int | None = None):
        """Opens the folder.

        Args:
          run_dir: the run's folder.
          keep: how many of the latest to keep, beside the one with the lowest validation loss; None: to read only.
        """
        self._run_dir = Path(run_dir).absolute()
        self._folder = self._run_dir / FOLDER
        self._validation: dict[int, float | None] = {}
        self._manager: Any = None
        logging.getLogger("absl").setLevel(logging.CRITICAL)  # Orbax tells every step; its errors are raised as well
        if keep is not None:
            import orbax.checkpoint as ocp

            options = ocp.CheckpointManagerOptions(
                preservation_policy=_LatestAndBest(keep, self._validation),
                create=True,
                todelete_subdir=_PRUNED,
                lightweight_initialize=True,  # reads nothing of what may be damaged
            )
            self._manager = ocp.CheckpointManager(self._folder, options=options)
            self._validation.update({step: self._validation_of(step) for step in self.steps()})

    def save(
        self, step: int, params: Any, state: Any, data: Any, meta: Mapping[str, Any], validation: float | None = None
    ) -> None:
        """Save a checkpoint; returns when the arrays may be donated, before they are on disk.

        `data` and `meta` are JSON; `validation` is the loss by which the best checkpoint is kept, None or NaN if there is none.
        Raises `InputError` if the save before this one has failed.
        """
        from orbax.checkpoint import args

        arrays = jax.tree.map(jnp.asarray, {"params": params, "state": state})
        sums = checksums.sums(arrays)  # computed while the save before this one ends
        finite = validation is not None and math.isfinite(validation)
        self._validation[step] = float(validation) if finite else None
        with self._as_input_error(OSError, ValueError):
            self._manager.wait_until_finished()
        self._sweep()
        with self._as_input_error(OSError):
            content = {
                "arrays": checksums.entries(arrays, sums),
                "data": checksums.crc(data),
                "meta": checksums.crc(meta),
                "validation": self._validation[step],
            }
            self._manager.save(
                step,
                args=args.Composite(
                    params=args.StandardSave(arrays["params"]),
                    state=args.StandardSave(arrays["state"]),
                    data=args.JsonSave(data),
                    meta=args.JsonSave(meta),
                    integrity=args.JsonSave(checksums.seal(content)),
                ),
                force=True,  # or Orbax leaves out, without a word, what is not later than the latest
            )

    def steps(self) -> list[int]:
        """Steps of the checkpoints on disk, in order."""
        if not self._folder.is_dir():
            return []
        return sorted(int(path.name) for path in self._folder.iterdir() if path.name.isdecimal())

    def latest(self) -> int:
        """Step of the latest checkpoint on disk. Raises `InputError` if there is none."""
        steps = self.steps()
        if not steps:
            raise InputError(
                f"{self._folder} holds no checkpoint: the run ended before its first, so remove the folder and start it anew."
            )
        return steps[-1]

    def digest(self, step: int) -> str:
        """SHA-256, hex, by which the weights of a checkpoint are known, those of its base included; nothing large is read.

        Raises `InputError` if the checkpoint is gone or damaged.
        """
        try:
            return _digest(self._told(step))
        except Damaged as problem:
            raise InputError(
                f"{self._folder / str(step)} is damaged ({problem}): give another checkpoint."
            ) from problem

    def best(self) -> int | None:
        """Step of the checkpoint on disk with the lowest validation loss, the first of equals; None if none has any."""
        return _best({step: self._validation_of(step) for step in self.steps()})

    def meta(self) -> dict[str, Any]:
        """What the latest checkpoint says of its run; of the latest that can be read, if it is damaged.

        Raises `InputError` as `restore` does.
        """
        return self._first_whole(lambda step: self._told(step).meta)

    def restore(self, like: Like, step: int | None = None) -> Saved:
        """The checkpoint of `step`, or the latest that is whole, in the structure, shapes, types and places that `like` gives.

        Later ones that are damaged are named in the log and, if the folder is open for writing, moved to RUN/damaged.

        Raises `InputError` if there is no checkpoint, none is whole, or the latest whole one differs from `like`.
        """
        if step is None:
            return self._first_whole(lambda step: self._restore(step, like))
        try:
            return self._restore(step, like)
        except Damaged as problem:
            raise InputError(
                f"{self._folder / str(step)} is damaged ({problem}): give another checkpoint."
            ) from problem

    def close(self) -> None:
        """Wait until everything saved is on disk. Raises `InputError` if that fails."""
        if self._manager is None:
            return
        with self._as_input_error(OSError, ValueError):
            self._manager.close()
        self._sweep()

    def _first_whole(self, read: Callable[[int], Any]) -> Any:
        self.latest()  # there is one
        damaged: dict[int, str] = {}
        for step in reversed(self.steps()):
            try:
                found = read(step)
            except Damaged as problem:
                damaged[step] = str(problem)
                log.warning("%s is damaged (%s): going back to the one before", self._folder / str(step), problem)
                continue
            if damaged and self._manager is not None:
                self._move_aside(damaged)
            return found
        told = "; ".join(f"{step}: {problem}" for step, problem in damaged.items())
        raise InputError(
            f"{self._folder} holds no checkpoint that is not damaged ({told}): bring one back from a copy, or start the run anew."
        )

    def _told(self, step: int) -> _Told:
        """The JSON of a checkpoint. Raises `Damaged`, or `InputError` if it is of a version that stored no sums."""
        folder = self._folder / str(step)
        if not (folder / "integrity").exists() and not _lists_sums(_read(folder / "_CHECKPOINT_METADATA")):
            raise InputError(
                f"{folder} is of another version, which stored no sums: go on with the version of ttt_jax that its meta names."
            )
        content = checksums.unseal(_read(folder / "integrity" / "metadata"))
        values = {name: _read(folder / name / "metadata") for name in ("data", "meta")}
        for name, value in values.items():
            if checksums.crc(value) != content[name]:
                raise Damaged(f"{name} does not match its CRC-32")
        return _Told(content, values["data"], values["meta"])

    def _restore(self, step: int, like: Like) -> Saved:
        """Raises `Damaged`, in all processes if in one; `InputError` if `like` is another."""
        told, found, problem = None, {}, None
        try:
            told = self._told(step)
            wanted = {name: _target(tree) for name, tree in zip(("params", "state"), like(told.meta), strict=True)}
            wanted = {name: tree for name, tree in wanted.items() if tree is not None}
            _check_same(self._folder / str(step), told.content["arrays"], wanted)
            found = {name: _arrays(self._folder / str(step) / name, tree) for name, tree in wanted.items()}
        except Damaged as damaged:
            problem = damaged
        self._agree(problem)
        stored = {name: total for name, (_, _, total) in told.content["arrays"].items()}
        checksums.compare(stored, checksums.sums(found))
        return Saved(step, found["params"], found.get("state"), told.data, told.meta, _digest(told))

    def _agree(self, problem: Damaged | None) -> None:
        """Raise `problem`, or `Damaged` if another process that reads with this one has one."""
        others = False
        if self._manager is not None and jax.process_count() > 1:
            from jax.experimental import multihost_utils

            others = bool(multihost_utils.process_allgather(np.array(problem is not None)).any())
        if problem is not None or others:
            raise problem or Damaged("another process cannot read it")

    def _move_aside(self, steps: Collection[int]) -> None:
        for step in steps if jax.process_index() == 0 else ():
            (self._run_dir / DAMAGED).mkdir(exist_ok=True)
            names = (str(step), *(f"{step}.{i}" for i in range(1, 1000)))
            target = next(path for path in (self._run_dir / DAMAGED / name for name in names) if not path.exists())
            (self._folder / str(step)).rename(target)
            log.warning("moved %s to %s", self._folder / str(step), target)
        if jax.process_count() > 1:
            from jax.experimental import multihost_utils

            multihost_utils.sync_global_devices("damaged checkpoints are moved")
        self._manager.reload()

    def _validation_of(self, step: int) -> float | None:
        try:
            return checksums.unseal(_read(self._folder / str(step) / "integrity" / "metadata"))["validation"]
        except Damaged:
            return None

    def _sweep(self) -> None:
        """Remove what is unfinished or no longer kept; nothing is being saved."""
        if jax.process_index() == 0 and self._folder.is_dir():
            for path in [path for path in self._folder.iterdir() if _UNFINISHED in path.name]:
                shutil.rmtree(path, ignore_errors=True)

    @contextlib.contextmanager
    def _as_input_error(self, *kinds: type[Exception]) -> Iterator[None]:
        try:
            yield
        except kinds as error:
            raise InputError(
                f"a checkpoint could not be written to {self._folder} ({_short(error)}): make room or mend the folder, then go on"
                f" with --resume {self._run_dir}."
            ) from error


class _Told(NamedTuple):
    """What a checkpoint says in JSON."""

    content: dict[str, Any]
    data: Any
    meta: dict[str, Any]


def _digest(told: _Told) -> str:
    weights = {name: entry for name, entry in told.content["arrays"].items() if name.startswith("params/")}
    base = (told.meta.get("base") or {}).get("digest")
    return hashlib.sha256(json.dumps([weights, base], sort_keys=True).encode()).hexdigest()


class _LatestAndBest:
    """Orbax's rule for what is kept. Its own `BestN` reads losses from files that may be damaged, and takes NaN for a loss."""

    def __init__(self, latest: int, validation: Mapping[int, float | None]):
        self._latest, self._validation = latest, validation

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        """For each of `checkpoints`, in order of their steps, whether it is kept."""
        steps = [info.step for info in checkpoints]
        kept = {*steps[-self._latest :], _best({step: self._validation.get(step) for step in steps})}
        return [step in kept for step in steps]


@contextlib.contextmanager
def open_run(run_dir: str | Path) -> Iterator[Checkpoints]:
    """The checkpoints of an existing run, to read. Raises `InputError` if `run_dir` is no run folder."""
    run_dir = Path(run_dir)
    if not (run_dir / FOLDER).is_dir():
        raise InputError(
            f"{run_dir} is not the folder of a run (it has no {FOLDER}/): give one that python -m train made."
        )
    checkpoints = Checkpoints(run_dir)
    try:
        yield checkpoints
    finally:
        checkpoints.close()


def load_run(path: str | Path) -> Run:
    """The latest weights of a run, or those of a checkpoint (RUN/checkpoints/STEP), with their configuration.

    What a fine-tuning run left as it was comes from its base.

    Raises `InputError` if there is no run, no checkpoint in it that is whole, or its base is gone or another.
    """
    from ttt_jax.moshi import model

    run_dir, step = run_and_step(Path(path)) or (path, None)

    def config_of(meta: dict[str, Any]) -> MoshiConfig:
        return config_json.from_dict(MoshiConfig, meta["config"]["model"], f"the checkpoint in {run_dir}")

    def whole(meta: dict[str, Any]) -> Any:
        config = config_of(meta)
        return jax.eval_shape(lambda key: model.init_params(config, key), jax.random.key(0))

    def like(meta: dict[str, Any]) -> tuple[Any, None]:
        stored = meta.get("stored")
        return (whole(meta) if stored is None else trees.pick(whole(meta), set(stored))), None

    with open_run(run_dir) as checkpoints:
        saved = checkpoints.restore(like, step)
    config, params = config_of(saved.meta), saved.params
    if saved.meta.get("stored") is not None:
        params = _completed(run_dir, saved, config, whole(saved.meta))
    return Run(config, params, {**saved.meta, "step": saved.step, "weights": saved.digest})


def _completed(run_dir: str | Path, saved: Saved, config: MoshiConfig, like: Any) -> dict[str, Any]:
    """The stored weights and those of the base, together of the shapes of `like`."""
    from ttt_jax.checkpoints import weights

    base = saved.meta["base"]
    if not (Path(base["path"]) / weights.CONFIG).is_file():
        raise InputError(
            f"{base['path']}, the weights that {run_dir} stands on, is gone: bring the folder back to that place."
        )
    missing = trees.named(like).keys() - trees.named(saved.params).keys()
    with weights.Folder(base["path"]) as folder:
        if folder.info["digest"] != base["digest"]:
            raise InputError(
                f"{base['path']} has the digest {folder.info['digest']}, but {run_dir} stands on weights with {base['digest']}:"
                " bring those back to that place."
            )
        params = trees.merge(weights.read(folder, config, missing), saved.params)
    shapes = [{name: leaf.shape for name, leaf in trees.named(tree).items()} for tree in (like, params)]
    if told := "; ".join(differences(*shapes)):
        raise InputError(
            f"{run_dir} with its base {base['path']} {told}: load it with the version of ttt_jax that its meta names."
        )
    return params


def _best(validation: Mapping[int, float | None]) -> int | None:
    known = {step: loss for step, loss in validation.items() if loss is not None}
    return min(known, key=lambda step: (known[step], step), default=None)


def _read(path: Path) -> Any:
    """The JSON in a file. Raises `Damaged`."""
    where = path.relative_to(path.parents[1])
    try:
        return json.loads(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
        raise Damaged(f"{where} is missing") from None
    except ValueError:
        raise Damaged(f"{where} is not JSON") from None


def _lists_sums(metadata: Any) -> bool:
    """Whether Orbax's own record of a checkpoint's parts names the sums, or names nothing, so that it is damaged."""
    parts = metadata.get("item_handlers") if isinstance(metadata, dict) else None
    return not isinstance(parts, dict) or "integrity" in parts


def _arrays(folder: Path, like: Any) -> Any:
    """The arrays in a folder of Orbax. Raises `Damaged`."""
    import orbax.checkpoint as ocp

    try:  # the handler itself: what goes round it waits for other processes, which may have met with damage
        return ocp.StandardCheckpointHandler().restore(folder, args=ocp.args.StandardRestore(like))
    except (MemoryError, PermissionError, jax.errors.JaxRuntimeError):
        raise  # of the machine, not of the files
    except OSError as error:
        if error.errno in _MACHINE:
            raise
        raise Damaged(f"{folder.name} cannot be read: {_short(error)}") from error
    except Exception as error:  # flipped bits can make Orbax and TensorStore raise anything
        raise Damaged(f"{folder.name} cannot be read: {_short(error)}") from error


def _check_same(folder: Path, stored: Mapping[str, Sequence[Any]], like: Mapping[str, Any]) -> None:
    """Raise `InputError` unless arrays of the names, types and shapes of `like` are stored."""
    expected = checksums.listing(like)
    found = {name: (dtype, tuple(shape)) for name, (dtype, shape, _) in stored.items() if name.split("/", 1)[0] in like}
    told = list(differences(*({name: shape for name, (_, shape) in some.items()} for some in (expected, found))))
    told += [
        f"has {name} as {found[name][0]} instead of {dtype}"
        for name, (dtype, _) in expected.items()
        if name in found and found[name][0] != dtype
    ]
    if told:
        raise InputError(
            f"{folder} is of another version or architecture ({'; '.join(told)}): go on with the version of ttt_jax that its meta"
            " names, or start the run anew."
        )


def _short(error: BaseException) -> str:
    """The first line of what an error says; of a long one, its beginning and its end, where the system's reason stands."""
    first = (str(error).strip().splitlines() or [""])[0]
    return f"{type(error).__name__}: {first if len(first) < 200 else f'{first[:60]} ... {first[-120:]}'}"


def _target(tree: Any) -> Any:
    """Shapes and types of `tree`, to be placed where its arrays are, or else on the first device."""
    first = jax.sharding.SingleDeviceSharding(jax.devices()[0])

    def one(leaf: Any) -> jax.ShapeDtypeStruct:
        dtype = jax.dtypes.canonicalize_dtype(leaf.dtype)
        return jax.ShapeDtypeStruct(leaf.shape, dtype, sharding=getattr(leaf, "sharding", None) or first)

    return jax.tree.map(one, tree)
