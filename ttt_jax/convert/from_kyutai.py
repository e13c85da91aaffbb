"""Kyutai's weights to a folder of ours."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from ttt_jax.checkpoints import weights
from ttt_jax.checkpoints.differences import group
from ttt_jax.checkpoints.safetensors_reader import DTYPES, NAMES, TensorFile, cast
from ttt_jax.checkpoints.safetensors_writer import Spec
from ttt_jax.config import LoRAConfig, MoshiConfig, TTTConfig, model_preset
from ttt_jax.convert import from_huggingface, from_original, kyutai_config, kyutai_names, ttt_layers, unsupported
from ttt_jax.convert.lora import merged
from ttt_jax.convert.matching import Found, Matched, common_type, match, refuse_misfits
from ttt_jax.convert.model_card import UNKNOWN
from ttt_jax.convert.plan import Plan, carry_out, check_copies, log
from ttt_jax.convert.source import FINE_TUNED, Source, find, read_config
from ttt_jax.convert.tensor_view import Held, View, open_view
from ttt_jax.errors import InputError
from ttt_jax.utils import config_json
from ttt_jax.utils.files import check_new
from ttt_jax.utils.paths import local

NO_TTT = TTTConfig(layers="none")
DEFAULT_SCALING = 2.0  # Kyutai's loader's
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
    """Convert Kyutai's weights, in their layout or in that of Hugging Face; what was (or with `dry_run` would be) written.

    Args:
      source: a folder with config.json and safetensors, a safetensors file or the index of shards, or a hub id.
      out: the new folder.
      config: a config.json instead of the one in `source`.
      lora: a LoRA file of Kyutai's, or hf://OWNER/NAME/FILE, or what the original trained; None: the one that config.json names, if
        it does.
      merge_lora: whether the adapters are added to the weights instead of being kept apart.
      ttt: TTT layers to be added; their output projections are 0, so the model says what it said.
      seed: of the TTT layers.
      dry_run: whether to check all and write nothing.

    Raises `InputError` if anything is missing, left over, of a wrong shape or type, contradicts the configuration, or is
    not supported; then nothing is written.
    """
    out = local(out)
    check_new(out)
    with contextlib.ExitStack() as opened:
        found = _with_config(find(str(source)), config)
        plan, finish = _plan(found, _configuration(found), out, lora, merge_lora, ttt, seed, opened)
        check_copies(plan)
        for line in plan.lines():
            log.info(line)
        if not dry_run:
            carry_out(plan, finish)
        return plan


def _with_config(found: Source, config: str | Path | None) -> Source:
    if config is None:
        return found
    path = local(config)
    return found._replace(config=read_config(path), where=str(path))


def _configuration(found: Source) -> dict[str, Any] | None:
    """Kyutai's configuration, translated if it is Hugging Face's; None: there is none."""
    raw = found.config
    if raw is None:
        return None
    if from_huggingface.is_config(raw):
        return kyutai_config.export(from_huggingface.architecture(raw, found.where), {})
    unsupported.check_is_moshi(raw, found.where)
    if told := unsupported.unsupported(raw):
        _refuse(found.where, told)
    return raw


def _plan(found, raw, out, lora, merge_lora, ttt, seed, opened):
    """The plan, and the function that writes config.json when all else is written."""
    notes: list[str] = []
    view, theirs = _weights(found, opened, notes)
    adapters_view, trained = _lora(found, lora, view, opened, notes)
    if theirs is not None and trained is not None:
        raise InputError(f"{view.path} and {trained.path} both hold TTT layers of the original: take one of them away.")
    has_adapters = adapters_view is not None and (trained is None or _has_adapters(adapters_view))
    if merge_lora and not has_adapters:
        raise InputError(
            f"{found.name} names no adapters that could be merged: give --lora FILE, or leave out --merge-lora."
        )
    cfg, base = _base(found, raw, view, adapters_view, notes)
    rank, adapters = 0, None
    if has_adapters:
        rank, scaling, adapters = _adapters(found, cfg, adapters_view, notes)
        if not merge_lora:
            cfg = dataclasses.replace(cfg, lora=LoRAConfig(rank, scaling))
    cfg, ttt_params = _ttt(found, cfg, theirs or trained, ttt, seed, opened, notes)

    files: dict[str, list[Spec]] = {}
    for one in base.found:
        files.setdefault(one.tensor.file, []).append(_spec(one, base.dtype))
    if adapters is not None and merge_lora:
        _merge(files, base, adapters, rank, scaling, adapters_view.path)
    elif adapters is not None:
        files[weights.LORA] = [_spec(one, adapters.dtype) for one in adapters.found]
    for tensor in weights.ttt(cfg):
        files.setdefault(tensor.file, []).append(ttt_layers.ttt_spec(tensor, ttt_params))

    licence, licences = found.licence()
    tokenizer = found.tokenizer()
    if tokenizer is None:
        notes.append("no tokenizer was found, so none travels along")
    if licence == UNKNOWN and not licences:
        notes.append("the weights' licence is not told there and recorded as unknown")
    copies = tuple(path for path in (*licences, tokenizer, found.mimi_config()) if path)
    about = {
        "name": found.name,
        "repository": found.repository,
        "revision": found.revision,
        "file": view.path.name,
        "config": found.config,
        "dtype": NAMES[base.dtype],
        "lora": adapters_view.path.name if adapters_view else None,
        "lora_merged": merge_lora,
        "lm_gen_config": found.raw.get("lm_gen_config", {}),
        "tokenizer": tokenizer.name if tokenizer else None,
        "mimi": from_huggingface.MIMI if from_huggingface.is_config(found.raw) else found.mimi(),
        "licence": licence,
        "travelling": [path.name for path in copies],
    }

    def finish(folder: Path, written: dict[str, dict[str, Any]]) -> None:
        info = {
            "format": weights.FORMAT,
            "model": config_json.to_dict(cfg),
            "source": about,
            "files": written,
            "digest": weights.base_digest(cfg, written),
        }
        config_json.write_json(folder / weights.CONFIG, info)

    plan = Plan(found.name, out, cfg, base.dtype, files, copies, (weights.CONFIG,), tuple(notes))
    return plan, finish


def _weights(found: Source, opened: contextlib.ExitStack, notes: list[str]) -> tuple[View, from_original.Layers | None]:
    """The tensors of the base, under Kyutai's names, and TTT layers of the original among them."""
    path, beside = found.weights()
    view, layers = from_original.split(open_view(path, beside, opened, notes))
    view = view.watched()
    if layers is not None:
        from_original.check_base(view)
    if path.name == FINE_TUNED and found.file is None and not from_original.is_checkpoint(found):
        notes.append(
            f"{FINE_TUNED}, moshi-finetune's name of a full fine-tune, is taken, as no other weights are there"
        )
    theirs = from_huggingface.is_config(found.raw)
    if from_huggingface.is_layout(view.tensors):
        if not theirs:
            raise InputError(
                f"{view.path} has the names of Hugging Face's {from_huggingface.CLASS}, but {found.where} is not its"
                " config.json: give that by --config."
            )
        cfg = from_huggingface.architecture(found.config, found.where)
        return from_huggingface.as_kyutais(view, cfg, found.where, notes), None
    if theirs:
        raise InputError(
            f"{found.where} describes no language model of Kyutai's (it has no dim, num_layers ...) but Hugging Face's"
            f" {from_huggingface.CLASS}, whose names {view.path} does not have: give the config.json that belongs to the weights"
            " by --config."
        )
    mixed = [
        key for key in view.tensors if key.endswith((kyutai_names.LORA_A, kyutai_names.LORA_B)) or ".frozen_W." in key
    ]
    if mixed and len(mixed) == len(view.tensors):
        raise InputError(
            f"{view.path} holds adapters only: give the weights that they belong to as SOURCE, and this file by --lora."
        )
    if mixed:
        raise InputError(
            f"{view.path} holds adapters among the weights ({group(mixed)}): merge them, or write them into a file of their own"
            " and give it by --lora."
        )
    return view, layers


