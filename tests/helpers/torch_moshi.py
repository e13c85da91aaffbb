"""PyTorch `moshi` as the reference: small random models in Kyutai's on-disk layout, and ways to run them.

Imports torch and the PyPI package `moshi`; only `moshi/test_parity_torch.py` and `make_fixtures.py` use it. Arrays go
in and come out as numpy.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("NO_TORCH_COMPILE", "1")

import numpy as np
import torch
from moshi.models import loaders
from moshi.models.lm import LMGen, LMModel
from moshi.modules.lora import replace_all_linear_with_lora
from safetensors.torch import save_file

torch.set_num_threads(2)

UNGENERATED, FREE = -2, -2
FAINT = 1
"""Token of every table of the temporal transformer whose embedding is a thousand times smaller: a norm's eps then
counts."""
NOT_THE_MODELS = {  # keys of a released config.json that `loaders.CheckpointInfo` takes for itself
    "moshi_name": "model.safetensors",
    "mimi_name": "tokenizer-e351c8d8-checkpoint125.safetensors",
    "tokenizer_name": "tokenizer_spm_32k_3.model",
    "model_type": "moshi",
    "lm_gen_config": {},
    "model_id": {"sig": "random", "epoch": 0},
}

MOSHI = {
    "dim": 32,
    "text_card": 48,
    "existing_text_padding_id": 3,
    "n_q": 6,
    "dep_q": 3,
    "card": 40,
    "num_heads": 4,
    "num_layers": 3,
    "hidden_scale": 4.125,
    "causal": True,
    "layer_scale": None,
    "context": 8,
    "max_period": 10000,
    "gating": "silu",
    "norm": "rms_norm_f32",
    "positional_embedding": "rope",
    "depformer_dim": 24,
    "depformer_dim_feedforward": 99,
    "depformer_num_heads": 3,
    "depformer_num_layers": 2,
    "depformer_layer_scale": None,
    "depformer_multi_linear": True,
    "depformer_context": 2,
    "depformer_max_period": 10000,
    "depformer_gating": "silu",
    "depformer_pos_emb": "none",
    "depformer_weights_per_step": True,
    "delays": [0, 0, 1, 1, 0, 1, 1],
}
"""As the 7B, small. `depformer_context` is smaller than the codebooks, so that who heeds it is caught."""

VARIANTS: dict[str, dict[str, Any]] = {
    "moshi": MOSHI,
    "all moshi": MOSHI | {"n_q": 4, "dep_q": 4, "delays": [0, 0, 1, 1, 1]},
    "delay 2": MOSHI | {"delays": [0, 0, 2, 2, 0, 2, 2], "max_period": 100000},
    "mixed delays": MOSHI | {"delays": [0, 2, 0, 1, 1, 0, 2]},
    "shared": MOSHI
    | {
        "n_q": 8,
        "dep_q": 5,
        "delays": [0, 0, 2, 2, 2, 2, 0, 2, 2],
        "depformer_weights_per_step_schedule": [0, 1, 2, 2, 1],
        "depformer_low_rank_embeddings": 8,
        "hidden_scale": 4,
        "depformer_dim_feedforward": 96,
    },
    "heads": MOSHI | {"extra_heads_num_heads": 4, "extra_heads_dim": 6},
}
"""The differences of the released models. Moshi; all codebooks predicted, as TTS; delay 2 and shared weight sets with
low-rank tables, as Hibiki, with the other rule for hidden widths (at four times the width); extra heads, as STT."""


class Trace(NamedTuple):
    """PyTorch's results for teacher-forced tokens, on the delayed grid; see `grid`."""

    hidden: np.ndarray
    """[B, T, dim]."""
    text_logits: np.ndarray
    """[B, T, text_card]."""
    audio_logits: np.ndarray
    """[B, T, Q, card]."""


# Models and folders


def random_model(kwargs: dict[str, Any], seed: int = 0) -> LMModel:
    """A model whose every parameter is random: matrices keep the scale of what they read, gains lie around 1, of either
    sign."""
    model = loaders.get_moshi_lm(None, dict(kwargs), dtype=torch.float32)
    _randomise(model, torch.Generator().manual_seed(seed))
    return model


