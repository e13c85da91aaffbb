"""How long fast weights stay alive and what they keep, over an hour of real speech: ``python -m bench.memory``.

Streams 45,000 frames (an hour) of the embedded speech, as a TTT layer of a model reads them, through TTT layers with
several inner networks and mini-batches, and prints for each:

- displacement: norm of fast weights minus base over the base's, the largest of the heads: its peak, in the first 512
  frames or after any 512 that follow, and after 4,500 and 45,000 frames; growth is from the one to the other, of the
  head that grows most. A memory that inflates for ever stops learning, since the inner LayerNorm is blind to the scale
  of the weights
- plasticity: inner loss before each frame's step over the 512 frames after the map from keys to values is replaced by
  another, late (frame 40,960) over early (frame 1,024): above 1 the layer has grown stiff
- inner loss at the base weights, and before the step in the first and in the last 512 frames
- kept: share of what the first 1,024 frames left in the weights that is still there after so many more frames, by two
  streams that differ in those frames alone

The speech repeats every 19,968 frames, so that the early and the late change meet the same frames.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
from functools import partial
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from ttt_jax.checkpoints.run_weights import load_run
from ttt_jax.config import MoshiConfig, TTTConfig, check, model_preset
from ttt_jax.data import corpus
from ttt_jax.moshi import model
from ttt_jax.moshi.delays import columns
from ttt_jax.ttt.layer import Measurement, TTTLayer, init_state
from ttt_jax.ttt.state import TTTState

CALL = 512  # frames of a call
PERIOD = 39 * CALL
EARLY, LATE, END = 2 * CALL, 80 * CALL, 45_000
MOMENTS = (4_500, END)
NETWORKS = {"linear": (), "mlp2": (4,), "mlp3": (2, 2), "mlp5": (2, 2, 2, 2)}
LATER = (3_000, 12_000, 36_000)


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--run", type=Path, help="run whose model reads the speech; default: tiny, not trained")
    parser.add_argument("--heads", type=int, nargs="+", default=[4], help="heads that share the model's channels")
    parser.add_argument("--horizon", type=float, help="frames, inf for no decay; default: the layer's")
    args = parser.parse_args()
    if args.run:
        run = load_run(args.run)
        params, cfg = run.params, run.config
    else:
        cfg = model_preset("tiny")
        params = model.init_params(cfg, jax.random.key(0))
    x = activations(params, cfg, speech())
    # Of the second row the first frames are others, all that follow the same.
    rows = jnp.concatenate([x, x.at[:, :EARLY].set(x[:, PERIOD // 2 :][:, :EARLY])])
    ttt = TTTConfig(layers="0")
    if args.horizon is not None:
        ttt = dataclasses.replace(ttt, horizon=None if args.horizon == np.inf else args.horizon)
    print(HEADER)
    for heads, (network, hidden), b in itertools.product(args.heads, NETWORKS.items(), (1, 16, 64)):
        of_layer = dataclasses.replace(ttt, hidden=hidden, mini_batch=b)
        layer = MoshiConfig(dim=cfg.dim, num_heads=heads, num_layers=1, dtype="float32", ttt=of_layer)
        print(line({"network": network, "b": b, "D": layer.head_dim, **study(rows, layer)}), flush=True)


HEADER = """\
                 displacement at      growth  plasticity     inner loss, before the step      kept after more frames
