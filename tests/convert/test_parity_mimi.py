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

from tests.helpers import mimi_files
from tests.helpers.places import FIXTURES
from ttt_jax.codec.mimi import file
from ttt_jax.convert import export, mimi

pytestmark = pytest.mark.parity

TRACE = load_file(FIXTURES / "mimi.trace.safetensors")
ROPE = {"rope_type": "default", "rope_theta": 100.0}
SEEN = 9600  # samples of 10 latents, all of which attention sees


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
        codes = model.encode(torch.from_numpy(TRACE["wav"][..., :SEEN])).audio_codes
    np.testing.assert_array_equal(codes.numpy(), TRACE["codes"][..., : codes.shape[-1]])
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
def test_a_random_mimi_of_transformers_computes_the_same_in_moshi(tmp_path, changes):
    transformers = pytest.importorskip("transformers", exc_type=ImportError)
    torch.manual_seed(0)
    c = mimi_files.huggingface_config(**{"frame_rate": None, "rope_theta": None, **changes})
    known = {key: value for key, value in c.items() if value is not None and key not in ("model_type", "architectures")}
    model = transformers.MimiModel(transformers.MimiConfig(**known)).eval()
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if name.endswith("embed_sum"):
                tensor.copy_(torch.randn(tensor.shape))
            elif name.endswith("cluster_usage"):
                tensor.copy_(torch.rand(tensor.shape) + 0.5)
            elif name.endswith("layer_scale.scale"):
                tensor.fill_(0.5)
            elif "initialized" not in name and tensor.ndim > 1:
                tensor.copy_(torch.randn(tensor.shape) / tensor[0].numel() ** 0.5)
    model.save_pretrained(tmp_path / "theirs")
    mimi(tmp_path / "theirs", tmp_path / "ours.safetensors", num_codebooks=2)
    export(tmp_path / "ours.safetensors", tmp_path / "back")
    config = json.loads((tmp_path / "back" / "mimi_config.json").read_text())
    ours = loaded(tmp_path / "back" / mimi_files.NAME, config)
    wav = TRACE["wav"][..., : 5 * ours.frame_size]
    with torch.no_grad():
        codes = model.encode(torch.from_numpy(wav)).audio_codes
        audio = model.decode(codes).audio_values
    found, _ = run(ours, wav)
    assert (found == codes.numpy()).mean() > 0.99
    with torch.no_grad():
        decoded = ours.decode(codes).numpy()
    np.testing.assert_allclose(decoded, audio.numpy()[..., : decoded.shape[-1]], atol=1e-5 * np.abs(decoded).max())
