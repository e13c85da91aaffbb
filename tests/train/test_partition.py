"""What trains and what is frozen, and the parameters that a run starts from."""

import dataclasses
import itertools
from functools import cache

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from tests.helpers import kyutai_files, small_step
from tests.helpers.drawing import quick_jit
from tests.helpers.small_step import LORA, NO_STOP, batch, one_device
from train import initial_params, optim, partition, step
from train.config import TrainableConfig
from train.partition import fit, split
from ttt_jax.checkpoints import weights
from ttt_jax.config import LoRAConfig, TTTConfig
from ttt_jax.convert import kyutai
from ttt_jax.errors import InputError
from ttt_jax.moshi import model
from ttt_jax.utils.trees import merge, named, pick

THREE = dataclasses.replace(small_step.MODEL, num_layers=3, lora=LORA)
"""Layers 0 and 2 are plain, 1 has a TTT layer."""
COMBINATIONS = [
    TrainableConfig(base, attention, ttt, lora)
    for base, attention, ttt, lora in itertools.product(
        (False, True), ("none", "0", "1,2", "all"), (False, True), (False, True)
    )
    if base or ttt or lora or attention != "none"
]  # fmt: skip
NO_BASE = TrainableConfig(base=False)
slow = lambda values: [pytest.param(value, marks=pytest.mark.slow) for value in values]  # noqa: E731
NAMED = {"none": (), "0": (0,), "1,2": (1, 2), "all": (0, 1, 2)}


def combined(trainable, model=THREE):
    return fit(dataclasses.replace(small_step.CONFIG, model=model, trainable=trainable))


def of_layers(shapes, cfg):
    """What each layer's part of every leaf is called, "2/attention/qkv" or "depth/qkv", with its path."""
    runs = {run.name: range(run.start, run.stop) for run in cfg.runs}
    found = {}
    for path in named(shapes):
        first, *rest = path.split("/")
        if first != "layers":
            found[path] = path
            continue
        for layer in runs[rest[0]]:
            found[f"{layer}/{'/'.join(rest[1:])}"] = path
    return found


some = pytest.mark.parametrize(
    "trainable",
    [pytest.param(one, id=str(one), marks=[pytest.mark.slow] if i % 10 else []) for i, one in enumerate(COMBINATIONS)],
)


@some
def test_that_trains_which_is_named_and_nothing_else(trainable):
    cfg, asked = combined(trainable), trainable
    shapes = partition.shapes(cfg.model)
    trainable, frozen = split(shapes, cfg)
    assert not named(trainable).keys() & named(frozen).keys()
    assert merge(trainable, frozen) == shapes

    def wanted(name):
        if "/ttt/" in name:
            return asked.ttt
        if "_lora_" in name:
            return asked.lora
        layer, *rest = name.split("/")
        return asked.base or (rest[:1] == ["attention"] and layer in map(str, NAMED[asked.attention]))

    names = of_layers(shapes, cfg.model)
    assert {name for name, path in names.items() if path in named(trainable)} == {n for n in names if wanted(n)}


@pytest.mark.parametrize("trainable", [COMBINATIONS[3], *slow(COMBINATIONS[::3])], ids=str)
def test_the_state_holds_two_numbers_for_each_that_trains(trainable):
    cfg = combined(trainable)
    like = step.state_like(cfg, one_device())
    assert named(like.trainable).keys() == named(split(partition.shapes(cfg.model), cfg)[0]).keys()

    def count(tree):
        return sum(leaf.size for leaf in jax.tree.leaves(tree) if leaf.ndim or leaf.dtype == np.float32)

    assert {leaf.dtype for leaf in jax.tree.leaves(like.trainable)} == {np.dtype(np.float32)}
    assert count(like.opt_state) == 2 * count(like.trainable)


def test_layers_whose_attention_alone_trains_are_stacked_apart():
    model = dataclasses.replace(small_step.MODEL, num_layers=6, ttt=TTTConfig(layers="5"))

    def runs(**trainable):
        return [run.name for run in combined(TrainableConfig(**trainable), model).model.runs]

    assert runs() == runs(base=False) == runs(attention="1-2") == ["layers_00_04", "layers_05_05"]
    expected = ["layers_00_00", "layers_01_02", "layers_03_04", "layers_05_05"]
    assert runs(base=False, attention="1-2") == expected
    assert runs(base=False, attention="all") == ["layers_00_04", "layers_05_05"]
    again = combined(TrainableConfig(base=False, attention="1-2"), model)
    assert fit(again) == again
    assert fit(dataclasses.replace(again, trainable=TrainableConfig(base=True))).model.apart == ()


