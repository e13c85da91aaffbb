"""Operations by formula are those of the products in the program."""

import dataclasses
import math
from functools import partial

import jax
import jax.numpy as jnp
import pytest

from tests.helpers.micro import config
from train import flops, partition
from train.batches import Batch
from train.config import TrainableConfig
from train.step import gradient, step_sums
from ttt_jax.config import DepthConfig, LoRAConfig, MoshiConfig, TTTConfig
from ttt_jax.moshi import model
from ttt_jax.ttt import network
from ttt_jax.utils import trees

MODEL = MoshiConfig(
    dim=64,
    num_layers=5,
    num_heads=2,
    hidden=176,
    context=48,
    card=50,
    text_card=90,
    n_q=4,
    dep_q=4,
    delays=(0, 0, 1, 1, 1),
    extra_heads=2,
    depth=DepthConfig(dim=32, num_layers=2, num_heads=2, hidden=48),
    ttt=TTTConfig(layers="none", mini_batch=16),
)
LORA = dataclasses.replace(MODEL, lora=LoRAConfig(rank=4))
MLP, LINEAR = (TTTConfig(layers="3,4", mini_batch=16, hidden=hidden) for hidden in ((4,), ()))
ALL = TrainableConfig()

CASES = {
    "all": (MODEL, ALL, {}),
    "shared and low-rank depth": (
        dataclasses.replace(MODEL, depth=dataclasses.replace(MODEL.depth, schedule=(0, 1, 1, 1), low_rank=8)), ALL, {},
    ),
    "adapters": (LORA, TrainableConfig(base=False), {}),
    "adapters of the heads": (
        dataclasses.replace(MODEL, lora=LoRAConfig(rank=4, maps=("heads",))), TrainableConfig(base=False), {},
    ),
    "attention of the upper layers": (MODEL, TrainableConfig(base=False, attention="3,4"), {}),
    "no KV cache": (MODEL, ALL, {"carry_attention": False}),
    "MLP": (dataclasses.replace(MODEL, ttt=MLP), ALL, {}),
    "MLP alone": (dataclasses.replace(MODEL, ttt=MLP), TrainableConfig(base=False), {}),
    "linear": (dataclasses.replace(MODEL, ttt=LINEAR), ALL, {}),
}  # fmt: skip


WITH_TTT = ("MLP", "MLP alone", "linear")


def build(name):
    net, trainable, others = CASES[name]
    cfg = config(model=net, trainable=trainable, **others)
    return partition.fit(dataclasses.replace(cfg, data=dataclasses.replace(cfg.data, batch=2, chunk=128)))


def inputs(cfg):
    """Shapes of what `gradient` takes."""
    rows, chunk = cfg.data.batch, cfg.data.chunk
    shape = jax.ShapeDtypeStruct
    batch = Batch(
        shape((1, rows, cfg.model.num_streams, chunk), jnp.int32), shape((1, rows, chunk), bool), shape((1, rows), bool)
    )
    return (
        *partition.split(partition.shapes(cfg.model), cfg),
        batch,
        jax.eval_shape(lambda: model.init_state(cfg.model, rows)),
    )


def products(jaxpr):
    """Operations of all matrix products of a program, those in loops as often as they run."""
    total = 0
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "dot_general":
            contracted = eqn.params["dimension_numbers"][0][0]
            total += (
                2 * math.prod(eqn.outvars[0].aval.shape) * math.prod(eqn.invars[0].aval.shape[i] for i in contracted)
            )
        inner = [value for value in eqn.params.values() if hasattr(value, "eqns") or hasattr(value, "jaxpr")]
        total += eqn.params.get("length", 1) * sum(products(getattr(value, "jaxpr", value)) for value in inner)
        total += max((products(branch.jaxpr) for branch in eqn.params.get("branches", ())), default=0)
    return total


def counted(cfg):
    """Products of a frame forward."""
    tr, fr, batch, stream = inputs(cfg)
    forward = partial(step_sums, cfg=cfg, block=10**6)
    return products(jax.make_jaxpr(forward)(trees.merge(tr, fr), batch, stream).jaxpr) / cfg.data.batch / cfg.data.chunk


