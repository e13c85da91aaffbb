"""Times the TTT inner loop against a plain scan and against the device's own limits: ``python -m bench.ttt_layer``.

Per inner mini-batch size and batch: milliseconds forward and forward + backward, of the scan
(`ttt_jax.ttt.inner.inner_scan`), of the fused kernels where they can run, and of a peer measured in the same run, the
plain causal dual form in a `lax.scan` (2-layer MLP alone, bfloat16 products, whole mini-batches of one phase: no masks,
no streaming state, no bound). Two limits stand beside them: the time to read and write the fast weights once per
mini-batch at the memory bandwidth that a copy reaches here, and that of the products alone at the rate that a large
matrix product reaches here. Both are the scan's: the kernels keep the weights on the chip.

``--one-frame`` times calls of one frame instead, as a live stream makes them: three layers, one after another for every
frame. Their limit is the time to read base and displacement once a frame and to write the displacement once a
mini-batch.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import math
import time
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from bench.figures import copy_bandwidth, device, product_rate
from ttt_jax.config import TTTConfig, default_base_lr
from ttt_jax.kernels import choice
from ttt_jax.ttt import inner, network
from ttt_jax.ttt.loop import inner_loop
from ttt_jax.ttt.one_frame import one_frame
from ttt_jax.ttt.state import TTTState, close, init_state

PASSES = {"forward": (1, 1), "forward+backward": (4, 3)}
"""Products and readings of all weights, in those of the forward pass: the backward pass reads the weights again, and
reads and writes their gradients."""
PATHS = ("xla", "pallas", "plain")
LAYERS = 3
"""Of the mode of one frame: as many as the 7B has by default."""


def main() -> None:
    """Prints a line for each cell."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--frames", type=int, default=2048)
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--width", type=int, default=128, help="of a head")
    parser.add_argument("--hidden", type=int, nargs="*", default=[4], help="as ttt.hidden; without numbers: linear")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--mini-batches", type=int, nargs="+", default=[1, 16, 64])
    parser.add_argument("--passes", nargs="+", default=list(PASSES), choices=PASSES)
    parser.add_argument("--paths", nargs="+", default=list(PATHS), choices=PATHS, help="plain: the peer")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--one-frame", action="store_true", help="calls of one frame, one after another")
    args = parser.parse_args()
    print(f"{device()}; {args.heads} heads x {args.width}, {args.frames} frames")
    bandwidth = copy_bandwidth()
    if args.one_frame:
        print(f"a copy moves {bandwidth / 1e9:.0f} GB/s; {LAYERS} layers")
        print(
            "batch    b   ours: median us a frame (spread)   scan of one: median us (spread)    limit us   ours/limit"
        )
        for batch, b in itertools.product(args.batches, args.mini_batches):
            print_one_frame(args, batch, b, bandwidth)
        return
    rate = product_rate(jnp.float32)
    print(
        f"a copy moves {bandwidth / 1e9:.0f} GB/s, a float32 product of default precision runs at {rate / 1e12:.1f}"
        " TFLOP/s"
    )
    cfg = TTTConfig(impl="pallas", hidden=tuple(args.hidden))
    reason = choice.why_not(cfg, args.width, args.frames, jnp.dtype("float32"))
    if reason and "pallas" in args.paths:
        args.paths.remove("pallas")
        print(f"the fused kernels do not run here: {reason}")
    if cfg.hidden != (4,) and "plain" in args.paths:
        args.paths.remove("plain")
        print(f"the peer is an MLP with ttt.hidden (4,), not {cfg.hidden}")
    columns = "".join(f"{f'{path}: median ms (spread)':>33s}" for path in args.paths)
    print(f"batch    b  {'pass':18s}{columns}   limits ms: weights, products")
    for batch in args.batches:
        for b in args.mini_batches:
            print_cell(args, batch, b, bandwidth, rate)


