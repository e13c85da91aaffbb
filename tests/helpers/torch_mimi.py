"""Mimi of PyTorch `moshi` as the reference: random models in Kyutai's on-disk layout, and ways to run them.

Imports torch and the PyPI package `moshi`; only parity tests and `make_fixtures.py` use it. Arrays are numpy: audio
[B, samples], latents [B, n, D], codes [B, Q, n].
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from moshi.models import loaders
from moshi.models.compression import MimiModel
from safetensors.torch import save_file

from tests.helpers import mimi_files, torch_moshi

OTHER = mimi_files.config(
    **{
        "sample_rate": 2700,
        "frame_rate": 30,
        "seanet.ratios": [5, 3, 2],
        "seanet.kernel_size": 5,
        "seanet.last_kernel_size": 5,
        "seanet.n_filters": 6,
        "seanet.dimension": 24,
        "quantizer.dimension": 12,
        "quantizer.n_q": 5,
        "quantizer.bins": 50,
        "quantizer.input_dimension": 24,
        "quantizer.output_dimension": 24,
        "transformer.d_model": 24,
        "transformer.num_heads": 3,
        "transformer.num_layers": 3,
        "transformer.dim_feedforward": 40,
        "transformer.context": 10,
        "transformer.max_period": 100,
        "transformer.input_dimension": 24,
        "transformer.output_dimensions": [24],
    }
)
"""Another shape than Kyutai's in all that a configuration says: three latents a frame, a window of no whole frames."""
KYUTAIS = json.loads(json.dumps(loaders._mimi_config))
"""Kyutai's own."""


class Trace(NamedTuple):
    """PyTorch's results for audio."""

    latents: np.ndarray
    codes: np.ndarray


def random_model(config: dict[str, Any], audio: np.ndarray, seed: int = 0) -> MimiModel:
    """A model whose every parameter is random, such that activations keep their size and the codes of `audio` are
    various: the entries of each codebook are spread as that is which they quantise."""
    model = loaders.get_mimi(None, config, num_codebooks=config["quantizer"]["n_q"])
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in sorted(model.named_parameters()):
            noise = torch.randn(p.shape, generator=generator)
            if "layer_scale" in name:
                p.copy_(0.3 + 0.05 * noise)
            elif "norm" in name:
                p.copy_(0.1 * noise + float(name.endswith("weight")))
            elif p.ndim == 1:
                p.copy_(0.05 * noise)
            elif "convtr" in name:  # [in, out / groups, kernel]: two inputs reach each output
                p.copy_(noise / (2 * (1 if "upsample" in name else len(p))) ** 0.5)
            else:
                p.copy_(noise / p[0].numel() ** 0.5)
    spread_codebooks(model, encode(model, audio).latents, generator)
    return model


@torch.no_grad()
def spread_codebooks(model: MimiModel, latents: np.ndarray, generator: torch.Generator) -> None:
    """Gives each codebook random entries of the mean and deviation of what it quantises of `latents`."""
    columns = torch.from_numpy(latents).swapaxes(1, 2)
    for part in (model.quantizer.rvq_first, model.quantizer.rvq_rest):
        rest = part.input_proj(columns).swapaxes(1, 2).flatten(0, 1)
        for layer in part.vq.layers:
            book = layer._codebook
            usage = 0.5 + 2 * torch.rand(book.cluster_usage.shape, generator=generator)
            entries = rest.mean(0) + 0.7 * rest.std(0) * torch.randn(book.embedding_sum.shape, generator=generator)
            book.cluster_usage.copy_(usage)
            book.embedding_sum.copy_(entries * usage[:, None])
            book._initialized.fill_(1)
            book._embedding = None  # which the package keeps
            rest = rest - book.embedding[torch.cdist(rest, book.embedding).argmin(1)]


def write(folder: Path, model: MimiModel, config: dict[str, Any]) -> Path:
    """A folder such as a Kyutai repository, with the codec alone."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file(torch_moshi.released_layout(model.state_dict()), folder / mimi_files.NAME)
    (folder / "codec.json").write_text(json.dumps(config))
    (folder / "config.json").write_text(json.dumps({"mimi_name": mimi_files.NAME, "mimi_config_name": "codec.json"}))
    return folder


@torch.no_grad()
def encode(model: MimiModel, audio: np.ndarray) -> Trace:
    """Whole recordings, or the next frames of streams where the model is streaming."""
    latents = model.encode_to_latent(torch.from_numpy(audio)[:, None], quantize=False)
    return Trace(latents.swapaxes(1, 2).numpy().copy(), model.quantizer.encode(latents).numpy())


@torch.no_grad()
def decode(model: MimiModel, codes: np.ndarray) -> np.ndarray:
    """As `encode`: audio [B, samples]."""
    return model.decode(torch.from_numpy(codes).long())[:, 0].numpy().copy()


def encode_stream(
    model: MimiModel, audio: np.ndarray, mask: np.ndarray | None = None, reset: np.ndarray | None = None
) -> Trace:
    """Frame by frame. mask: bool [B, n], the execution mask; reset: bool [B, n], rows to reset before a frame."""
    parts = _stream(model, audio.reshape(len(audio), -1, model.frame_size).swapaxes(0, 1), encode, mask, reset)
    return Trace(np.concatenate([part.latents for part in parts], 1), np.concatenate([part.codes for part in parts], 2))


def decode_stream(
    model: MimiModel, codes: np.ndarray, mask: np.ndarray | None = None, reset: np.ndarray | None = None
) -> np.ndarray:
    """As `encode_stream`."""
    return np.concatenate(_stream(model, np.moveaxis(codes, 2, 0)[..., None], decode, mask, reset), 1)


def _stream(model, frames, step, mask, reset) -> list:
    parts = []
    with model.streaming(frames.shape[1]):
        for i, frame in enumerate(frames):
            if reset is not None and reset[:, i].any():
                model.reset_streaming(torch.from_numpy(reset[:, i].copy()))
            if mask is not None:
                model.set_exec_mask(torch.from_numpy(mask[:, i].copy()))
            parts.append(step(model, np.ascontiguousarray(frame)))
    return parts
