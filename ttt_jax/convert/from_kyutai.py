"""Converts Kyutai's weights to a folder of ours."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from ttt_jax.checkpoints import weights
from ttt_jax.checkpoints.differences import group
from ttt_jax.checkpoints.safetensors_reader import DTYPES, NAMES, TensorFile
from ttt_jax.checkpoints.safetensors_writer import Spec
from ttt_jax.codec.mimi.file import MADE_BY
from ttt_jax.config import LoRAConfig, MoshiConfig, TTTConfig, model_preset
from ttt_jax.convert import (
    from_huggingface,
    from_original,
    kyutai_config,
    kyutai_names,
    mimi_files,
    mimi_names,
    ttt_layers,
    unsupported,
)
from ttt_jax.convert.lora import Adapter, merged
from ttt_jax.convert.model_card import UNKNOWN
from ttt_jax.convert.plan import Plan, execute
from ttt_jax.convert.source import FINE_TUNED, Source, find, read_config
from ttt_jax.convert.state_dict import (
    Match,
    Matched,
    StateDict,
    StoredTensor,
    common_type,
    match,
    open_state_dict,
    refuse_misfits,
)
from ttt_jax.errors import InputError
from ttt_jax.utils import config_json
from ttt_jax.utils.files import check_new
from ttt_jax.utils.paths import local

NO_TTT = TTTConfig(layers="none")
DEFAULT_SCALING = 2.0  # of Kyutai's loader
LARGEST_SCALING = float(np.finfo(np.float32).max)


def kyutai(
    source: str | Path,
    out: str | Path,
    *,
    config: str | Path | None = None,
    lora: str | Path | None = None,
    merge_lora: bool = False,
    ttt: TTTConfig = NO_TTT,
    seed: int = 0,
    dry_run: bool = False,
) -> Plan:
    """Converts Kyutai's weights, in their layout or in that of Hugging Face. Returns the plan of what is written.

    The arguments are those of `python -m ttt_jax.convert kyutai`. The output projections of added TTT layers are 0, so
    the model's outputs do not change. Raises `InputError`, and writes nothing, if anything is missing, left over, of a
    wrong shape or type, contradicts the configuration, or is not supported.
    """
    out = local(out)
    check_new(out)
    with contextlib.ExitStack() as opened:
        files = find(str(source))
        if config is not None:
            files = files._replace(config=read_config(local(config)), where=str(local(config)))
        return _Conversion(files, opened).run(out, lora, merge_lora, ttt, seed, dry_run)


def _configuration(source: Source) -> dict[str, Any] | None:
    """Returns Kyutai's configuration, translated if it is Hugging Face's; None if there is none."""
    raw = source.config
    if raw is None:
        return None
    if from_huggingface.is_config(raw):
        return kyutai_config.export(from_huggingface.architecture(raw, source.where), {})
    unsupported.check_config(raw, source.where)
    return raw


class _Conversion:
    """One conversion; collects notes for the user on the way."""

    def __init__(self, source: Source, opened: contextlib.ExitStack):
        self.source, self.opened = source, opened
        self.raw = _configuration(source)
        self.notes: list[str] = []

    def run(
        self, out: Path, lora: str | Path | None, merge_lora: bool, ttt: TTTConfig, seed: int, dry_run: bool
    ) -> Plan:
        """Does the work of `kyutai`."""
        source, notes = self.source, self.notes
        state_dict, original = self.weights()
        lora_file, trained = self.lora_file(lora, state_dict)
        if original is not None and trained is not None:
            both = f"{state_dict.path} and {trained.path}"
            raise InputError(f"{both} both hold TTT layers of the original: take one of them away.")
        has_adapters = lora_file is not None and (trained is None or bool(_adapter_keys(lora_file.tensors)))
        if merge_lora and not has_adapters:
            how = "give --lora FILE, or leave out --merge-lora"
            raise InputError(f"{source.name} names no adapters that could be merged: {how}.")
        cfg, base = self.base(state_dict, lora_file)
        files: dict[str, list[Spec]] = {}
        apart: dict[str, list[Spec]] = {}
        if has_adapters:
            rank, scaling, adapters = self.adapters(cfg, lora_file)
            if merge_lora:
                base = _merge(base, adapters, rank, scaling, lora_file.path)
            else:
                cfg = dataclasses.replace(cfg, lora=LoRAConfig(rank, scaling))
                apart[weights.LORA] = [tensor.spec(adapters.dtype) for tensor in adapters.matches]
        for tensor in base.matches:
            files.setdefault(tensor.tensor.file, []).append(tensor.spec(base.dtype))
        files |= apart
        cfg, parameters = self.ttt(cfg, original or trained, ttt, seed)
        for tensor in weights.ttt(cfg):
            files.setdefault(tensor.file, []).append(ttt_layers.ttt_spec(tensor, parameters))

        licence, licences = source.licence()
        tokenizer = source.tokenizer()
        if tokenizer is None:
            notes.append("no tokenizer was found, so none travels along")
        if licence == UNKNOWN and not licences:
            notes.append("the source names no licence of the weights, which is recorded as unknown")
        # Moshi reads the codes of two streams, its own and the user's.
        mimi = mimi_files.beside(source, cfg.n_q // 2, notes)
        copies = tuple(path for path in (*licences, tokenizer, source.mimi_config()) if path)
        about = {
            "name": source.name,
            "repository": source.repository,
            "revision": source.revision,
            "file": state_dict.path.name,
            "config": source.config,
            "dtype": NAMES[base.dtype],
            "lora": lora_file.path.name if lora_file else None,
            "lora_merged": merge_lora,
            "lm_gen_config": source.raw.get("lm_gen_config", {}),
            "tokenizer": tokenizer.name if tokenizer else None,
            "mimi": from_huggingface.MIMI if from_huggingface.is_config(source.raw) else source.mimi(),
            "licence": licence,
            "travelling": [path.name for path in copies],
        }

        def finish(folder: Path, written: dict[str, dict[str, Any]]) -> None:
            info = {
                "format": weights.FORMAT,
                "model": config_json.to_dict(cfg),
                "source": about,
                "files": written,
                "digest": weights.digest(weights.base(cfg), written),
            }
            if mimi is not None:
                info["codec"] = {"name": mimi.name, "digest": mimi.digest, "file": weights.MIMI}
            config_json.write_json(folder / weights.CONFIG, info)

        codec = None if mimi is None else mimi_files.ours(mimi, weights.MIMI)
        plan = Plan(source.name, out, cfg, base.dtype, files, copies, (weights.CONFIG,), tuple(notes), codec)
        execute(plan, finish, dry_run)
        return plan

    def weights(self) -> tuple[StateDict, from_original.Layers | None]:
        """Returns the tensors of the base, under Kyutai's names, and TTT layers of the original among them."""
        source = self.source
        path, beside = source.weights()
        state_dict, layers = from_original.split(open_state_dict(path, beside, self.opened, self.notes))
        state_dict = state_dict.watched()
        if layers is not None:
            from_original.check_base(state_dict)
        if path.name == FINE_TUNED and source.file is None and not from_original.is_checkpoint(source):
            self.notes.append(
                f"{FINE_TUNED}, moshi-finetune's name of a full fine-tune, is taken, as no other weights are there"
            )
        if mimi_names.is_mimi(state_dict.tensors):
            raise InputError(
                f"{state_dict.path} is a Mimi, the audio codec: convert it by `{MADE_BY} SOURCE OUT`, or give the"
                " folder of a language model, whose Mimi comes along."
            )
        is_huggingface = from_huggingface.is_config(source.raw)
        if from_huggingface.is_layout(state_dict.tensors):
            if not is_huggingface:
                names = f"has the names of Hugging Face's {from_huggingface.CLASS}"
                raise InputError(
                    f"{state_dict.path} {names}, but {source.where} is not its config.json: give that by --config."
                )
            cfg = from_huggingface.architecture(source.config, source.where)
            return from_huggingface.to_kyutai_names(state_dict, cfg, source.where, self.notes), None
        if is_huggingface:
            raise InputError(
                f"{source.where} describes Hugging Face's {from_huggingface.CLASS}, whose names {state_dict.path} does"
                " not have: give the config.json that belongs to the weights by --config."
            )
        mixed = _adapter_keys(state_dict.tensors) + [key for key in state_dict.tensors if ".frozen_W." in key]
        if mixed and len(mixed) == len(state_dict.tensors):
            how = "give the weights that they belong to as SOURCE, and this file by --lora"
            raise InputError(f"{state_dict.path} holds adapters only: {how}.")
        if mixed:
            how = "merge them, or write them into a file of their own and give it by --lora"
            raise InputError(f"{state_dict.path} holds adapters among the weights ({group(mixed)}): {how}.")
        return state_dict, layers

    def base(self, state_dict: StateDict, lora_file: StateDict | None) -> tuple[MoshiConfig, Matched]:
        """Returns the architecture and all tensors of the base."""
        source, notes = self.source, self.notes
        shapes = {key: stored.shape for key, stored in state_dict.tensors.items()}
        unsupported.check_keys(shapes, state_dict.path)
        dtype = common_type(state_dict.tensors)
        raw = kyutai_config.export(model_preset("moshi-7b"), {}) if self.raw is None else self.raw
        cfg = kyutai_config.architecture(raw, shapes, dtype, source.where)
        kyutai_config.check_counts(cfg, len(shapes), state_dict.path, source.where)
        wanted = [(tensor, kyutai_names.weight(tensor)) for tensor in weights.base(cfg)]
        tensors = state_dict.tensors | self.replaced(lora_file, dtype)
        matched = match(wanted, tensors, state_dict.path)
        if not matched.problems:
            if source.config is None:
                notes.append(
                    f"there is no {source.where}; the tensors are those of the 7B, whose configuration is taken"
                )
            for key, (expected, actual) in kyutai_config.hidden_widths(raw, cfg).items():
                if expected != actual:
                    notes.append(f"{key} would give hidden width {expected}; the tensors have {actual}, which is taken")
            if lora_file is None and raw.get("lora"):
                notes.append(
                    f"{source.where} names adapters (lora=true), but there is no file of them and the weights are"
                    " complete: they are taken as they are, as of a full fine-tune"
                )
            return cfg, matched
        if source.config is None:
            problems = "; ".join(problem for texts in matched.problems.values() for problem in texts)
            alone = "has no config.json beside it and does not fit the 7B"
            raise InputError(f"{state_dict.path} {alone}, as it {problems}: give --config FILE.")
        refuse_misfits(matched.problems, source.where)

    def replaced(self, lora_file: StateDict | None, dtype: str) -> dict[str, StoredTensor]:
        """Returns the tensors of a LoRA file that are no adapters, such as fine-tuned tables, as type `dtype`."""
        if lora_file is None:
            return {}
        adapters = _adapter_keys(lora_file.tensors)
        tensors = {key: stored for key, stored in lora_file.tensors.items() if key not in adapters}
        if tensors:
            self.notes.append(f"{group(tensors)} of the LoRA file replace those of the base")
        others = [key for key, one in tensors.items() if one.dtype != dtype and {one.dtype, dtype} <= DTYPES.keys()]
        if others:
            self.notes.append(f"{group(others)} of the LoRA file are cast to {NAMES[dtype]}, the type of the weights")
        return tensors | {key: tensors[key].cast(dtype) for key in others}

    def lora_file(
        self, lora: str | Path | None, base: StateDict
    ) -> tuple[StateDict | None, from_original.Layers | None]:
        """Returns the tensors of the adapters' file, None if there is none, and TTT layers of the original in it."""
        path = self.lora_path(lora)
        if path is None:
            if self.source.folder is not None and self.source.fetch(weights.LORA) is not None:
                unnamed = f"but {self.source.where} names no adapters (lora), so it is left out"
                self.notes.append(f"{weights.LORA} lies beside the weights, {unnamed}: give it by --lora to have it")
            return None, None

        def beside(name: str) -> Path | None:
            sibling = path.parent / name
            return sibling if sibling.is_file() else None

        state_dict, layers = from_original.split(open_state_dict(path, beside, self.opened, self.notes), base.tensors)
        return state_dict.watched(), layers

    def lora_path(self, lora: str | Path | None) -> Path | None:
        """Returns the path of the LoRA file that the user or config.json names."""
        source = self.source
        if lora is not None:
            path = local(lora)
            if "://" in str(lora) and not path.exists():
                path = source.fetch(str(lora))
            if path is None or not path.is_file():
                raise InputError(f"{lora} is not a file: give --lora a LoRA file of Kyutai's.")
            return path
        if name := source.raw.get("lora_name"):
            return source.need(name, "the LoRA file")
        return source.fetch(weights.LORA) if source.raw.get("lora") or from_original.is_checkpoint(source) else None

    def adapters(self, cfg: MoshiConfig, lora_file: StateDict) -> tuple[int, float, Matched]:
        """Returns rank, scaling and all tensors of the adapters."""
        where, raw = self.lora_config(lora_file.path)
        tensors = {key: lora_file.tensors[key] for key in _adapter_keys(lora_file.tensors)}
        rank = kyutai_names.lora_rank({key: stored.shape for key, stored in tensors.items()})
        if not rank:
            missing = f"no adapters (keys that end in {kyutai_names.LORA_B})"
            raise InputError(f"{lora_file.path} holds {missing}: give a LoRA file of Kyutai's.")
        if raw.get("lora_rank", rank) != rank:
            stored = f"the adapters in {lora_file.path} have rank {rank}"
            raise InputError(f"{where} gives lora_rank {raw['lora_rank']!r}, but {stored}: correct it there.")
        scaling = config_json.conform(float, raw.get("lora_scaling", DEFAULT_SCALING), where, "lora_scaling")
        if not abs(scaling) <= LARGEST_SCALING:
            rule = "a number within the range of float32"
            raise InputError(f"{where}: lora_scaling is {scaling}, but must be {rule}; correct it there.")
        if "lora_scaling" not in raw:
            self.notes.append(f"no lora_scaling is given, so that of Kyutai's loader is taken ({DEFAULT_SCALING:g})")
        wanted = []
        for tensor in weights.base(cfg):
            if tensor.inputs:
                wanted += zip(weights.adapter(tensor, rank), kyutai_names.adapter(tensor, rank), strict=True)
        matched = match(wanted, tensors, lora_file.path)
        if matched.problems:
            refuse_misfits(matched.problems, "the model", advice="give the LoRA file that belongs to it")
        return rank, scaling, matched

    def lora_config(self, lora_path: Path) -> tuple[str, dict[str, Any]]:
        """Returns the config.json with the settings of the adapters, its name first: the one beside their file wins."""
        source, beside = self.source, lora_path.parent / weights.CONFIG
        in_source = source.folder is not None and lora_path.parent.resolve() == source.folder.resolve()
        if beside.is_file() and not in_source and str(beside) != source.where:
            raw = config_json.read_json(beside, "the config.json of a LoRA file")
            if isinstance(raw, dict) and kyutai_config.LORA & raw.keys():
                return str(beside), raw
        return source.where, source.raw

    def ttt(
        self, cfg: MoshiConfig, original: from_original.Layers | None, ttt: TTTConfig, seed: int
    ) -> tuple[MoshiConfig, TensorFile | ttt_layers.Parameters]:
        """Returns `cfg` with TTT layers, and their tensors: the original's, exported ones, or new ones."""
        source = self.source
        path = source.fetch(ttt_layers.TTT_CONFIG)
        stored = [str(where) for where in (path, original and original.path) if where is not None]
        if len(stored) > 1:
            raise InputError(f"{source.name} has TTT layers in {' and in '.join(stored)}: take one of them away.")
        if stored and ttt != NO_TTT:
            how = "leave out --ttt-layers and other settings of TTT layers, or take that file away"
            raise InputError(f"{source.name} has TTT layers already ({stored[0]}): {how}.")
        if original is not None:
            cfg = from_original.configure(original, source, cfg, self.notes)
            return cfg, from_original.parameters(original, cfg)
        if path is None:
            cfg = dataclasses.replace(cfg, ttt=ttt)
            return cfg, ttt_layers.fresh(cfg, seed)
        try:
            cfg = dataclasses.replace(cfg, ttt=ttt_layers.read_ttt_config(path))
        except InputError as error:
            raise (error if str(error).startswith(str(path)) else InputError(f"{path}: {error}")) from None
        exported = self.opened.enter_context(TensorFile(source.need(ttt_layers.TTT, "the TTT layers")))
        ttt_layers.check_ttt(cfg, exported)
        return cfg, exported


def _merge(base: Matched, adapters: Matched, rank: int, scaling: float, path: Path) -> Matched:
    """Returns `base` with the adapters of the file `path` merged into its linear maps."""
    advice = "keep the adapters apart (leave out --merge-lora)"
    pairs = iter(adapters.matches)

    def changed(tensor: Match) -> Match:
        parts = []
        for key, weight, down, up in zip(
            tensor.names.parts, tensor.parts, next(pairs).parts, next(pairs).parts, strict=True
        ):
            adapter, where = Adapter(down, up, adapters.dtype, rank, scaling), f"{key.name} with {path} merged"
            parts.append(merged(weight, base.dtype, adapter, base.dtype, where, advice))
        return tensor._replace(parts=tuple(parts))

    return base._replace(matches=[changed(tensor) if tensor.tensor.inputs else tensor for tensor in base.matches])


def _adapter_keys(keys: Iterable[str]) -> list[str]:
    return [key for key in keys if key.endswith((kyutai_names.LORA_A, kyutai_names.LORA_B))]
