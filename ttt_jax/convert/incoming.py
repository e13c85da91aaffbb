"""Kyutai's weights to a folder of ours."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from ttt_jax import record, weights
from ttt_jax.config import LoRAConfig, MoshiConfig, TTTConfig, model_preset
from ttt_jax.convert import extras, names, original, settings, support
from ttt_jax.convert.lora import merged
from ttt_jax.convert.matching import Found, Matched, match
from ttt_jax.convert.plan import Plan, carry_out, check_copies, log
from ttt_jax.convert.source import UNKNOWN, Source, find, read_config
from ttt_jax.differences import group
from ttt_jax.errors import InputError
from ttt_jax.files import check_new
from ttt_jax.tensorfile import NAMES, TensorFile
from ttt_jax.tensorwriter import Spec

NO_TTT = TTTConfig(layers="none")
DEFAULT_SCALING = 2.0  # Kyutai's loader's


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
    """Convert Kyutai's weights; what was (or with `dry_run` would be) written.

    Args:
      source: a folder with config.json and safetensors, a safetensors file, or a hub id.
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
    out = Path(out).expanduser()
    check_new(out)
    with contextlib.ExitStack() as opened:
        found = _with_config(find(str(source)), config)
        if found.config is not None and (told := support.unsupported(found.config)):
            _refuse(found.where, told)
        found = original.located(found)
        file, theirs = original.split(opened.enter_context(TensorFile(found.weights())))
        notes: list[str] = []
        if theirs is not None and lora is None:
            found = original.merged(found, notes)
        lora_path = _lora_path(found, lora)
        if lora_path is None and theirs is None:
            lora_path = original.trained_part(found)
        lora_file, trained = (
            original.split(opened.enter_context(TensorFile(lora_path)), file.tensors) if lora_path else (None, None)
        )
        if merge_lora and (lora_file is None or (trained is not None and not _has_adapters(lora_file))):
            raise InputError(
                f"{source} names no adapters that could be merged: give --lora FILE, or leave out --merge-lora."
            )
        if theirs is not None and trained is not None:
            raise InputError(
                f"{file.path} and {lora_path} both hold TTT layers of the original: take one of them away."
            )
        plan, finish = _plan(found, file, lora_file, theirs or trained, out, merge_lora, ttt, seed, opened, notes)
        check_copies(plan)
        for line in plan.lines():
            log.info(line)
        if not dry_run:
            carry_out(plan, finish)
        return plan


def _with_config(found: Source, config: str | Path | None) -> Source:
    return found if config is None else found._replace(config=read_config(Path(config)), where=str(config))


def _plan(found, file, lora_file, theirs, out, merge_lora, ttt, seed, opened, notes):
    """The plan, and the function that writes config.json when all else is written."""
    cfg, base = _base(found, file, lora_file, notes)
    rank, adapters = 0, None
    if lora_file is not None and (theirs is None or _has_adapters(lora_file)):
        rank, scaling, adapters = _adapters(found, cfg, lora_file, notes)
        if not merge_lora:
            cfg = dataclasses.replace(cfg, lora=LoRAConfig(rank, scaling))
    cfg, ttt_params = _ttt(found, cfg, theirs, ttt, seed, opened, notes)

    files: dict[str, list[Spec]] = {}
    for one in base.found:
        files.setdefault(one.tensor.file, []).append(_spec(one, base.dtype))
    if adapters is not None and merge_lora:
        _merge(files, base, adapters, rank, scaling)
    elif adapters is not None:
        files[weights.LORA] = [_spec(one, adapters.dtype) for one in adapters.found]
    for tensor in weights.ttt(cfg):
        files.setdefault(tensor.file, []).append(extras.ttt_spec(tensor, ttt_params))

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
        "file": file.path.name,
        "config": found.config,
        "dtype": NAMES[base.dtype],
        "lora": lora_file.path.name if lora_file else None,
        "lora_merged": merge_lora,
        "lm_gen_config": found.raw.get("lm_gen_config", {}),
        "tokenizer": tokenizer.name if tokenizer else None,
        "mimi": found.mimi(),
        "licence": licence,
        "travelling": [path.name for path in copies],
    }

    def finish(folder: Path, written: dict[str, dict[str, Any]]) -> None:
        info = {
            "format": weights.FORMAT,
            "model": record.to_dict(cfg),
            "source": about,
            "files": written,
            "digest": weights.base_digest(cfg, written),
        }
        record.write_json(folder / weights.CONFIG, info)

    plan = Plan(found.name, out, cfg, base.dtype, files, copies, (weights.CONFIG,), tuple(notes))
    return plan, finish


