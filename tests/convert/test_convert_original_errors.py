"""Checkpoints of the original that do not fit are refused."""

import re

import numpy as np
import pytest

from tests.helpers import original_files as theirs
from tests.helpers.converting import refused
from ttt_jax.config import TTTConfig
from ttt_jax.convert import kyutai

BLOCK = "transformer.layers.1.seq_modeling_block."


def drop(*names):
    return lambda tensors: {key: values for key, values in tensors.items() if key.removeprefix(BLOCK) not in names}


def put(name, values):
    return lambda tensors: tensors | {BLOCK + name: values}


def cast(name, kind):
    return lambda tensors: tensors | {BLOCK + name: tensors[BLOCK + name].astype(kind)}


def spoil(name, value):
    def change(tensors):
        values = tensors[BLOCK + name].copy()
        values.flat[-1] = value
        return tensors | {BLOCK + name: values}

    return change


T = "ttt_layer.ttt."
DAMAGED = {
    "no queries": (drop(T + "wq.weight"), f"lacks {BLOCK}{T}wq.weight"),
    "no first map": (drop(T + "W1"), f"lacks {BLOCK}{T}W1"),
    "no last map": (drop(T + "W2"), f"lacks {BLOCK}{T}W2"),
    "no inner network": (drop(T + "W1", T + "b1", T + "W2", T + "b2"), f"lacks {BLOCK}{T}W1, {BLOCK}{T}b1"),
    "no gate": (drop("forward_ssm_gating.gating_alpha"), "lacks .*forward_ssm_gating.gating_alpha"),
    "as several GPUs save it": (
        drop(*(T + n for n in ("W1", "b1", "W2", "b2", "ttt_norm_weight", "ttt_norm_bias"))),
        "lacks .*ttt_norm_weight",
    ),
    "both networks": (put(T + "weights.0", np.ones((2, 8, 8), np.float32)), f"has {BLOCK}{T}W1"),
    "a tensor of another kind": (put(T + "conv_q.weight", np.ones(3, np.float32)), "has .*conv_q.weight, which"),
    "transposed map": (put(T + "W1", np.ones((2, 32, 8), np.float32)), r"of shape \[2, 32, 8\] instead of"),
    "flat map": (put(T + "W1", np.ones(512, np.float32)), r"W1 of shape \[512\] instead of"),
    "one head's norm": (put(T + "ttt_norm_bias", np.ones((1, 8), np.float32)), r"\[1, 8\] instead of \[2, 8\]"),
    "scalar gate": (put("forward_ssm_gating.gating_alpha", np.ones(1, np.float32)), r"\[1\] instead of \[16\]"),
    "whole numbers": (cast(T + "b1", np.int32), "b1 as I32 instead of BF16, F16, F32"),
    "NaN": (spoil(T + "W2", np.nan), f"NaN or infinite values in {BLOCK}{T}W2"),
    "infinite": (spoil("forward_ssm_gating.gating_alpha", np.inf), "NaN or infinite values in .*gating_alpha"),
    "copies that differ": (spoil("original_layer.norm1.alpha", 0.5), "original_layer.norm1.alpha, which differ"),
    "a copy of another type": (cast("original_layer.norm1.alpha", np.float16), "norm1.alpha, which differ"),
    "a copy of another shape": (
        put("original_layer.norm1.alpha", np.ones(16, np.float32)),
        "original_layer.norm1.alpha, which differ",
    ),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_tensors_that_do_not_fit_are_refused(case, tmp_path):
    change, words = DAMAGED[case]
    layers = theirs.layers_of(numbers=(1,))
    folder = theirs.write(tmp_path / "theirs", change(theirs.consolidated(theirs.CONFIG, layers)), layers)
    message = refused(folder, "consolidated.safetensors")
    assert re.search(words, message), message


def test_layers_that_differ_in_their_networks_are_refused(tmp_path):
    layers = theirs.layers_of(numbers=(0,)) | theirs.layers_of("TTTMLPMultiLayer", (8,), numbers=(1,))
    folder = theirs.write(tmp_path / "theirs", theirs.consolidated(theirs.CONFIG, layers), layers)
    assert "which the model does not have" in refused(folder)


BAD_SETTINGS = {
    "no rate": ({"base_lr": None}, r"training_config.json has no ttt\.base_lr"),
    "no mini-batch": ({"mini_batch_size": None}, r"training_config.json has no ttt\.mini_batch_size"),
    "mini-batch of 0": ({"mini_batch_size": 0}, "mini_batch_size=0"),
    "negative rate": ({"base_lr": -0.1}, r"base_lr=-0\.1"),
    "infinite rate": ({"base_lr": float("inf")}, "base_lr=inf"),
    "NaN rate": ({"base_lr": float("nan")}, "base_lr=nan"),
    "rate as text": ({"base_lr": "0.1"}, r"ttt\.base_lr is '0\.1'"),
    "mini-batch of a fraction": ({"mini_batch_size": 1.5}, r"ttt\.mini_batch_size is 1\.5"),
    "rotation": ({"use_rope": True}, r"ttt\.use_rope=true"),
    "other layers": ({"layers": "0,1"}, "names the layers 0,1, but .* holds 1"),
    "middle half": ({"layers": "middle"}, None),  # of two layers: the first and the second's start: layer 0
    "no layers": ({"layers": "none"}, "names the layers none, but .* holds 1"),
    "layers that cannot be": ({"layers": "1,9"}, "cannot be followed: .*layer 9"),
    "layers as a list": ({"layers": [1]}, r"ttt\.layers is \[1\]"),
    "window below 1": ({"ttt_layer_context": -5}, r"ttt.ttt_layer_context is -5"),
}


@pytest.mark.parametrize("case", BAD_SETTINGS)
def test_settings_that_do_not_fit_are_refused(case, tmp_path):
    changes, words = BAD_SETTINGS[case]
    layers = theirs.layers_of(numbers=(1,))
    folder = theirs.write(tmp_path / "theirs", theirs.consolidated(theirs.CONFIG, layers), layers, **changes)
    message = refused(folder, "training_config.json")
    assert re.search(words or "names the layers 0, but", message), message


def test_rotation_without_effect_is_no_obstacle(tmp_path):
    layers = theirs.layers_of(numbers=(1,))
    tensors = theirs.consolidated(theirs.CONFIG, layers)
    folder = theirs.write(tmp_path / "theirs", tensors, layers, use_rope=True, mini_batch_size=1)
    assert not kyutai(folder, tmp_path / "ours", dry_run=True).cfg.ttt.rope


def test_files_that_do_not_belong_together_are_refused(tmp_path, source):
    layers = theirs.layers_of(numbers=(1,))
    whole = theirs.write(tmp_path / "theirs", theirs.consolidated(theirs.CONFIG, layers), layers)
    part = theirs.write(tmp_path / "part", theirs.own(layers), layers, name="lora")
    lora = part / "lora.safetensors"

    refused(part, f"SOURCE, and {lora} by --lora")
    refused(lora, f"SOURCE, and --lora {lora}")
    refused(whole, "take one of them away", lora=lora)
    for ttt in (TTTConfig(layers="0"), TTTConfig(layers="none", mini_batch=8)):
        refused(whole, "leave out --ttt-layers", ttt=ttt)
    refused(source, "names no adapters that could be merged", lora=lora, merge_lora=True)

    (part / "training_config.json").write_text("[]")
    refused(source, 'has no settings "ttt"', lora=lora)
    (part / "training_config.json").write_text("{")
    refused(source, "is not JSON", lora=lora)
    (part / "training_config.json").unlink()
    refused(source, "there is no training_config.json beside it", lora=lora)
    (whole / "ttt_config.json").write_text("{}")
    refused(whole, "take one of them away")

    deep = theirs.write(tmp_path / "deep", theirs.own({7: layers[1]}), [7], name="lora")
    refused(source, "holds TTT layers 7, but the model has layers 0 to 1", lora=deep / "lora.safetensors")
