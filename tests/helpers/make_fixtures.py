"""Fixtures of PyTorch `moshi` for tests that run without it: ``python -m tests.helpers.make_fixtures [--out
tests/fixtures]``.

Needs torch and the PyPI package `moshi` (0.2.13 made those in the repository, with torch 2.13.0 on a CPU). Each fixture
is a folder as Kyutai releases them, with small random weights, and a `trace.safetensors` of what PyTorch makes of them,
greedily:

- `hibiki`: a user's stream, delay 2, shared weight sets, low-rank tables, extra heads, the other rule for hidden
  widths, an adapter file, bfloat16
- `all_moshi`: every codebook is predicted, as in TTS; two layers in the depth transformer

`moshi.*` and `mimi.*` beside them, the 7B's and Mimi's shapes in small, are older; their traces are described in
`moshi/test_parity.py` and `mimi_checks.py`. The codes of `mimi.trace.safetensors` are almost all the same, as its
codebooks lie far from its latents. `mimi.codes.safetensors` has codebooks for the same weights that lie among them, and
what PyTorch makes of the same audio with those.
"""

from __future__ import annotations

import argparse
import inspect
import tempfile
from pathlib import Path

import numpy as np
import torch
from moshi.models.lm import LMGen
from moshi.modules.rope import apply_rope
from moshi.utils.sampling import sample_token
from safetensors.numpy import load_file, save_file

from tests.helpers import mimi_files, torch_mimi, torch_moshi
from tests.helpers.places import FIXTURES
from tests.helpers.torch_moshi import MOSHI, VARIANTS

ROWS, FRAMES, CALLS = 2, 24, 40
RANK, SCALING = 2, 1.5
THINNED = 16
SHAPES = {
    "hibiki": VARIANTS["shared"] | {"num_layers": 2, "depformer_num_layers": 1, "extra_heads_num_heads": 2},
    "all_moshi": MOSHI | {"num_layers": 1, "n_q": 4, "dep_q": 4, "delays": [0, 0, 1, 1, 1]},
}


