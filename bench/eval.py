"""Times streaming evaluation, TTT layers and scoring included: ``python -m bench.eval``.

An hour of random codes (43,060 frames) through random weights. Beside the figures stands the time that the products
alone would take at the rate that a large matrix product reaches here. Compilation is timed apart.

    python -m bench.eval                                        # tiny, on a CPU
    python -m bench.eval --shape 7b                             # the 7B in bfloat16, TTT (b = 16) in layers 29 to 31
    python -m bench.eval --frames 450000 --cells one --long     # ten hours: time and memory of every tenth
    python -m bench.eval --shape 7b --cells records             # what records of `eval diagnose` cost
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bench.figures import device, in_use, peak, product_rate, random_params, seconds, spread
from eval.diagnose.measure import advance, fresh, measure
from eval.streaming.arms import DEFAULT
from eval.streaming.runner import stream
from ttt_jax.config import MODEL_PRESETS, MoshiConfig, TTTConfig

HOUR = 43_060
CELLS = ("one", "inner", "exact", "arms", "drift", "records")


def main() -> None:
    """Prints a line for each cell."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--shape", choices=["tiny", "small", "7b"], default="tiny")
    parser.add_argument("--frames", type=int, default=HOUR)
    parser.add_argument("--chunk", type=int, default=None, help="frames of a call; unset: 10766 (7b), 250")
    parser.add_argument("--period", type=int, default=1250, help="frames between resets, where arms stand side by side")
    parser.add_argument("--exact", type=int, default=200, help="frames of the one-frame-at-a-time scan")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--cells", nargs="+", default=["one", "exact", "arms"], choices=CELLS)
    parser.add_argument("--long", action="store_true", help="time and memory of every tenth of the stream")
    args = parser.parse_args()
    cfg = MODEL_PRESETS["tiny" if args.shape == "tiny" else "small"]
    if args.shape == "7b":
        cfg = MoshiConfig(dtype="bfloat16", ttt=TTTConfig(layers="29,30,31", mini_batch=16))
    params = random_params(cfg)
    codes = np.random.default_rng(0).integers(0, cfg.card, (cfg.num_streams, args.frames), np.int32)
    chunk = args.chunk or (10_766 if args.shape == "7b" else 250)
    flops, rate = flops_per_frame(cfg), product_rate(cfg.dtype)
    print(
        f"{device()}; {args.shape}, {args.frames} frames; products of a frame {flops / 1e9:.2f} GFLOP, a large"
        f" {cfg.dtype} product runs at {rate / 1e12:.1f} TFLOP/s: at most {rate / flops:,.0f} frames/s",
        flush=True,
    )
    cells: dict[str, tuple[int, Callable[[], Any]]] = {
        "one": (args.frames, lambda: run(params, codes, cfg, ("persist",), chunk, args.period)),
        "inner": (args.frames, lambda: run(params, codes, cfg, ("persist",), chunk, args.period, True)),
        "exact": (args.exact, lambda: run(params, codes[:, : args.exact], cfg, ("persist",), 1, args.period)),
        "arms": (args.frames, lambda: run(params, codes, cfg, DEFAULT, args.period, args.period)),
    }
    for name in args.cells:
        if name == "drift":
            print_drift(params, codes, cfg, (chunk, args.period, 250))
        elif name == "records":
            print_records(params, cfg, args.repeats)
        else:
            frames, cell = cells[name]
            first, times = seconds(cell, 1)[0], seconds(cell, args.repeats)
            middle = float(np.median(times))
            print(
                f"{name:6s} {frames} frames: {middle:.3f} s ({min(times):.3f}-{max(times):.3f}),"
                f" {frames / middle:,.0f} frames/s; the first, compilation included, {first:.1f} s;"
                f" peak {peak():.2f} GB",
                flush=True,
            )
    if args.long:
        print_long(params, codes, cfg, chunk)


def run(params: Any, codes: np.ndarray, cfg: MoshiConfig, arms: tuple, chunk: int, period: int, measured: bool = False):
    """Streams one file through `eval.streaming.runner.stream`."""
    return stream(params, [codes], cfg, arms, chunk=chunk, reset_every=period, measured=measured)[0]


