"""Times streaming generation, tokens on the host after each frame: ``python -m bench.stream``.

Ours and the PyTorch package ``moshi`` (where it is installed; with its CUDA graphs on a GPU) run in turn, each in a
process of its own, on random weights of one shape, Kyutai's sampling, a full attention window. Beside them stands the
time to read all weights and KV caches once at the bandwidth that a copy reaches here.

    python -m bench.stream                                   # small: dim 512, 8 layers, depth 256 x 6, float32
    python -m bench.stream --shape 7b --rows 1 8             # the 7B in bfloat16, TTT on three layers: a GPU of 80 GB
    python -m bench.stream --long 45000                      # times the first and the last hundred of that many frames
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import numpy as np

from bench import figures
from bench.figures import copy_bandwidth, in_use, peak, random_params, spread

SMALL = {
    "dim": 512, "num_layers": 8, "num_heads": 8, "hidden": 1408, "context": 250,
    "depth": {"dim": 256, "num_layers": 6, "num_heads": 4, "hidden": 704},
}  # fmt: skip
WARM_UP = 10
REPLY = "figures: "


def main() -> None:
    """Prints a line for each program and number of rows."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--shape", choices=["small", "7b"], default="small")
    parser.add_argument("--rows", type=int, nargs="+", default=[1])
    parser.add_argument("--ttt", nargs="+", help='TTT layers; default: "none" and the last three')
    parser.add_argument("--frames", type=int, default=100, help="timed in each round")
    parser.add_argument("--rounds", type=int, default=5, help="in which the programs take turns (7b: each by itself)")
    parser.add_argument("--long", type=int, help="frames of a stream whose first and last hundred are compared")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        child(**json.loads(args.child))
        return
    layers = args.ttt or ["none", "29,30,31" if args.shape == "7b" else "5-7"]
    programs = [("ours", ttt) for ttt in layers]
    if importlib.util.find_spec("moshi"):
        programs.insert(0, ("torch", "none"))
    else:
        print("PyTorch moshi is not installed here: timed alone (docs/parity.md says how to install it)")
    for rows in args.rows:
        of_all = {"rows": rows, "shape": args.shape, "frames": args.frames, "long": args.long}
        cells = [{"who": who, "ttt": ttt, **of_all} for who, ttt in programs]
        together = [cells] if args.shape == "small" else [[cell] for cell in cells]  # two of the 7B would not fit a GPU
        found = [got for some in together for got in take_turns(some, args.rounds)]
        for got in found:
            print(line(got), flush=True)
        if found[0]["who"] == "torch":
            for got in found[1:]:
                ratio = found[0]["ms"][0] / got["ms"][0]
                print(f"{rows} rows, TTT {got['ttt']}: {ratio:.2f} times as fast as PyTorch without TTT")