def _base(
    found: Source, raw: dict[str, Any] | None, view: View, adapters: View | None, notes: list[str]
) -> tuple[MoshiConfig, Matched]:
    """The architecture and the tensors of the base, strictly."""
    shapes = {key: held.shape for key, held in view.tensors.items()}
    if told := unsupported.unsupported_keys(shapes):
        _refuse(str(view.path), told)
    dtype = common_type(view.tensors)
    if raw is None:
        raw = kyutai_config.export(model_preset("moshi-7b"), {})
    cfg = kyutai_config.architecture(raw, shapes, dtype, found.where)
    kyutai_config.check_counts(cfg, len(shapes), view.path, found.where)
    wanted = [(tensor, kyutai_names.weight(tensor)) for tensor in weights.base(cfg)]
    held = dict(view.tensors)
    if adapters is not None:  # fine-tuned tables may stand in the LoRA file, in place of the base's
        replaced = {
            key: one
            for key, one in adapters.tensors.items()
            if not key.endswith((kyutai_names.LORA_A, kyutai_names.LORA_B))
        }
        if replaced:
            notes.append(f"{group(replaced)} of the LoRA file replace those of the base")
        if others := [
            key for key, one in replaced.items() if one.dtype != dtype and {one.dtype, dtype} <= DTYPES.keys()
        ]:
            notes.append(f"{group(others)} of the LoRA file are cast to {NAMES[dtype]}, the type of the weights")
        held |= {key: _cast(one, dtype) if key in others else one for key, one in replaced.items()}
    matched = match(wanted, held, view.path)
    if not matched.problems:
        if found.config is None:
            notes.append(f"there is no {found.where}; the tensors are those of the 7B, so its configuration is taken")
        for key, (said, has) in kyutai_config.hidden_widths(raw, cfg).items():
            if said != has:
                notes.append(f"{key} would give hidden width {said}; the tensors have {has}, which is taken")
        if adapters is None and raw.get("lora"):
            notes.append(
                f"{found.where} tells of adapters (lora=true), but there is no file of them and the weights are complete: they are"
                " taken as they are, as of a full fine-tune"
            )
        return cfg, matched
    if found.config is None:
        problems = "; ".join(problem for some in matched.problems.values() for problem in some)
        raise InputError(
            f"{view.path} has no config.json beside it and does not fit the 7B, as it {problems}: give --config FILE."
        )
    against = kyutai_config.contradictions(cfg, shapes)
    because = f" ({found.where} says {', '.join(against)})" if against else ""
    refuse_misfits(matched.problems, found.where, because)


