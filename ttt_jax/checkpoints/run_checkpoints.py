"""Checkpoints of a run, by Orbax. Weights are stored apart from the rest, so that they can be read alone.

RUN/checkpoints/STEP/params      weights; of a fine-tuning run only the trainable ones
                     state       state of the optimiser and of the running streams
                     data        position in the training data (JSON)
                     meta        resolved configuration, versions, digests (JSON)
                     integrity   checksums of all of these, validation loss (JSON)
RUN/damaged/STEP                 a damaged checkpoint that a resumed run has replaced

A checkpoint gets its name when it is complete, and loses it before it is removed: a folder named STEP was whole once.
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
from ttt_jax.checkpoints.differences import differences, wrong_types
from ttt_jax.errors import InputError
from ttt_jax.utils.files import CHECKPOINTS

FOLDER = CHECKPOINTS
DAMAGED = "damaged"

_MACHINE = (errno.EIO, errno.ESTALE, errno.ENOSPC, errno.EMFILE, errno.ENFILE, errno.ENOMEM)
"""Errors of the machine, not of the files."""
_UNFINISHED = ".orbax-checkpoint-tmp"
"""In the name of a checkpoint that Orbax is still writing."""
_PRUNED = f"pruned{_UNFINISHED}"
"""Folder into which Orbax moves the checkpoints that it removes."""

log = logging.getLogger("train")


class Saved(NamedTuple):
    """A checkpoint's content."""

    step: int
    params: Any
    state: Any
    """None if only the weights were read."""
    data: Any
    meta: dict[str, Any]
    digest: str
    """SHA-256 that identifies the weights and their base."""


Like = Callable[[dict[str, Any]], tuple[Any, Any]]
"""From a checkpoint's meta to arrays, or shapes, like the weights and like the state; None as state: do not read it.
Shardings place what is read."""


class _Record(NamedTuple):
    """The JSON of a checkpoint."""

    content: dict[str, Any]
    """Checksums and validation loss."""
    data: Any
    meta: dict[str, Any]

    def digest(self) -> str:
        """Returns the SHA-256 of the types, shapes and checksums of the weights, and of the digest of their base."""
        weights = {name: entry for name, entry in self.content["arrays"].items() if name.startswith("params/")}
        base = (self.meta.get("base") or {}).get("digest")
        return hashlib.sha256(json.dumps([weights, base], sort_keys=True).encode()).hexdigest()


