"""Weights as others leave them: in shards, under prefixes, as full fine-tunes, in Hugging Face's layout, with a model
card."""

import json

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from tests.helpers import kyutai_files as files
from tests.helpers.converting import (
    assert_one_sentence,
    cached_by_hub,
    change_config,
    info_of,
    nightly,
    refused,
    run,
    same,
)
from ttt_jax.checkpoints import safetensors_reader, weights
from ttt_jax.convert import export, kyutai, model_card
from ttt_jax.convert.from_huggingface import _interleaved

C = files.config()
INDEX = "model.safetensors.index.json"


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """config.json of the model that all these sources hold, converted from one file of Kyutai's."""
    folder = tmp_path_factory.mktemp("plain")
    kyutai(files.write(folder / "source", C, files.weights(C)), folder / "ours")
    return info_of(folder / "ours")


@pytest.fixture
def source(tmp_path):
    """A sound source folder."""
    return files.write(tmp_path / "source", C, files.weights(C))


def arrives(source, plain, *notes, **options):
    """Convert `source` and require every bit of `plain` and a note for each of `notes`; the plan."""
    out = source.parent / f"{source.name}-ours"
    plan = kyutai(source, out, **options)
    info = info_of(out)
    assert info["files"] == plain["files"]
    assert info["model"] == plain["model"]
    notices = [note for note in plan.notes if "no tokenizer" not in note and "licence" not in note]
    assert len(notices) == len(notes), notices
    for note, words in zip(notices, notes, strict=True):
        assert words in note
    return plan


# Shards


