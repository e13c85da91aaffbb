"""What the benchmarks share: random weights, limits of the device, memory, and the spread of repeated timings."""

from __future__ import annotations

import os
import resource
import sys
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np


def random_params(cfg: Any) -> Any:
    """Random weights of the model's shapes in its type; TTT layers in float32."""
    import jax
    import jax.numpy as jnp

    from ttt_jax.moshi import model

    shapes = model.init_params.eval_shape(cfg, jax.random.key(0))

    def one(path: tuple, leaf: jax.ShapeDtypeStruct) -> jax.Array:
        names = [str(p.key) for p in path]
        dtype = jnp.float32 if "ttt" in names else jnp.dtype(cfg.dtype)
        if "norm" in names[-1] or names[-1] == "ln_scale":
            return jnp.ones(leaf.shape, dtype)
        fan_in = leaf.shape[-2] if names[-1].startswith("inner_w") else leaf.shape[-1]
        key = jax.random.key(zlib.crc32("/".join(names).encode()) % 2**31, impl="rbg")
        return normal(key, leaf.shape, dtype, fan_in**-0.5)

    normal = jax.jit(
        lambda key, shape, dtype, scale: jax.random.normal(key, shape, dtype) * jnp.asarray(scale, dtype),
        static_argnums=(1, 2),
    )
    return jax.block_until_ready(jax.tree_util.tree_map_with_path(one, shapes))


def seconds(fun: Callable[[], Any], repeats: int = 5) -> list[float]:
    """Seconds of each of `repeats` calls; `fun` must wait for its result."""
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        fun()
        times.append(time.perf_counter() - began)
    return times


def copy_bandwidth() -> float:
    """Bytes per second that large copies read and write on this device."""
    import jax
    import jax.numpy as jnp

    size, copies = (2**28, 10) if jax.default_backend() != "cpu" else (2**26, 3)
    copy = jax.jit(lambda x: x + 1, donate_argnums=0)
    x = jax.block_until_ready(copy(jnp.zeros((size,), jnp.float32)))

    def copy_often() -> None:
        nonlocal x
        for _ in range(copies):
            x = copy(x)
        jax.block_until_ready(x)

    return 2 * copies * x.nbytes / float(np.median(seconds(copy_often)))


def product_rate(dtype: Any) -> float:
    """Operations per second of a large matrix product in `dtype` at default precision (TF32 where a GPU has it)."""
    import jax
    import jax.numpy as jnp

    size = 8192 if jax.default_backend() != "cpu" else 1024
    x = jnp.ones((size, size), dtype)
    product = jax.jit(lambda x: x @ x)
    jax.block_until_ready(product(x))
    return 2.0 * size**3 / float(np.median(seconds(lambda: jax.block_until_ready(product(x)))))


def spread(times: list[float]) -> tuple[float, float, float]:
    """Median, tenth and ninetieth percentile."""
    return tuple(float(np.percentile(times, p)) for p in (50, 10, 90))


def device() -> str:
    """The device and the version of jax."""
    import jax

    return f"{jax.devices()[0].device_kind}, jax {jax.__version__}"


def peak() -> float:
    """Most memory held, in gigabytes: the device's, or the process's on a CPU."""
    if "jax" in sys.modules:
        stats = sys.modules["jax"].devices()[0].memory_stats()
        if stats:
            return stats["peak_bytes_in_use"] / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def in_use() -> float:
    """Memory held now, in gigabytes: the device's, or the process's on a CPU (Linux)."""
    import jax

    stats = jax.devices()[0].memory_stats()
    return stats["bytes_in_use"] / 1e9 if stats else of_process()


def of_process() -> float:
    """Memory of the host that the process holds now, in gigabytes (Linux)."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e9
