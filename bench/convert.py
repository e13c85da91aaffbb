"""Measures bringing a full-size 7B in and out: `python -m bench.convert SCRATCH` (about 50 GB, removed afterwards).

Makes a random bfloat16 checkpoint in Kyutai's released layout, converts it by the command line in a process, and
exports the result by another. Prints seconds, MB/s and peak resident memory of both, beside plain copies of the same
file by reads and writes of 16 MB in the same run. Each run ends on disk (fsync) and starts with its source out of the
page cache. Prints also how many tensors came back bit for bit (SHA-256). `--layers 2` measures a model of 3 GB.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from ttt_jax.checkpoints import weights
from ttt_jax.checkpoints.safetensors_reader import BLOCK, Piece, TensorFile
from ttt_jax.checkpoints.safetensors_writer import Spec, write_files
from ttt_jax.config import MODEL_PRESETS, MoshiConfig, TTTConfig
from ttt_jax.convert import kyutai_config, kyutai_names
from ttt_jax.utils import config_json


def main() -> None:
    """Prints all figures."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("scratch", type=Path, help="folder on the disk to measure, with 50 GB free")
    parser.add_argument("--layers", type=int, default=32, help="temporal layers of the model (default: the 7B's 32)")
    args = parser.parse_args()
    seven = MODEL_PRESETS["moshi-7b"]
    cfg = dataclasses.replace(seven, num_layers=args.layers, ttt=TTTConfig(layers="none"))
    needed = 3.2 * 2 * sum(np.prod(tensor.shape, dtype=float) for tensor in weights.base(cfg))
    free = shutil.disk_usage(args.scratch).free
    if free < needed:
        parser.error(f"{args.scratch} has {free / 1e9:.0f} GB free; {needed / 1e9:.0f} GB are needed")
    folder = Path(tempfile.mkdtemp(dir=args.scratch, prefix="bench-convert-"))
    try:
        measure(folder, cfg)
    finally:
        shutil.rmtree(folder)


def measure(folder: Path, cfg: MoshiConfig) -> None:
    """Takes all measurements, in `folder`."""
    make_checkpoint(folder / "kyutai", cfg)
    source, back = folder / "kyutai" / "model.safetensors", folder / "exported" / "model.safetensors"
    size = source.stat().st_size
    print(f"{size:,} bytes")
    report("plain copy", size, *copy(source, folder / "copy"))
    command = (sys.executable, "-m", "ttt_jax.convert")
    report("convert kyutai", size, *run(source, *command, "kyutai", folder / "kyutai", folder / "ours"))
    report("plain copy again", size, *copy(source, folder / "copy"))
    layer = folder / "ours" / "layer_00.safetensors"
    report("convert export", size, *run(layer, *command, "export", folder / "ours", folder / "exported"))
    with TensorFile(source) as old, TensorFile(back) as new:
        same = [name for name in old.tensors if name in new.tensors and digest(old, name) == digest(new, name)]
        print(f"{len(same)} of {len(old.tensors)} tensors came back bit for bit; {len(new.tensors)} were exported")


def make_checkpoint(folder: Path, cfg: MoshiConfig) -> None:
    """Writes a random model of the shape `cfg`, as Kyutai releases it."""
    folder.mkdir()
    keys = [key for tensor in weights.base(cfg) for key in kyutai_names.released(kyutai_names.weight(tensor))]
    specs = [Spec(key.name, "BF16", key.shape, (random(i, key.shape),)) for i, key in enumerate(keys)]
    write_files(folder, {"model.safetensors": sorted(specs)})
    config_json.write_json(folder / "config.json", kyutai_config.export(cfg, {}))


def random(seed: int, shape: tuple[int, ...]) -> Piece:
    """Returns random bfloat16 numbers of magnitudes from 2**-7 to 2**-3."""
    nbytes = 2 * int(np.prod(shape))

    def blocks(unit: int) -> Iterator[memoryview]:
        generator = np.random.default_rng(seed)
        for at in range(0, nbytes, BLOCK):
            bits = np.frombuffer(generator.bytes(min(BLOCK, nbytes - at)), np.uint16)
            yield memoryview((bits & 0x81FF | 0x3C00).view(np.uint8))

    return Piece(nbytes, blocks)


def copy(source: Path, target: Path) -> tuple[float, int]:
    """Copies a file and removes the copy. Returns seconds, and 0 for its memory."""
    forget(source)
    start = time.perf_counter()
    with source.open("rb", buffering=0) as old, target.open("wb", buffering=0) as new:
        buffer = memoryview(bytearray(BLOCK))
        while count := old.readinto(buffer):
            new.write(buffer[:count])
        os.fsync(new.fileno())
    seconds = time.perf_counter() - start
    target.unlink()
    return seconds, 0


def run(source: Path, *command: object) -> tuple[float, int]:
    """Runs a command that reads `source` and files beside it. Returns seconds and peak resident memory in bytes."""
    for path in source.parent.iterdir():
        forget(path)
    start = time.perf_counter()
    process = subprocess.Popen([str(word) for word in command], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - start
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{' '.join(map(str, command))} ended with {process.returncode}")
    return seconds, usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def forget(path: Path) -> None:
    """Takes a file out of the page cache where the system allows it."""
    os.sync()
    if hasattr(os, "posix_fadvise"):
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def digest(file: TensorFile, name: str) -> str:
    """Returns the SHA-256 of a tensor's bytes."""
    sha = hashlib.sha256()
    for block in file.piece(name).blocks(1):
        sha.update(block)
    return sha.hexdigest()


def report(what: str, size: int, seconds: float, peak: int) -> None:
    """Prints a line."""
    memory = f", peak {peak / 1e9:.2f} GB resident" if peak else ""
    print(f"{what:18}{seconds:7.1f} s  {size / seconds / 1e6:6.0f} MB/s{memory}", flush=True)


if __name__ == "__main__":
    main()
