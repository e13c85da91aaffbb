"""Base weights on disk: a folder of safetensors, one file per layer, with a `config.json` (docs/checkpoints.md).

`tensors` lists the tensors of the files and their places in the parameters; `load` reads a folder.
`python -m ttt_jax.convert` writes it.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ttt_jax.checkpoints.differences import differences
from ttt_jax.checkpoints.safetensors_reader import DTYPES, TensorFile
from ttt_jax.codec.stored import CONFIG, StoredCodec, stated, stated_tokenizer
from ttt_jax.config import MoshiConfig, Part
from ttt_jax.errors import InputError
from ttt_jax.utils import config_json
from ttt_jax.utils.files import file_digest

FORMAT = 1
LORA = "lora.safetensors"
MIMI = "mimi.safetensors"
"""Our file of the codec that belongs to the weights, where there is one."""
MADE_BY = "python -m ttt_jax.convert kyutai"


class Tensor(NamedTuple):
    """A tensor of the folder and its place in the parameters."""

    file: str
    name: str
    path: tuple[str, ...]
    """Keys of its leaf in the parameters."""
    index: int | None
    """Layer within the leaf, whose first axis then counts layers (layers and what `lead` stacks, layer by layer); None:
    the leaf itself."""
    shape: tuple[int, ...]
    lead: int = 0
    """Leading axes that stack equal maps or tables."""
    inputs: int = 0
    """Trailing axes that a linear map sums over; 0: not a linear map."""

    @property
    def rows(self) -> tuple[int, ...]:
        """Output axes of a linear map."""
        return self.shape[self.lead : len(self.shape) - self.inputs]

    @property
    def part(self) -> tuple[int, ...]:
        """Shape without the stacking axes."""
        return self.shape[self.lead :]


class Weights(NamedTuple):
    """A folder's content."""

    cfg: MoshiConfig
    params: dict[str, Any]
    """In the structure of `ttt_jax.moshi.model.init_params`, in the types of the files."""
    info: dict[str, Any]
    """All of `config.json`: "source" gives the origin of the weights, "digest" identifies the base."""


def codec(folder: str | Path) -> StoredCodec | None:
    """Returns the codec in a folder of weights, by its `config.json`; None if it states none. Raises `InputError`."""
    return stated(Path(folder), _read_config(Path(folder)))


def tokenizer(folder: str | Path) -> Path | None:
    """Returns the path of the SentencePiece model in a folder of weights, by its `config.json`; None if there is none.

    Raises `InputError`.
    """
    return stated_tokenizer(Path(folder), _read_config(Path(folder)))


def base(cfg: MoshiConfig) -> list[Tensor]:
    """Returns the tensors of the model without adapters and TTT layers, in the order of the files."""
    d, heads, width, depth = cfg.dim, cfg.num_heads, cfg.head_dim, cfg.depth
    e, depth_width, narrow = depth.dim, depth.dim // depth.num_heads, depth.low_rank or depth.dim
    sets, q, texts, codes = max(cfg.depth_sets) + 1, cfg.dep_q, cfg.text_card + 1, cfg.card + 1
    tensors = []

    def add(
        file: str, prefix: tuple[str, ...], name: str, shape: tuple[int, ...], lead=0, inputs=0, index=None
    ) -> None:
        tensors.append(Tensor(f"{file}.safetensors", name, (*prefix, *name.split("/")), index, shape, lead, inputs))

    add("embeddings", (), "text_emb", (texts, d))
    add("embeddings", (), "audio_emb", (cfg.n_q, codes, d), 1)
    for run in cfg.runs:
        for i in range(run.start, run.stop):
            layer = functools.partial(add, f"layer_{i:02d}", ("layers", run.name), index=i - run.start)
            layer("attention/qkv", (3, heads, width, d), inputs=1)
            layer("attention/out", (d, d), inputs=1)
            layer("ffn/gate_up", (2, cfg.hidden, d), inputs=1)
            layer("ffn/down", (d, cfg.hidden), inputs=1)
            layer("norm1", (d,))
            layer("norm2", (d,))
    add("head", (), "out_norm", (d,))
    add("head", (), "text_head", (cfg.text_card, d), inputs=1)
    if cfg.extra_heads:
        add("head", (), "extra_heads", (cfg.extra_heads, cfg.extra_heads_dim, d), 1, 1)
    add("depth", (), "depth/input", (sets, e, d), 1, 1)
    add("depth", (), "depth/text_emb", (texts, narrow))
    add("depth", (), "depth/audio_emb", (q - 1, codes, narrow), 1)
    if depth.low_rank is not None:
        add("depth", (), "depth/text_emb_up", (e, narrow), inputs=1)
        add("depth", (), "depth/audio_emb_up", (q - 1, e, narrow), 1, 1)
    add("depth", (), "depth/heads", (q, cfg.card, e), 1, 1)
    for i in range(depth.num_layers):
        layer = functools.partial(add, f"depth_layer_{i:02d}", ("depth",), index=i)
        layer("qkv", (sets, 3, depth.num_heads, depth_width, e), 1, 1)
        layer("out", (sets, e, e), 1, 1)
        layer("gate_up", (sets, 2, depth.hidden, e), 1, 1)
        layer("down", (sets, e, depth.hidden), 1, 1)
        layer("norm1", (e,))
        layer("norm2", (e,))
    return tensors