def _lora(
    found: Source, lora: str | Path | None, base: View, opened: contextlib.ExitStack, notes: list[str]
) -> tuple[View | None, from_original.Layers | None]:
    """The adapters' file, None if there is none, and TTT layers of the original in it."""
    path = _lora_path(found, lora)
    if path is None:
        if found.folder is not None and found.fetch(weights.LORA) is not None:
            notes.append(
                f"{weights.LORA} lies beside the weights, but {found.where} does not tell of adapters (lora), so it is left out: give it"
                " by --lora to have it"
            )
        return None, None

    def beside(name: str) -> Path | None:
        return one if (one := path.parent / name).is_file() else None

    view, layers = from_original.split(open_view(path, beside, opened, notes), base.tensors)
    return view.watched(), layers


def _has_adapters(view: View) -> bool:
    return any(key.endswith((kyutai_names.LORA_A, kyutai_names.LORA_B)) for key in view.tensors)


def _lora_path(found: Source, lora: str | Path | None) -> Path | None:
    if lora is not None:
        path = local(lora)
        if "://" in str(lora) and not path.exists():
            path = found.fetch(str(lora))
        if path is None or not path.is_file():
            raise InputError(f"{lora} is not a file: give --lora a LoRA file of Kyutai's.")
        return path
    if name := found.raw.get("lora_name"):
        return found.need(name, "the LoRA file")
    return found.fetch(weights.LORA) if found.raw.get("lora") or from_original.is_checkpoint(found) else None