def _base(
    found: Source, file: TensorFile, lora_file: TensorFile | None, notes: list[str]
) -> tuple[MoshiConfig, Matched]:
    """The architecture and the tensors of the base, strictly."""
    shapes = {key: info.shape for key, info in file.tensors.items()}
    if told := support.unsupported_keys(shapes):
        _refuse(str(file.path), told)
    dtype = next((info.dtype for info in file.tensors.values()), "")
    raw = found.config if found.config is not None else settings.export(model_preset("moshi-7b"), {})
    cfg = settings.architecture(raw, shapes, dtype, found.where)
    wanted = [(tensor, names.weight(tensor)) for tensor in weights.base(cfg)]
    files = [(file, list(file.tensors))]
    if lora_file is not None:  # fine-tuned tables may stand in the LoRA file, in place of the base's
        replaced = [key for key in lora_file.tensors if not key.endswith((names.LORA_A, names.LORA_B))]
        files.append((lora_file, replaced))
        if replaced:
            notes.append(f"{group(replaced)} of the LoRA file replace those of the base")
    matched = match(wanted, files)
    if not matched.problems:
        if found.config is None:
            notes.append(f"there is no {found.where}; the tensors are those of the 7B, so its configuration is taken")
        for key, (said, has) in settings.hidden_widths(raw, cfg).items():
            if said != has:
                notes.append(f"{key} would give hidden width {said}; the tensors have {has}, which is taken")
        return cfg, matched
    problems = "; ".join(matched.problems)
    if found.config is None:
        raise InputError(
            f"{file.path} has no config.json beside it and does not fit the 7B, as it {problems}: give --config FILE."
        )
    against = settings.contradictions(cfg, shapes)
    because = f" ({found.where} says {', '.join(against)})" if against else ""
    raise InputError(
        f"{file.path} does not fit {found.where}, as it {problems}{because}: give weights and a config.json that belong"
        " together."
    )


def _lora_path(found: Source, lora: str | Path | None) -> Path | None:
    if lora is not None:
        path = found.fetch(str(lora)) if "://" in str(lora) else Path(lora).expanduser()
        if path is None or not path.is_file():
            raise InputError(f"{lora} is not a file: give --lora a LoRA file of Kyutai's.")
        return path
    if name := found.raw.get("lora_name"):
        return found.need(name, "the LoRA file")
    if not found.raw.get("lora"):
        return None
    path = found.fetch(weights.LORA)
    if path is None:
        raise InputError(f"{found.where} tells of adapters (lora=true) but names no file of them: give --lora FILE.")
    return path