def adapters(cfg: MoshiConfig) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Returns the linear maps that have adapters, each with its two tensors A and B."""
    return [(t, *adapter(t, cfg.lora.rank)) for t in base(cfg) if t.inputs and cfg.lora.of(owner(t)).rank]


def owner(tensor: Tensor) -> Part:
    """Returns the part of the base that a linear map belongs to, as in `LoRAConfig.maps`."""
    name = tensor.path[2] if tensor.path[0] == "layers" else tensor.path[0]
    return name if name in ("attention", "ffn", "depth") else "heads"


def adapter(tensor: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Returns A [*lead, rank, *inputs] and B [*lead, *rows, rank] of a linear map."""
    lead, columns = tensor.shape[: tensor.lead], tensor.shape[len(tensor.shape) - tensor.inputs :]
    stem = "" if tensor.index is None else Path(tensor.file).stem + "/"

    def part(letter: str, shape: tuple[int, ...], inputs: int) -> Tensor:
        path = (*tensor.path[:-1], f"{tensor.path[-1]}_lora_{letter}")
        return Tensor(LORA, f"{stem}{tensor.name}_lora_{letter}", path, tensor.index, shape, tensor.lead, inputs)

    return part("a", (*lead, rank, *columns), tensor.inputs), part("b", (*lead, *tensor.rows, rank), 1)


def ttt(cfg: MoshiConfig) -> list[Tensor]:
    """Returns the tensors of the TTT layers."""
    if not cfg.ttt_layers:
        return []
    shapes = {name: tuple(leaf.shape) for name, leaf in _ttt_shapes(cfg).items()}
    return [
        Tensor(f"ttt_{i:02d}.safetensors", name, ("layers", run.name, "ttt", name), i - run.start, shape)
        for run in cfg.runs
        if run.has_ttt
        for i in range(run.start, run.stop)
        for name, shape in shapes.items()
    ]


def tensors(cfg: MoshiConfig) -> list[Tensor]:
    """Returns all tensors of a folder: base, adapters, TTT layers."""
    return base(cfg) + [t for _, *pair in adapters(cfg) for t in pair] + ttt(cfg)


def by_file(tensors: Iterable[Tensor]) -> dict[str, list[Tensor]]:
    """Groups tensors by their file."""
    files: dict[str, list[Tensor]] = {}
    for tensor in tensors:
        files.setdefault(tensor.file, []).append(tensor)
    return files


def digest(tensors: Iterable[Tensor], files: Mapping[str, Mapping[str, Any]]) -> str:
    """Returns the SHA-256 over the names and digests of the files that hold `tensors`."""
    lines = "".join(f"{files[name]['sha256']}  {name}\n" for name in sorted(by_file(tensors)))
    return hashlib.sha256(lines.encode()).hexdigest()


class Folder(contextlib.ExitStack):
    """A folder of weights, checked and open for reading tensor by tensor."""

    def __init__(self, folder: str | Path, verify: bool = False):
        """Opens all files of `folder`; reads them once to compare their SHA-256 with `config.json` if `verify`.

        Raises `InputError` with all differences if a file, tensor, shape or type differs from `config.json`.
        """
        super().__init__()
        self.path = Path(folder)
        self.info = _read_config(self.path)
        self.cfg = config_json.from_dict(MoshiConfig, self.info["model"], f"{self.path / CONFIG}: model")
        self.tensors = tensors(self.cfg)
        self.files: dict[str, TensorFile] = {}
        with contextlib.ExitStack() as opened:
            problems = list(self._problems(verify, opened))
            if problems:
                raise InputError(f"{self.path} differs from its {CONFIG}: {'; '.join(problems)}: convert it again.")
            self.push(opened.pop_all())

    def dtype(self, tensor: Tensor) -> str:
        """Returns the type of a tensor as files name it."""
        return self.files[tensor.file].tensors[tensor.name].dtype

    def array(self, tensor: Tensor) -> np.ndarray:
        """Returns a tensor."""
        return self.files[tensor.file].array(tensor.name)

    def _problems(self, verify: bool, opened: contextlib.ExitStack) -> Iterator[str]:
        listed, grouped = self.info["files"], by_file(self.tensors)
        for name in sorted(grouped.keys() - listed.keys()):
            yield f'{CONFIG} lists no "{name}"'
        for name, about in listed.items():
            path = self.path / name
            if not path.is_file():
                yield f"{name} is missing"
            elif path.stat().st_size != about["bytes"]:
                yield f"{name} has {path.stat().st_size} bytes instead of {about['bytes']}"
            elif verify and file_digest(path) != about["sha256"]:
                yield f"{name} has another SHA-256 than when it was written"
            elif name in grouped:
                self.files[name] = opened.enter_context(TensorFile(path))
        for name, file in self.files.items():
            stored = {key: info.shape for key, info in file.tensors.items()}
            expected = {t.name: t.shape for t in grouped[name]}
            yield from (f"{name} {problem}" for problem in differences(expected, stored))
        if (mimi := codec(self.path)) is not None and mimi.path.name not in listed:
            yield f'{CONFIG} lists no "{mimi.path.name}"'
        types_of = {name: {info.dtype for info in file.tensors.values()} for name, file in self.files.items()}
        for kind in (by_file(base(self.cfg)).keys(), {LORA}):
            types = {(name, dtype) for name in kind & types_of.keys() for dtype in types_of[name]}
            if len({dtype for _, dtype in types}) > 1 or any(dtype not in DTYPES for _, dtype in types):
                yield "types are mixed (" + ", ".join(sorted(f"{name}: {dtype}" for name, dtype in types)) + ")"
        for name in sorted(by_file(t for t in self.tensors if "ttt" in t.path).keys() & types_of.keys()):
            if wrong := types_of[name] - {"F32"}:
                yield f"{name} has type {', '.join(sorted(wrong))} instead of F32"