class Checkpoints:
    """The checkpoints of one run folder. Saves in the background; `close` waits for the last save."""

    def __init__(self, run_dir: Path, keep: int | None = None):
        """Opens the folder. `keep` is the number of latest checkpoints to keep, besides the one with the lowest
        validation loss; None: read only."""
        self._run_dir = Path(run_dir).absolute()
        self._folder = self._run_dir / FOLDER
        self._validation: dict[int, float | None] = {}
        self._manager: Any = None
        logging.getLogger("absl").setLevel(logging.CRITICAL)  # Orbax logs every step; its errors are raised as well
        if keep is not None:
            import orbax.checkpoint as ocp

            options = ocp.CheckpointManagerOptions(
                preservation_policy=_LatestAndBest(keep, self._validation),
                create=True,
                todelete_subdir=_PRUNED,
                lightweight_initialize=True,  # reads no file, which may be damaged
            )
            self._manager = ocp.CheckpointManager(self._folder, options=options)
            self._validation.update({step: self._validation_of(step) for step in self.steps()})

    def save(
        self, step: int, params: Any, state: Any, data: Any, meta: Mapping[str, Any], validation: float | None = None
    ) -> None:
        """Saves a checkpoint. Returns when the arrays may be donated, before they are on disk.

        `data` and `meta` are JSON values. The loss `validation`, unless None or NaN, selects the best checkpoint.
        Raises `InputError` if the save before this one has failed.
        """
        from orbax.checkpoint import args

        arrays = jax.tree.map(jnp.asarray, {"params": params, "state": state})
        sums = checksums.sums(arrays)  # the devices compute while the save before this one ends
        finite = validation is not None and math.isfinite(validation)
        self._validation[step] = float(validation) if finite else None
        with self._write_errors(OSError, ValueError):
            self._manager.wait_until_finished()
        self._remove_unfinished()
        content = {
            "arrays": checksums.entries(arrays, sums),
            "data": checksums.crc(data),
            "meta": checksums.crc(meta),
            "validation": self._validation[step],
        }
        items = args.Composite(
            params=args.StandardSave(arrays["params"]),
            state=args.StandardSave(arrays["state"]),
            data=args.JsonSave(data),
            meta=args.JsonSave(meta),
            integrity=args.JsonSave(checksums.seal(content)),
        )
        with self._write_errors(OSError):
            # Without force Orbax skips, silently, a step that is not later than the latest.
            self._manager.save(step, args=items, force=True)

    def steps(self) -> list[int]:
        """Returns the steps of the checkpoints on disk, in order."""
        if not self._folder.is_dir():
            return []
        return sorted(int(path.name) for path in self._folder.iterdir() if path.name.isdecimal())

    def best(self) -> int | None:
        """Returns the step with the lowest validation loss, the first of equals; None if no checkpoint has one."""
        return _best({step: self._validation_of(step) for step in self.steps()})

    def meta(self) -> dict[str, Any]:
        """Returns the meta of the latest checkpoint that is whole. Raises `InputError` as `restore` does."""
        return self._latest_whole(lambda step: self._record(step).meta)

    def restore(self, like: Like, step: int | None = None) -> Saved:
        """Returns the checkpoint `step`, or the latest whole one, in the structure, types and places that `like` gives.

        Logs later ones that are damaged, and moves them to RUN/damaged if the folder is open for writing. Raises
        `InputError` if there is no checkpoint, none is whole, or the latest whole one differs from `like`.
        """
        if step is None:
            return self._latest_whole(lambda step: self._restore(step, like))
        try:
            return self._restore(step, like)
        except Damaged as problem:
            where = self._folder / str(step)
            raise InputError(f"{where} is damaged ({problem}): give another checkpoint.") from problem

    def close(self) -> None:
        """Waits until everything saved is on disk. Raises `InputError` if that fails."""
        if self._manager is None:
            return
        with self._write_errors(OSError, ValueError):
            self._manager.close()
        self._remove_unfinished()

    def _latest_whole(self, read: Callable[[int], Any]) -> Any:
        """Returns what `read` gives for the latest step for which it does not raise `Damaged`."""
        if not self.steps():
            how = "the run ended before its first, so remove the folder and start it anew"
            raise InputError(f"{self._folder} holds no checkpoint: {how}.")
        damaged: dict[int, str] = {}
        for step in reversed(self.steps()):
            try:
                value = read(step)
            except Damaged as problem:
                damaged[step] = str(problem)
                log.warning("%s is damaged (%s): going back to the one before", self._folder / str(step), problem)
                continue
            if damaged and self._manager is not None:
                self._move_aside(damaged)
            return value
        problems = "; ".join(f"{step}: {problem}" for step, problem in damaged.items())
        how = "bring one back from a copy, or start the run anew"
        raise InputError(f"{self._folder} holds no checkpoint that is not damaged ({problems}): {how}.")

    def _record(self, step: int) -> _Record:
        """Returns the JSON of a checkpoint. Raises `Damaged`."""
        folder = self._folder / str(step)
        content = checksums.unseal(_read(folder / "integrity" / "metadata"))
        values = {name: _read(folder / name / "metadata") for name in ("data", "meta")}
        for name, value in values.items():
            if checksums.crc(value) != content[name]:
                raise Damaged(f"{name} does not match its CRC-32")
        return _Record(content, values["data"], values["meta"])

    def _restore(self, step: int, like: Like) -> Saved:
        """Raises `Damaged`, in all processes if in one; `InputError` if the stored arrays differ from `like`."""
        record, loaded, problem = None, {}, None
        try:
            record = self._record(step)
            targets = zip(("params", "state"), like(record.meta), strict=True)
            wanted = {name: _target(tree) for name, tree in targets if tree is not None}
            _check_same(self._folder / str(step), record.content["arrays"], wanted)
            loaded = {name: _arrays(self._folder / str(step) / name, tree) for name, tree in wanted.items()}
        except Damaged as damaged:
            problem = damaged
        self._agree(problem)
        stored = {name: total for name, (_, _, total) in record.content["arrays"].items()}
        checksums.compare(stored, checksums.sums(loaded))
        return Saved(step, loaded["params"], loaded.get("state"), record.data, record.meta, record.digest())

    def _agree(self, problem: Damaged | None) -> None:
        """Raises `problem`, or `Damaged` if another process that reads with this one has a problem."""
        others = False
        if self._manager is not None and jax.process_count() > 1:
            from jax.experimental import multihost_utils

            others = bool(multihost_utils.process_allgather(np.array(problem is not None)).any())
        if problem is not None or others:
            raise problem or Damaged("another process cannot read it")

    def _move_aside(self, steps: Collection[int]) -> None:
        """Moves damaged checkpoints to RUN/damaged, as Orbax refuses to save a step that exists."""
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

    def _remove_unfinished(self) -> None:
        """Removes what a killed save or removal has left. Must not run during a save."""
        if jax.process_index() == 0 and self._folder.is_dir():
            for path in [path for path in self._folder.iterdir() if _UNFINISHED in path.name]:
                shutil.rmtree(path, ignore_errors=True)

    @contextlib.contextmanager
    def _write_errors(self, *kinds: type[Exception]) -> Iterator[None]:
        """Raises errors of these `kinds` as `InputError`."""
        try:
            yield
        except kinds as error:
            failed = f"a checkpoint could not be written to {self._folder} ({_short(error)})"
            how = f"make room or mend the folder, then go on with --resume {self._run_dir}"
            raise InputError(f"{failed}: {how}.") from error