def print_drift(params: Any, codes: np.ndarray, cfg: MoshiConfig, chunks: tuple[int, ...], window: int = 250) -> None:
    """Prints the largest difference of a window's mean loss between calls of several lengths."""
    losses = []
    for chunk in chunks:
        nats = run(params, codes, cfg, ("persist",), chunk, chunk).arms["persist"].nats
        mean = np.nanmean(nats[1:], 0)[: nats.shape[1] // window * window]
        losses.append(mean.reshape(-1, window).mean(1))
    apart = {str(chunk): float(np.abs(loss - losses[0]).max()) for chunk, loss in zip(chunks, losses, strict=True)}
    print(f"drift  windows of {window} frames: largest difference in mean loss to calls of {chunks[0]} frames: {apart}")


def print_records(params: Any, cfg: MoshiConfig, rounds: int, every: int = 100, frames: int = 300) -> None:
    """Prints the share of the time that records take, frame by frame, with and without them in turn.

    Both leave out the depth transformer, which a record does not need: of a stream that also speaks the share is lower.
    """
    state, previous = fresh(cfg)
    state = state._replace(position=jnp.full((1,), cfg.context + 5, jnp.int32))
    rng, mask = np.random.default_rng(0), jnp.ones((1, 1), bool)
    codes = [jnp.asarray(rng.integers(0, cfg.card, (1, cfg.num_streams, 1), np.int32)) for _ in range(64)]

    def frame_by_frame(recorded: bool) -> None:
        nonlocal state, previous
        for i in range(1, frames + 1):
            if recorded and i % every == 0:
                figures, previous, state = measure(params, codes[i % 64], state, previous, cfg)
                np.asarray(figures)
            else:
                state = advance(params, codes[i % 64], mask, state, cfg)
        jax.block_until_ready(state)

    frame_by_frame(True)  # compiles both
    pairs = [[seconds(lambda on=on: frame_by_frame(on), 1)[0] for on in (False, True)] for _ in range(rounds)]
    without, recorded = (1e3 * float(np.median(times)) / frames for times in zip(*pairs, strict=True))
    share, low, high = spread([100 * (after / before - 1) for before, after in pairs])
    print(f"records {recorded:.3f} ms a frame with one every {every} frames, {without:.3f} without", end=": ")
    print(f"{share:+.2f} % of the time ({low:+.2f} to {high:+.2f})")


def print_long(params: Any, codes: np.ndarray, cfg: MoshiConfig, chunk: int) -> None:
    """Prints the speed and memory of every tenth of a stream, and whether all losses are finite."""
    done, before = 0, (0, time.perf_counter())

    def on_frames(frames: int) -> None:
        nonlocal done, before
        done += frames
        if done * 10 // codes.shape[1] > before[0] * 10 // codes.shape[1]:
            now = time.perf_counter()
            speed = (done - before[0]) / (now - before[1])
            before = done, now
            print(f"long   to frame {done}: {speed:,.0f} frames/s, {in_use():.3f} GB in use", flush=True)

    scores = stream(params, [codes], cfg, ("persist",), chunk=chunk, reset_every=chunk, on_frames=on_frames)[0]
    print(f"long   every loss is finite: {bool(np.isfinite(scores.arms['persist'].nats[1:, 1:]).all())}")


def flops_per_frame(cfg: MoshiConfig) -> float:
    """Returns the operations of a frame's products with weights and its full window, without TTT's inner loop."""
    d, e, depth = cfg.dim, cfg.depth.dim, cfg.depth
    layer = 4 * d * d + 3 * d * cfg.hidden + 2 * cfg.context * d
    ttt = 4 * d * d
    step = d * e + depth.num_layers * (4 * e * e + 3 * e * depth.hidden) + e * cfg.card
    return 2.0 * (cfg.num_layers * layer + len(cfg.ttt_layers) * ttt + d * cfg.text_card + cfg.dep_q * step)


if __name__ == "__main__":
    main()