def _randomise(model: LMModel, generator: torch.Generator) -> None:
    with torch.no_grad():
        for name, p in sorted(model.named_parameters()):
            noise = torch.randn(p.shape, generator=generator)
            if name.endswith("alpha"):
                p.copy_(torch.sign(noise) * (1 + 0.3 * torch.randn(p.shape, generator=generator)))
            elif "emb" in name and "low_rank" not in name:
                p.copy_(0.5 * noise)
                if "depformer" not in name:
                    p[FAINT] *= 1e-3
            else:
                p.copy_(noise / p.shape[-1] ** 0.5)


def with_lora(model: LMModel, rank: int, scaling: float, seed: int = 1) -> LMModel:
    """The model with random adapters on every linear map, both factors: the update is about a third of the map."""
    replace_all_linear_with_lora(model, rank, scaling)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in sorted(model.named_parameters()):
            if "lora_" in name:
                size = 1 if "lora_A" in name else 0.3 / scaling
                p.copy_(size * torch.randn(p.shape, generator=generator) / p.shape[-1] ** 0.5)
    return model.eval()


def released_layout(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A state dict under the names of Kyutai's released files: per-codebook attention maps stacked into one tensor.

    Adapters of a fine-tuning keep the names that modules have in memory, as moshi-finetune writes them.
    """
    fused = {}
    for name, tensor in state.items():
        for part, whole in ("in_projs.", "in_proj_weight"), ("out_projs.", "out_proj.weight"):
            if part in name and "lora" not in name:
                stem, rest = name.split(part)
                fused.setdefault(stem + whole, {})[int(rest.split(".")[0])] = tensor
                break
        else:
            fused[name] = tensor
    return {
        name: torch.cat([value[i] for i in sorted(value)]) if isinstance(value, dict) else value.contiguous().clone()
        for name, value in fused.items()
    }


def write_folder(
    folder: Path, model: LMModel, kwargs: dict[str, Any], fused: bool = True, dtype: torch.dtype = torch.float32
) -> Path:
    """A folder such as a Kyutai repository: config.json and model.safetensors, fused as released or as
    `state_dict()`."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(NOT_THE_MODELS | kwargs))
    state = {name: value.to(dtype).contiguous() for name, value in model.state_dict().items()}
    save_file(released_layout(state) if fused else state, folder / "model.safetensors")
    return folder


def write_lora_folder(folder: Path, model: LMModel, kwargs: dict[str, Any], rank: int, scaling: float) -> Path:
    """As moshi-finetune leaves them: lora.safetensors with the adapters alone, config.json that says so."""
    folder.mkdir(parents=True, exist_ok=True)
    config = NOT_THE_MODELS | kwargs | {"lora": True, "lora_rank": rank, "lora_scaling": scaling}
    (folder / "config.json").write_text(json.dumps(config))
    adapters = {name: value.contiguous() for name, value in model.state_dict().items() if "lora_" in name}
    save_file(adapters, folder / "lora.safetensors")
    return folder


def load_folder(folder: Path, dtype: torch.dtype = torch.float32, lora_weights: Path | None = None) -> LMModel:
    """The folder's model as Kyutai's own tools load it, every key demanded and none left over; adapters stay apart."""
    info = loaders.CheckpointInfo.from_hf_repo(
        "",
        moshi_weights=f"file://{folder / 'model.safetensors'}",
        mimi_weights=folder / "absent",
        tokenizer=folder / "absent",
        config_path=folder / "config.json",
        lora_weights=lora_weights,
    )
    return info.get_moshi(dtype=dtype)


# Teacher-forced


def delayed(model: LMModel, codes: np.ndarray) -> torch.Tensor:
    """Codes [B, K, T] on the delayed grid with the initial column in front, [B, K, T + 1]; what `LMModel.forward`
    builds."""
    codes = torch.from_numpy(codes).long().to(model.device)
    initial = model._get_initial_token().expand(codes.shape[0], -1, -1)
    shifted = [
        torch.cat([initial[:, k].expand(-1, delay), codes[:, k, : codes.shape[2] - delay]], 1)
        for k, delay in enumerate(model.delays)
    ]
    return torch.cat([initial, torch.stack(shifted, 1)], 2)


@torch.no_grad()
def forward(model: LMModel, codes: np.ndarray) -> dict[str, np.ndarray]:
    """`LMModel.forward`: logits and masks undelayed, NaN as it fills them."""
    out = model(torch.from_numpy(codes).long())
    return {name: getattr(out, name).numpy() for name in ("logits", "mask", "text_logits", "text_mask")}


@torch.no_grad()
def grid(model: LMModel, codes: np.ndarray) -> Trace:
    """All positions at once, as in training, before the logits are undelayed."""
    columns = delayed(model, codes)
    hidden, text = model.forward_text(columns[:, :, :-1])
    audio = model.forward_depformer_training(columns[:, :, 1:], hidden)
    return Trace(*(x.float().cpu().numpy() for x in (hidden, text[:, 0], audio.transpose(1, 2))))


@torch.no_grad()
def heads(model: LMModel, hidden: np.ndarray) -> np.ndarray:
    """Probabilities of the extra heads [B, T, heads, width], as `LMGen.step_with_extra_heads` gives them."""
    return np.stack([torch.softmax(head(torch.from_numpy(hidden)), -1).numpy() for head in model.extra_heads], 2)


@torch.no_grad()
def stepped(model: LMModel, codes: np.ndarray, chunk: int = 1) -> Trace:
    """Position by position over streaming caches, or `chunk` positions at a time (whose cache then loses keys)."""
    columns, steps = delayed(model, codes), []
    with model.streaming(codes.shape[0]):
        for s in range(0, codes.shape[2], chunk):
            inputs = columns[:, :, s : min(s + chunk, codes.shape[2])]
            hidden, text = model.forward_text(inputs)
            steps.append((hidden, text[:, 0], _depth(model, columns[:, :, s + 1 : s + 1 + inputs.shape[2]], hidden)))
    return Trace(*(torch.cat(parts, 1).numpy() for parts in zip(*steps, strict=True)))


def _depth(model: LMModel, targets: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
    """Audio logits [B, S, Q, card], codebook after codebook over the depth transformer's own cache."""
    logits = []
    for s in range(hidden.shape[1]):
        with model.depformer.streaming(hidden.shape[0]):
            logits.append(
                torch.cat(
                    [
                        model.forward_depformer(k, targets[:, k : k + 1, s : s + 1], hidden[:, s : s + 1])[:, 0]
                        for k in range(model.dep_q)
                    ],
                    1,
                )
            )
    return torch.stack(logits, 1)


# Streams


class Stream(NamedTuple):
    """Output of `LMGen`, call by call."""

    tokens: np.ndarray
    """int32 [B, 1 + Q, calls]; -1 where a row has none."""
    text_logits: np.ndarray
    """[B, calls, text_card]."""
    heads: np.ndarray | None
    """Outputs of the extra heads [B, calls, heads, width], from the first call that gives tokens; 0 before."""


class ForcedInside(LMGen):
    """`LMGen` whose forced audio tokens replace samples one by one, so that later codebooks of the column read them.

    The package's own hook replaces them after the whole column is sampled.
    """

    column: torch.Tensor | None = None
    """int64 [B, Q] of the column under way, `FREE` where sampled."""

    def depformer_step(self, text_token: torch.Tensor, transformer_out: torch.Tensor) -> torch.Tensor:
        """Greedy; codebook after codebook."""
        model, tokens, previous = self.lm_model, [], text_token
        with model.depformer.streaming(text_token.shape[0]):
            for k in range(model.dep_q):
                logits = model.forward_depformer(k, previous[:, None, None], transformer_out)
                previous = logits[:, 0, 0].argmax(-1)
                if self.column is not None:
                    previous = torch.where(self.column[:, k] == FREE, previous, self.column[:, k])
                tokens.append(previous)
        return torch.stack(tokens, 1)


@torch.no_grad()
def stream(
    model: LMModel,
    user: np.ndarray,
    active: np.ndarray | None = None,
    reset_before: dict[int, np.ndarray] | None = None,
    forced: np.ndarray | None = None,
    forced_inside: bool = False,
) -> Stream:
    """Greedy calls of `LMGen`.

    Args:
      user: codes [B, n_q - Q, calls], handed in one a call; active: bool [B, calls], the execution mask;
      reset_before: rows (bool [B]) to reset before a call; forced: int [B, 1 + Q, calls] on the *delayed* grid (what
        the hooks see at each call), `FREE` where sampled; forced_inside: replace audio tokens while the column is
        sampled, not after it.
    """
    rows, _, calls = user.shape
    out_of_sync = active is not None or reset_before is not None
    logits, now = [], {"call": 0}
    gen = (ForcedInside if forced_inside else LMGen)(
        model,
        use_sampling=False,
        support_out_of_sync=out_of_sync,
        on_text_logits_hook=lambda x: logits.append(x[:, 0, 0].clone()),
        on_text_hook=_hook(forced, now, slice(0, 1)),
        on_audio_hook=None if forced_inside else _hook(forced, now, slice(1, None)),
    )
    tokens, heads = np.full((rows, 1 + model.dep_q, calls), -1, np.int32), []
    with gen.streaming(rows):
        for call in range(calls):
            now["call"] = call
            if reset_before and call in reset_before:
                gen.reset_streaming(torch.from_numpy(reset_before[call]))
            if active is not None:
                gen.set_exec_mask(torch.from_numpy(active[:, call]))
            if forced_inside:
                gen.column = torch.from_numpy(forced[:, 1:, call]).long()
            got = gen.step_with_extra_heads(torch.from_numpy(user[:, :, call : call + 1]).long())
            if got is not None:
                out = got[0][..., 0].numpy()
                tokens[:, :, call] = np.where(out == UNGENERATED, -1, out)
                heads.append(np.stack([head[:, 0].numpy() for head in got[1]], 1) if got[1] else None)
            else:
                heads.append(None)
    given = [h for h in heads if h is not None]
    if given:
        heads = np.stack([np.zeros_like(given[0]) if h is None else h for h in heads], 1)
    return Stream(tokens, torch.stack(logits, 1).numpy(), heads if given else None)


def _hook(forced: np.ndarray | None, now: dict[str, int], streams: slice) -> Callable[[torch.Tensor], None] | None:
    """Writes the call's forced tokens over the sampled ones, in place."""
    if forced is None:
        return None

    def write(tokens: torch.Tensor) -> None:
        wanted = torch.from_numpy(forced[:, streams, now["call"]]).long().reshape(tokens.shape)
        tokens.copy_(torch.where(wanted == FREE, tokens, wanted))

    return write


def on_grid(tokens: np.ndarray, delays: list[int]) -> np.ndarray:
    """Forced tokens of frames [B, 1 + Q, T] on the delayed grid; `FREE` before a stream begins."""
    out = np.full_like(tokens, FREE)
    for k in range(tokens.shape[1]):
        out[:, k, delays[k] :] = tokens[:, k, : tokens.shape[2] - delays[k]]
    return out


def random_codes(kwargs: dict[str, Any], rows: int, frames: int, seed: int = 0, absent: bool = True) -> np.ndarray:
    """Codes int32 [B, K, T]; with `absent` the last row has gaps (-1) in every stream, then nothing but gaps and faint
    tokens."""
    rng = np.random.default_rng(seed)
    text = rng.integers(0, kwargs["text_card"], (rows, 1, frames))
    audio = rng.integers(0, kwargs["card"], (rows, kwargs["n_q"], frames))
    codes = np.concatenate([text, audio], 1)
    if absent:
        gone = rng.random(codes.shape[1:]) < 0.2
        quiet = slice(frames // 2, None)
        codes[-1, :, quiet] = FAINT
        gone[:, quiet] |= rng.random(gone[:, quiet].shape) < 0.5
        codes[-1][gone] = -1
    return codes.astype(np.int32)
