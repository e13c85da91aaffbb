"""TTT layers that a conversion adds, and runs exported to Kyutai's layout."""

import dataclasses
import functools
import operator
import re

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file

from tests.helpers import kyutai_files as files
from tests.helpers.comparing import same
from tests.helpers.converting import TTT, close, info_of, layout, nightly, parameters_of, with_adapters
from ttt_jax.checkpoints import run_checkpoints, run_weights, weights
from ttt_jax.config import LoRAConfig, TTTConfig
from ttt_jax.convert import export, kyutai
from ttt_jax.errors import InputError
from ttt_jax.moshi import model
from ttt_jax.utils import config_json


def test_ttt_layers_are_added_and_travel_in_files_of_their_own(with_ttt, tmp_path):
    cfg, params, info = weights.load(with_ttt / "ours", verify=True)
    assert cfg.ttt == TTT
    (run,) = params["layers"].values()
    tree = run["ttt"]
    assert layout(params) == layout(parameters_of(cfg))
    assert not tree["out_kernel"].any()
    assert not tree["out_bias"].any()
    assert (tree["gate"] == 0.25).all()
    for part in ("kernel", "bias"):  # as in fresh weights
        np.testing.assert_array_equal(tree[f"q_{part}"], tree[f"k_{part}"])
        assert (tree[f"q_{part}"] != tree[f"v_{part}"]).all()
    assert info_of(with_ttt / "plain")["digest"] == info["digest"]

    out = load_file(with_ttt / "out" / "ttt.safetensors")
    np.testing.assert_array_equal(out["layer_01/q_kernel"], tree["q_kernel"][1])
    same(load_file(with_ttt / "out" / "model.safetensors"), files.fuse(files.weights(files.config())))
    kyutai(with_ttt / "out", tmp_path / "again")
    again = info_of(tmp_path / "again")
    for name in ("ttt_00.safetensors", "ttt_01.safetensors"):
        assert again["files"][name] == info["files"][name]
    assert again["model"]["ttt"] == info_of(with_ttt / "ours")["model"]["ttt"]
    with pytest.raises(InputError, match="has TTT layers already"):
        kyutai(with_ttt / "out", tmp_path / "never", ttt=TTT)


def test_each_added_ttt_layer_has_random_numbers_of_its_own(with_ttt, tmp_path):
    first, second = (load_file(with_ttt / "ours" / f"ttt_0{i}.safetensors") for i in range(2))
    kyutai(with_ttt / "source", tmp_path / "another", ttt=TTT, seed=4)
    another = load_file(tmp_path / "another" / "ttt_00.safetensors")
    for name in ("q_kernel", "v_kernel", "rate_weight", "inner_w0"):
        assert (first[name] != second[name]).any(), name
        assert (first[name] != another[name]).any(), name


@pytest.mark.slow
def test_added_ttt_layers_have_no_effect(with_ttt):
    tokens = jax.random.randint(jax.random.key(0), (1, 5, 6), 0, 6)
    logits = []
    for name in ("plain", "ours"):
        cfg, params, _ = weights.load(with_ttt / name)
        outputs, _ = model.forward(params, tokens, np.ones((1, 6), bool), model.init_state(cfg, 1), cfg)
        logits.append(outputs)
    np.testing.assert_array_equal(logits[0].text_logits, logits[1].text_logits)
    np.testing.assert_array_equal(logits[0].audio_logits, logits[1].audio_logits)


def test_a_trained_run_goes_out(with_ttt, tmp_path):
    cfg, params, _ = weights.load(with_ttt / "ours")
    checkpoints = run_checkpoints.Checkpoints(tmp_path / "run", keep=1)
    checkpoints.save(1, params, {"x": np.zeros(1)}, {}, {"config": {"model": config_json.to_dict(cfg)}})
    checkpoints.close()
    export(tmp_path / "run", tmp_path / "out")
    for name in ("model", "ttt"):
        same(*(load_file(folder / "out" / f"{name}.safetensors") for folder in (tmp_path, with_ttt)))
    export(tmp_path / "run", tmp_path / "small", dtype="bfloat16")
    assert load_file(tmp_path / "small" / "model.safetensors")["text_emb.weight"].dtype == ml_dtypes.bfloat16


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """Folder of bfloat16 weights with float32 adapters and a TTT layer ("ours"); its weights and adapters."""
    folder = tmp_path_factory.mktemp("tuned")
    c = files.config(**files.VARIANTS["all"], lora=True, lora_rank=3, lora_scaling=1.5, mimi_name="codec.safetensors")
    w, a = files.weights(c, "BF16"), files.lora(c, 3)
    source = files.write(folder / "source", c, w, lora=a)
    (source / "tokenizer_spm_32k_3.model").write_bytes(b"pieces")
    (source / "README.md").write_text("---\nlicense: cc-by-4.0\n---\n")
    kyutai(source, folder / "ours", ttt=TTTConfig(layers="1", hidden=()))
    return folder / "ours", w, a