def refused(part, call, *args):
    with pytest.raises(InputError) as caught:
        call(*args)
    message = str(caught.value)
    assert part in message
    assert "\n" not in message


def test_nothing_to_train_is_one_sentence():
    plain = dataclasses.replace(THREE, ttt=TTTConfig(layers="none"), lora=LoRAConfig())
    refused("nothing trains", combined, TrainableConfig(base=False), plain)
    refused("nothing trains", combined, TrainableConfig(base=False, lora=False), dataclasses.replace(plain, lora=LORA))
    with pytest.raises(InputError, match="names nothing that trains"):
        dataclasses.replace(small_step.CONFIG, trainable=TrainableConfig(False, "none", False, False))


@pytest.mark.parametrize("layers", ["3", "0-7", "-4", "first"])
def test_attention_of_layers_that_are_not_there_is_one_sentence(layers):
    refused(f'trainable.attention="{layers}"', combined, TrainableConfig(base=False, attention=layers))


# Weights to start from

KYUTAI = kyutai_files.config(card=12, text_card=20)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A bfloat16 base of Kyutai's layout, converted."""
    return converted(tmp_path_factory.mktemp("weights"))


def converted(where, ranks=0, **kwargs):
    tensors = {name: (0.3 * w).astype(w.dtype) for name, w in kyutai_files.weights(KYUTAI, "BF16").items()}
    source = kyutai_files.write(where / "source", KYUTAI, kyutai_files.fuse(tensors))
    if ranks:
        kwargs["lora"] = where / "lora.safetensors"
        save_file(kyutai_files.lora(KYUTAI, ranks, "BF16"), kwargs["lora"])
    kyutai(source, where / "ours", **kwargs)
    return where / "ours"


def starting(folder, trainable=NO_BASE, **changes):
    """A run that starts from `folder`; `changes` of its model."""
    with weights.Folder(folder) as found:
        cfg = found.cfg
    cfg = dataclasses.replace(cfg, **{"dtype": "float32", **changes})
    return fit(dataclasses.replace(small_step.CONFIG, model=cfg, trainable=trainable, base=str(folder)))


TTT = TTTConfig(layers="1", mini_batch=4, hidden=(2,))
RANK = LoRAConfig(rank=2)


@cache
def initial(cfg):
    """The parameters that a run starts from; no test writes to them."""
    return initial_params.initial(cfg, one_device())


@pytest.fixture(scope="module")
def begun(folder):
    """A run with new TTT layers and adapters on a frozen base but for the attention of layer 0, and its parameters."""
    cfg = starting(folder, TrainableConfig(base=False, attention="0"), ttt=TTT, lora=RANK)
    return cfg, initial(cfg)


def logits(params, cfg):
    run = quick_jit(model.forward, static_argnames="cfg")
    tokens = np.random.default_rng(0).integers(0, 12, (2, cfg.num_streams, 12)).astype(np.int32)
    out, _ = run(params, tokens, np.ones((2, 12), bool), model.init_state(cfg, 2), cfg=cfg)
    return np.asarray(out.text_logits), np.asarray(out.audio_logits)


def test_new_ttt_layers_and_adapters_can_learn_from_an_output_of_0(begun):
    params = merge(*begun[1])
    ttt = params["layers"]["layers_01_01"]["ttt"]
    assert not np.asarray(ttt["out_kernel"]).any()
    assert not np.asarray(ttt["out_bias"]).any()
    assert all(np.asarray(ttt[name]).any() for name in ("gate", "q_kernel", "k_kernel", "v_kernel", "inner_w0"))
    adapters = {path: np.asarray(leaf).any() for path, leaf in named(params).items() if "_lora_" in path}
    assert adapters == {path: path.endswith("_a") for path in adapters}