def _adapters(found: Source, cfg: MoshiConfig, file: TensorFile, notes: list[str]) -> tuple[int, float, Matched]:
    """Rank, scaling and tensors of the adapters, strictly."""
    beside = file.path.parent / weights.CONFIG
    where, raw = found.where, found.raw
    own_folder = found.folder is not None and file.path.parent.resolve() == found.folder.resolve()
    if beside.is_file() and not own_folder and str(beside) != found.where:
        own = record.read_json(beside, "the config.json of a LoRA file")
        if isinstance(own, dict) and settings.LORA & own.keys():
            where, raw = str(beside), own
    keys = [key for key in file.tensors if key.endswith((names.LORA_A, names.LORA_B))]
    rank = names.lora_rank({key: file.tensors[key].shape for key in keys})
    if not rank:
        raise InputError(
            f"{file.path} holds no adapters (keys that end in {names.LORA_B}): give a LoRA file of Kyutai's."
        )
    if raw.get("lora_rank", rank) != rank:
        raise InputError(
            f"{where} says lora_rank {raw['lora_rank']!r}, but the adapters in {file.path} have rank {rank}: correct it there."
        )
    scaling = record.conform(float, raw.get("lora_scaling", DEFAULT_SCALING), where, "lora_scaling")
    if "lora_scaling" not in raw:
        notes.append(f"no lora_scaling is given, so that of Kyutai's loader is taken ({DEFAULT_SCALING:g})")
    wanted = []
    for tensor in weights.base(cfg):
        if tensor.inputs:
            wanted += zip(weights.adapter(tensor, rank), names.adapter(tensor, rank), strict=True)
    matched = match(wanted, [(file, keys)])
    if matched.problems:
        raise InputError(
            f"{file.path} does not fit the model, as it {'; '.join(matched.problems)}: give the LoRA file that belongs to it."
        )
    return rank, scaling, matched


def _merge(files: dict[str, list[Spec]], base: Matched, adapters: Matched, rank: int, scaling: float) -> None:
    """Put merged pieces in place of the base's."""
    linear = [one for one in base.found if one.tensor.inputs]
    pairs: Iterator[Found] = iter(adapters.found)
    for one, a, b in zip(linear, pairs, pairs, strict=True):
        parts = tuple(
            merged(w, base.dtype, down, up, adapters.dtype, rank, scaling, base.dtype, one.tensor.name)
            for w, down, up in zip(one.parts, a.parts, b.parts, strict=True)
        )
        specs = files[one.tensor.file]
        at = next(i for i, spec in enumerate(specs) if spec.name == one.tensor.name)
        specs[at] = specs[at]._replace(pieces=parts)


def _has_adapters(file: TensorFile | original.View) -> bool:
    return any(key.endswith((names.LORA_A, names.LORA_B)) for key in file.tensors)


def _ttt(
    found: Source,
    cfg: MoshiConfig,
    theirs: original.Layers | None,
    ttt: TTTConfig,
    seed: int,
    opened: contextlib.ExitStack,
    notes: list[str],
) -> tuple[MoshiConfig, TensorFile | Callable[[int], dict[str, Any]]]:
    """The model with its TTT layers, and their tensors: those of the original, those that `export` wrote, or those asked for."""
    path = found.fetch(extras.TTT_CONFIG)
    own = [str(where) for where in (path, theirs and theirs.file.path) if where is not None]
    if len(own) > 1:
        raise InputError(f"{found.name} has TTT layers in {' and in '.join(own)}: take one of them away.")
    if own and ttt != NO_TTT:
        raise InputError(
            f"{found.name} has TTT layers of its own ({own[0]}): leave out --ttt-layers and other settings of TTT layers, or take that"
            " file away."
        )
    if theirs is not None:
        cfg = original.configure(theirs, found, cfg, notes)
        return cfg, original.parameters(theirs, cfg)
    if path is None:
        cfg = dataclasses.replace(cfg, ttt=ttt)
        return cfg, extras.fresh(cfg, seed)
    cfg = dataclasses.replace(cfg, ttt=extras.read_ttt_config(path))
    exported = opened.enter_context(TensorFile(found.need(extras.TTT, "the TTT layers")))
    extras.check_ttt(cfg, exported)
    return cfg, exported


def _spec(found: Found, dtype: str) -> Spec:
    return Spec(found.tensor.name, dtype, found.tensor.shape, found.parts)


def _refuse(where: str, told: list[str]) -> None:
    raise InputError(f"{where} describes what is not supported yet: {'; '.join(told)}; give a model without it.")
