"""Converts a Mimi, in Kyutai's layout or in Hugging Face's, to a file of ours, and back to Kyutai's layout."""

from __future__ import annotations

import contextlib
import functools
import logging
from pathlib import Path
from typing import NamedTuple

import safetensors.numpy

from ttt_jax.codec.mimi import file
from ttt_jax.codec.mimi.config import Dtype, MimiConfig, Use, Window
from ttt_jax.convert import mimi_config, mimi_names
from ttt_jax.convert.model_card import UNKNOWN, front_matter
from ttt_jax.convert.plan import SMALL, CodecFile, room_for
from ttt_jax.convert.source import MIMI, MOSHI, Source, find
from ttt_jax.convert.state_dict import INDEX, open_state_dict
from ttt_jax.errors import InputError
from ttt_jax.utils import config_json
from ttt_jax.utils.files import check_new, check_new_file, new_folder
from ttt_jax.utils.paths import local

log = logging.getLogger("convert")
ENDING = ".safetensors"
README = "README.md"
CLASS = "MimiModel"


class MimiPlan(NamedTuple):
    """A conversion of a Mimi whose input is checked."""

    source: str
    out: Path
    mimi: file.Mimi
    writes: tuple[str, ...]
    """Names of files."""
    notes: tuple[str, ...]

    def lines(self) -> list[str]:
        """Describes the plan line by line."""
        cfg, use, arrays = self.mimi.cfg, self.mimi.use, self.mimi.params.values()
        numbers = sum(array.size for array in arrays)
        lines = [
            f"from          {self.source}",
            f"to            {self.out}",
            f"audio         {cfg.sample_rate} Hz, {cfg.frame_rate:g} frames a second of {cfg.frame_size} samples",
            f"convolutions  {cfg.filters} to {cfg.widths[-1]} channels, factors {','.join(map(str, cfg.ratios))}, then"
            f" {cfg.stride}",
            f"transformers  {cfg.num_layers} layers of {cfg.dim}, {cfg.num_heads} heads, hidden {cfg.hidden},"
            f" window {cfg.context}, period {cfg.max_period:g}",
            f"codebooks     {cfg.codebooks} of {cfg.cardinality} entries of width {cfg.quantizer_dim}",
            f"use           {use.num_codebooks} codebooks, {use.dtype}, window {use.window}",
            f"tensors       {len(arrays)}, {numbers:,} numbers, {_nbytes(self.mimi):,} bytes",
            f"name          {self.mimi.name}",
            f"digest        {self.mimi.digest}",
            f"writes        {', '.join(self.writes)}",
        ]
        return lines + [f"note          {note}" for note in self.notes]


def mimi(
    source: str | Path,
    out: str | Path,
    *,
    config: str | Path | None = None,
    num_codebooks: int = Use.num_codebooks,
    dtype: Dtype = Use.dtype,
    window: Window = Use.window,
    dry_run: bool = False,
) -> MimiPlan:
    """Converts a Mimi to a file of ours. Returns the plan of what is written.

    The arguments are those of `python -m ttt_jax.convert mimi`. Raises `InputError`, and writes nothing, if anything is
    missing, left over, of a wrong shape or type, not finite, contradicts the configuration, or is not supported.
    """
    out = local(out)
    check_new_file(out, ENDING)
    notes: list[str] = []
    files, use = find(str(source)), Use(num_codebooks, dtype, window)
    content = _read(files, _path(files), None if config is None else local(config), use, files.licence()[0], notes)
    plan = MimiPlan(str(source), out, content, (out.name,), tuple(notes))
    _log(plan)
    if not dry_run:
        with room_for(out, _nbytes(content) + SMALL):
            file.write(out, content)
    return plan


def export_mimi(path: Path, out: Path, dry_run: bool) -> MimiPlan:
    """Writes a Mimi of ours in Kyutai's layout into the new folder `out`. Returns the plan of what is written.

    Raises `InputError`, and writes nothing, if the file is another or damaged.
    """
    check_new(out)
    content = file.read(path)
    is_kyutais = content.cfg == MimiConfig()
    writes = (MIMI, *(() if is_kyutais else (mimi_config.NAME,)), README)
    plan = MimiPlan(str(path), out, content, writes, ())
    _log(plan)
    if not dry_run:
        with room_for(out, _nbytes(content) + SMALL), new_folder(out) as folder:
            write_kyutai(content, folder / MIMI)
            if not is_kyutais:
                config_json.write_json(folder / mimi_config.NAME, mimi_config.to_kyutai(content.cfg))
            about = "Mimi, written by `python -m ttt_jax.convert export` in the layout of PyPI `moshi`."
            text = f"{front_matter(content.metadata['licence'])}{about} It comes from {content.metadata['source']}.\n"
            (folder / README).write_text(text, encoding="utf-8")
    return plan


