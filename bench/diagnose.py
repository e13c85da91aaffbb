"""What records cost: ``python -m bench.diagnose [--shape tiny|7b] [--every 100]``.

Streams a row frame by frame with records of `eval.diagnose.measure` every N frames and without any, in turn, on random
weights and a full attention window, and prints the share of the time that records take. Both leave out the depth
transformer, which a
record does not need: against a stream that also speaks the share is lower.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from bench.figures import random_params, spread
from eval.diagnose.measure import advance, fresh, measure
from ttt_jax.config import MoshiConfig, TTTConfig, model_preset


def main() -> None:
    """Prints the times of a frame with and without records and what records cost; writes them as JSON if asked to."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--shape", choices=["tiny", "7b"], default="tiny")
    parser.add_argument("--every", type=int, default=100, help="frames from one record to the next")
    parser.add_argument("--frames", type=int, default=300, help="of each of the streams that take turns")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path, help="JSON file for the figures")
    args = parser.parse_args()
    if args.frames < args.every:
        parser.error(f"--frames {args.frames} hold no record: give at least as many as --every {args.every}")
    cfg = model_preset("tiny")
    if args.shape == "7b":
        cfg = MoshiConfig(dtype="bfloat16", ttt=TTTConfig(layers="29,30,31"))
    params = random_params(cfg)
    state, previous = fresh(cfg)
    state = state._replace(position=jnp.full((1,), cfg.context + 5, jnp.int32))
    rng = np.random.default_rng(0)
    codes = [jnp.asarray(rng.integers(0, cfg.card, (1, cfg.num_streams, 1), np.int32)) for _ in range(64)]
    mask = jnp.ones((1, 1), bool)

    def stream(frames: int, every: int | None) -> float:
        """Milliseconds a frame."""
        nonlocal state, previous
        began = time.perf_counter()
        for i in range(1, frames + 1):
            if every is None or i % every:
                state = advance(params, codes[i % 64], mask, state, cfg)
            else:
                figures, previous, state = measure(params, codes[i % 64], state, previous, cfg)
                np.asarray(figures)
        jax.block_until_ready(state)
        return (time.perf_counter() - began) * 1e3 / frames

    stream(4, 2)  # compiles both, twice: states come from either
    without, with_records, measured = [], [], []
    for _ in range(args.rounds):
        without.append(stream(args.frames, None))
        with_records.append(stream(args.frames, args.every))
        measured.append(stream(args.every, 1))
    paired = [100 * (b / a - 1) for a, b in zip(without, with_records, strict=True)]
    one = float(np.median(measured)) - float(np.median(without))
    found = {
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
        "shape": args.shape,
        "every": args.every,
        "frames": args.frames,
        "ms_without": spread(without),
        "ms_with": spread(with_records),
        "ms_measured_frame": spread(measured),
        "percent": spread(paired),
        "percent_from_single_records": 100 * one / (args.every * float(np.median(without))),
    }
    print(f"{found['device']}, jax {found['jax']}; {args.shape}, a record every {args.every} of {args.frames} frames")
    for name, label in (
        ("ms_without", "without records"),
        ("ms_with", "with records"),
        ("ms_measured_frame", "each one"),
    ):
        median, low, high = found[name]
        print(f"{label:16} {median:8.3f} ms a frame ({low:.3f}-{high:.3f})")
    median, low, high = found["percent"]
    print(f"records cost     {median:+8.2f} % of the time ({low:+.2f} to {high:+.2f}, round by round)")
    print(f"                 {found['percent_from_single_records']:+8.2f} % by the time of a frame with a record")
    if args.out:
        args.out.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
