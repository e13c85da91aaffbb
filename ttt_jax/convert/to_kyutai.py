"""A checkpoint of ours to Kyutai's layout."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import operator
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from ttt_jax.checkpoints import weights
from ttt_jax.checkpoints.safetensors_reader import DTYPES, NAMES, Piece, cast, of_array, watched
from ttt_jax.checkpoints.safetensors_writer import Spec
from ttt_jax.checkpoints.weights import Tensor
from ttt_jax.config import LoRAConfig, MoshiConfig
from ttt_jax.convert import kyutai_config, kyutai_names, ttt_layers
from ttt_jax.convert.lora import merged
from ttt_jax.convert.model_card import UNKNOWN, front_matter
from ttt_jax.convert.plan import Plan, carry_out, check_copies, log
from ttt_jax.convert.source import CONFIG, MOSHI
from ttt_jax.errors import InputError
from ttt_jax.utils import config_json
from ttt_jax.utils.files import check_new, run_and_step
from ttt_jax.utils.paths import local

Dtype = Literal["bfloat16", "float16", "float32"]


class Opened(NamedTuple):
    """A checkpoint, open for reading."""

    cfg: MoshiConfig
    source: dict[str, Any]
    """What is known of where it came from."""
    copies: tuple[Path, ...]
    """Files that travel along."""
    part: Callable[[Tensor, int, int], Piece]
    """Piece of a tensor: one of so many equal shares."""
    dtype: Callable[[Tensor], str]
    """Type of a tensor as files name it."""


def export(
    checkpoint: str | Path,
    out: str | Path,
    *,
    merge_lora: bool = False,
    dtype: Dtype | None = None,
    dry_run: bool = False,
) -> Plan:
    """Write a checkpoint as safetensors and config.json that Kyutai's tools load; what was or would be written.

    Args:
      checkpoint: a folder that `kyutai` made, or the folder of a training run.
      out: the new folder.
      merge_lora: whether adapters are added to the weights; else they are written as a LoRA file of Kyutai's.
      dtype: type of weights and adapters; None: as they are, those of the base that were trained in float32 over a frozen rest rounded
        to the type of that.
      dry_run: whether to check all and write nothing.

    Raises `InputError` if the checkpoint is damaged or Kyutai's layout cannot express it; then nothing is written.
    """
    out = local(out)
    check_new(out)
    with contextlib.ExitStack() as stack:
        found = _watched(_open(local(checkpoint), stack), checkpoint)
        cfg = found.cfg
        if merge_lora and not cfg.lora.rank:
            raise InputError(f"{checkpoint} has no adapters that could be merged: leave out --merge-lora.")
        if cfg.lora.rank and not merge_lora and not cfg.lora.is_everywhere:
            raise InputError(
                f"{checkpoint} has adapters on {', '.join(cfg.lora.maps)} only, but Kyutai's loader wants them on every linear map:"
                " give --merge-lora."
            )
        told = dataclasses.replace(cfg, lora=LoRAConfig()) if merge_lora else cfg
        config = _config(told, found)
        base = weights.base(cfg)
        # Kyutai's files have one type; the first tensor, an embedding, is trained only with all the others.
        target = {name: short for short, name in NAMES.items()}[dtype] if dtype else found.dtype(base[0])
        notes = []
        if rounded := sorted({"/".join(t.path) for t in base if not dtype and found.dtype(t) != target}):
            notes.append(
                f"{', '.join(rounded)} are rounded to {NAMES[target]}, the others' type; --dtype float32 keeps them"
            )
        files = {MOSHI: _base_specs(found, merge_lora, target)}
        others = [CONFIG, "README.md"]
        if cfg.lora.rank and not merge_lora:
            files[weights.LORA] = _lora_specs(found, target if dtype else None)
        if cfg.ttt_layers:
            files[ttt_layers.TTT] = [
                Spec(ttt_layers.exported_name(t), "F32", t.shape, (found.part(t, 0, 1),)) for t in weights.ttt(cfg)
            ]
            others.append(ttt_layers.TTT_CONFIG)
        plan = Plan(str(checkpoint), out, told, target, files, found.copies, tuple(others), tuple(notes))
        check_copies(plan)
        for line in plan.lines():
            log.info(line)

        def finish(folder: Path, written: dict[str, dict[str, Any]]) -> None:
            config_json.write_json(folder / CONFIG, config)
            (folder / "README.md").write_text(_readme(plan, found), encoding="utf-8")
            if cfg.ttt_layers:
                ttt_layers.write_ttt_config(folder / ttt_layers.TTT_CONFIG, cfg)

        if not dry_run:
            carry_out(plan, finish, metadata={"format": "pt"})
        return plan


def _open(path: Path, stack: contextlib.ExitStack) -> Opened:
    if run_and_step(path) is not None:
        from ttt_jax.checkpoints import run_checkpoints  # loads jax

        run = run_checkpoints.load_run(path)
        base = run.meta.get("base")
        origin = _base_origin(path, **base) if base else ({}, ())
        return Opened(run.config, *origin, *_of_params(run.params))
    folder = stack.enter_context(weights.Folder(path))

    def part(tensor: Tensor, number: int, count: int) -> Piece:
        return folder.files[tensor.file].piece(tensor.name, number, count)

    return Opened(folder.cfg, *_origin(folder), part, folder.dtype)


def _watched(found: Opened, checkpoint: str | Path) -> Opened:
    """`found`, reading which warns once of each tensor that holds NaN or infinity."""
    told: set[str] = set()

    def part(tensor: Tensor, number: int, count: int) -> Piece:
        where = f"{checkpoint}: {tensor.file.removesuffix('.safetensors')}/{tensor.name}"
        return watched(found.part(tensor, number, count), found.dtype(tensor), where, told)

    return found._replace(part=part)


def _origin(folder: weights.Folder) -> tuple[dict[str, Any], tuple[Path, ...]]:
    """What a folder of weights says of where they come from, and the files that travel along."""
    source = folder.info["source"]
    return source, tuple(folder.path / name for name in source["travelling"])


def _base_origin(run: Path, path: str, digest: str) -> tuple[dict[str, Any], tuple[Path, ...]]:
    """`_origin` of the weights in `path` that a run started from, whose licence and files are the run's, too."""
    if (Path(path) / weights.CONFIG).is_file():
        with weights.Folder(path) as folder:
            if folder.info["digest"] == digest:
                return _origin(folder)
    raise InputError(
        f"{path}, the weights that {run} started from, is gone or another, and with it their licence: bring it back to that place."
    )