def write_kyutai(content: file.Mimi, path: Path) -> None:
    """Writes Kyutai's file of a Mimi."""
    tensors = mimi_names.to_kyutai(content.params, content.cfg)
    path.write_bytes(safetensors.numpy.save(tensors, metadata={"format": "pt"}))


def beside(source: Source, num_codebooks: int, notes: list[str]) -> file.Mimi | None:
    """Returns the Mimi beside a language model of Kyutai's; None, and a note, if it cannot be had."""
    name = source.raw.get("mimi_name") or MIMI
    try:
        path = source.fetch(name)
    except InputError as error:  # of the hub
        notes.append(f"Mimi is left out: {error}")
        return None
    if path is None:
        notes.append(f"Mimi ({name}) was not found, so none travels along")
        return None
    licence = UNKNOWN if "://" in name else source.licence()[0]
    return _read(source._replace(file=None), path, None, Use(num_codebooks), licence, notes)


def ours(content: file.Mimi, name: str) -> CodecFile:
    """Returns what is written as our file of a model's Mimi."""
    return CodecFile(name, _about(content), _nbytes(content), functools.partial(file.write, mimi=content))


def kyutais(content: file.Mimi, name: str) -> CodecFile:
    """Returns what is written as Kyutai's file of a model's Mimi."""
    return CodecFile(name, _about(content), _nbytes(content), functools.partial(write_kyutai, content))


def _about(content: file.Mimi) -> str:
    return f"{content.name}, {content.use.num_codebooks} codebooks used, digest {content.digest[:16]}"


def _nbytes(content: file.Mimi) -> int:
    return sum(array.nbytes for array in content.params.values())


def _log(plan: MimiPlan) -> None:
    for line in plan.lines():
        log.info(line)


def _path(source: Source) -> Path:
    """Returns the path of the file that holds the Mimi of `source`, or of the index of its shards."""
    if source.file is not None:
        return source.file
    if mimi_config.is_huggingface(source.raw):
        return source.fetch(MOSHI) or source.fetch(MOSHI + INDEX) or source.need(MOSHI, "the weights")
    return source.need(source.raw.get("mimi_name") or MIMI, "Kyutai's file of Mimi")


def _read(source: Source, path: Path, config: Path | None, use: Use, licence: str, notes: list[str]) -> file.Mimi:
    """Returns the Mimi in the file `path` of `source`. Raises `InputError`."""
    with contextlib.ExitStack() as opened:
        state_dict = open_state_dict(path, source.fetch, opened, notes)
        if "encoder/first/w" in state_dict.tensors:
            raise InputError(f"{path} was converted already: use it as it is, or write Kyutai's by export.")
        raw, where = _configuration(source, config)
        theirs = mimi_names.is_huggingface(state_dict.tensors)
        described = raw is not None and mimi_config.is_huggingface(raw)
        if theirs and not described:
            names = f"has the names of Hugging Face's {CLASS}, but no config.json of one was found"
            raise InputError(f"{path} {names}: give it by --config.")
        if described and not theirs:
            names = f"describes Hugging Face's {CLASS}, whose names {path} does not have"
            raise InputError(f"{where} {names}: give the {mimi_config.NAME} that belongs to it by --config.")
        if raw is None:
            cfg, advice = MimiConfig(), f"give its {mimi_config.NAME} by --config"
        else:
            cfg, advice = (mimi_config.from_huggingface if theirs else mimi_config.from_kyutai)(raw, where), ""
        if (most := max(cfg.num_layers, cfg.codebooks, len(cfg.ratios))) > len(state_dict.tensors):
            few = f"which has {most} layers or codebooks, as it holds only {len(state_dict.tensors)} tensors in all"
            raise InputError(f"{path} does not fit {where}, {few}: give a Mimi and a configuration that fit.")
        if theirs:
            params = mimi_names.from_huggingface(state_dict, cfg, where, advice)
        else:
            params = mimi_names.from_kyutai(state_dict, cfg, where, advice, notes)
    return file.make(params, cfg, use, licence=licence, source=_origin(source, path))


def _configuration(source: Source, config: Path | None) -> tuple[dict | None, str]:
    """Returns the configuration of a Mimi in either layout and what names it in messages; None for Kyutai's Mimi."""
    if config is not None:
        return mimi_config.read(config), str(config)
    if mimi_config.is_huggingface(source.raw):
        return source.raw, source.where
    if name := source.raw.get("mimi_config_name"):
        path = source.need(name, "the configuration of Mimi")
    else:
        path = source.fetch(mimi_config.NAME) if source.config is None else None
    return (None, "Kyutai's Mimi") if path is None else (mimi_config.read(path), str(path))


def _origin(source: Source, path: Path) -> str:
    """Returns where a Mimi is from."""
    if source.repository is None:
        return path.name
    name = source.raw.get("mimi_name") or ""
    if "://" in name and name.endswith(f"/{path.name}"):
        return name
    return f"hf://{source.repository}/{path.name}" + (f"@{source.revision}" if source.revision else "")
