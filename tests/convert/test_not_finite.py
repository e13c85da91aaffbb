"""Numbers that are NaN or infinite are kept and reported, in every type, layout and direction."""

import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from tests.helpers import kyutai_files as files
from tests.helpers.comparing import same
from tests.helpers.converting import nightly
from ttt_jax.checkpoints.safetensors_reader import of_array, watched
from ttt_jax.convert import export, kyutai

VALUES = (np.nan, -np.nan, np.inf, -np.inf)


def test_special_numbers_keep_their_bits_and_those_that_are_not_finite_are_reported(tmp_path, caplog):
    c = files.config()
    w = files.weights(c, "BF16")
    w["text_emb.weight"].view(np.uint16)[:] = np.resize([0x7F80, 0xFF80, 0x7FC1, 0x0001, 0x8000], (10, 16))
    kyutai(files.write(tmp_path / "source", c, w), tmp_path / "ours")
    (message,) = caplog.messages
    assert message.startswith(
        f"{tmp_path / 'source' / 'model.safetensors'}: text_emb.weight holds NaN or infinite numbers"
    )
    export(tmp_path / "ours", tmp_path / "back")
    same(load_file(tmp_path / "back" / "model.safetensors"), files.fuse(w))


@pytest.mark.parametrize("kind", files.TYPES)
def test_one_number_that_is_not_finite_is_found_in_every_type(caplog, kind):
    values = np.ones(9, files.TYPES[kind])
    for value in VALUES:
        caplog.clear()
        values[-1] = value
        list(watched(of_array(values.nbytes, lambda: values), kind, "here", set()).blocks(1))
        assert [message.split(",")[0] for message in caplog.messages] == ["here holds NaN or infinite numbers"]


ADAPTERS = ("text_linear.lora_A.weight", "transformer.layers.1.self_attn.in_projs.0.lora_B.weight")


@pytest.mark.parametrize(
    ("key", "value", "merge"),
    nightly(
        (ADAPTERS[0], np.nan, False),
        (ADAPTERS[1], -np.inf, True),
        *((key, value, merge) for key in ADAPTERS for value in (np.nan, -np.inf) for merge in (False, True)),
        default=2,
    ),
)
def test_adapters_that_are_not_finite_are_reported_merged_or_not(tmp_path, caplog, key, value, merge):
    c = files.config(lora=True, lora_scaling=2.0)
    a = files.lora(c, 3)
    a[key][0, 0] = value
    source = files.write(tmp_path / "source", c, files.weights(c), lora=a)
    kyutai(source, tmp_path / "ours", merge_lora=merge)
    (message,) = caplog.messages
    assert message.startswith(f"{source / 'lora.safetensors'}: {key} holds NaN or infinite numbers, which are kept")
    caplog.clear()
    export(tmp_path / "ours", tmp_path / "out")
    (message,) = caplog.messages
    assert message.startswith(f"{tmp_path / 'ours'}: ")
    if not merge:
        caplog.clear()
        export(tmp_path / "ours", tmp_path / "merged", merge_lora=True)
        (again,) = caplog.messages
        assert again == message


@pytest.mark.parametrize("dtype", nightly("BF16", "F32"))
def test_a_base_that_is_not_finite_is_reported_when_adapters_are_merged(tmp_path, caplog, dtype):
    c = files.config(lora=True, lora_scaling=2.0)
    w = files.weights(c, dtype)
    w["linears.0.weight"][1, 1] = np.inf
    source = files.write(tmp_path / "source", c, w, lora=files.lora(c, 3))
    kyutai(source, tmp_path / "ours", merge_lora=True)
    (message,) = caplog.messages
    assert message.startswith(f"{source / 'model.safetensors'}: linears.0.weight holds NaN")


def test_what_is_not_finite_has_the_name_of_its_own_file_in_other_layouts(tmp_path, caplog):
    c = files.config()
    theirs = files.huggingface(files.weights(c), c)
    keys = ["decoder.model.layers.0.self_attn.k_proj.linear.weight", "depth_decoder.lm_heads.weight"]
    for key in keys:
        theirs[key][...] = np.nan
    source = files.write(tmp_path / "hf", files.huggingface_config(c), theirs)
    kyutai(source, tmp_path / "from-hf")
    assert sorted(message.split(" holds ")[0] for message in caplog.messages) == [
        f"{source / 'model.safetensors'}: {key}" for key in keys
    ]
    caplog.clear()
    w = {f"module.{key}": array for key, array in files.weights(c).items()}
    w["module.emb.0.weight"][0, 0] = np.nan
    source = files.write(tmp_path / "wrapped", c, w)
    kyutai(source, tmp_path / "from-wrapped")
    (message,) = caplog.messages
    assert message.startswith(f"{source / 'model.safetensors'}: module.emb.0.weight holds")


@pytest.mark.parametrize(("name", "value"), nightly(("gate", np.nan), ("inner_w0", np.inf), ("out_kernel", -np.inf)))
def test_ttt_layers_that_are_not_finite_are_reported_and_kept(with_ttt, tmp_path, caplog, name, value):
    shutil.copytree(with_ttt / "out", tmp_path / "out")
    path = tmp_path / "out" / "ttt.safetensors"
    tensors = load_file(path)
    tensors[f"layer_01/{name}"].flat[0] = value
    save_file(tensors, path)
    kyutai(tmp_path / "out", tmp_path / "again")
    (message,) = caplog.messages
    assert message.startswith(f"{path}: layer_01/{name} holds NaN or infinite numbers, which are kept")
    np.testing.assert_array_equal(
        load_file(tmp_path / "again" / "ttt_01.safetensors")[name], tensors[f"layer_01/{name}"]
    )
