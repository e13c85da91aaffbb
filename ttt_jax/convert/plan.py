"""The plan of a conversion: described for people, and carried out."""

from __future__ import annotations

import contextlib
import errno
import itertools
import logging
import math
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from ttt_jax.checkpoints.safetensors_reader import NAMES
from ttt_jax.checkpoints.safetensors_writer import Spec, header, write_files
from ttt_jax.config import MoshiConfig
from ttt_jax.errors import InputError
from ttt_jax.utils.files import check_new, file_digest, new_folder

log = logging.getLogger("convert")
SMALL = 1 << 20  # bytes kept free for config.json and other small files


class CodecFile(NamedTuple):
    """The file of a model's Mimi, to be written."""

    name: str
    about: str
    nbytes: int
    write: Callable[[Path], None]
    """Writes it to a path."""


class Plan(NamedTuple):
    """A conversion whose inputs are checked."""

    source: str
    out: Path
    cfg: MoshiConfig
    dtype: str
    """Type of the weights as files name it."""
    files: dict[str, list[Spec]]
    """Tensors by the file that will hold them."""
    copies: tuple[Path, ...]
    """Files that travel along."""
    others: tuple[str, ...]
    """Names of the small files that are written besides."""
    notes: tuple[str, ...]
    codec: CodecFile | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors, but for the codec's."""
        return sum(spec.nbytes for specs in self.files.values() for spec in specs)

    def lines(self) -> list[str]:
        """Describes the plan line by line."""
        cfg, depth = self.cfg, self.cfg.depth
        specs = [spec for file in self.files.values() for spec in file]
        numbers = sum(math.prod(spec.shape) for spec in specs)
        where = "all maps" if cfg.lora.is_everywhere else ", ".join(cfg.lora.maps)
        lora = f"rank {cfg.lora.rank}, scaling {cfg.lora.scaling:g}, of {where}, kept apart" if cfg.lora.rank else ""
        lines = [
            f"from          {self.source}",
            f"to            {self.out}",
            f"temporal      {cfg.num_layers} layers of width {cfg.dim}, {cfg.num_heads} heads, hidden {cfg.hidden},"
            f" window {cfg.context}, period {cfg.max_period:g}",
            f"depth         {depth.num_layers} layers of width {depth.dim}, {depth.num_heads} heads, hidden"
            f" {depth.hidden}, {max(cfg.depth_sets) + 1} weight sets for {cfg.dep_q} codebooks"
            + (f", embeddings of rank {depth.low_rank}" if depth.low_rank else ""),
            f"streams       text ({cfg.text_card}) and {cfg.n_q} codebooks ({cfg.card}), {cfg.dep_q} predicted,"
            f" delays {','.join(map(str, cfg.delays))}",
            f"adapters      {lora or 'none apart'}",
            f"TTT layers    {', '.join(map(str, cfg.ttt_layers)) or 'none'}",
            f"codec         {self.codec.about if self.codec else 'none'}",
            f"tensors       {len(specs)}, {numbers:,} parameters, {self.nbytes:,} bytes, weights in"
            f" {NAMES[self.dtype]}",
        ]
        if cfg.extra_heads:
            lines.insert(5, f"extra heads   {cfg.extra_heads} of {cfg.extra_heads_dim} outputs")
        lines.append("writes        " + ", ".join([*self._files(), *self.others]))
        lines.append("travels along " + (", ".join(path.name for path in self.copies) or "nothing"))
        return lines + [f"note          {note}" for note in self.notes]

    def _files(self) -> Iterator[str]:
        """Describes files with their sizes, those of equal layers together."""
        sizes = {name: sum(spec.nbytes for spec in specs) for name, specs in self.files.items()}
        for (_, size), names in itertools.groupby(sizes, lambda name: (name.rsplit("_", 1)[0], sizes[name])):
            first, *rest = names
            if rest:
                yield f"{first} to {rest[-1]} ({len(rest) + 1} files of {size:,} bytes)"
            else:
                yield f"{first} ({size:,} bytes)"
        if self.codec:
            yield f"{self.codec.name} ({self.codec.nbytes:,} bytes)"


Finish = Callable[[Path, dict[str, dict[str, Any]]], None]
"""Writes `Plan.others` into the unfinished folder, from size and digest of each file, {"bytes": ..., "sha256": ...}."""


def execute(plan: Plan, finish: Finish, dry_run: bool, metadata: dict[str, str] | None = None) -> None:
    """Logs the plan, and writes it all or nothing unless `dry_run`; `metadata` goes into the headers of the files.
    Raises `InputError` if two files would have one name, or the disk is full."""
    taken = {*plan.files, *plan.others} | ({plan.codec.name} if plan.codec else set())
    for path in plan.copies:
        if path.name in taken:
            raise InputError(f"{path} cannot travel along, as {path.name} is written anew: rename it in the source.")
        taken.add(path.name)
    for line in plan.lines():
        log.info(line)
    if not dry_run:
        _write(plan, finish, metadata)


def _write(plan: Plan, finish: Finish, metadata: dict[str, str] | None) -> None:
    check_new(plan.out)
    codec = plan.codec.nbytes if plan.codec else 0
    needed = plan.nbytes + codec + sum(path.stat().st_size for path in plan.copies) + SMALL
    total = plan.nbytes + codec + sum(len(header(specs, metadata)) for specs in plan.files.values())
    with room_for(plan.out, needed), new_folder(plan.out) as folder, _progress_bar(total) as progress:
        written = write_files(folder, plan.files, progress, metadata)
        beside = [Path(shutil.copyfile(path, folder / path.name)) for path in plan.copies]
        if plan.codec:
            plan.codec.write(folder / plan.codec.name)
            beside.append(folder / plan.codec.name)
            progress(codec)
        for path in beside:
            written[path.name] = {"bytes": os.path.getsize(path), "sha256": file_digest(path)}
        finish(folder, written)


@contextlib.contextmanager
def room_for(out: Path, needed: int) -> Iterator[None]:
    """Raises `InputError` if the disk of `out` has fewer than `needed` bytes left, or is full before the end."""
    parent = out.absolute().parent
    free = shutil.disk_usage(parent).free
    full = f"needs {needed:,} bytes: free some space, or give another OUT."
    if free < needed:
        raise InputError(f"the disk of {parent} has {free:,} bytes left, the conversion {full}")
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        raise InputError(f"the disk of {parent} is full or its quota used up, the conversion {full}") from None


@contextlib.contextmanager
def _progress_bar(total: int) -> Iterator[Callable[[int], object]]:
    """Yields the function to call with the number of bytes done. The bar is shown if the log is."""
    if not log.isEnabledFor(logging.INFO):
        yield lambda count: None
        return
    from tqdm import tqdm

    with tqdm(total=total, unit="B", unit_scale=True, mininterval=0.5) as bar:
        yield bar.update
