"""Weights as others leave them: in shards, under prefixes, as full fine-tunes, with adapters or with another
configuration."""

import json

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from tests.helpers import kyutai_files as files
from tests.helpers import mimi_files
from tests.helpers.comparing import same
from tests.helpers.converting import arrives, assert_one_sentence, cached_by_hub, change_config, nightly, refused, run
from ttt_jax.checkpoints import safetensors_reader, weights
from ttt_jax.convert import export, kyutai

C = files.config()
INDEX = "model.safetensors.index.json"


@pytest.mark.parametrize(
    ("count", "moshi_name"),
    nightly((2, None), (7, "model.safetensors"), (1, None), (1, "model.safetensors"), default=2),
)
def test_shards_arrive_as_one_file(source, plain, count, moshi_name):
    files.shard(source, count)
    change_config(source, moshi_name=moshi_name or ...)
    arrives(source, plain)


def test_shards_by_their_index_or_by_one_of_them(source, plain, tmp_path):
    files.shard(source)
    arrives(source / INDEX, plain)
    shard = source / "model-00002-of-00003.safetensors"
    arrives(shard, plain, "model-00002-of-00003.safetensors is one of 3 shards, which are read together")


def test_shards_under_another_name(source, plain):
    files.shard(source)
    index = json.loads((source / INDEX).read_text())
    for path in source.glob("model-*"):
        path.rename(source / path.name.replace("model", "tuned"))
    index["weight_map"] = {key: name.replace("model", "tuned") for key, name in index["weight_map"].items()}
    (source / INDEX).unlink()
    (source / "tuned.safetensors.index.json").write_text(json.dumps(index))
    save_file(mimi_files.weights(), source / mimi_files.NAME)
    (source / "codec.json").write_text(json.dumps(mimi_files.CONFIG))
    change_config(source, mimi_config_name="codec.json")
    arrives(source, plain)


def test_shards_that_do_not_fit_their_index(source):
    files.shard(source)
    first, second, third = sorted(source.glob("model-*"))
    content = second.read_bytes()
    second.unlink()
    refused(source, f"{INDEX} names {second.name}, which is not there")
    second.write_bytes(content)
    tensors = load_file(second)
    key, other = list(tensors)[:2]
    save_file({name: array for name, array in tensors.items() if name != key}, second)
    refused(source, INDEX, f"{second.name} lacks {key}, which the index lists for it")
    second.write_bytes(content)
    whole = load_file(first)
    save_file(whole | {other: tensors[other]}, first)
    refused(source, f"{first.name} holds {other}, which the index lists for {second.name}")
    save_file(whole | {"wings.weight": tensors[other]}, first)
    refused(source, f"{first.name} holds wings.weight, which the index does not name")
    save_file(whole, first)
    third.write_bytes(third.read_bytes()[:-4])
    refused(source, str(third), "cut off")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{", "is not JSON"),
        ("[]", "holds no weight_map"),
        ('{"weight_map": {}}', "holds no weight_map"),
        ('{"weight_map": {"a": 3}}', "holds no weight_map"),
        ('{"weight_map": {"a": "../x.safetensors"}}', "names '../x.safetensors', which is no file beside it"),
        ('{"weight_map": {"a": "/etc/passwd"}}', "names '/etc/passwd', which is no file beside it"),
        ('{"weight_map": {"a": ""}}', "names '', which is no file beside it"),
        ('{"weight_map": {"a": ".."}}', "names '..', which is no file beside it"),
    ],
)
def test_an_index_that_is_none(source, content, words):
    files.shard(source)
    (source / INDEX).write_text(content)
    refused(source, INDEX, words)


def test_shards_without_an_index(source):
    files.shard(source)
    (source / INDEX).unlink()
    words = "model-00001-of-00003.safetensors is one of 3 shards, and model.safetensors.index.json is not beside it"
    refused(source, words)
    refused(source / "model-00001-of-00003.safetensors", words)


