"""`python -m train` in processes of its own, for tests that kill it, stop it, or start several."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import jax

from tests.helpers.micro import CONFIG, files, write_manifest
from tests.helpers.places import ROOT
from ttt_jax.codec import load_codec
from ttt_jax.utils import config_json


def write_config(folder, **changes):
    """A configuration of the micro model on data in `folder`; its path."""
    digest = load_codec().digest
    data = dataclasses.replace(
        CONFIG.data,
        train=str(write_manifest(folder, "train", files(), digest)),
        validation=str(write_manifest(folder, "validation", files((40, 70), seed=1), digest)),
        cache=str(folder / "cache"),
    )
    path = folder / "given.json"
    config_json.write_json(path, config_json.to_dict(dataclasses.replace(CONFIG, data=data, **changes)))
    return path


def start(*words, devices=1):
    """The running command, on simulated devices."""
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}"
    env = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags, "PYTHONPATH": str(ROOT)}
    if jax.config.jax_compilation_cache_dir is not None:
        env["JAX_COMPILATION_CACHE_DIR"] = jax.config.jax_compilation_cache_dir
        env["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.1"
    command = [sys.executable, "-m", "train", *map(str, words)]
    return subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finish(process, timeout=400):
    """What the command printed, and its exit code."""
    try:
        output, _ = process.communicate(timeout=timeout)
    finally:
        process.kill()
    return output, process.returncode


def lines(run_dir):
    """Of metrics.jsonl, without the times."""
    path = Path(run_dir) / "metrics.jsonl"
    untimed = ("seconds", "frames_per_second")
    read = [json.loads(line) for line in path.read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in untimed} for line in read]