def _of_params(
    params: dict[str, Any],
) -> tuple[Callable[[Tensor, int, int], Piece], Callable[[Tensor], str]]:
    """`Opened.part` and `Opened.dtype` of parameters in memory, each leaf of a type of its own."""

    def leaf(tensor: Tensor) -> Any:
        return functools.reduce(operator.getitem, tensor.path, params)

    def part(tensor: Tensor, number: int, count: int) -> Piece:
        def make() -> np.ndarray:
            layers = np.asarray(leaf(tensor)).reshape(-1, *tensor.shape)  # one, if the leaf is not stacked
            return layers[tensor.index or 0].reshape(count, -1)[number]

        return of_array(leaf(tensor).dtype.itemsize * math.prod(tensor.shape) // count, make)

    def dtype(tensor: Tensor) -> str:
        return next(name for name, kind in DTYPES.items() if kind == leaf(tensor).dtype)

    return part, dtype


def _base_specs(found: Opened, merge_lora: bool, target: str) -> list[Spec]:
    cfg, specs = found.cfg, []
    adapters = {tensor: pair for tensor, *pair in weights.adapters(cfg)}
    for tensor in weights.base(cfg):
        named, dtype = kyutai_names.weight(tensor), found.dtype(tensor)
        pieces = _shares(found, tensor, len(kyutai_names.modules(tensor)))
        if merge_lora and tensor in adapters:
            a, b = adapters[tensor]
            pieces = [
                merged(w, dtype, down, up, found.dtype(a), cfg.lora.rank, cfg.lora.scaling, target, tensor.name)
                for w, down, up in zip(
                    pieces, _shares(found, a, len(pieces)), _shares(found, b, len(pieces)), strict=True
                )
            ]
            dtype = target
        specs += _specs(named, pieces, dtype, target)
    return specs


def _lora_specs(found: Opened, target: str | None) -> list[Spec]:
    cfg, specs = found.cfg, []
    for tensor, *pair in weights.adapters(cfg):
        for adapter, named in zip(pair, kyutai_names.adapter(tensor, cfg.lora.rank), strict=True):
            dtype = found.dtype(adapter)
            pieces = _shares(found, adapter, len(named.parts))
            specs += _specs(named._replace(fused=()), pieces, dtype, target or dtype)
    return specs


def _shares(found: Opened, tensor: Tensor, count: int) -> list[Piece]:
    return [found.part(tensor, i, count) for i in range(count)]


def _specs(named: kyutai_names.Names, pieces: list[Piece], dtype: str, target: str) -> list[Spec]:
    """Tensors of theirs, as they release them, that hold `pieces`, one piece for each map."""
    keys = kyutai_names.released(named)
    share = len(pieces) // len(keys) if keys else 0
    return [
        Spec(
            key.name,
            target,
            key.shape,
            tuple(cast(piece, dtype, target, key.name) for piece in pieces[i * share : (i + 1) * share]),
        )
        for i, key in enumerate(keys)
    ]


def _config(cfg: MoshiConfig, found: Opened) -> dict[str, Any]:
    source = found.source
    config = kyutai_config.export(cfg, source.get("config") or {}) | {"moshi_name": MOSHI}
    config.pop("lora_name", None)
    if cfg.lora.rank:
        config["lora_name"] = weights.LORA
    if source.get("mimi"):
        config["mimi_name"] = source["mimi"]
    if source.get("tokenizer"):
        config["tokenizer_name"] = source["tokenizer"]
    if source.get("lm_gen_config"):
        config["lm_gen_config"] = source["lm_gen_config"]
    return config


def _readme(plan: Plan, found: Opened) -> str:
    front = front_matter(found.source.get("licence", UNKNOWN))
    origin = f" The weights come from {found.source['repository']}." if found.source.get("repository") else ""
    ttt = (
        f"`{ttt_layers.TTT}` and `{ttt_layers.TTT_CONFIG}` hold TTT layers (layers {', '.join(map(str, plan.cfg.ttt_layers))}), which"
        " Kyutai's tools do not read.\n"
        if plan.cfg.ttt_layers
        else ""
    )
    return f"{front}Written by `python -m ttt_jax.convert export`, in the layout of PyPI `moshi`.{origin}\n{ttt}"