def test_a_problem_names_the_shard(source):
    w = files.weights(C) | {"wings.weight": np.zeros(3, np.float32)}
    key = "depformer.layers.0.norm1.alpha"
    w[key] = w[key][..., 1:]
    del w["out_norm.alpha"]
    files.shard(files.write(source, C, w), 2)
    where = source / "config.json"
    first, second = (source / f"model-0000{i}-of-00002.safetensors" for i in (1, 2))
    refused(
        source,
        f"{source / INDEX} does not fit {where}, as it lacks out_norm.alpha; ",
        f"{first} does not fit {where}, as it has {key} of shape [1, 1, 7] instead of [1, 1, 8]; ",
        f"{second} does not fit {where}, as it has wings.weight, which the model does not have: ",
    )


@pytest.mark.integration
def test_shards_on_the_hub(source, tmp_path):
    pytest.importorskip("huggingface_hub")
    files.shard(source)
    snapshot = cached_by_hub(source, tmp_path)
    done = run(tmp_path, "kyutai", "some/one", "ours", HF_HUB_OFFLINE="1")
    assert done.returncode == 0, done.stderr
    assert weights.load(tmp_path / "ours").info["source"]["file"] == INDEX
    (snapshot / "model-00003-of-00003.safetensors").unlink()
    done = run(tmp_path, "kyutai", "some/one", "never", HF_HUB_OFFLINE="1")
    assert_one_sentence(done, "model-00003-of-00003.safetensors of some/one on the hub is not in the hub's cache")


PREFIXES = ("module.", "_orig_mod.", "_orig_mod.module.", "model.", "lm.")


@pytest.mark.parametrize(
    ("layout", "prefix"),
    nightly(
        *(("unfused", "ema.lm_model.module."), ("sharded", "_orig_mod.")),
        *(("fused", prefix) for prefix in PREFIXES),
        default=2,
    ),
)
def test_a_prefix_of_all_names_is_left_out(tmp_path, plain, prefix, layout):
    w = files.weights(C) if layout == "unfused" else files.fuse(files.weights(C))
    source = files.write(tmp_path / "source", C, {prefix + key: array for key, array in w.items()})
    if layout == "sharded":
        files.shard(source)
    arrives(source, plain, f"start with {prefix}, which is left out")


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("transformer.layers.0.", "transformer._orig_mod.layers.0."),
        ("transformer.layers.1.", "transformer.layers.1._checkpoint_wrapped_module."),
        ("depformer.", "depformer._fsdp_wrapped_module."),
    ],
)
@pytest.mark.parametrize("prefix", nightly("module.", ""))
def test_words_of_wrappers_within_names_are_left_out(tmp_path, plain, before, after, prefix):
    w = {prefix + key.replace(before, after): array for key, array in files.weights(C).items()}
    source = files.write(tmp_path / "source", C, w)
    word = next(word for word in after.split(".") if word.startswith("_"))
    notes = ["start with module., which is left out"] * bool(prefix)
    arrives(source, plain, *notes, f"{word} in names in model.safetensors is left out")


def test_a_name_with_and_without_a_wrapper(source):
    w = files.weights(C)
    name = "transformer.layers.0.norm1.alpha"
    wrapped = name.replace("layers", "_orig_mod.layers")
    refused(files.write(source, C, w | {wrapped: w[name]}), f"model.safetensors holds {name} twice, once as {wrapped}")
    first = {"_orig_mod.text_emb.weight": w["text_emb.weight"]}
    refused(files.write(source, C, first | w), "holds text_emb.weight twice, once as _orig_mod.text_emb.weight")


def test_a_part_of_a_model_has_no_prefix(tmp_path):
    w = {key: array for key, array in files.weights(C).items() if key.startswith("depformer.layers")}
    source = files.write(tmp_path / "source", C, {f"module.{key}": array for key, array in w.items()})
    refused(source, "lacks text_emb.weight, emb.{0-3}.weight")