def main() -> None:
    """Writes the folders."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("tests/fixtures"))
    out = parser.parse_args().out
    for name, kwargs in SHAPES.items():
        theirs = torch_moshi.random_model(kwargs)
        folder = torch_moshi.write_folder(out / name, theirs, kwargs)
        trace = teacher_forced(theirs, kwargs) | streamed(theirs, kwargs)
        if name == "hibiki":
            trace |= draws() | adapted(theirs, kwargs, folder) | in_bfloat16(folder, kwargs)
        save_file({key: np.ascontiguousarray(value) for key, value in trace.items()}, folder / "trace.safetensors")
        for file in folder.rglob("*.safetensors"):
            file.chmod(0o644)
        print(folder, sum(file.stat().st_size for file in folder.rglob("*.*")), "bytes")
    save_file(mimi_codes(), out / "mimi.codes.safetensors")
    (out / "mimi.codes.safetensors").chmod(0o644)


def mimi_codes() -> dict[str, np.ndarray]:
    """Codebooks among the latents of the fixture's Mimi, and what it makes of the fixture's audio then: whole, as a
    stream of frames, and as one whose rows pause (what a paused row gives says nothing) and are reset before a frame.
    Audio: every `THINNED`th sample."""
    audio = load_file(FIXTURES / "mimi.trace.safetensors")["wav"][:, 0]
    with tempfile.TemporaryDirectory() as folder:
        path = mimi_files.write(Path(folder) / "mimi") / mimi_files.NAME
        theirs = torch_mimi.loaders.get_mimi(path, mimi_files.CONFIG, num_codebooks=8)
    torch_mimi.spread_codebooks(theirs, torch_mimi.encode(theirs, audio).latents, torch.Generator().manual_seed(0))
    whole, stream = torch_mimi.encode(theirs, audio), torch_mimi.encode_stream(theirs, audio)
    mask, reset = np.ones((2, 20), bool), np.zeros((2, 20), bool)
    mask[0, [0, 7, 8, 12]] = mask[1, [3, 15]] = False
    reset[0, 14] = reset[1, 9] = True
    paused = torch_mimi.encode_stream(theirs, audio, mask, reset)
    outs = {
        "out": torch_mimi.decode(theirs, whole.codes),
        "out_stream": torch_mimi.decode_stream(theirs, whole.codes),
        "out_paused": torch_mimi.decode_stream(theirs, whole.codes, mask, reset),
    }
    state = theirs.state_dict()
    return {
        **{name: np.ascontiguousarray(out[:, ::THINNED]) for name, out in outs.items()},
        **{name: array.numpy() for name, array in state.items() if name.endswith(("embedding_sum", "cluster_usage"))},
        **{"mask": mask, "reset": reset, "latents_stream": stream.latents, "latents_paused": paused.latents},
        **{"codes": whole.codes, "codes_stream": stream.codes, "codes_paused": paused.codes},
    }


def teacher_forced(theirs, kwargs) -> dict[str, np.ndarray]:
    """Teacher-forced: codes [B, K, T]; on the delayed grid hidden vectors and logits; masks on undelayed frames."""
    codes = torch_moshi.random_codes(kwargs, ROWS, FRAMES)
    out = torch_moshi.forward(theirs, codes)
    trace = torch_moshi.grid(theirs, codes)
    heads = {"heads": torch_moshi.heads(theirs, trace.hidden)} if len(theirs.extra_heads) else {}
    return heads | {"codes": codes, "mask": out["mask"], "text_mask": out["text_mask"]} | trace._asdict()


def streamed(theirs, kwargs) -> dict[str, np.ndarray]:
    """Calls of `LMGen`: plain, paused and reset, with forced tokens that later codebooks of a column read."""
    rng = np.random.default_rng(1)
    user = rng.integers(0, kwargs["card"], (ROWS, kwargs["n_q"] - kwargs["dep_q"], CALLS)).astype(np.int32)
    user[1, :, 8:14] = -1
    plain = torch_moshi.stream(theirs, user)
    active = rng.random((ROWS, CALLS)) < 0.7
    active[0] = True
    reset = np.zeros((ROWS, CALLS), bool)
    reset[0, 25], reset[1, 13], reset[1, 14] = True, True, True
    before = {call: reset[:, call] for call in range(CALLS) if reset[:, call].any()}
    moshi = torch_moshi.random_codes(kwargs, ROWS, CALLS, seed=2, absent=False)[:, : 1 + kwargs["dep_q"]]
    forced = np.where(rng.random(moshi.shape) < 0.3, moshi, torch_moshi.FREE).astype(np.int32)
    columns = torch_moshi.on_grid(forced, kwargs["delays"])
    return {
        "user": user,
        "stream": plain.tokens,
        "first_text": plain.text_logits[:, 0].argmax(-1).astype(np.int32),
        "active": active,
        "reset": reset,
        "stream_paused": torch_moshi.stream(theirs, user, active, before).tokens,
        "forced": forced,
        "stream_forced": torch_moshi.stream(theirs, user, forced=columns, forced_inside=True).tokens,
    }


def draws() -> dict[str, np.ndarray]:
    """What `sample_token` draws, with its own noise, at two temperatures; and the defaults of `LMGen`."""
    defaults = {name: value.default for name, value in inspect.signature(LMGen).parameters.items()}
    rng = np.random.default_rng(0)
    found = {"defaults": np.array([defaults[x] for x in ("temp", "top_k", "temp_text", "top_k_text")], np.float64)}
    logits = (3 * rng.standard_normal((400, 40))).astype(np.float32)
    for name, temperature, top_k in (("hot", 1.3, 5), ("cold", 0.5, 60)):
        torch.manual_seed(0)
        found[f"draw_{name}"] = sample_token(torch.from_numpy(logits), True, temperature, top_k).int().numpy()
        torch.manual_seed(0)
        found[f"exponential_{name}"] = torch.empty(400, min(top_k, 40)).exponential_(1).numpy()
    return found | {"draw_logits": logits}


def adapted(theirs, kwargs, folder: Path) -> dict[str, np.ndarray]:
    """Writes adapters beside the weights, under the names of moshi-finetune; logits with them."""
    codes = torch_moshi.random_codes(kwargs, ROWS, FRAMES)[:, :, :8]
    with_lora = torch_moshi.with_lora(theirs, RANK, SCALING)
    torch_moshi.write_lora_folder(folder / "lora", with_lora, kwargs, RANK, SCALING)
    trace = torch_moshi.grid(with_lora, codes)
    return {"lora_text_logits": trace.text_logits, "lora_audio_logits": trace.audio_logits}


def in_bfloat16(folder: Path, kwargs) -> dict[str, np.ndarray]:
    """Logits of the weights rounded to bfloat16, in float32, and the mean distance from them (text, audio) when run in
    bfloat16.

    Rotations far from the start and attention with large scores apart, as rounding shows there.
    """
    frames = 96
    codes = torch_moshi.random_codes(kwargs, 1, frames, seed=4, absent=False)
    half = torch_moshi.load_folder(folder, torch.bfloat16)
    exact = torch_moshi.load_folder(folder, torch.bfloat16).float()
    wide, narrow = torch_moshi.grid(exact, codes), torch_moshi.grid(half, codes)
    errors = [np.abs(a - b).mean(dtype=np.float64) for a, b in zip(wide[1:], narrow[1:], strict=True)]
    return {
        "half_codes": codes,
        "half_error": np.array(errors),
        "half_text_logits": wide.text_logits,
        "half_audio_logits": wide.audio_logits,
    } | parts_in_bfloat16()


def parts_in_bfloat16() -> dict[str, np.ndarray]:
    """q, k, v [B, T, H, K], q rotated at positions from 2900, and causal attention, all exact in bfloat16."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (4 * torch.randn(3, 1, 2, 64, 8, generator=generator)).bfloat16()
    turned, _ = apply_rope(q, k, torch.tensor([2900]), 10_000)
    out = torch.nn.functional.scaled_dot_product_attention(q, k, v, torch.tril(torch.ones(64, 64, dtype=torch.bool)))
    found = {"q": q, "k": k, "v": v, "turned": turned, "attended": out}
    return {f"half_{name}": x.float().transpose(1, 2).numpy() for name, x in found.items()}


if __name__ == "__main__":
    main()