@pytest.mark.parametrize(
    ("count", "moshi_name"),
    nightly(
        (2, None),
        (7, "model.safetensors"),
        (1, None),
        (1, "model.safetensors"),
        (2, "model.safetensors"),
        (7, None),
        default=2,
    ),
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
    save_file({"x": np.zeros(1)}, source / "tokenizer-e351c8d8-checkpoint125.safetensors")
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
        ('{"weight_map": {"a": "."}}', "names '.', which is no file beside it"),
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


# Prefixes


PREFIXES = ("module.", "_orig_mod.", "_orig_mod.module.", "model.", "lm.", "ema.lm_model.module.")


@pytest.mark.parametrize(
    ("layout", "prefix"),
    nightly(
        ("unfused", "ema.lm_model.module."),
        ("sharded", "_orig_mod."),
        *((layout, prefix) for layout in ("unfused", "fused", "sharded") for prefix in PREFIXES),
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
    for both in (w | {wrapped: w[name]}, {wrapped: w[name]} | w):
        source = files.write(source, C, both)
        refused(source, f"model.safetensors holds {name} twice, once as {wrapped}, with a wrapper's word in its name")
    first = {"_orig_mod.text_emb.weight": w["text_emb.weight"]}
    refused(files.write(source, C, first | w), "holds text_emb.weight twice, once as _orig_mod.text_emb.weight, with")


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


# Full fine-tunes and adapters


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


def test_adapters_beside_weights_of_another_name(tmp_path):
    c = files.config(lora=True, lora_rank=3, lora_scaling=1.5)
    source = files.write(tmp_path / "source", c, files.weights(c), lora=files.lora(c, 3))
    (source / "model.safetensors").rename(source / "mine.safetensors")
    assert kyutai(source, tmp_path / "ours").cfg.lora.rank == 3


def test_adapters_in_shards(tmp_path, source):
    lora = files.shard(files.write(tmp_path / "lora", None, files.lora(C, 3)), 2)
    plan = kyutai(source, tmp_path / "ours", lora=lora / INDEX)
    assert plan.cfg.lora.rank == 3
    assert "lora.safetensors" in plan.files


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


# Configurations of other models


@pytest.mark.parametrize(
    "config",
    [
        {"model_type": "personaplex", "version": "1.0.0"},
        {"model_type": "llama", "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 9},
        {"dim": 16, "n_layers": 2, "n_heads": 2, "norm_eps": 1e-5},
        {"model_type": "mimi", "hidden_size": 512, "num_quantizers": 32},
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


# Hugging Face's layout


def huggingface(folder, kind="F32", c=C, **changes):
    """The model of `plain` as transformers stores it."""
    return files.write(folder, files.huggingface_config(c, **changes), files.huggingface(files.weights(c, kind), c))


def test_hugging_faces_weights_name_kyutais_codec(tmp_path):
    kyutai(huggingface(tmp_path / "source"), tmp_path / "ours")
    about = weights.load(tmp_path / "ours").info["source"]
    assert about["mimi"] == "hf://kyutai/moshiko-pytorch-bf16/tokenizer-e351c8d8-checkpoint125.safetensors"
    assert about["config"] == files.huggingface_config(C)


def without(config, *keys):
    return {key: value for key, value in config.items() if key not in keys}


@pytest.mark.parametrize("shards", nightly(4, 0))
def test_hugging_faces_layout_arrives_bit_for_bit(tmp_path, plain, shards):
    source = huggingface(tmp_path / "source")
    if shards:
        files.shard(source, shards)
    arrives(source, plain)
    export(tmp_path / "source-ours", tmp_path / "back")
    same(load_file(tmp_path / "back" / "model.safetensors"), files.fuse(files.weights(C)))
    config = info_of(tmp_path / "back")
    assert {key: config[key] for key in C} == C


@pytest.mark.parametrize(
    ("kind", "changes"),
    nightly(
        ("BF16", {"n_q": 8, "dep_q": 4, "delays": [0, 0, 1, 1, 1, 0, 1, 1, 1], "num_heads": 4}),
        ("F16", {"n_q": 6, "dep_q": 3, "delays": [0, 0, 1, 1, 0, 1, 1], "num_heads": 1, "depformer_num_heads": 1}),
        ("F32", {"dim": 24, "num_heads": 2, "max_period": 100000, "depformer_num_layers": 1, "num_layers": 3}),
    ),
)
def test_both_layouts_of_other_sizes_and_types_arrive_alike(tmp_path, kind, changes):
    c = files.config(**changes)
    kyutai(files.write(tmp_path / "kyutais", c, files.weights(c, kind)), tmp_path / "one")
    kyutai(huggingface(tmp_path / "theirs", kind, c), tmp_path / "other")
    one, other = (info_of(tmp_path / name) for name in ("one", "other"))
    assert one["files"] == other["files"]
    assert one["model"] == other["model"]
    assert one["digest"] == other["digest"]


def test_what_hugging_face_has_beyond(tmp_path, plain):
    source = huggingface(
        tmp_path / "source", torch_dtype="bfloat16", use_cache=True, rope_parameters={"rope_theta": 10000}
    )
    w = load_file(source / "model.safetensors")
    w["audio_encoder.encoder.layers.0.conv.weight"] = np.zeros((3, 1, 7), ml_dtypes.bfloat16)
    w["audio_encoder.encoder_transformer.rotary_emb.inv_freq"] = np.zeros(3, np.float32)
    w["decoder.model.layers.0.self_attn.rotary_emb.inv_freq"] = np.zeros(4, np.float32)
    save_file(w, source / "model.safetensors")
    (source / "generation_config.json").write_text("{}")
    arrives(
        source,
        plain,
        "audio_encoder.* (2 tensors) is Mimi, the codec",
        "inv_freq (1 tensors) follows from the configuration",
    )


def test_hugging_faces_layout_with_a_prefix_adapters_and_without_defaults(tmp_path, plain):
    w = {f"_orig_mod.{key}": array for key, array in files.huggingface(files.weights(C), C).items()}
    c = without(
        files.huggingface_config(C),
        "head_dim",
        "num_key_value_heads",
        "hidden_act",
        "architectures",
        "audio_vocab_size",
    )
    c["depth_decoder_config"] = without(c["depth_decoder_config"], "rms_norm_eps", "model_type")
    source = files.write(tmp_path / "source", without(c, "rope_theta"), w)
    arrives(source, plain, "start with _orig_mod., which is left out")
    a = files.lora(C, 2)
    save_file(a, tmp_path / "lora.safetensors")
    for name in (source, files.write(tmp_path / "kyutais", C, files.weights(C))):
        kyutai(name, tmp_path / f"{name.name}-merged", lora=tmp_path / "lora.safetensors", merge_lora=True)
    one, other = (info_of(tmp_path / f"{name}-merged") for name in ("source", "kyutais"))
    assert one["files"] == other["files"]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_key_value_heads": 1}, "num_key_value_heads=1 instead of 2"),
        ({"head_dim": 4}, "head_dim=4 instead of 8"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu' instead of 'silu'"),
        ({"rms_norm_eps": 1e-5}, "rms_norm_eps=1e-05 instead of 1e-08"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings=True instead of False"),
        ({"rope_scaling": {"type": "linear", "factor": 2}}, "scaled positions"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, "scaled positions"),
        ({"quantization_config": {"bits": 4}}, "quantised weights"),
        ({"hidden_size": "16"}, "hidden_size is '16'"),
        ({"num_codebooks": 0}, "describes no model that can be"),
        ({"num_codebooks": 10**30}, "more codebooks than Mimi's 32"),
        ({"num_hidden_layers": 10**30}, "has 1000000000000000000000000000000 layers, as it holds only"),
        ({"rope_theta": "far"}, "rope_theta is 'far'"),
        ({"depth_decoder_config": 3}, "depth_decoder_config is 3"),
        ({"sliding_window": None}, "sliding_window is None"),
        ({"rope_parameters": [1]}, "rope_parameters is [1]"),
        (
            {"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}},
            "rope_parameters.partial_rotary_factor=0.5",
        ),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5 instead of 1.0"),
        ({"attention_bias": True}, "attention_bias=True instead of False"),
        ({"ffn_dim": 89}, "ffn_dim is 89, but must be even"),
        ({"num_attention_heads": 0}, "num_attention_heads is 0, but must be 1 or more"),
        ({"num_attention_heads": -2}, "num_attention_heads is -2, but must be 1 or more"),
        ({"hidden_size": 0}, "hidden_size is 0, but must be 1 or more"),
    ],
)
def test_what_of_hugging_faces_configurations_is_refused(tmp_path, changes, words):
    refused(huggingface(tmp_path / "source", **changes), str(tmp_path / "source" / "config.json"), words)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"sliding_window": 1}, "a window in the depth transformer (depth_decoder_config.sliding_window=1)"),
        ({"rms_norm_eps": 1e-6}, "depth_decoder_config.rms_norm_eps=1e-06"),
        ({"num_hidden_layers": 2.0}, "depth_decoder_config.num_hidden_layers is 2.0"),
        ({"num_codebooks": 3}, "depth_decoder_config.num_codebooks is 3, but num_codebooks is 2"),
        ({"vocab_size": 5}, "depth_decoder_config.vocab_size is 5, but vocab_size is 9"),
        ({"audio_vocab_size": 5}, "depth_decoder_config.audio_vocab_size is 5, but audio_vocab_size is 6"),
        ({"input_size": 8}, "depth_decoder_config.input_size is 8, but hidden_size is 16"),
        ({"ffn_dim": 43}, "depth_decoder_config.ffn_dim is 43, but must be even"),
        ({"num_attention_heads": 0}, "depth_decoder_config.num_attention_heads is 0, but must be 1 or more"),
        ({"attention_bias": True}, "depth_decoder_config.attention_bias=True instead of False"),
    ],
)
def test_what_of_hugging_faces_depth_configurations_is_refused(tmp_path, changes, words):
    depth = files.huggingface_config(C)["depth_decoder_config"] | changes
    refused(huggingface(tmp_path / "source", depth_decoder_config=depth), words)


def test_hugging_faces_tensors_that_do_not_fit_are_named_as_theirs(tmp_path):
    source = huggingface(tmp_path / "source")
    w = load_file(source / "model.safetensors")
    del w["decoder.model.layers.1.self_attn.k_proj.linear.weight"]
    w["depth_decoder.lm_heads.weight"] = w["depth_decoder.lm_heads.weight"][:, 1:].copy()
    w["depth_decoder.layers.0.mlp.fc3.weight"] = np.zeros((2, 2), np.float32)
    w["decoder.lm_head.weight"] = w["decoder.lm_head.weight"].astype(np.float16)
    save_file(w, source / "model.safetensors")
    refused(
        source,
        f"model.safetensors does not fit {source / 'config.json'}",
        "lacks decoder.model.layers.1.self_attn.k_proj.linear.weight",
        "has depth_decoder.layers.0.mlp.fc3.weight, which the model does not have",
        "has depth_decoder.lm_heads.weight of shape [2, 5, 8] instead of [2, 6, 8]",
        "has decoder.lm_head.weight as F16 where the others are F32",
    )


def test_a_config_and_weights_of_two_layouts(tmp_path, source):
    theirs = huggingface(tmp_path / "theirs")
    refused(theirs, "has the names of Hugging Face's", "--config", config=source / "config.json")
    refused(source, "no language model of Kyutai's (it has no dim, num_layers ...)", config=theirs / "config.json")
    (theirs / "config.json").unlink()
    refused(theirs, "has the names of Hugging Face's", "--config")


@pytest.mark.parametrize("block", [1, 64, 1000])
@pytest.mark.parametrize("unit", [1, 24, 128])
def test_rows_of_heads_are_put_back_in_blocks_of_any_size(monkeypatch, block, unit):
    monkeypatch.setattr(safetensors_reader, "BLOCK", block)
    rows = np.arange(3 * 8 * 6, dtype=np.float32).reshape(24, 6)  # 3 heads of 8 rows of 24 bytes
    piece = _interleaved(safetensors_reader.of_array(rows.nbytes, lambda: rows), 3, 24)
    blocks = [bytes(view) for view in piece.blocks(unit)]
    assert all(len(one) % unit == 0 for one in blocks[:-1])
    assert len(blocks) > 1 or block > 24 * 8
    got = np.frombuffer(b"".join(blocks), np.float32).reshape(3, 4, 2, 6)
    for head in range(3):
        for pair in range(4):
            np.testing.assert_array_equal(got[head, pair], rows[head * 8 + np.array([pair, 4 + pair])])


# Model cards


@pytest.mark.parametrize(
    ("front", "licence"),
    [
        ("license: cc-by-4.0", "cc-by-4.0"),
        ("license: 'cc-by-4.0'  # as Kyutai", "cc-by-4.0"),
        ('language: en\nlicense: "apache-2.0"\ntags:\n- x', "apache-2.0"),
        ("license:\n- cc-by-4.0\ntags:\n- speech", "cc-by-4.0"),
        ("license:\n  - cc-by-4.0\n  - 'mit'\nlanguage:\n  - en", "cc-by-4.0, mit"),
        ('license: [cc-by-4.0, "mit"]', "cc-by-4.0, mit"),
        ("license: [\n  cc-by-4.0,\n  mit,\n]\ntags: [x]", "cc-by-4.0, mit"),
        ("license: other\nlicense_name: own-terms\nlicense_link: LICENSE", "own-terms (LICENSE)"),
        (
            "license: other\nlicense_name: open-model\nlicense_link: >-\n "
            " https://example.com/open-model/\nlanguage:\n- en",
            "open-model (https://example.com/open-model/)",
        ),
        ("license: other\nlicense_name: 'terms of ours'", "terms of ours"),
        ("license: other", "other"),
        ("license:\nlanguage: en", "unknown"),
        ("license: null", "unknown"),
        ("language: en\ntags:\n- license:mit", "unknown"),
        ("license_name: mine", "unknown"),
        ("license : mit", "mit"),
        ('"license": mit', "mit"),
        ("'license' : [mit, apache-2.0]", "mit, apache-2.0"),
        ("license: other\nlicense_name: O'Neill's licence\nlicense_link: LICENSE", "O'Neill's licence (LICENSE)"),
        ("license: other\nlicense_name: 'O''Neill''s licence'", "O'Neill's licence"),
        ('license: other\nlicense_name: "the \\"free\\" one: # 2"', 'the "free" one: # 2'),
        ("license: other\nlicense_name: '[draft] mine'", "[draft] mine"),
        ("license: other\nlicense_name: 'null'", "null"),
    ],
)
def test_the_licence_of_a_card(front, licence):
    text = f"---\n{front}\n---\n# A model\nlicense: gpl\n"
    for card in (text, text.replace("\n", "\r\n"), "\ufeff" + text):
        assert model_card.licence(card) == licence
    assert model_card.licence(model_card.front_matter(licence) + "# A model\n") == licence


@pytest.mark.parametrize(
    ("licence", "expected"),
    [
        ("mit", "license: mit\n"),
        ("cc-by-4.0, mit", "license:\n- cc-by-4.0\n- mit\n"),
        ("O'Neill's licence", "license: other\nlicense_name: 'O''Neill''s licence'\n"),
        ("a, b c", "license: other\nlicense_name: 'a, b c'\n"),
        ("unknown", ""),
    ],
)
def test_the_licence_in_a_card_is_yaml(licence, expected):
    assert model_card.front_matter(licence) == (expected and f"---\n{expected}---\n\n")


@pytest.mark.parametrize(
    "text", ["", "# A model\nlicense: mit\n", "---\nlicense: mit\n", "text\n---\nlicense: mit\n---\n"]
)
def test_a_card_without_a_licence(text):
    assert model_card.licence(text) == model_card.UNKNOWN


def test_a_list_of_licences_travels(source):
    (source / "README.md").write_text("---\nlicense:\n- cc-by-4.0\n- mit\n---\n")
    kyutai(source, source.parent / "ours")
    export(source.parent / "ours", source.parent / "back")
    kyutai(source.parent / "back", source.parent / "again")
    assert weights.load(source.parent / "again").info["source"]["licence"] == "cc-by-4.0, mit"