@pytest.mark.slow
def test_new_ttt_layers_and_adapters_say_nothing_at_first(folder, begun):
    cfg, params = begun[0], merge(*begun[1])
    base = weights.load(folder)
    got, expected = logits(params, cfg.model), logits(base.params, dataclasses.replace(base.cfg, dtype="float32"))
    for a, b in zip(got, expected, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)
        assert b.std() > 0.1
    ones = lambda path, leaf: leaf + 0.1 if path[-1].key in ("out_bias", "qkv_lora_b") else leaf  # noqa: E731
    changed = logits(jax.tree_util.tree_map_with_path(ones, params), cfg.model)
    assert np.abs(changed[0] - got[0]).max() > 1e-2


def test_ttt_layers_that_join_a_base_start_from_different_random_numbers(folder):
    cfg = starting(folder, ttt=dataclasses.replace(TTT, layers="0,1"))
    leaves = named(initial(cfg).trainable)
    for name in ("q_kernel", "v_kernel", "inner_w0"):
        first, second = np.concatenate([leaf for path, leaf in leaves.items() if path.endswith(f"/ttt/{name}")])
        assert np.abs(first - second).max() > 1e-3, name


def test_what_trains_is_float32_and_what_is_frozen_keeps_its_type_and_bits(folder, begun):
    cfg, (trainable, frozen) = begun
    assert {leaf.dtype for leaf in jax.tree.leaves(trainable)} == {np.dtype(np.float32)}
    assert {leaf.dtype for leaf in jax.tree.leaves(frozen)} == {np.dtype(ml_dtypes.bfloat16)}
    base = weights.load(folder).params["layers"]["layers_00_01"]
    for i, run in enumerate(("layers_00_00", "layers_01_01")):
        np.testing.assert_array_equal(frozen["layers"][run]["ffn"]["down"][0], base["ffn"]["down"][i])
    qkv = trainable["layers"]["layers_00_00"]["attention"]["qkv"]
    np.testing.assert_array_equal(qkv[0], base["attention"]["qkv"][0].astype(np.float32))
    assert "layers_01_01" in frozen["layers"]
    assert set(frozen["layers"]["layers_01_01"]["attention"]) == {"qkv", "out"}


@pytest.mark.slow  # test_step_gradients.py has the gradients of what trains
def test_a_step_moves_what_trains_and_no_bit_of_what_is_frozen(begun):
    cfg, (trainable, frozen) = begun
    one = batch(seed=1)
    frames = np.concatenate([one.frames, one.frames[:, :, 1:]], 2)[:, :, : cfg.model.num_streams]
    one = one._replace(frames=np.ascontiguousarray(frames))
    before = jax.tree.map(lambda leaf: np.asarray(leaf).tobytes(), frozen)
    first = jax.tree.map(np.array, trainable)
    program = small_step.compiled(cfg, one_device(), frozen, one)
    state = small_step.start(cfg, trainable)
    places = lambda tree: [leaf.sharding for leaf in jax.tree.leaves(tree)]  # noqa: E731
    # Equal, and not just equivalent: the step would be compiled a second time.
    assert places(step.init_state(cfg, one_device(), trainable)) == places(step.state_like(cfg, one_device()))
    for _ in range(3):
        state, metrics = program(state, frozen, one, NO_STOP)
        assert set(metrics.grad_norms) == set(optim.GROUPS)
        assert places(state) == places(step.state_like(cfg, one_device()))
    assert jax.tree.map(lambda leaf: np.asarray(leaf).tobytes(), frozen) == before
    moved = jax.tree.map(lambda a, b: (a != np.asarray(b)).any(), first, state.trainable)
    assert all(jax.tree.leaves(moved)), moved
    assert {leaf.dtype for leaf in jax.tree.leaves(state.trainable)} == {np.dtype(np.float32)}


