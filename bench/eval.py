"""Times streaming evaluation, TTT layers and scoring included: ``python -m bench.eval``.

An hour of random codes (43,060 frames) through random weights. Beside the figures stands the time that the products
alone would take at the rate that a large matrix product reaches here. Compilation is timed apart.

    python -m bench.eval                                      # tiny, on a CPU
    python -m bench.eval --shape 7b                           # the 7B in bfloat16, TTT (b = 16) in layers 29 to 31: a
    GPU of 80 GB python -m bench.eval --frames 450000 --cells one --long   # ten hours: time and memory at the start and
    at the end
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from bench.figures import in_use, peak, product_rate, random_params, spread
from eval.streaming.arms import DEFAULT
from eval.streaming.runner import stream
from ttt_jax.config import MODEL_PRESETS, MoshiConfig, TTTConfig

HOUR = 43_060


def main() -> None:
    """Prints a line per cell, and writes them all as JSON if asked to."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--shape", choices=["tiny", "small", "7b"], default="tiny")
    parser.add_argument("--frames", type=int, default=HOUR)
    parser.add_argument("--chunk", type=int, default=None, help="frames of a call; unset: 10766 (7b), 250")
    parser.add_argument("--period", type=int, default=1250, help="frames between resets, where arms stand side by side")
    parser.add_argument("--exact", type=int, default=200, help="frames of the one-frame-at-a-time scan")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument(
        "--cells", nargs="+", default=["one", "exact", "arms"], choices=["one", "inner", "exact", "arms", "drift"]
    )
    parser.add_argument("--long", action="store_true", help="time and memory of every tenth of the stream")
    parser.add_argument("--trace", help="folder for a profile of one more run of the first cell")
    parser.add_argument("--out", type=Path, help="JSON file for the figures")
    args = parser.parse_args()
    cfg = MODEL_PRESETS["tiny" if args.shape == "tiny" else "small"]
    if args.shape == "7b":
        cfg = MoshiConfig(dtype="bfloat16", ttt=TTTConfig(layers="29,30,31", mini_batch=16))
    params = random_params(cfg)
    rng = np.random.default_rng(0)
    codes = rng.integers(0, cfg.card, (cfg.num_streams, args.frames), np.int32)
    chunk = args.chunk or (10_766 if args.shape == "7b" else 250)
    flops, rate = flops_per_frame(cfg), product_rate(cfg.dtype)
    print(
        f"{jax.devices()[0].device_kind}, jax {jax.__version__}; {args.shape}, {args.frames} frames; products of a"
        f" frame {flops / 1e9:.2f} GFLOP,"
        f" a large {cfg.dtype} product runs at {rate / 1e12:.1f} TFLOP/s: at most {rate / flops:,.0f} frames/s",
        flush=True,
    )
    cells: dict[str, tuple[int, Callable[[], Any]]] = {
        "one": (args.frames, lambda: run(params, codes, cfg, ("persist",), chunk, args.period)),
        "inner": (args.frames, lambda: run(params, codes, cfg, ("persist",), chunk, args.period, True)),
        "exact": (args.exact, lambda: run(params, codes[:, : args.exact], cfg, ("persist",), 1, args.period)),
        "arms": (args.frames, lambda: run(params, codes, cfg, DEFAULT, args.period, args.period)),
    }
    found = {}
    for name in args.cells:
        if name == "drift":
            found[name] = drift(params, codes, cfg, (chunk, args.period, 250))
            continue
        frames, cell = cells[name]
        began = time.perf_counter()
        cell()
        first = time.perf_counter() - began
        times = []
        for _ in range(args.repeats):
            began = time.perf_counter()
            cell()
            times.append(time.perf_counter() - began)
        seconds = spread(times)
        found[name] = {"frames": frames, "seconds": seconds, "first": first, "peak_gb": peak()}
        print(
            f"{name:6s} {frames} frames: {seconds[0]:.3f} s ({min(times):.3f}-{max(times):.3f}),"
            f" {frames / seconds[0]:,.0f} frames/s;"
            f" the first, compilation included, {first:.1f} s; peak {peak():.2f} GB",
            flush=True,
        )
    if args.long:
        found["long"] = long(params, codes, cfg, chunk)
    if args.trace:
        with jax.profiler.trace(args.trace):
            cells[args.cells[0]][1]()
    if args.out:
        about = {"device": jax.devices()[0].device_kind, "jax": jax.__version__, "flops": flops, "rate": rate}
        args.out.write_text(json.dumps({**about, "cells": found}, indent=1))


def run(params: Any, codes: np.ndarray, cfg: MoshiConfig, arms: tuple, chunk: int, period: int, measured: bool = False):
    """One file through `eval.streaming.runner.stream`."""
    return stream(params, [codes], cfg, arms, chunk=chunk, reset_every=period, measured=measured)[0]


def drift(params: Any, codes: np.ndarray, cfg: MoshiConfig, chunks: tuple[int, ...], window: int = 250) -> dict:
    """Largest difference of a window's mean loss between calls of several lengths."""
    losses = []
    for chunk in chunks:
        nats = run(params, codes, cfg, ("persist",), chunk, chunk).arms["persist"].nats
        mean = np.nanmean(nats[1:], 0)[: nats.shape[1] // window * window]
        losses.append(mean.reshape(-1, window).mean(1))
    apart = {str(chunk): float(np.abs(loss - losses[0]).max()) for chunk, loss in zip(chunks, losses, strict=True)}
    print(f"drift  windows of {window} frames: largest difference in mean loss to calls of {chunks[0]} frames: {apart}")
    return apart


def long(params: Any, codes: np.ndarray, cfg: MoshiConfig, chunk: int) -> list[dict[str, float]]:
    """Seconds and memory of every tenth of a stream, and whether all that it gave is finite."""
    marks: list[tuple[int, float, float]] = []
    done = 0

    def on_frames(frames: int) -> None:
        nonlocal done
        done += frames
        if done * 10 // codes.shape[1] > len(marks):
            marks.append((done, time.perf_counter(), in_use()))

    began = time.perf_counter()
    scores = stream(params, [codes], cfg, ("persist",), chunk=chunk, reset_every=chunk, on_frames=on_frames)[0]
    finite = bool(np.isfinite(scores.arms["persist"].nats[1:, 1:]).all())
    rows, before = [], (0, began)
    for frames, at, gigabytes in marks:
        rows.append({"to": frames, "frames_per_s": (frames - before[0]) / (at - before[1]), "gb": gigabytes})
        before = frames, at
        print(f"long   to frame {frames}: {rows[-1]['frames_per_s']:,.0f} frames/s, {gigabytes:.3f} GB in use")
    print(f"long   every loss is finite: {finite}")
    return rows


def flops_per_frame(cfg: MoshiConfig) -> float:
    """Products of one frame with its weights and its full window, TTT's inner loop apart: two operations per
    multiply-add."""
    d, e, depth = cfg.dim, cfg.depth.dim, cfg.depth
    layer = 4 * d * d + 3 * d * cfg.hidden + 2 * cfg.context * d
    ttt = 4 * d * d
    step = d * e + depth.num_layers * (4 * e * e + 3 * e * depth.hidden) + e * cfg.card
    return 2.0 * (cfg.num_layers * layer + len(cfg.ttt_layers) * ttt + d * cfg.text_card + cfg.dep_q * step)


if __name__ == "__main__":
    main()
