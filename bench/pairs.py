"""Times benchmarks of pairs once the recordings are encoded: ``python -m bench.pairs``.

Recordings of random codes through random weights, by `eval.benchmarks.scoring.losses`. Beside many recordings a call
stands one recording a call, as scorers do that take one file after the other.

    python -m bench.pairs                # tiny, on a CPU
    python -m bench.pairs --shape 7b     # the 7B in bfloat16, TTT (b = 16) in layers 29 to 31, 1,000 pairs of 3 s
"""

from __future__ import annotations

import argparse

import numpy as np

from bench.figures import device, peak, random_params, seconds, spread
from eval.benchmarks.scoring.losses import Entry, call_frames, call_rows, score
from ttt_jax.config import FRAME_RATE, MODEL_PRESETS, MoshiConfig, TTTConfig


def main() -> None:
    """Prints a line for each way."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--shape", choices=["tiny", "7b"], default="tiny")
    parser.add_argument("--pairs", type=int, default=1000)
    parser.add_argument("--seconds", type=float, default=3.0, help="of a recording")
    parser.add_argument("--alone", type=int, default=50, help="recordings that are scored one a call")
    parser.add_argument("--batch", type=int, default=None, help="recordings of a call of many; unset: by the device")
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    cfg = MODEL_PRESETS["tiny"]
    if args.shape == "7b":
        cfg = MoshiConfig(dtype="bfloat16", ttt=TTTConfig(layers="29,30,31", mini_batch=16))
    params, rng, frames = random_params(cfg), np.random.default_rng(0), round(args.seconds * FRAME_RATE + 0.5)
    books = cfg.n_q // 2
    entries = [
        Entry(rng.integers(0, cfg.card, (books, frames), np.int32), "absent", "moshi") for _ in range(2 * args.pairs)
    ]
    silence, length = rng.integers(0, cfg.card, (books, frames), np.int32), call_frames(frames + cfg.max_delay)
    print(
        f"{device()}; {args.shape}, {args.pairs} pairs, {frames} frames a recording; calls of"
        f" {call_rows(length, 1, args.batch)} recordings and {length} frames",
        flush=True,
    )
    ways = {
        "persist": (entries, ("persist",), args.batch),
        "persist, frozen, off": (entries, ("persist", "frozen", "off"), None),
        "persist, one recording a call": (entries[: args.alone], ("persist",), 1),
    }
    for name, (chosen, arms, batch) in ways.items():

        def cell(chosen: list[Entry] = chosen, arms: tuple[str, ...] = arms, batch: int | None = batch) -> None:
            for _ in score(params, cfg, chosen, silence, arms, batch):
                pass

        first, times = seconds(cell, 1)[0], seconds(cell, args.repeats)
        middle, low, high = spread(times)
        print(
            f"{name}: {len(chosen)} recordings in {middle:.2f} s ({low:.2f}-{high:.2f}),"
            f" {1000 * middle / len(chosen):.2f} ms each; the first time, compilation included, {first:.1f} s; peak"
            f" {peak():.1f} GB",
            flush=True,
        )


if __name__ == "__main__":
    main()
