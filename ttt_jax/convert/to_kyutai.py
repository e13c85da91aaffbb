"""Writes a checkpoint of ours in Kyutai's layout."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
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
from ttt_jax.codec.mimi import file as mimi_file
from ttt_jax.config import LoRAConfig, MoshiConfig
from ttt_jax.convert import kyutai_config, kyutai_names, mimi_files, ttt_layers
from ttt_jax.convert.lora import Adapter, merged
from ttt_jax.convert.mimi_files import MimiPlan
from ttt_jax.convert.model_card import UNKNOWN, front_matter
from ttt_jax.convert.plan import CodecFile, Plan, execute
from ttt_jax.convert.source import CONFIG, MIMI, MOSHI
from ttt_jax.errors import InputError
from ttt_jax.utils import config_json
from ttt_jax.utils.files import check_new, run_and_step
from ttt_jax.utils.paths import local

Dtype = Literal["bfloat16", "float16", "float32"]


class Checkpoint(NamedTuple):
    """A checkpoint, open for reading."""

    cfg: MoshiConfig
    source: dict[str, Any]
    """Its origin: "source" in the config.json of the weights that it began with; {} if there were none."""
    copies: tuple[Path, ...]
    """Files that travel along."""
    codec: Path | None
    """Our file of the Mimi that belongs to it; None if there was none beside the weights."""
    part: Callable[[Tensor, int, int], Piece]
    """From a tensor, `number` and `count` to that one of `count` equal shares of its bytes."""
    dtype: Callable[[Tensor], str]
    """Type of a tensor as files name it."""

    def shares(self, tensor: Tensor, count: int) -> list[Piece]:
        """Returns the bytes of a tensor in `count` equal shares."""
        return [self.part(tensor, i, count) for i in range(count)]


def export(
    checkpoint: str | Path,
    out: str | Path,
    *,
    merge_lora: bool = False,
    dtype: Dtype | None = None,
    dry_run: bool = False,
) -> Plan | MimiPlan:
    """Writes a checkpoint as safetensors and config.json that Kyutai's tools load, or a Mimi of ours as theirs. Returns
    the plan of what is written.

    The arguments are those of `python -m ttt_jax.convert export`. Without `dtype`, trainable weights in float32 take
    the type of the frozen weights. Raises `InputError`, and writes nothing, if the checkpoint is damaged or Kyutai's
    layout cannot express it.
    """
    out = local(out)
    check_new(out)
    if local(checkpoint).is_file():
        if merge_lora or dtype:
            raise InputError(f"{checkpoint} is a file, and a Mimi is written as it is: leave out other options.")
        return mimi_files.export_mimi(local(checkpoint), out, dry_run)
    with contextlib.ExitStack() as stack:
        opened = _watched(_open(local(checkpoint), stack), checkpoint)
        cfg = opened.cfg
        if merge_lora and not cfg.lora.rank:
            raise InputError(f"{checkpoint} has no adapters that could be merged: leave out --merge-lora.")
        if cfg.lora.rank and not merge_lora and not cfg.lora.is_everywhere:
            some = f"has adapters on {', '.join(cfg.lora.maps)} only"
            raise InputError(f"{checkpoint} {some}, but Kyutai's loader wants them on every map: give --merge-lora.")
        exported = dataclasses.replace(cfg, lora=LoRAConfig()) if merge_lora else cfg
        codec = _codec(opened)
        config = _config(exported, opened, codec)
        base = weights.base(cfg)
        # Kyutai's files have one type; the first tensor, an embedding, is trained only with all the others.
        target = {name: short for short, name in NAMES.items()}[dtype] if dtype else opened.dtype(base[0])
        notes = []
        if rounded := sorted({"/".join(t.path) for t in base if not dtype and opened.dtype(t) != target}):
            how = f"are rounded to {NAMES[target]}, the others' type; --dtype float32 keeps them"
            notes.append(f"{', '.join(rounded)} {how}")
        files = {MOSHI: _base_specs(opened, merge_lora, target)}
        others = [CONFIG, "README.md"]
        if cfg.lora.rank and not merge_lora:
            files[weights.LORA] = _lora_specs(opened, target if dtype else None)
        if cfg.ttt_layers:
            files[ttt_layers.TTT] = [
                Spec(ttt_layers.exported_name(t), "F32", t.shape, (opened.part(t, 0, 1),)) for t in weights.ttt(cfg)
            ]
            others.append(ttt_layers.TTT_CONFIG)
        plan = Plan(str(checkpoint), out, exported, target, files, opened.copies, tuple(others), tuple(notes), codec)

        def finish(folder: Path, written: dict[str, dict[str, Any]]) -> None:
            config_json.write_json(folder / CONFIG, config)
            (folder / "README.md").write_text(_readme(plan, opened), encoding="utf-8")
            if cfg.ttt_layers:
                ttt_layers.write_ttt_config(folder / ttt_layers.TTT_CONFIG, cfg)

        execute(plan, finish, dry_run, metadata={"format": "pt"})
        return plan


def _open(path: Path, stack: contextlib.ExitStack) -> Checkpoint:
    if run_and_step(path) is not None:
        from ttt_jax.checkpoints import run_weights  # loads jax

        run = run_weights.load_run(path)
        origin = ({}, (), None)
        if base := run.meta.get("base"):
            with weights.base_of_run(path, **base) as folder:
                origin = _origin(folder)
        return Checkpoint(run.config, *origin, *_of_params(run.params))
    folder = stack.enter_context(weights.Folder(path))

    def part(tensor: Tensor, number: int, count: int) -> Piece:
        return folder.files[tensor.file].piece(tensor.name, number, count)

    return Checkpoint(folder.cfg, *_origin(folder), part, folder.dtype)


def _watched(opened: Checkpoint, checkpoint: str | Path) -> Checkpoint:
    """Returns `opened`. Reading it logs a warning once for each tensor that holds NaN or infinity."""
    warned: set[str] = set()

    def part(tensor: Tensor, number: int, count: int) -> Piece:
        where = f"{checkpoint}: {tensor.file.removesuffix('.safetensors')}/{tensor.name}"
        return watched(opened.part(tensor, number, count), opened.dtype(tensor), where, warned)

    return opened._replace(part=part)


def _origin(folder: weights.Folder) -> tuple[dict[str, Any], tuple[Path, ...], Path | None]:
    """Returns the origin of a folder of weights, the files that travel along, and its Mimi."""
    source, codec = folder.info["source"], weights.codec(folder.path)
    return source, tuple(folder.path / name for name in source["travelling"]), codec and codec.path


def _codec(opened: Checkpoint) -> CodecFile | None:
    """Returns the Mimi to be written, under the name that it had, as far as that is free."""
    if opened.codec is None:
        return None
    name = _last(opened.source.get("mimi") or MIMI)
    taken = name in (MOSHI, weights.LORA, ttt_layers.TTT)
    return mimi_files.kyutais(mimi_file.read(opened.codec), MIMI if taken else name)


def _last(name: str) -> str:
    """Returns the name of a file without folders or repository."""
    return name.rpartition("/")[2]


def _of_params(params: dict[str, Any]) -> tuple[Callable[..., Piece], Callable[[Tensor], str]]:
    """Returns `Checkpoint.part` and `Checkpoint.dtype` of parameters in memory. Leaves may differ in type."""

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


def _base_specs(opened: Checkpoint, merge_lora: bool, target: str) -> list[Spec]:
    cfg, specs = opened.cfg, []
    adapters = {tensor: pair for tensor, *pair in weights.adapters(cfg)}
    for tensor in weights.base(cfg):
        names, dtype = kyutai_names.weight(tensor), opened.dtype(tensor)
        pieces = opened.shares(tensor, len(kyutai_names.modules(tensor)))
        if merge_lora and tensor in adapters:
            downs, ups = (opened.shares(adapter, len(pieces)) for adapter in adapters[tensor])
            kind = opened.dtype(adapters[tensor][0])
            pairs = [Adapter(*pair, kind, cfg.lora.rank, cfg.lora.scaling) for pair in zip(downs, ups, strict=True)]
            pieces = [merged(w, dtype, pair, target, tensor.name) for w, pair in zip(pieces, pairs, strict=True)]
            dtype = target
        specs += _specs(names, pieces, dtype, target)
    return specs


def _lora_specs(opened: Checkpoint, target: str | None) -> list[Spec]:
    cfg, specs = opened.cfg, []
    for tensor, *pair in weights.adapters(cfg):
        for adapter, names in zip(pair, kyutai_names.adapter(tensor, cfg.lora.rank), strict=True):
            dtype = opened.dtype(adapter)
            pieces = opened.shares(adapter, len(names.parts))
            specs += _specs(names._replace(fused=()), pieces, dtype, target or dtype)
    return specs


def _specs(names: kyutai_names.Names, pieces: list[Piece], dtype: str, target: str) -> list[Spec]:
    """Returns Kyutai's tensors, as they release them, from one piece for each map."""
    specs, rest = [], iter(pieces)
    for key in (keys := kyutai_names.released(names)):
        parts = itertools.islice(rest, len(pieces) // len(keys))
        casted = tuple(cast(piece, dtype, target, key.name) for piece in parts)
        specs.append(Spec(key.name, target, key.shape, casted))
    return specs


def _config(cfg: MoshiConfig, opened: Checkpoint, codec: CodecFile | None) -> dict[str, Any]:
    source = opened.source
    config = kyutai_config.export(cfg, source.get("config") or {}) | {"moshi_name": MOSHI}
    config.pop("lora_name", None)
    if cfg.lora.rank:
        config["lora_name"] = weights.LORA
    known = {"mimi_name": "mimi", "tokenizer_name": "tokenizer", "lm_gen_config": "lm_gen_config"}
    config |= {key: source[name] for key, name in known.items() if source.get(name)}
    if codec:
        config["mimi_name"] = codec.name
        if config.get("mimi_config_name"):  # which travels along
            config["mimi_config_name"] = _last(config["mimi_config_name"])
    return config


def _readme(plan: Plan, opened: Checkpoint) -> str:
    front = front_matter(opened.source.get("licence", UNKNOWN))
    origin = f" The weights come from {opened.source['repository']}." if opened.source.get("repository") else ""
    ttt = ""
    if layers := ", ".join(map(str, plan.cfg.ttt_layers)):
        names = f"`{ttt_layers.TTT}` and `{ttt_layers.TTT_CONFIG}`"
        ttt = f"{names} hold TTT layers (layers {layers}), which Kyutai's tools do not read.\n"
    return f"{front}Written by `python -m ttt_jax.convert export`, in the layout of PyPI `moshi`.{origin}\n{ttt}"