network  D    b   peak  4,500 45,000  late/early       base   first 512    last 512   """ + "  ".join(
    f"{n:>6,}" for n in LATER
)


def line(r: dict[str, Any]) -> str:
    """A row of the table."""
    moved, growth = (r["peak"], *r["displacement"]), r["growth"]
    return (
        f"{r['network']:7s}{r['D']:3d} {r['b']:4d}  {moved[0]:5.2f}  {moved[1]:5.2f} {moved[2]:6.2f}  {growth:6.2f}"
        f" {r['plasticity']:10.2f}"
        f" {r['base']:10.2f} {r['first']:11.2f} {r['last']:11.2f}   " + "  ".join(f"{k:6.1%}" for k in r["kept"])
    )


def speech() -> np.ndarray:
    """Tokens of the embedded corpus, int32 [K, PERIOD], one file after another."""
    cfg = corpus.CorpusConfig()
    loaded = corpus.load(cfg, *corpus.load_coders(cfg))
    return np.concatenate([file.read() for file in (*loaded.recordings, *loaded.heldout)], 1)[:, :PERIOD]


def activations(params: model.Params, cfg: MoshiConfig, frames: np.ndarray) -> jax.Array:
    """What the first TTT layer of a model reads, float32 [1, T, dim], of tokens int32 [K, T]; T a multiple of `CALL`.

    Raises `InputError` if the model has no TTT layer.
    """
    check(bool(cfg.ttt_layers), "the model has no TTT layer: give a run that has one.")
    # The model up to that layer, which is then no part of a scan over equal layers that would keep what it reads to
    # itself.
    last = cfg.ttt_layers[0]
    runs = {run.start: params["layers"][run.name] for run in cfg.runs}
    windows = tuple((layer, window) for layer, window in cfg.layer_context if layer <= last)
    ttt = dataclasses.replace(cfg.ttt, layers=str(last))
    cfg = dataclasses.replace(cfg, num_layers=last + 1, layer_context=windows, ttt=ttt)
    cut = {run.name: jax.tree.map(lambda p, run=run: p[: run.stop - run.start], runs[run.start]) for run in cfg.runs}
    params = {**params, "layers": cut}

    @jax.jit
    def call(frames: jax.Array, state: model.State) -> tuple[jax.Array, model.State]:
        read = []

        def keep(fun, args, kwargs, context):
            if isinstance(context.module, TTTLayer) and context.method_name == "__call__":
                read.append(args[0])
            return fun(*args, **kwargs)

        mask = jnp.ones((1, CALL), bool)
        with nn.intercept_methods(keep):
            grid, history = columns(state.history, frames, mask, cfg)
            _, state, _ = model.temporal(params, grid.inputs, mask, state, cfg)
        return read[0].astype(jnp.float32), state._replace(history=history)

    state, outs = model.init_state(cfg, 1), []
    for start in range(0, frames.shape[1], CALL):
        x, state = call(jnp.asarray(frames[None, :, start : start + CALL]), state)
        outs.append(x)
    return jnp.concatenate(outs, 1)


@partial(jax.jit, static_argnames="cfg")
def step(params: model.Params, x: jax.Array, mask: jax.Array, state: TTTState, cfg: MoshiConfig) -> TTTState:
    """The layer over x [B, CALL, dim], its valid frames in mask bool [B, CALL]: its state after the call."""
    return TTTLayer(cfg).apply({"params": params}, x, mask, state)[1]


@partial(jax.jit, static_argnames="cfg")
def look(params: model.Params, x: jax.Array, state: TTTState, cfg: MoshiConfig) -> Measurement:
    """What the layer measures over x [B, CALL, dim]."""
    return TTTLayer(cfg).apply({"params": params}, x, jnp.ones(x.shape[:2], bool), state, True)[2]


def study(x: jax.Array, cfg: MoshiConfig, seed: int = 0) -> dict[str, Any]:
    """Streams an hour and returns the figures of the table, by name.

    Args:
      x: what the layer reads in a period, float32 [2, PERIOD, dim]; the rows differ in their first `EARLY` frames.
      cfg: a model whose `ttt` and heads are the layer's.
    """
    batch = x.shape[0]
    first = x[:1].repeat(batch, 0)
    init = jax.jit(TTTLayer(cfg).init)
    params = init(jax.random.key(seed), first[:, :1], jnp.ones((batch, 1), bool), init_state(cfg, batch))["params"]
    other = init(jax.random.key(seed + 1), first[:, :1], jnp.ones((batch, 1), bool), init_state(cfg, batch))["params"]
    changed = {**params, "v_kernel": other["v_kernel"], "v_bias": other["v_bias"]}
    norm = jnp.sqrt(_squares({name: p for name, p in params.items() if name.startswith("inner_")}, 1))
    moved, apart, after, losses = {}, {}, {}, {}
    state, frame = init_state(cfg, batch), 0
    stops = {*MOMENTS, EARLY, LATE, *(EARLY + n for n in LATER)}
    while frame < END:
        stop = min(stop for stop in (frame + CALL, *stops) if stop > frame)
        piece = jnp.take(x if frame < EARLY else first, (frame + jnp.arange(CALL)) % PERIOD, 1)
        if frame in (EARLY, LATE):
            after[frame] = look(changed, piece, state, cfg).inner.loss_before[0].mean()
        if frame == 0 or stop == END:
            losses[frame] = look(params, piece, state, cfg).inner
        state = step(params, piece, jnp.arange(CALL)[None].repeat(batch, 0) < stop - frame, state, cfg)
        frame = stop
        moved[frame] = jnp.sqrt(_squares(state.displacement, 2)[0]) / norm
        if frame - EARLY in (0, *LATER):
            apart[frame] = jnp.sqrt(_squares(jax.tree.map(lambda d: d[:1] - d[1:], state.displacement), 2).sum())
    start, *later = apart.values()
    begin, end = losses.values()
    return {
        "peak": float(max(begin.displacement[0].max(), *(heads.max() for heads in moved.values()))),
        "displacement": [float(moved[moment].max()) for moment in MOMENTS],
        "growth": float((moved[END] / moved[MOMENTS[0]]).max()),
        "plasticity": float(after[LATE] / after[EARLY]),
        "base": float(begin.loss_base[0].mean()),
        "first": float(begin.loss_before[0].mean()),
        "last": float(end.loss_before[0].mean()),
        "kept": [float(distance / start) for distance in later],
    }


def _squares(tree: Any, lead: int) -> jax.Array:
    """Sums of squares of all leaves, keeping `lead` leading axes."""
    return sum((leaf**2).sum(tuple(range(lead, leaf.ndim))) for leaf in jax.tree.leaves(tree))


if __name__ == "__main__":
    main()