class _LatestAndBest:
    """Orbax's rule for what to keep. Its own `BestN` reads losses from damaged files too, and takes NaN for a loss."""

    def __init__(self, latest: int, validation: Mapping[int, float | None]):
        self._latest, self._validation = latest, validation

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        """Returns for each of `checkpoints`, in order of their steps, whether to keep it."""
        steps = [info.step for info in checkpoints]
        kept = {*steps[-self._latest :], _best({step: self._validation.get(step) for step in steps})}
        return [step in kept for step in steps]


def open_run(run_dir: str | Path) -> Checkpoints:
    """Opens the checkpoints of an existing run for reading. Raises `InputError` if `run_dir` is no run folder."""
    if not (Path(run_dir) / FOLDER).is_dir():
        how = "give one that python -m train made"
        raise InputError(f"{run_dir} is not the folder of a run (it has no {FOLDER}/): {how}.")
    return Checkpoints(Path(run_dir))


def _best(validation: Mapping[int, float | None]) -> int | None:
    known = {step: loss for step, loss in validation.items() if loss is not None}
    return min(known, key=lambda step: (known[step], step), default=None)


def _read(path: Path) -> Any:
    """Returns the JSON in a file. Raises `Damaged`."""
    where = path.relative_to(path.parents[1])
    try:
        return json.loads(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
        raise Damaged(f"{where} is missing") from None
    except ValueError:
        raise Damaged(f"{where} is not JSON") from None


def _arrays(folder: Path, like: Any) -> Any:
    """Returns the arrays in a folder of Orbax. Raises `Damaged`."""
    import orbax.checkpoint as ocp

    try:  # the handler: its wrappers wait for other processes, whose files may be damaged
        return ocp.StandardCheckpointHandler().restore(folder, args=ocp.args.StandardRestore(like))
    except (MemoryError, PermissionError, jax.errors.JaxRuntimeError):
        raise  # errors of the machine, not of the files
    except Exception as error:  # flipped bits make Orbax and TensorStore raise anything
        if isinstance(error, OSError) and error.errno in _MACHINE:
            raise
        raise Damaged(f"{folder.name} cannot be read: {_short(error)}") from error


def _check_same(folder: Path, stored: Mapping[str, Sequence[Any]], like: Mapping[str, Any]) -> None:
    """Raises `InputError` unless the arrays `stored` have the names, types and shapes of `like`."""
    expected = checksums.listing(like)
    saved = {name: (dtype, tuple(shape)) for name, (dtype, shape, _) in stored.items() if name.split("/", 1)[0] in like}
    shapes = ({name: shape for name, (_, shape) in arrays.items()} for arrays in (expected, saved))
    problems = list(differences(*shapes))
    for name in expected:
        if name in saved:
            problems += wrong_types({name: saved[name][0]}, expected[name][0])
    how = "go on with the version of ttt_jax in its meta, or start the run anew"
    if any("/open_sum/" in name for name in saved):
        raise InputError(
            f"{folder} is of an older version, whose streams hold the sum of the open mini-batch (open_sum) where this"
            f" one's hold its steps (open_steps): {how}."
        )
    if problems:
        raise InputError(f"{folder} is of another version or architecture ({'; '.join(problems)}): {how}.")


def _short(error: BaseException) -> str:
    """Returns the first line of an error; of a long one its beginning and its end, which gives the system's reason."""
    first = (str(error).strip().splitlines() or [""])[0]
    return f"{type(error).__name__}: {first if len(first) < 200 else f'{first[:60]} ... {first[-120:]}'}"


def _target(tree: Any) -> Any:
    """Returns shapes and types of `tree`, placed like its arrays, or else on the first device."""
    first = jax.sharding.SingleDeviceSharding(jax.devices()[0])

    def target(leaf: Any) -> jax.ShapeDtypeStruct:
        dtype = jax.dtypes.canonicalize_dtype(leaf.dtype)
        return jax.ShapeDtypeStruct(leaf.shape, dtype, sharding=getattr(leaf, "sharding", None) or first)

    return jax.tree.map(target, tree)