def _adapters(found: Source, cfg: MoshiConfig, file: View, notes: list[str]) -> tuple[int, float, Matched]:
    """Rank, scaling and tensors of the adapters, strictly."""
    beside = file.path.parent / weights.CONFIG
    where, raw = found.where, found.raw
    own_folder = found.folder is not None and file.path.parent.resolve() == found.folder.resolve()
    if beside.is_file() and not own_folder and str(beside) != found.where:
        own = config_json.read_json(beside, "the config.json of a LoRA file")
        if isinstance(own, dict) and kyutai_config.LORA & own.keys():
            where, raw = str(beside), own
    keys = [key for key in file.tensors if key.endswith((kyutai_names.LORA_A, kyutai_names.LORA_B))]
    rank = kyutai_names.lora_rank({key: file.tensors[key].shape for key in keys})
    if not rank:
        raise InputError(
            f"{file.path} holds no adapters (keys that end in {kyutai_names.LORA_B}): give a LoRA file of Kyutai's."
        )
    if raw.get("lora_rank", rank) != rank:
        raise InputError(
            f"{where} says lora_rank {raw['lora_rank']!r}, but the adapters in {file.path} have rank {rank}: correct it there."
        )
    scaling = config_json.conform(float, raw.get("lora_scaling", DEFAULT_SCALING), where, "lora_scaling")
    if not abs(scaling) <= LARGEST_SCALING:
        raise InputError(
            f"{where}: lora_scaling is {scaling}, but must be a number within the range of float32; correct it there."
        )
    if "lora_scaling" not in raw:
        notes.append(f"no lora_scaling is given, so that of Kyutai's loader is taken ({DEFAULT_SCALING:g})")
    wanted = []
    for tensor in weights.base(cfg):
        if tensor.inputs:
            wanted += zip(weights.adapter(tensor, rank), kyutai_names.adapter(tensor, rank), strict=True)
    matched = match(wanted, {key: file.tensors[key] for key in keys}, file.path)
    if matched.problems:
        refuse_misfits(matched.problems, "the model", mend="give the LoRA file that belongs to it")
    return rank, scaling, matched


def _merge(
    files: dict[str, list[Spec]], base: Matched, adapters: Matched, rank: int, scaling: float, path: Path
) -> None:
    """Put pieces with the adapters of the file `path` merged in place of the base's."""
    mend = "keep the adapters apart (leave out --merge-lora)"
    linear = [one for one in base.found if one.tensor.inputs]
    pairs: Iterator[Found] = iter(adapters.found)
    for one, a, b in zip(linear, pairs, pairs, strict=True):
        parts = tuple(
            merged(
                w,
                base.dtype,
                down,
                up,
                adapters.dtype,
                rank,
                scaling,
                base.dtype,
                f"{key.name} with {path} merged",
                mend,
            )
            for key, w, down, up in zip(one.names.parts, one.parts, a.parts, b.parts, strict=True)
        )
        specs = files[one.tensor.file]
        at = next(i for i, spec in enumerate(specs) if spec.name == one.tensor.name)
        specs[at] = specs[at]._replace(pieces=parts)


def _ttt(
    found: Source,
    cfg: MoshiConfig,
    theirs: from_original.Layers | None,
    ttt: TTTConfig,
    seed: int,
    opened: contextlib.ExitStack,
    notes: list[str],
) -> tuple[MoshiConfig, TensorFile | Callable[[int], dict[str, Any]]]:
    """The model with its TTT layers, and their tensors: those of the original, those that `export` wrote, or those asked for."""
    path = found.fetch(ttt_layers.TTT_CONFIG)
    own = [str(where) for where in (path, theirs and theirs.path) if where is not None]
    if len(own) > 1:
        raise InputError(f"{found.name} has TTT layers in {' and in '.join(own)}: take one of them away.")
    if own and ttt != NO_TTT:
        raise InputError(
            f"{found.name} has TTT layers of its own ({own[0]}): leave out --ttt-layers and other settings of TTT layers, or take that"
            " file away."
        )
    if theirs is not None:
        cfg = from_original.configure(theirs, found, cfg, notes)
        return cfg, from_original.parameters(theirs, cfg)
    if path is None:
        cfg = dataclasses.replace(cfg, ttt=ttt)
        return cfg, ttt_layers.fresh(cfg, seed)
    try:
        cfg = dataclasses.replace(cfg, ttt=ttt_layers.read_ttt_config(path))
    except InputError as error:
        raise (error if str(error).startswith(str(path)) else InputError(f"{path}: {error}")) from None
    exported = opened.enter_context(TensorFile(found.need(ttt_layers.TTT, "the TTT layers")))
    ttt_layers.check_ttt(cfg, exported)
    return cfg, exported


def _cast(held: Held, dtype: str) -> Held:
    where, mend = f"{held.path}: {held.name}", "give weights of another type, such as float32"
    return held._replace(dtype=dtype, piece=lambda *share: cast(held.piece(*share), held.dtype, dtype, where, mend))


def _spec(found: Found, dtype: str) -> Spec:
    return Spec(found.tensor.name, dtype, found.tensor.shape, found.parts)


def _refuse(where: str, told: list[str]) -> None:
    raise InputError(f"{where} describes what is not supported yet: {'; '.join(told)}; give a model without it.")