@pytest.mark.parametrize(
    ("trainable", "ttt", "lora"),
    [
        (TrainableConfig(base=False, attention="0"), TTT, RANK),
        # New adapters that are frozen are stored.
        pytest.param(TrainableConfig(base=False, lora=False), TTT, RANK, marks=pytest.mark.slow),
        pytest.param(TrainableConfig(base=False), TTT, LoRAConfig(), marks=pytest.mark.slow),
        (TrainableConfig(base=True), TTT, LoRAConfig()),
    ],
    ids=["attention", "ttt", "ttt without adapters", "base"],
)
def test_what_a_checkpoint_holds_and_the_frozen_base_are_all(folder, trainable, ttt, lora):
    cfg, mesh = starting(folder, trainable, ttt=ttt, lora=lora), one_device()
    all_ = merge(*initial(cfg))
    kept = pick(all_, set(initial_params.stored(cfg)))
    rest = initial_params.frozen_base(cfg, mesh)
    whole = merge(kept, rest)
    assert named(whole).keys() == named(all_).keys()
    assert not named(kept).keys() & named(rest).keys()
    for path, leaf in named(whole).items():
        expected = named(all_)[path]
        assert leaf.dtype == expected.dtype, path
        np.testing.assert_array_equal(leaf, expected)
    like = named(initial_params.stored_like(cfg, mesh))
    assert {p: (x.shape, x.dtype, x.sharding) for p, x in like.items()} == {
        p: (x.shape, x.dtype, x.sharding) for p, x in named(kept).items()
    }
    assert named(split(all_, cfg)[0]).keys() <= like.keys()
    assert (rest == {}) == trainable.base


def test_without_a_base_all_is_stored():
    cfg = small_step.config()
    assert initial_params.stored(cfg) is None
    assert initial_params.frozen_base(cfg, one_device()) == {}
    assert initial_params.base_of(cfg) is None
    random = small_step.config(trainable=NO_BASE)
    refused("trainable.base is off and base is unset", initial_params.check_base, random)


@pytest.mark.slow
def test_without_a_base_all_is_random():
    cfg = small_step.config()
    trainable, frozen = initial_params.initial(cfg, one_device())
    assert frozen == {}
    expected = quick_jit(model.init_params, static_argnames="cfg")(cfg=cfg.model, key=jax.random.key(cfg.seed))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), trainable, expected)


def test_ttt_layers_and_adapters_of_the_folder_are_taken_and_new_ones_are_drawn(tmp_path):
    source = converted(tmp_path, ttt=TTT, ranks=3)
    found = weights.load(source)
    cfg = starting(source)
    assert (cfg.model.ttt, cfg.model.lora.rank) == (TTT, 3)
    all_ = merge(*initial_params.initial(cfg, one_device()))
    jax.tree.map(np.testing.assert_array_equal, all_, {**found.params})


@pytest.mark.slow
def test_a_run_without_the_ttt_layers_and_adapters_of_the_folder_or_with_others_is_refused(tmp_path):
    source = converted(tmp_path, ttt=TTT, ranks=3)
    for what, changes in {
        "TTT layers": {"ttt": dataclasses.replace(TTT, layers="0")},
        "the TTT layers": {"ttt": TTTConfig(layers="none")},
        "are not those of the run": {"ttt": dataclasses.replace(TTT, hidden=(4,))},
        "adapters": {"lora": LoRAConfig(rank=2)},
        "the adapters": {"lora": LoRAConfig()},
        "model.lora": {"lora": LoRAConfig(rank=3, maps=("attention",))},
    }.items():
        refused(what, initial_params.initial, starting(source, TrainableConfig(), **changes), one_device())


@pytest.mark.parametrize(
    ("field", "changes"),
    [
        ("model.hidden is 48, there", {"hidden": 48}),
        ("model.num_layers is 3, there 2", {"num_layers": 3}),
        ("model.delays", {"delays": (0, 0, 0, 0, 0)}),
        ("model.depth", {"depth": dataclasses.replace(small_step.MODEL.depth, hidden=16)}),
    ],
)
def test_weights_of_another_architecture_are_refused_by_the_field(folder, field, changes):
    refused(field, initial_params.initial, starting(folder, ttt=TTT, **changes), one_device())


def test_window_and_type_may_be_others_than_those_of_the_weights(folder):
    cfg = starting(folder, ttt=TTT, context=5, layer_context=((0, 3),), dtype="bfloat16")
    assert initial_params.stored(cfg)  # checks that they fit


def test_a_folder_that_is_none_is_one_sentence(tmp_path):
    cfg = fit(dataclasses.replace(small_step.CONFIG, trainable=NO_BASE, base=str(tmp_path / "nowhere")))
    refused("nowhere is not a folder of weights", initial_params.initial, cfg, one_device())


def test_the_base_is_named_by_folder_and_digest(folder):
    cfg = starting(folder, ttt=TTT)
    assert initial_params.base_of(cfg) == {"path": str(folder), "digest": weights.load(folder).info["digest"]}