def base_of_run(run: str | Path, path: str, digest: str) -> Folder:
    """Opens the base weights of a run. Raises `InputError` if they are gone or have another digest."""
    if (Path(path) / CONFIG).is_file():
        folder = Folder(path)
        if folder.info["digest"] == digest:
            return folder
        folder.close()
    raise InputError(f"{path}, the base weights of {run}, is gone or another: bring it back to that place.")


Place = Callable[[tuple[str, ...], np.ndarray], Any]
"""From a leaf's keys and its content to the array in the parameters."""


def load(folder: str | Path, verify: bool = False) -> Weights:
    """Returns the weights in `folder`, stacked for the model. Needs memory for them and, once more, for the largest
    leaf.

    Args and errors as for `Folder`.
    """
    with Folder(folder, verify) as opened:
        return Weights(opened.cfg, read(opened, opened.cfg), opened.info)


def read(
    folder: Folder, cfg: MoshiConfig, names: Collection[str] | None = None, place: Place | None = None
) -> dict[str, Any]:
    """Returns the leaves of `cfg`'s parameters that are whole in `folder`, nested. `cfg` may stack layers otherwise and
    have more layers or adapters.

    Args:
      names: the leaves to read, as "layers/layers_00_28/norm1"; None: all.
      place: puts a leaf where it belongs; None: on the first device.
    """
    import jax.numpy as jnp

    from ttt_jax.utils.trees import nested

    place = place or (lambda _, array: jnp.asarray(array))
    stored = {(tensor.file, tensor.name): tensor for tensor in folder.tensors}
    leaves: dict[tuple[str, ...], list[Tensor]] = {}
    for tensor in tensors(cfg):
        if names is None or "/".join(tensor.path) in names:
            leaves.setdefault(tensor.path, []).append(tensor)
    params: dict[str, Any] = {}
    for path, parts in leaves.items():
        found = [stored.get((tensor.file, tensor.name)) for tensor in parts]
        if None in found or any(a.shape != b.shape for a, b in zip(parts, found, strict=True)):
            continue
        name = "/".join(path)
        if parts[0].index is None:
            params[name] = place(path, folder.array(parts[0]))
            continue
        stacked = np.empty((len(parts), *parts[0].shape), DTYPES[folder.dtype(parts[0])])
        for tensor in parts:
            stacked[tensor.index] = folder.array(tensor)
        params[name] = place(path, stacked.reshape(-1, *parts[0].part) if parts[0].lead else stacked)
    return nested(params)


def _read_config(folder: Path) -> dict[str, Any]:
    if not (folder / CONFIG).is_file():
        raise InputError(f"{folder} is not a folder of weights (it has no {CONFIG}): give one that {MADE_BY} made.")
    info = config_json.read_json(folder / CONFIG, f"the {CONFIG} of converted weights")
    if not isinstance(info, dict) or not {"format", "model", "files", "source", "digest"} <= info.keys():
        raise InputError(f"{folder / CONFIG} does not describe converted weights: give a folder that {MADE_BY} made.")
    if info["format"] != FORMAT:
        has = f"has format {info['format']}, this version reads {FORMAT}"
        raise InputError(f"{folder / CONFIG} {has}: convert the weights again.")
    return info


@functools.lru_cache(maxsize=8)
def _ttt_shapes(cfg: MoshiConfig) -> dict[str, Any]:
    import jax

    return jax.eval_shape(lambda key: init_ttt(cfg, key), jax.random.key(0))


def init_ttt(cfg: MoshiConfig, key: Any) -> dict[str, Any]:
    """Returns parameters of a TTT layer to add to a trained model: float32, output projection 0."""
    import jax
    import jax.numpy as jnp

    from ttt_jax.ttt import layer

    x, mask = jax.ShapeDtypeStruct((1, 1, cfg.dim), jnp.float32), jax.ShapeDtypeStruct((1, 1), bool)
    state = jax.eval_shape(lambda: layer.init_state(cfg, 1))
    params = layer.TTTLayer(cfg).lazy_init(key, x, mask, state)["params"]  # runs the initialisers, not the layer
    return {**params, "out_kernel": 0 * params["out_kernel"], "out_bias": 0 * params["out_bias"]}
