"""Small random checkpoints as the original saves them: names and shapes as its modules give them, apart from
`ttt_jax.convert`.

Its layer N holds Kyutai's as `original_layer` and again inside `seq_modeling_block`, with the TTT layer and two gates.
A run that trains all saves `consolidated.safetensors`, adapters merged; another saves what it trained as
`lora.safetensors`.
"""

from __future__ import annotations

import json
import pathlib

import numpy as np
from safetensors.numpy import save_file

from tests.helpers import kyutai_files as files

TTT = {"enable": True, "base_lr": 0.5, "mini_batch_size": 4, "ttt_mlp_layers": 2, "use_rope": False}
"""Of `training_config.json`, without the layers."""
CONFIG = files.CONFIG | {"lora": False, "lora_rank": 3, "lora_scaling": 2.0}
"""Its config.json: Kyutai's, with the settings of adapters, used or not."""


def layer_shapes(d: int, heads: int, inner: tuple[int, ...] = (), kind: str = "TTTMLP") -> dict[str, tuple[int, ...]]:
    """Parameters of one `seq_modeling_block` without Kyutai's layer.

    Args:
      inner: hidden widths of a TTTMLPMultiLayer.
      kind: class of the TTT layer: TTTLinear, TTTMLP, TTTMLPMultiLayer.
    """
    width = d // heads
    ttt = {"learnable_ttt_lr_weight": (heads, 1, d), "learnable_ttt_lr_bias": (heads, 1)}
    ttt |= {"ttt_norm_weight": (heads, width), "ttt_norm_bias": (heads, width)}
    ttt |= {"post_norm.weight": (d,), "post_norm.bias": (d,)}
    for linear in ("wq", "wk", "wv", "wo"):
        ttt |= {f"{linear}.weight": (d, d), f"{linear}.bias": (d,)}
    if kind == "TTTLinear":
        ttt |= {"W1": (heads, width, width), "b1": (heads, 1, width)}
    elif kind == "TTTMLP":
        ttt |= {"W1": (heads, width, 4 * width), "b1": (heads, 1, 4 * width)}
        ttt |= {"W2": (heads, 4 * width, width), "b2": (heads, 1, width)}
    else:
        sizes = [width, *inner, width]
        for i in range(len(sizes) - 1):
            ttt |= {f"weights.{i}": (heads, sizes[i], sizes[i + 1]), f"biases.{i}": (heads, 1, sizes[i + 1])}
    gates = {f"{way}_ssm_gating.gating_alpha": (d,) for way in ("forward", "backward")}
    return {f"ttt_layer.ttt.{name}": shape for name, shape in ttt.items()} | gates


def layer(shapes: dict[str, tuple[int, ...]], seed: int, kind: str = "F32") -> dict[str, np.ndarray]:
    """Random parameters in these shapes, as far from any initial value as trained ones; some gates beyond where they
    are clamped."""
    p = files.random(shapes, kind, seed)
    for name in p:
        if "norm.weight" in name or "norm_weight" in name:
            p[name] = (1 + 0.3 * p[name]).astype(files.TYPES[kind])
        elif "gating" in name:
            p[name] = (2 * p[name]).astype(files.TYPES[kind])
        elif p[name].ndim == 3 and "lr_weight" not in name:
            p[name] = (p[name] / p[name].shape[1] ** 0.5).astype(files.TYPES[kind])
        elif p[name].ndim > 1:
            p[name] = (p[name] / p[name].shape[-1] ** 0.5).astype(files.TYPES[kind])
    return p


def own(layers: dict[int, dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """The TTT layers' tensors by their names in a file."""
    return {
        f"transformer.layers.{n}.seq_modeling_block.{name}": values
        for n, p in layers.items()
        for name, values in p.items()
    }


def wrapped(kyutai: dict[str, np.ndarray], layers, copies: bool = True) -> dict[str, np.ndarray]:
    """Kyutai's tensors by the names that they have in a model with TTT in `layers`; twice, unless only parameters are
    walked."""
    found = {}
    for name, values in kyutai.items():
        stem = next((f"transformer.layers.{n}." for n in layers if name.startswith(f"transformer.layers.{n}.")), None)
        if stem is None:
            found[name] = values
            continue
        for place in ("original_layer.", "seq_modeling_block.original_layer.")[: 1 + copies]:
            found[stem + place + name.removeprefix(stem)] = values
    return found


def consolidated(c: dict, layers: dict[int, dict[str, np.ndarray]], kind: str = "F32") -> dict[str, np.ndarray]:
    """All weights, as `consolidated.safetensors` holds them."""
    return wrapped(files.weights(c, kind), layers) | own(layers)


def write(
    folder: pathlib.Path,
    tensors: dict[str, np.ndarray],
    numbers,
    c: dict = CONFIG,
    name: str = "consolidated",
    **changes: object,
) -> pathlib.Path:
    """A folder `checkpoints/checkpoint_000123/consolidated` of the original.

    Args:
      numbers: its TTT layers, as in its settings.
      changes: of these settings; None leaves one out.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(c))
    save_file(tensors, folder / f"{name}.safetensors")
    settings = TTT | {"layers": ",".join(map(str, numbers))} | changes
    settings = {key: value for key, value in settings.items() if value is not None}
    config = {"optim": {"lr": 1e-4}, "ttt": settings, "lora": {"enable": c.get("lora", False)}}
    (folder / "training_config.json").write_text(json.dumps(config))
    (folder / "optimizer_state.pt").write_bytes(b"pickled")
    return folder


def layers_of(kind: str = "TTTMLP", inner: tuple[int, ...] = (), numbers=(0, 1), type: str = "F32"):
    """Random TTT layers of the model `CONFIG` by number, for `consolidated` and `own`."""
    shapes = layer_shapes(CONFIG["dim"], CONFIG["num_heads"], inner, kind)
    return {n: layer(shapes, seed=n, kind=type) for n in numbers}
