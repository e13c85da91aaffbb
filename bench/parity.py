"""How far our bfloat16 model and PyTorch's lie from float32, on one GPU: ``python -m bench.parity [--layers 32]``.

Random bfloat16 weights in the shape of Moshi's 7B are made once with PyTorch `moshi`, written in Kyutai's layout and
read by `ttt_jax.convert`. Both models score the same random codes, teacher-forced, in bfloat16 and in float32. For text
and every codebook the table gives, against PyTorch in float32 (and last, between the two in bfloat16):

- argmax: share of positions whose likeliest token is the same
- KL: of the two distributions, in nats, mean over positions
- apart: largest difference of two logits

Needs torch and `moshi`; docs/parity.md says how to install them.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import types
from pathlib import Path
from typing import Any

import numpy as np

HEAD = 3.0
"""Deviation of the logits: random weights would give 1, trained ones are surer."""


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--layers", type=int, default=8, help="of the temporal transformer; the 7B has 32")
    parser.add_argument("--frames", type=int, default=256)
    args = parser.parse_args()
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # PyTorch is on the same GPU
    os.environ.setdefault("NO_TORCH_COMPILE", "1")
    with tempfile.TemporaryDirectory() as folder:
        kwargs, codes, traces = theirs(args.layers, args.frames, Path(folder) / "kyutai")
        traces |= ours(Path(folder), codes)
    import jax
    import torch

    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, jax {jax.__version__};", end=" ")
    print(f"{args.layers} layers, {args.frames} frames")
    show(compare(traces, kwargs))


def theirs(layers: int, frames: int, folder: Path) -> tuple[dict[str, Any], np.ndarray, dict[str, Any]]:
    """Arguments of the model, the codes, and PyTorch's traces; leaves the weights in `folder`."""
    import torch

    from tests.helpers import torch_moshi

    torch.backends.cuda.matmul.allow_tf32 = False
    kwargs = torch_moshi.loaders._lm_kwargs | {"num_layers": layers}
    codes = torch_moshi.random_codes(kwargs, 1, frames, 0, absent=False)
    model = torch_moshi.loaders.get_moshi_lm(None, kwargs, device="cuda", dtype=torch.bfloat16)
    randomise(model, torch.Generator("cuda").manual_seed(0))
    torch_moshi.write_folder(folder, model.cpu(), kwargs, dtype=torch.bfloat16)
    model = model.to("cuda")
    traces = {"PyTorch bfloat16": torch_moshi.grid(model, codes)}
    traces["PyTorch float32"] = torch_moshi.grid(model.float(), codes)
    del model
    torch.cuda.empty_cache()
    return kwargs, codes, traces


def randomise(model, generator) -> None:
    """Matrices keep the scale of what they read, heads make logits of deviation `HEAD`, gains lie around 1."""
    import torch

    with torch.no_grad():
        for name, p in sorted(model.named_parameters()):
            noise = torch.randn(p.shape, generator=generator, device=p.device)
            if name.endswith("alpha"):
                p.copy_(1 + 0.1 * noise)
            elif "emb" in name:
                p.copy_(0.5 * noise)
            else:
                scale = HEAD if name.startswith(("text_linear", "linears")) else 1.0
                p.copy_(scale * noise / p.shape[-1] ** 0.5)


def ours(folder: Path, codes: np.ndarray) -> dict[str, Any]:
    """Our traces: bfloat16 in one call and frame by frame, float32 in one call."""
    import dataclasses

    import jax
    import jax.numpy as jnp

    from ttt_jax import convert
    from ttt_jax.checkpoints import weights
    from ttt_jax.moshi import model

    convert.kyutai(folder / "kyutai", folder / "ours")
    read = weights.load(folder / "ours")
    rows, _, frames = codes.shape

    def trace(cfg, params, call: int):
        state, parts = model.init_state(cfg, rows), []
        for start in range(0, frames, call):
            mask = jnp.ones((rows, min(call, frames - start)), bool)
            out, state = model.forward(params, jnp.asarray(codes[:, :, start : start + call]), mask, state, cfg=cfg)
            parts.append([np.asarray(x, np.float32) for x in (out.hidden, out.text_logits, out.audio_logits)])
        hidden, text, audio = (np.concatenate(part, 1) for part in zip(*parts, strict=True))
        return types.SimpleNamespace(hidden=hidden, text_logits=text, audio_logits=audio)

    traces = {"ours bfloat16": trace(read.cfg, read.params, frames), "ours, by frame": trace(read.cfg, read.params, 1)}
    wide = jax.tree.map(lambda p: p.astype(jnp.float32), read.params)
    cfg = dataclasses.replace(read.cfg, dtype="float32")
    del read
    with jax.default_matmul_precision("highest"):
        traces["ours float32"] = trace(cfg, wide, frames)
    return traces


def compare(traces: dict[str, Any], kwargs: dict[str, Any]) -> dict[str, dict[str, dict[str, float]]]:
    """By stream and model: argmax, KL, apart, against PyTorch in float32; and ours in bfloat16 against theirs."""
    exact, figures = traces["PyTorch float32"], {}
    for k in range(1 + kwargs["dep_q"]):
        name = f"codebook {k}" if k else "text"
        begun = slice(kwargs["delays"][k], None)  # before that a codebook's logits are never used

        def logits(trace, k: int = k, begun: slice = begun) -> np.ndarray:
            x = trace.audio_logits[:, begun, k - 1] if k else trace.text_logits
            return x.astype(np.float64)

        figures[name] = {
            model: differences(logits(exact), logits(trace)) for model, trace in traces.items() if trace is not exact
        }
        both = logits(traces["PyTorch bfloat16"]), logits(traces["ours bfloat16"])
        figures[name]["one bfloat16 to the other"] = differences(*both)
    return figures


def differences(exact: np.ndarray, approximate: np.ndarray) -> dict[str, float]:
    """Figures of logits [B, T, V] against exact ones."""
    p, q = (x - x.max(-1, keepdims=True) for x in (exact, approximate))
    p, q = (x - np.log(np.exp(x).sum(-1, keepdims=True)) for x in (p, q))
    return {
        "argmax": float((exact.argmax(-1) == approximate.argmax(-1)).mean()),
        "KL": float((np.exp(p) * (p - q)).sum(-1).mean()),
        "apart": float(np.abs(exact - approximate).max()),
    }


def show(table: dict[str, dict[str, dict[str, float]]]) -> None:
    """Prints the table."""
    models = [*next(iter(table.values()))]
    print(f"\n{'':12}" + "".join(f"{model:>30}" for model in models))
    print(f"{'':12}" + f"{'argmax':>12}{'KL':>10}{'apart':>8}" * len(models))
    for stream, row in table.items():
        cells = (f"{x['argmax']:12.4f}{x['KL']:10.2e}{x['apart']:8.1e}" for x in row.values())
        print(f"{stream:12}" + "".join(cells))


if __name__ == "__main__":
    main()