def counted_with_gradient(cfg):
    """Products of a frame forward and backward."""
    whole = partial(gradient, cfg=cfg, block=10**6)
    return products(jax.make_jaxpr(whole)(*inputs(cfg)).jaxpr) / cfg.data.batch / cfg.data.chunk


def unseen(cfg):
    """Products of attention that the program computes and masks, forward and backward; KV caches get no gradient."""
    kv_cache, call, (whole, recent) = cfg.model.context, cfg.data.chunk, flops._seen(cfg, cfg.model.context)
    return 4 * cfg.model.dim * (kv_cache + call - whole), 4 * cfg.model.dim * (kv_cache + 2 * call - whole - recent)


def cases(names, default):
    """Parameters of which those in `default` are not slow."""
    return [pytest.param(name, marks=[] if name in default else pytest.mark.slow) for name in names]


@pytest.mark.parametrize("name", cases([name for name in CASES if name not in WITH_TTT], ["adapters"]))
def test_products_are_those_of_the_program(name):
    cfg = build(name)
    layers = cfg.model.num_layers
    reached = {"adapters of the heads": 0, "attention of the upper layers": 2}.get(name, layers)
    forward, backward = flops.flops_per_frame(cfg)
    counted_forward = counted(cfg)
    net = cfg.model
    depth = 4 * net.depth.dim * net.dep_q**2 * net.depth.num_layers  # its attention, which the formula leaves out
    assert forward + layers * unseen(cfg)[0] + depth == pytest.approx(counted_forward, rel=1e-3)
    counted_backward = counted_with_gradient(cfg) - counted_forward
    expected = backward + reached * unseen(cfg)[1] + (2 * depth if reached else 0)
    assert expected == pytest.approx(counted_backward, rel=1e-3)


@pytest.mark.parametrize("hidden", cases([(), (4,), (4, 2)], [(4,)]))
def test_the_inner_loop_is_one_network_forward_twice_back_once_and_its_steps(hidden):
    net = dataclasses.replace(MODEL, ttt=TTTConfig(layers="3", mini_batch=16, hidden=hidden))
    heads, width, b = net.num_heads, net.head_dim, net.ttt.mini_batch
    shape = partial(jax.ShapeDtypeStruct, dtype=jnp.float32)
    base = tuple(
        network.Affine(shape((1, heads, i, o)), shape((1, heads, o))) for i, o in network.widths(width, hidden)
    )
    vectors = shape((1, heads, b, width))

    def mini_batch(base, k, q, t, eta, scale):
        seen, weights = network.causal(b), tuple((affine,) for affine in base)
        overlap = network.overlap(q, k, seen)
        frames = network.Frames(jnp.concatenate([k, q], -2), t, eta, None, overlap)
        descent = network.descend(weights, network.apply(k, base[0]), scale, scale, frames)
        read = network.read(weights, network.apply(q, base[0]), network.Seen(descent, overlap, seen))
        return read, network.total(descent, jnp.ones(1))

    traced = jax.make_jaxpr(mini_batch)(base, vectors, vectors, vectors, shape((1, heads, b)), shape((heads, 1, width)))
    assert flops._inner(net, chunk=128) == products(traced.jaxpr) / b
    assert flops._inner(net, chunk=8) < flops._inner(net, chunk=128)


@pytest.mark.parametrize("name", cases(WITH_TTT, ["MLP"]))
def test_ttt_layers_count_and_not_what_is_computed_again(name):
    cfg = build(name)
    without = dataclasses.replace(
        cfg, model=dataclasses.replace(cfg.model, ttt=TTTConfig(layers="none")), trainable=ALL
    )
    ttt = flops.flops_per_frame(cfg).forward - flops.flops_per_frame(without).forward
    computed = counted(cfg) - counted(without)
    # The program forms the first map's base product apart, and up to two mini-batches more than the frames fill.
    assert 0.6 * computed < ttt < computed
