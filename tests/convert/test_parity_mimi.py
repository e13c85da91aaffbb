"""Mimi beside PyTorch: what we write loads strictly in PyPI `moshi` and gives the same codes and audio, bit for bit; a
file that `transformers` wrote is the Mimi that it computes.

Needs torch, and `moshi` or `transformers`; without them nothing runs here.
"""

# ruff: noqa: E402  what needs torch is imported where it is there

from __future__ import annotations

import json

import numpy as np
import pytest
from safetensors.numpy import load_file

torch = pytest.importorskip("torch", reason="parity with PyTorch needs torch")

from tests.helpers import mimi_files, near_ties
from tests.helpers.places import FIXTURES
from ttt_jax.codec.mimi import file, model
from ttt_jax.codec.mimi.codec import MimiCodec
from ttt_jax.convert import export, mimi

pytestmark = pytest.mark.parity

TRACE = load_file(FIXTURES / "mimi.trace.safetensors")
ROPE = {"rope_type": "default", "rope_theta": 100.0}


def loaded(path, config=mimi_files.CONFIG):
    """A Mimi of `moshi`, loaded strictly."""
    loaders = pytest.importorskip("moshi.models.loaders", exc_type=ImportError)
    return loaders.get_mimi(path, config, num_codebooks=config["quantizer"]["n_q"])


def run(model, wav):
    with torch.no_grad():
        codes = model.encode(torch.from_numpy(wav))
        return codes.numpy(), model.decode(codes).numpy()


def test_what_is_exported_gives_the_codes_and_audio_of_its_source(tmp_path):
    source = mimi_files.write(tmp_path / "source")
    mimi(source, tmp_path / "ours.safetensors")
    export(tmp_path / "ours.safetensors", tmp_path / "back")
    config = json.loads((tmp_path / "back" / "mimi_config.json").read_text())
    theirs = run(loaded(source / mimi_files.NAME), TRACE["wav"])
    ours = run(loaded(tmp_path / "back" / mimi_files.NAME, config), TRACE["wav"])
    for expected, found in zip(theirs, ours, strict=True):
        np.testing.assert_array_equal(found, expected)
    np.testing.assert_array_equal(ours[0], TRACE["codes"])


def test_weight_norm_is_folded_as_torch_folds_it(tmp_path):
    w = mimi_files.weights()
    name = "decoder.model.5.convtr.convtr.weight"
    v = w.pop(name)
    g = np.random.default_rng(0).uniform(0.5, 2, (len(v), 1, 1)).astype(np.float32)
    source = mimi_files.write(tmp_path / "source", w | {name + "_v": v, name + "_g": g})
    mimi(source, tmp_path / "ours.safetensors")
    export(tmp_path / "ours.safetensors", tmp_path / "back")
    folded = torch._weight_norm(torch.from_numpy(v), torch.from_numpy(g), dim=0).numpy()
    np.testing.assert_allclose(load_file(tmp_path / "back" / mimi_files.NAME)[name], folded, rtol=1e-6)


def test_a_mimi_that_transformers_wrote_is_kyutais(tmp_path):
    transformers = pytest.importorskip("transformers", exc_type=ImportError)
    mimi(mimi_files.write(tmp_path / "source"), tmp_path / "ours.safetensors")
    model = transformers.MimiModel.from_pretrained(mimi_files.write_huggingface(tmp_path / "written")).eval()
    with torch.no_grad():
        codes = model.encode(torch.from_numpy(TRACE["wav"])).audio_codes
    np.testing.assert_array_equal(codes.numpy(), TRACE["codes"])
    model.save_pretrained(tmp_path / "theirs")
    mimi(tmp_path / "theirs", tmp_path / "same.safetensors")
    assert file.read(tmp_path / "same.safetensors").digest == file.read(tmp_path / "ours.safetensors").digest


