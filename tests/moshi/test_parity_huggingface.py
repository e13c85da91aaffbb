"""Checkpoints that `transformers` itself wrote, converted, beside its own forward pass.

Needs torch and transformers; without them nothing runs here, and `convert/test_convert_layouts.py` compares with its
script's map.

What transformers computes otherwise and is left out here: it attends to all frames instead of to the last
`sliding_window`, and with attn_implementation="eager" its depth transformer sees later codebooks. So windows hold all
frames, and it runs with "sdpa". Its grid of delayed tokens comes from the caller.
"""

# ruff: noqa: E402  what needs torch is imported where it is there

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="parity with transformers needs torch")
transformers = pytest.importorskip("transformers", reason="parity with transformers needs it", exc_type=ImportError)

from tests.helpers.drawing import quick_jit
from ttt_jax import convert
from ttt_jax.checkpoints import weights
from ttt_jax.moshi import model

pytestmark = pytest.mark.parity

ATOL = 1e-4
FRAMES, ROWS, TEXTS, CODES = 24, 2, 48, 32
MIMI = {
    "num_filters": 2,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "intermediate_size": 16,
    "codebook_size": CODES,
    "codebook_dim": 8,
    "vector_quantization_hidden_dimension": 8,
    "num_quantizers": 8,
    "upsample_groups": 16,
}
VARIANTS = {
    "moshi": {"num_codebooks": 3, "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}},
    "period": {"num_codebooks": 2, "rope_parameters": {"rope_type": "default", "rope_theta": 100.0}},
    "heads": {"num_codebooks": 4, "num_attention_heads": 2, "hidden_size": 24, "num_hidden_layers": 2},
}

forward = quick_jit(model.forward, static_argnames="cfg")


def random_model(**changes):
    """A small model of transformers, every parameter random, gains of either sign."""
    sizes = {"vocab_size": TEXTS, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "ffn_dim": 176}
    depth = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3, "ffn_dim": 132}
    config = transformers.MoshiConfig(
        **{**sizes, "sliding_window": FRAMES, **changes},
        audio_vocab_size=CODES,
        audio_encoder_config={"model_type": "mimi", **MIMI},
        depth_decoder_config=depth,
    )
    theirs = transformers.MoshiForConditionalGeneration(config).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, p in sorted(theirs.named_parameters()):
            noise = torch.randn(p.shape, generator=generator)
            if "audio_encoder" in name:
                continue
            if p.ndim == 1:
                p.copy_(torch.sign(noise) * (1 + 0.3 * torch.randn(p.shape, generator=generator)))
            else:
                p.copy_(0.5 * noise if "embed_tokens" in name else noise / p.shape[-1] ** 0.5)
    return theirs


def delayed(cfg, codes: np.ndarray) -> np.ndarray:
    """The columns -1 to T - 1 of the grid: each stream after its delay, initial tokens (the tables' last) before."""
    grid = np.empty((*codes.shape[:2], FRAMES + 1), np.int64)
    for k, delay in enumerate(cfg.delays):
        grid[:, k] = TEXTS if k == 0 else CODES
        grid[:, k, 1 + delay :] = codes[:, k, : FRAMES - delay]
    return grid


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_logits_equal_those_of_transformers(tmp_path, name, dtype):
    written = random_model(**VARIANTS[name]).to(getattr(torch, dtype))
    written.save_pretrained(tmp_path / "theirs", max_shard_size="100KB")
    assert len(list((tmp_path / "theirs").glob("*-of-*"))) > 1
    plan = convert.kyutai(tmp_path / "theirs", tmp_path / "ours")
    assert any("is Mimi, the codec" in note for note in plan.notes)
    cfg, params, _ = weights.load(tmp_path / "ours")
    assert params["text_emb"].dtype == dtype

    rng = np.random.default_rng(1)
    text = rng.integers(0, TEXTS, (ROWS, 1, FRAMES))
    codes = np.concatenate([text, rng.integers(0, CODES, (ROWS, cfg.n_q, FRAMES))], 1).astype(np.int32)
    mask = jnp.ones((ROWS, FRAMES), bool)
    theirs = transformers.MoshiForConditionalGeneration.from_pretrained(tmp_path / "theirs", dtype=torch.float32)
    params, cfg = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), params), dataclasses.replace(cfg, dtype="float32")
    ours, _ = forward(params, jnp.asarray(codes), mask, model.init_state(cfg, ROWS), cfg=cfg)

    grid = torch.from_numpy(delayed(cfg, codes))
    with torch.no_grad():
        inputs = {"input_ids": grid[:, 0, :-1], "moshi_audio_codes": grid[:, 1 : 1 + cfg.dep_q, :-1]}
        out = theirs(**inputs, user_audio_codes=grid[:, 1 + cfg.dep_q :, :-1], use_cache=False)
        moshi = grid[:, : cfg.dep_q, 1:].transpose(1, 2).reshape(ROWS * FRAMES, -1)
        hidden = out.last_hidden_state.reshape(ROWS * FRAMES, 1, -1)
        depth = theirs.depth_decoder(input_ids=moshi, last_hidden_state=hidden, use_cache=False).logits
    np.testing.assert_allclose(ours.hidden, out.last_hidden_state, rtol=0, atol=ATOL)
    np.testing.assert_allclose(ours.text_logits, out.logits, rtol=0, atol=ATOL)
    np.testing.assert_allclose(ours.audio_logits, depth.reshape(ROWS, FRAMES, cfg.dep_q, -1), rtol=0, atol=ATOL)
