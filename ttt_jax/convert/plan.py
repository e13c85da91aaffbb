"""What a conversion will write: told, and carried out."""

from __future__ import annotations

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
SMALL = 1 << 20  # bytes kept free for config.json and the like


class Plan(NamedTuple):
    """A conversion that nothing stands against but the disk."""

    source: str
    out: Path
    cfg: MoshiConfig
    dtype: str
    """Type of the weights as files name it."""
    files: dict[str, list[Spec]]
    """Tensors by the file that they will stand in."""
    copies: tuple[Path, ...]
    """Files that travel along."""
    others: tuple[str, ...]
    """Names of the small files that are written beside."""
    notes: tuple[str, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(spec.nbytes for specs in self.files.values() for spec in specs)

    def lines(self) -> list[str]:
        """The plan for people, line by line."""
        cfg, depth = self.cfg, self.cfg.depth
        specs = [spec for some in self.files.values() for spec in some]
        numbers = sum(math.prod(spec.shape) for spec in specs)
        where = "all maps" if cfg.lora.is_everywhere else ", ".join(cfg.lora.maps)
        lora = (
            f"rank {cfg.lora.rank}, scaling {cfg.lora.scaling:g}, of {where}, kept apart"
            if cfg.lora.rank
            else "none apart"
        )
        lines = [
            f"from          {self.source}",
            f"to            {self.out}",
            f"temporal      {cfg.num_layers} layers of width {cfg.dim}, {cfg.num_heads} heads, hidden {cfg.hidden},"
            f" window {cfg.context}, period {cfg.max_period:g}",
            f"depth         {depth.num_layers} layers of width {depth.dim}, {depth.num_heads} heads, hidden {depth.hidden},"
            f" {max(cfg.depth_sets) + 1} weight sets for {cfg.dep_q} codebooks"
            + (f", embeddings of rank {depth.low_rank}" if depth.low_rank else ""),
            f"streams       text ({cfg.text_card}) and {cfg.n_q} codebooks ({cfg.card}), {cfg.dep_q} predicted,"
            f" delays {','.join(map(str, cfg.delays))}",
            f"adapters      {lora}",
            f"TTT layers    {', '.join(map(str, cfg.ttt_layers)) or 'none'}",
            f"tensors       {len(specs)}, {numbers:,} parameters, {self.nbytes:,} bytes, weights in {NAMES[self.dtype]}",
        ]
        if cfg.extra_heads:
            lines.insert(5, f"extra heads   {cfg.extra_heads} of {cfg.extra_heads_dim} outputs")
        lines.append("writes        " + ", ".join([*self._files(), *self.others]))
        lines.append("travels along " + (", ".join(path.name for path in self.copies) or "nothing"))
        return lines + [f"note          {note}" for note in self.notes]

    def _files(self) -> Iterator[str]:
        """Files with their size, those of equal layers told as one."""
        sizes = {name: sum(spec.nbytes for spec in specs) for name, specs in self.files.items()}
        for (_, size), some in itertools.groupby(sizes, lambda name: (name.rsplit("_", 1)[0], sizes[name])):
            first, *rest = some
            if rest:
                yield f"{first} to {rest[-1]} ({len(rest) + 1} files of {size:,} bytes)"
            else:
                yield f"{first} ({size:,} bytes)"


def check_copies(plan: Plan) -> None:
    """Raise `InputError` if a file that travels along has the name of one that is written, or of another."""
    taken = {*plan.files, *plan.others}
    for path in plan.copies:
        if path.name in taken:
            raise InputError(f"{path} cannot travel along, as {path.name} is written anew: rename it in the source.")
        taken.add(path.name)


def carry_out(
    plan: Plan, finish: Callable[[Path, dict[str, dict[str, Any]]], None], metadata: dict[str, str] | None = None
) -> None:
    """Write what `plan` says, all or nothing, with a progress bar if the log is listened to.

    Args:
      plan: what to write.
      finish: is called with the unfinished folder and, by file, {"bytes", "sha256"}; writes `plan.others`.
      metadata: put into the headers of the safetensors.

    Raises `InputError` if the disk is full; whatever goes wrong, nothing stays behind.
    """
    check_new(plan.out)
    parent = plan.out.absolute().parent
    needed = plan.nbytes + sum(path.stat().st_size for path in plan.copies) + SMALL
    free = shutil.disk_usage(parent).free
    full = f"needs {needed:,} bytes: free some space, or give another OUT."
    if free < needed:
        raise InputError(f"the disk of {parent} has {free:,} bytes left, the conversion {full}")
    try:
        headers = sum(len(header(specs, metadata)) for specs in plan.files.values())
        with new_folder(plan.out) as folder, _bar(plan.nbytes + headers) as progress:
            written = write_files(folder, plan.files, progress, metadata)
            for path in plan.copies:
                shutil.copyfile(path, folder / path.name)
                written[path.name] = {
                    "bytes": os.path.getsize(folder / path.name),
                    "sha256": file_digest(folder / path.name),
                }
            finish(folder, written)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        raise InputError(f"the disk of {parent} is full or its quota used up, the conversion {full}") from None


class _bar:
    """A progress bar of bytes; the function to call with those done."""

    def __init__(self, total: int):
        self._total, self._bar = total, None

    def __enter__(self) -> Callable[[int], object]:
        if not log.isEnabledFor(logging.INFO):
            return lambda count: None
        from tqdm import tqdm

        self._bar = tqdm(total=self._total, unit="B", unit_scale=True, mininterval=0.5)
        return self._bar.update

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()