def take_turns(cells: list[dict[str, Any]], rounds: int) -> list[dict[str, Any]]:
    """Figures of programs that each run in a process and take turns, so that all meet the same machine."""
    env = {**os.environ, "XLA_PYTHON_CLIENT_MEM_FRACTION": "0.95" if len(cells) == 1 else "0.3"}
    started = [
        subprocess.Popen(
            [sys.executable, "-m", "bench.stream", "--child", json.dumps(cell)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env,
        )
        for cell in cells
    ]  # fmt: skip

    def ask(process: subprocess.Popen, what: str) -> Any:
        process.stdin.write(what + "\n")
        process.stdin.flush()
        while reply := process.stdout.readline():
            if reply.startswith(REPLY):
                return json.loads(reply.removeprefix(REPLY))
        sys.exit("a program ended before it was timed; its message stands above")

    found = [dict(cell) for cell in cells]
    for process in started:
        ask(process, "ready?")
    times = [[ask(process, "time") for process in started] for _ in range(rounds)]
    for i, process in enumerate(started):
        found[i] |= ask(process, "about")
        of_rounds = [one[i] for one in times]
        found[i]["ms"] = spread([ms for one in of_rounds for ms in one["ms"]])
        found[i]["queued_ms"] = float(np.median([one["queued_ms"] for one in of_rounds]))
        process.stdin.close()
        process.wait()
    return found


def child(who: str, ttt: str, long: int | None, **cell: Any) -> None:
    """Answers `take_turns` for one program."""
    program = ours(ttt=ttt, long=long, **cell) if who == "ours" else torch_moshi(**cell)
    about = next(program)
    for line in sys.stdin:
        reply = next(program) if line.strip() == "time" else about
        print(REPLY + json.dumps(reply), flush=True)


def line(cell: dict[str, Any]) -> str:
    """A cell as a line of the table."""
    median, low, high = cell["ms"]
    text = (
        f"{cell['who']:5s} {cell['rows']} rows  TTT {cell['ttt']:9s} {median:7.2f} ms a frame ({low:.2f}-{high:.2f}), "
        f"queued {cell['queued_ms']:.2f}; peak {cell['peak_gb']:.2f} GB; {cell['about']}"
    )
    if "floor_ms" in cell:
        text += f"; reading all once {cell['floor_ms']:.2f} ms; compiled in {cell['compile_s']:.0f} s"
    for name in ("first", "last"):
        if name in cell:
            figures = f"{cell[name]['ms']:.2f} ms, {cell[name]['gb']:.3f} GB in use"
            text += f"\n      {name} hundred of {cell['long']} frames: {figures}"
    return text


def ours(shape: str, rows: int, ttt: str, frames: int, long: int | None) -> Iterator[dict[str, Any]]:
    """Our `stream_step` on random weights and a full window: what it is, then the times of round after round."""
    import jax
    import jax.numpy as jnp

    from ttt_jax.moshi import generate, model

    cfg = configuration(shape, ttt)
    params = random_params(cfg)
    weights = read_bytes(params)
    params = generate.streaming_params(params, cfg)
    state = model.init_state(cfg, rows)
    if not long:
        state = state._replace(position=jnp.full((rows,), cfg.context + 5, jnp.int32))
    mask = jnp.ones((rows,), bool)
    codes = np.random.default_rng(0).integers(0, cfg.card, (64, rows, cfg.n_q - cfg.dep_q), np.int32)
    codes = [jnp.asarray(c) for c in codes]
    began = time.perf_counter()
    step = generate.stream_step.lower(params, codes[0], mask, state, cfg).compile()
    compile_s = time.perf_counter() - began
    for i in range(WARM_UP):
        moshi, state = step(params, codes[i], mask, state)
    jax.block_until_ready(moshi)

    def blocking(n: int) -> list[float]:
        nonlocal state
        times = []
        for i in range(n):
            began = time.perf_counter()
            moshi, state = step(params, codes[i % 64], mask, state)
            np.asarray(moshi)
            times.append((time.perf_counter() - began) * 1e3)
        return times

    got: dict[str, Any] = {}
    if long:
        times = blocking(100)
        got |= {"long": long, "first": {"ms": float(np.median(times)), "gb": in_use()}}
        for i in range(long - 200 - WARM_UP):
            moshi, state = step(params, codes[i % 64], mask, state)
        jax.block_until_ready(moshi)
        times = blocking(100)
        got |= {"last": {"ms": float(np.median(times)), "gb": in_use()}}
    state_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    yield got | {
        "compile_s": compile_s,
        "floor_ms": (weights + state_bytes) / copy_bandwidth() * 1e3,
        "peak_gb": peak(),
        "about": figures.device(),
    }
    while True:
        times = blocking(frames)
        began = time.perf_counter()
        for i in range(frames):
            moshi, state = step(params, codes[i % 64], mask, state)
        jax.block_until_ready(state)
        yield {"ms": times, "queued_ms": (time.perf_counter() - began) * 1e3 / frames}


def configuration(shape: str, ttt: str) -> Any:
    """The `MoshiConfig` of a shape with TTT in the layers `ttt`: the 7B in bfloat16, `SMALL` in float32."""
    from ttt_jax.config import DepthConfig, MoshiConfig, TTTConfig

    if shape == "small":
        return MoshiConfig(**SMALL | {"depth": DepthConfig(**SMALL["depth"])}, ttt=TTTConfig(layers=ttt))
    return MoshiConfig(dtype="bfloat16", ttt=TTTConfig(layers=ttt))


def read_bytes(params: Any) -> int:
    """Bytes of weights that a frame must read: all but the embedding tables."""
    import jax

    tables = [params["text_emb"], params["audio_emb"], params["depth"]["text_emb"], params["depth"]["audio_emb"]]
    return sum(leaf.nbytes for leaf in jax.tree.leaves(params)) - sum(table.nbytes for table in tables)


def torch_moshi(shape: str, rows: int, frames: int) -> Iterator[dict[str, Any]]:
    """``LMGen.step`` of PyTorch moshi, its defaults, random weights, a full window: as `ours`."""
    import torch

    gen, context = torch_language_model(shape)
    cuda = torch.cuda.is_available()
    codes = torch.randint(0, 2048, (64, rows, 8, 1), device="cuda" if cuda else "cpu")
    with torch.no_grad(), gen.streaming(rows):
        for i in range(WARM_UP):
            gen.step(codes[i])
        # A full window without a stream: the cache's mask depends on the count of frames alone.
        fill_window(gen.lm_model.transformer, context + 5)
        for i in range(WARM_UP):
            gen.step(codes[i])
        name = torch.cuda.get_device_name() if cuda else f"{os.cpu_count()} threads"
        yield {
            "peak_gb": torch.cuda.max_memory_allocated() / 1e9 if cuda else peak(),
            "about": f"{name}, torch {torch.__version__}",
        }
        while True:
            times = []
            for i in range(frames):
                began = time.perf_counter()
                gen.step(codes[i % 64]).cpu()
                times.append((time.perf_counter() - began) * 1e3)
            began = time.perf_counter()
            for i in range(frames):
                gen.step(codes[i % 64])
            if cuda:
                torch.cuda.synchronize()
            yield {"ms": times, "queued_ms": (time.perf_counter() - began) * 1e3 / frames}


def torch_language_model(shape: str) -> tuple[Any, int]:
    """An ``LMGen`` of PyTorch moshi with its defaults and random weights, on a GPU if there is one, and its window."""
    import torch

    cuda = torch.cuda.is_available()
    if not cuda:
        os.environ["NO_TORCH_COMPILE"] = "1"  # on a CPU compiling takes minutes and brings nothing
    from moshi.models.lm import LMGen, LMModel

    size = SMALL if shape == "small" else None
    torch.set_num_threads(os.cpu_count())
    kwargs = {
        "delays": [0] + 2 * ([0] + 7 * [1]), "n_q": 16, "dep_q": 8, "card": 2048, "text_card": 32000,
        "dim": size["dim"] if size else 4096, "num_heads": size["num_heads"] if size else 32,
        "num_layers": size["num_layers"] if size else 32, "hidden_scale": 4.125, "causal": True,
        "context": size["context"] if size else 3000, "max_period": 10000, "gating": "silu", "norm": "rms_norm_f32",
        "positional_embedding": "rope", "depformer_dim": size["depth"]["dim"] if size else 1024,
        "depformer_num_heads": size["depth"]["num_heads"] if size else 16, "depformer_num_layers": 6,
        "depformer_dim_feedforward": int(4.125 * (size["depth"]["dim"] if size else 1024)),
        "depformer_multi_linear": True, "depformer_context": 8, "depformer_gating": "silu",
        "depformer_pos_emb": "none", "depformer_weights_per_step": True,
    }  # fmt: skip
    dtype = torch.float32 if size else torch.bfloat16
    model = LMModel(**kwargs, device="cuda" if cuda else "cpu", dtype=dtype).eval()
    return LMGen(model), kwargs["context"]


def fill_window(transformer: Any, frames: int) -> None:
    """Sets the position of every KV cache of a PyTorch transformer to `frames`, in place."""
    for module in transformer.modules():
        state = getattr(module, "_streaming_state", None)
        for name in ("offset", "offsets"):
            if hasattr(state, name):
                getattr(state, name).fill_(frames)
        if hasattr(state, "kv_cache"):
            state.kv_cache.end_offset.fill_(frames)


if __name__ == "__main__":
    main()