@pytest.mark.parametrize("prefix", nightly("base_model.model.", "", "module.", "_orig_mod.", default=2))
def test_adapters_under_a_prefix(tmp_path, prefix):
    c = files.config(lora=True, lora_rank=3, lora_scaling=1.5)
    a = {prefix + key: array for key, array in files.lora(c, 3).items()}
    plan = kyutai(files.write(tmp_path / "source", c, files.weights(c), lora=a), tmp_path / "ours")
    assert any(f"lora.safetensors start with {prefix}, which" in note for note in plan.notes) == bool(prefix)
    export(tmp_path / "ours", tmp_path / "back")
    same(load_file(tmp_path / "back" / "lora.safetensors"), files.lora(c, 3))


@pytest.mark.parametrize("name", ["model.safetensors", "consolidated.safetensors", "mine.safetensors"])
@pytest.mark.parametrize(
    ("named", "as_file"), nightly((False, False), (True, True), (True, False), (False, True), default=1)
)
def test_a_full_fine_tune_arrives(source, plain, name, named, as_file):
    (source / "model.safetensors").rename(source / name)
    change_config(
        source, lora=True, lora_rank=64, lora_scaling=2.0, **({"moshi_name": "model.safetensors"} if named else {})
    )
    if named and name == "mine.safetensors" and not as_file:
        refused(source, "has no model.safetensors")
        return
    notes = ["lora=true"]
    if name == "consolidated.safetensors" and not as_file:
        notes.insert(0, "consolidated.safetensors, moshi-finetune's name of a full fine-tune, is taken")
    plan = arrives(source / name if as_file else source, plain, *notes)
    assert plan.cfg.lora.rank == 0


def test_a_full_fine_tune_must_be_whole(source, tmp_path):
    change_config(source, lora=True, lora_rank=3)
    w, a = files.weights(C), files.lora(C, 3)
    path = source / "model.safetensors"
    save_file({key: array for key, array in w.items() if key != "out_norm.alpha"}, path)
    refused(source, "model.safetensors does not fit", "lacks out_norm.alpha")
    save_file(w | {"linears.0.lora_A.weight": a["linears.0.lora_A.weight"]}, path)
    refused(source, "model.safetensors holds adapters among the weights (linears.0.lora_A.weight)")
    frozen = {key.replace(".weight", ".frozen_W.weight"): array for key, array in w.items() if "linear" in key}
    save_file({key: array for key, array in w.items() if "linear" not in key} | frozen | a, path)
    refused(source, "model.safetensors holds adapters among the weights", "linears.{0-1}.frozen_W.weight")
    save_file(a, path)
    refused(source, "model.safetensors holds adapters only", "by --lora")
    path.rename(source / "lora.safetensors")
    refused(source, "holds adapters (lora.safetensors) without the weights", "as SOURCE")
    change_config(source, moshi_name="model.safetensors")
    refused(source, "holds adapters (lora.safetensors) without the weights", "as SOURCE")


def test_adapters_in_shards_and_beside_weights_of_another_name(tmp_path, source):
    lora = files.shard(files.write(tmp_path / "lora", None, files.lora(C, 3)), 2)
    assert "lora.safetensors" in kyutai(source, tmp_path / "ours", lora=lora / INDEX).files
    (source / "model.safetensors").rename(source / "mine.safetensors")
    change_config(source, lora=True)
    save_file(files.lora(C, 3), source / "lora.safetensors")
    assert kyutai(source, tmp_path / "beside").cfg.lora.rank == 3