@pytest.fixture
def tuned(base, tmp_path, monkeypatch):
    """A function that makes runs that were fine-tuned from `base`; its weights and adapters."""
    ours, w, a = base
    cfg, params, info = weights.load(ours)
    folder = tmp_path / "run"
    (folder / "checkpoints").mkdir(parents=True)

    def run(*maps, base=ours, trained=None):
        """The folder of a run with adapters on `maps`, whose leaves `trained` (by path) differ from its base."""
        run_cfg = dataclasses.replace(cfg, lora=LoRAConfig(3 if maps else 0, 1.5, maps))
        tree = {}
        for path in {tensor.path for tensor in weights.tensors(run_cfg)}:
            branch = functools.reduce(lambda branch, key: branch.setdefault(key, {}), path[:-1], tree)
            leaf = functools.reduce(operator.getitem, path, params)
            branch[path[-1]] = (trained or {}).get(path, leaf)
        meta = {"base": {"path": str(base), "digest": info["digest"]}}
        monkeypatch.setattr(run_weights, "load_run", lambda path: run_weights.Run(run_cfg, tree, meta))
        return folder

    return run, w, a


def test_a_fine_tuned_run_goes_out_with_the_bits_and_papers_of_its_base(tuned, base, tmp_path):
    run, w, _ = tuned
    assert export(run(), tmp_path / "out").notes == ()
    same(load_file(tmp_path / "out" / "model.safetensors"), files.fuse(w))
    export(base[0], tmp_path / "direct", merge_lora=True)
    for name in ("config.json", "README.md", "tokenizer_spm_32k_3.model", "ttt.safetensors", "ttt_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "direct" / name).read_bytes(), name
    assert "license: cc-by-4.0" in (tmp_path / "out" / "README.md").read_text()
    assert info_of(tmp_path / "out")["mimi_name"] == "codec.safetensors"


def test_a_run_without_its_base_is_refused(tuned, tmp_path):
    run, *_ = tuned
    c = files.config()
    kyutai(files.write(tmp_path / "plain", c, files.weights(c)), tmp_path / "another")
    for name in ("nowhere", "another"):
        with pytest.raises(InputError, match=rf"{name}, the base weights of .*run, is gone or another"):
            export(run(base=tmp_path / name), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("part", "modules"),
    nightly(
        ("depth", r"depformer|linears"),
        ("attention", r"transformer\..*self_attn"),
        ("ffn", r"transformer\..*gating"),
        ("heads", r"text_linear|extra_heads"),
    ),
)
def test_adapters_on_some_maps_merge_and_leave_the_others_alone(tuned, tmp_path, part, modules):
    run, w, a = tuned
    with pytest.raises(InputError, match=rf"has adapters on {part} only, but Kyutai's .* give --merge-lora"):
        export(run(part), tmp_path / "out")
    export(run(part), tmp_path / "out", merge_lora=True)
    mine = {name: array for name, array in a.items() if re.match(modules, name)}
    wanted, plain = files.fuse(with_adapters(w, mine, 1.5)), files.fuse(w)
    got = load_file(tmp_path / "out" / "model.safetensors")
    close(got, wanted)
    others = [name for name in plain if not re.match(modules, name)]
    same({name: got[name] for name in others}, {name: plain[name] for name in others})
    assert "lora" not in info_of(tmp_path / "out")


def test_adapters_on_all_maps_of_a_run_are_kyutais_file(tuned, tmp_path):
    run, w, a = tuned
    export(run("heads", "depth", "ffn", "attention"), tmp_path / "out")
    same(load_file(tmp_path / "out" / "lora.safetensors"), a)
    same(load_file(tmp_path / "out" / "model.safetensors"), files.fuse(w))


def test_trainable_weights_take_the_type_of_frozen_ones_unless_another_is_requested(tuned, base, tmp_path):
    run, w, _ = tuned
    path = next(t.path for t in weights.base(weights.load(base[0]).cfg) if t.name == "attention/out" and "01" in t.file)
    mine = np.random.default_rng(3).normal(size=(1, 16, 16)).astype(np.float32)
    (note,) = export(run(trained={path: mine}), tmp_path / "out").notes
    assert note == f"{'/'.join(path)} are rounded to bfloat16, the others' type; --dtype float32 keeps them"
    key = "transformer.layers.1.self_attn.out_proj.weight"
    same(load_file(tmp_path / "out" / "model.safetensors"), files.fuse(w) | {key: mine[0].astype(ml_dtypes.bfloat16)})
    assert export(run(trained={path: mine}), tmp_path / "wide", dtype="float32").notes == ()
    wide = {name: array.astype(np.float32) for name, array in files.fuse(w).items()}
    same(load_file(tmp_path / "wide" / "model.safetensors"), wide | {key: mine[0]})