@pytest.mark.parametrize(
    "changes",
    [
        {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 16, "num_quantizers": 4},
        {
            "upsampling_ratios": [5, 4, 2],
            "num_filters": 8,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e2},
        },
    ],
)
def test_a_random_mimi_of_transformers_computes_the_same_here_and_in_moshi(tmp_path, changes):
    """Whole recordings, four windows long."""
    theirs = random_mimi(changes)
    theirs.save_pretrained(tmp_path / "theirs")
    mimi(tmp_path / "theirs", tmp_path / "ours.safetensors", num_codebooks=theirs.config.num_quantizers)
    found = file.read(tmp_path / "ours.safetensors")
    wav = TRACE["wav"][..., : 20 * found.cfg.frame_size]
    latents, codes, audio = of_transformers(theirs, wav)
    assert all(len(np.unique(codes[:, q])) >= 4 for q in range(codes.shape[1])), "codes should be various"
    ours = MimiCodec(found.params, found.cfg, found.use, found.name, found.digest)
    np.testing.assert_allclose(latents_of(ours, wav), latents, rtol=0, atol=1e-4)
    mine = np.stack(ours.encode_batch(list(wav[:, 0])))
    near_ties.assert_equal_but_for_ties(found.params, latents, codes, mine)
    decoded = np.stack(ours.decode_batch(list(codes.astype(np.int32))))
    np.testing.assert_allclose(decoded, audio[:, 0, : decoded.shape[1]], rtol=0, atol=1e-4)
    export(tmp_path / "ours.safetensors", tmp_path / "back")
    config = json.loads((tmp_path / "back" / "mimi_config.json").read_text())
    kyutais = loaded(tmp_path / "back" / mimi_files.NAME, config)
    with torch.no_grad():
        same = kyutais.decode(torch.from_numpy(codes)).numpy()
    np.testing.assert_allclose(same, audio[..., : same.shape[-1]], atol=1e-5 * np.abs(same).max())
    near_ties.assert_equal_but_for_ties(found.params, latents, codes, run(kyutais, wav)[0])


def random_mimi(changes):
    """A `MimiModel` whose activations keep their size, with codebooks among the latents of the fixture's audio."""
    transformers = pytest.importorskip("transformers", exc_type=ImportError)
    torch.manual_seed(0)
    c = mimi_files.huggingface_config(**{"frame_rate": None, "rope_theta": None, **changes})
    known = {key: value for key, value in c.items() if value is not None and key not in ("model_type", "architectures")}
    model = transformers.MimiModel(transformers.MimiConfig(**known)).eval()
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if name.endswith("cluster_usage"):
                tensor.copy_(torch.rand(tensor.shape) + 0.5)
            elif name.endswith("layer_scale.scale"):
                tensor.fill_(0.5)
            elif "initialized" not in name and "embed_sum" not in name and tensor.ndim > 1:
                tensor.copy_(torch.randn(tensor.shape) / tensor[0].numel() ** 0.5)
        latents = torch.from_numpy(of_transformers(model, TRACE["wav"])[0]).swapaxes(1, 2)
        quantizer = model.quantizer
        for part in (quantizer.semantic_residual_vector_quantizer, quantizer.acoustic_residual_vector_quantizer):
            rest = part.input_proj(latents).swapaxes(1, 2).flatten(0, 1)
            for layer in part.layers:
                book = layer.codebook
                entries = rest.mean(0) + 0.7 * rest.std(0) * torch.randn(book.embed_sum.shape)
                book.embed_sum.copy_(entries * book.cluster_usage[:, None])
                book._embed = None  # which the package keeps
                rest = rest - book.embed[torch.cdist(rest, book.embed).argmin(1)]
    return model


def of_transformers(model, wav):
    """Latents [B, n, D], codes and audio."""
    latents = []
    hook = model.encoder.downsample.register_forward_hook(lambda module, given, result: latents.append(result))
    with torch.no_grad():
        codes = model.encode(torch.from_numpy(wav)).audio_codes
        audio = model.decode(codes).audio_values
    hook.remove()
    return latents[0].swapaxes(1, 2).numpy(), codes.numpy(), audio.numpy()


def latents_of(codec, wav):
    mask = np.ones((len(wav), wav.shape[-1] // codec.frame_size), bool)
    state = codec.init_encoder(len(wav))
    return model.encode_latents(codec.params, wav[:, 0], mask, state, codec.cfg, codec.use)[0]