def print_cell(args: argparse.Namespace, batch: int, b: int, bandwidth: float, rate: float) -> None:
    """Prints the figures of one batch and inner mini-batch size, by pass."""
    heads, width, frames = args.heads, args.width, args.frames
    cfg = TTTConfig(mini_batch=b, hidden=tuple(args.hidden))
    base, scale, bias, inputs, weight = arrays(batch, heads, width, frames, cfg)
    state = init_state(batch, heads, width, cfg.hidden, b, jnp.float32)
    mask = jnp.ones((batch, frames), bool)

    def by(impl: str, base, scale, bias, displacement, inputs, state, mask):
        old, ttt = state._replace(displacement=displacement), dataclasses.replace(cfg, impl=impl)
        state, z, _ = inner_loop(base, scale, bias, old, inputs, mask, ttt)
        return state.displacement, z

    functions = {
        "xla": partial(by, "xla"),
        "pallas": partial(by, "pallas"),
        "plain": partial(plain_scan, mini_batch=b, group=math.gcd(cfg.remat_group, frames // b)),
    }
    arguments = (base, scale, bias, state.displacement, inputs, state, mask, weight)
    maps = network.widths(width, cfg.hidden)
    points = [i * o for i, o in maps]
    # Keys and queries through all maps, the steps of all, and the gradient back through all but the first.
    through = 3 * sum(points) + sum(points[1:])
    between = b * sum(map(sum, maps)) if b > 1 else 0
    flops = 2 * batch * heads * frames * (through + between)
    traffic = 2 * 4 * batch * heads * sum(points) * (frames // b)
    for name in args.passes:
        products, reads = PASSES[name]
        times = [spread(program(functions[path], name), arguments, args.repeats) for path in args.paths]
        shown = "".join(f"{f'{middle:.2f} ({least:.2f}-{most:.2f})':>33s}" for middle, least, most in times)
        print(
            f"{batch:5d} {b:4d}  {name:18s}{shown} {traffic * reads / bandwidth * 1e3:20.2f},"
            f" {flops * products / rate * 1e3:.2f}",
            flush=True,
        )


def print_one_frame(args: argparse.Namespace, batch: int, b: int, bandwidth: float) -> None:
    """Prints the times of a frame in calls of one frame, and their limit."""
    cfg, heads = TTTConfig(mini_batch=b, hidden=tuple(args.hidden)), LAYERS * args.heads
    base, scale, bias, inputs, _ = arrays(batch, heads, args.width, args.frames, cfg)
    of_layers = lambda x: jnp.stack(jnp.split(x, LAYERS, 0))  # noqa: E731
    base, scale, bias = jax.tree.map(of_layers, (base, scale, bias))
    # [T, L, B, 1, H, ...]
    inputs = jax.tree.map(lambda x: jnp.stack(jnp.split(jnp.moveaxis(x, 1, 0)[:, :, None], LAYERS, 3), 1), inputs)
    state = jax.vmap(lambda _: init_state(batch, args.heads, args.width, cfg.hidden, b, jnp.float32))(
        jnp.arange(LAYERS)
    )
    mask = jnp.ones((batch, 1), bool)

    def stream(one: Callable, base, scale, bias, state, inputs, mask):
        def frame(state: TTTState, inputs):
            layers, bases, outs = [], [], []
            for i in range(LAYERS):
                of_layer, old, x = jax.tree.map(lambda leaf, i=i: leaf[i], ((base, scale, bias), state, inputs))
                new, z, _ = one(*of_layer, old, x, mask, cfg)
                layers.append(new)
                bases.append(of_layer[0])
                outs.append(z)
            after, outs = (jax.tree.map(lambda *leaves: jnp.stack(leaves), *of) for of in (layers, outs))
            return (close(state, after, bases, cfg) if one is one_frame else after), outs

        return jax.lax.scan(frame, state, inputs)

    arguments = (base, scale, bias, state, inputs, mask)
    shown = []
    for one in (one_frame, inner.inner_scan):
        middle, least, most = (
            t * 1e3 / args.frames for t in spread(jax.jit(partial(stream, one)), arguments, args.repeats)
        )
        shown.append((middle, f"{middle:9.1f} ({least:.1f}-{most:.1f})"))
    of_base, moved = (sum(leaf.nbytes for leaf in jax.tree.leaves(tree)) for tree in (base, state.displacement))
    limit = (of_base + moved + moved / b) / bandwidth * 1e6
    print(
        f"{batch:5d} {b:4d} {shown[0][1]:>34s} {shown[1][1]:>33s} {limit:11.1f} {shown[0][0] / limit:12.2f}", flush=True
    )


def program(fun: Callable, name: str) -> Callable:
    """`fun` jitted, or the gradient of a weighted sum of its output with respect to all that it learns from."""
    if name == "forward":
        return jax.jit(lambda *args: fun(*args[:-1]))
    return jax.jit(jax.grad(lambda *args: (fun(*args[:-1])[1] * args[-1]).sum(), argnums=(0, 1, 2, 3, 4)))


def arrays(batch: int, heads: int, width: int, frames: int, cfg: TTTConfig):
    """Random weights and inputs in the magnitudes of a layer at its initialisation."""
    rng = np.random.default_rng(0)

    def normal(*shape: int) -> jax.Array:
        return jnp.asarray(rng.standard_normal(shape, np.float32))

    q, k, t = (normal(batch, frames, heads, width) for _ in range(3))
    q, k = (x / jnp.linalg.norm(x, axis=-1, keepdims=True) for x in (q, k))
    eta = jax.nn.sigmoid(normal(batch, frames, heads)) * default_base_lr(cfg.mini_batch, width) / width
    base = tuple(
        network.Affine(normal(heads, i, o) / i**0.5, jnp.zeros((heads, o)))
        for i, o in network.widths(width, cfg.hidden)
    )
    scale, bias = jnp.ones((heads, width)), jnp.zeros((heads, width))
    return base, scale, bias, network.Inputs(q, k, t, eta), normal(batch, frames, heads, width)


def plain_scan(base, scale, bias, displacement, inputs: network.Inputs, state, mask, *, mini_batch: int, group: int):
    """The peer: what one writes for training alone. Same arguments and outputs as the call it is compared with."""
    batch, frames, heads, width = inputs.q.shape
    count = frames // mini_batch

    def dot(equation: str, a: jax.Array, b: jax.Array) -> jax.Array:
        return jnp.einsum(equation, a.astype(jnp.bfloat16), b.astype(jnp.bfloat16), preferred_element_type=jnp.float32)

    def split(x: jax.Array) -> jax.Array:  # [B, T, H, ...] -> [M, B, H, C, ...]
        return jnp.moveaxis(jnp.moveaxis(x.reshape(batch, count, mini_batch, heads, *x.shape[3:]), 1, 0), 3, 2)

    causal = jnp.tril(jnp.ones((mini_batch, mini_batch)))

    def body(weights, x):
        (w1, b1), (w2, b2) = weights
        q, k, t, eta = x
        before = dot("BHCI,BHIO->BHCO", k, w1) + b1[:, :, None]
        hidden, slope = network.gelu_and_slope(before)
        out = dot("BHCI,BHIO->BHCO", hidden, w2) + b2[:, :, None]
        normed, rstd = network.normalise(out)
        g = (scale[:, None] * normed + bias[:, None] - t) * scale[:, None]
        g = (g - g.mean(-1, keepdims=True) - normed * (g * normed).mean(-1, keepdims=True)) * rstd * eta[..., None]
        g1 = dot("BHCO,BHIO->BHCI", g, w2) * slope
        after = (
            (w1 - dot("BHCI,BHCO->BHIO", k, g1), b1 - g1.sum(2)),
            (w2 - dot("BHCI,BHCO->BHIO", hidden, g), b2 - g.sum(2)),
        )
        if mini_batch == 1:
            (w1, b1), (w2, b2) = after
            read = jax.nn.gelu(dot("BHCI,BHIO->BHCO", q, w1) + b1[:, :, None])
            z = dot("BHCI,BHIO->BHCO", read, w2) + b2[:, :, None]
        else:
            overlap = (dot("BHCI,BHSI->BHCS", q, k) + 1) * causal
            read = dot("BHCI,BHIO->BHCO", q, w1) + b1[:, :, None] - dot("BHCS,BHSO->BHCO", overlap, g1)
            read = jax.nn.gelu(read)
            overlap = (dot("BHCI,BHSI->BHCS", read, hidden) + 1) * causal
            z = dot("BHCI,BHIO->BHCO", read, w2) + b2[:, :, None] - dot("BHCS,BHSO->BHCO", overlap, g)
        return after, q + network.layer_norm(z, scale[:, None], bias[:, None])

    start = tuple((w0.w + d.w, w0.b + d.b) for w0, d in zip(base, displacement, strict=True))
    xs = jax.tree.map(lambda x: x.reshape(-1, group, *x.shape[1:]), tuple(map(split, inputs)))
    weights, z = jax.lax.scan(jax.checkpoint(lambda w, x: jax.lax.scan(body, w, x)), start, xs)
    z = z.reshape(count, *z.shape[2:])
    z = jnp.moveaxis(jnp.moveaxis(z, 2, 3), 0, 1).reshape(batch, frames, heads, width)
    return weights, z


def spread(fun: Callable, arguments: tuple, repeats: int) -> tuple[float, float, float]:
    """Median, least and greatest milliseconds of a call, compilation and a first call apart."""
    fun = fun.lower(*arguments).compile()
    jax.block_until_ready(fun(*arguments))
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(fun(*arguments))
        times.append((time.perf_counter() - start) * 1e3)
    return float(np.median(times)), min(times), max(times)


if __name__ == "__main__":
    main()