@pytest.mark.parametrize(("kind", "other"), nightly(("BF16", "F32"), ("F32", "BF16"), ("F16", "F32"), ("BF16", "F16")))
def test_adapters_of_a_type_of_their_own(tmp_path, kind, other):
    c = files.config(lora=True, lora_rank=3, lora_scaling=0.5)
    w, a = files.weights(c, kind), files.lora(c, 3, other)
    table = {"emb.1.weight": files.weights(c, other, seed=9)["emb.1.weight"]}
    source = files.write(tmp_path / "source", c, w, lora=a | table)
    plan = kyutai(source, tmp_path / "apart")
    note = f"emb.1.weight of the LoRA file are cast to {safetensors_reader.NAMES[kind]}, the type of the weights"
    assert note in plan.notes
    cfg, params, _ = weights.load(tmp_path / "apart")
    types = {name: np.dtype(files.TYPES[name]) for name in (kind, other)}
    assert params["text_head"].dtype == types[kind]
    assert params["text_head_lora_a"].dtype == types[other]
    np.testing.assert_array_equal(params["text_head_lora_b"], a["text_linear.lora_B.weight"])
    np.testing.assert_array_equal(params["audio_emb"][1], table["emb.1.weight"].astype(types[kind]))
    export(tmp_path / "apart", tmp_path / "back")
    same(load_file(tmp_path / "back" / "lora.safetensors"), a)

    kyutai(source, tmp_path / "merged", merge_lora=True)
    got = weights.load(tmp_path / "merged").params["text_head"]
    up, down = (a[f"text_linear.lora_{letter}.weight"].astype(np.float32) for letter in "BA")
    wanted = w["text_linear.weight"].astype(np.float32) + np.float32(0.5) * up @ down
    eps = ml_dtypes.finfo(types[kind]).eps
    np.testing.assert_allclose(np.asarray(got, np.float32), wanted, rtol=2 * eps, atol=16 * 2**-23)


def test_a_problem_of_the_lora_file_names_it(source):
    a = files.lora(C, 3)
    lora = source.parent / "mine.safetensors"
    save_file(a | {"emb.1.weight": np.zeros((3, 16), np.float32), "wings.weight": np.zeros(3, np.float32)}, lora)
    message = refused(source, lora=lora)
    assert message.startswith(f"{lora} does not fit {source / 'config.json'}, as it has wings.weight")
    assert "emb.1.weight of shape [3, 16] instead of [7, 16]" in message
    assert "model.safetensors" not in message


@pytest.mark.parametrize("lora", [False, ...])
def test_a_lora_file_that_the_config_does_not_name_is_noted(tmp_path, lora):
    c = files.config() | ({} if lora is ... else {"lora": lora})
    source = files.write(tmp_path / "source", c, files.weights(c), lora=files.lora(c, 3))
    plan = kyutai(source, tmp_path / "ours")
    assert plan.cfg.lora.rank == 0
    (note,) = (note for note in plan.notes if "lora" in note)
    assert note.startswith(f"lora.safetensors lies beside the weights, but {source / 'config.json'} names no adapters")
    plan = kyutai(source, tmp_path / "with", lora=source / "lora.safetensors")
    assert not any("lies beside" in note for note in plan.notes)


@pytest.mark.parametrize(
    "config",
    [
        {"model_type": "personaplex", "version": "1.0.0"},
        {"model_type": "llama", "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 9},
        {"dim": 16, "n_layers": 2, "n_heads": 2, "norm_eps": 1e-5},
        {},
    ],
)
def test_a_config_of_another_model_is_refused_as_that_first(source, config):
    (source / "config.json").write_text(json.dumps(config))
    message = refused(source, f"{source / 'config.json'} describes no language model of Kyutai's", "num_layers")
    assert "layer_norm" not in message
    assert ("model_type" in config) == ("of model_type" in message)


def test_a_converted_folder_as_source(source):
    kyutai(source, source.parent / "ours")
    refused(source.parent / "ours", "converted already", out="again")


def test_personaplexs_weights_with_a_config_by_option(tmp_path, monkeypatch):
    c = files.config(dep_q=4)
    source = files.write(tmp_path / "source", {"model_type": "personaplex"}, files.weights(c))
    (tmp_path / "seven.json").write_text(json.dumps(c))
    assert kyutai(source, tmp_path / "ours", config=tmp_path / "seven.json").cfg.dep_q == 4
    monkeypatch.setenv("HOME", str(tmp_path))
    assert kyutai(source, tmp_path / "again", config="~/seven.json").cfg.dep_q == 4
