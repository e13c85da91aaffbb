"""Audio to codes and back.

ttt_jax.codec.base                     the interface of codecs
ttt_jax.codec.kmeans                   the embedded codec: residual k-means over log-mel frames
ttt_jax.codec.spectrogram_inversion    a waveform from log-mel energies, for its decoder
ttt_jax.codec.mimi                     Mimi, Kyutai's codec, in jax
ttt_jax.codec.stored                   the codec and the tokenizer in a folder of weights

`load_codec` finds one by a name or a path. Imports no jax, but for a Mimi.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import safetensors

from ttt_jax.codec import kmeans
from ttt_jax.codec.base import Codec
from ttt_jax.codec.mimi import file
from ttt_jax.codec.stored import CONFIG, StoredCodec, stated
from ttt_jax.config import FRAME_RATE
from ttt_jax.errors import InputError
from ttt_jax.utils import config_json
from ttt_jax.utils.paths import local

KMEANS = "kmeans"
"""Name of the embedded codec."""
MIMI = "mimi"
"""Name of no codec: in training it stands for the Mimi of the base."""
MIMI_AT = "mimi:"
"""What the path of a Mimi may begin with, so that no other codec is taken."""
DEFAULT_FILE = Path(__file__).resolve().parents[2] / "corpus" / "codec" / "melkmeans-8x64.safetensors"
_CODEBOOKS = ("_codebook.embedding_sum", "_codebook.embed_sum", "_codebook.embed_avg", ".codebook.embed_sum")
"""Ends of names in other layouts of a Mimi."""


@dataclass(frozen=True)
class CodecInfo:
    """A codec that is not here, as code files state it: enough to read their codes, not to encode or decode audio."""

    name: str
    digest: str | None
    cardinality: int | None = None  # None if no file states it
    num_codebooks: int = 8
    frame_rate: float = FRAME_RATE


def load_codec(name_or_path: str | Path = "kmeans") -> Codec:
    """Returns a codec: the embedded one of a checkout ("kmeans"), or that of a path.

    The path is that of a codec file, k-means or Mimi, or of a folder of converted weights with their Mimi. "mimi:PATH"
    is such a path, of a Mimi alone. jax is loaded for a Mimi only. Raises `InputError` for an unknown name, a path
    without a codec, or a codec of another frame rate.
    """
    name = str(name_or_path)
    if name == MIMI:
        raise InputError(
            f"codec 'mimi' does not come with the project: give mimi:PATH or PATH, a file that `{file.MADE_BY} SOURCE"
            " PATH` makes, 'kmeans', the embedded codec, or in training --base weights that have a Mimi."
        )
    if name == KMEANS and not DEFAULT_FILE.is_file():
        raise InputError(
            f"codec 'kmeans' is expected at {DEFAULT_FILE}, which does not exist: run from a checkout of the project,"
            " or give the path of a codec file."
        )
    path = DEFAULT_FILE if name == KMEANS else local(name.removeprefix(MIMI_AT))
    stored = _of_folder(path) if path.is_dir() else None
    codec = _read(path if stored is None else stored.path, name)
    if stored is not None and codec.digest != stored.digest:
        raise InputError(
            f"{stored.path} has the digest {codec.digest}, but {path / CONFIG} states {stored.digest}: bring the file"
            " back that came with the weights, or convert them again."
        )
    if codec.frame_rate != FRAME_RATE:
        raise InputError(
            f"the codec {path} gives {codec.frame_rate:g} frames a second ({codec.sample_rate} Hz, {codec.frame_size}"
            f" samples a frame), but models read {FRAME_RATE}: give a codec of {FRAME_RATE} frames a second."
        )
    return codec


def _of_folder(folder: Path) -> StoredCodec:
    """Returns the codec in a folder of converted weights. Raises `InputError` if it is another folder or has none."""
    info = config_json.read_json(folder / CONFIG, "a folder of weights") if (folder / CONFIG).is_file() else None
    stored = stated(folder, info) if isinstance(info, dict) else None
    if stored is None:
        raise InputError(
            f"{folder} is a folder without a codec in its {CONFIG}: give a codec file, or a folder that `python -m"
            f" ttt_jax.convert kyutai` made of weights with their Mimi (`{file.MADE_BY} {folder} OUT` converts Mimi"
            " alone)."
        )
    return stored


def _read(path: Path, name: str) -> Codec:
    """Returns the codec in a file of either format; `name` is what the user gave. Raises `InputError`."""
    if not path.is_file():
        raise InputError(
            f"codec {name!r} is neither a codec nor a file: use 'kmeans', or the path of a codec file (.safetensors)."
        )
    try:
        with safetensors.safe_open(str(path), framework="numpy") as opened:
            form, keys = (opened.metadata() or {}).get("format"), list(opened.keys())
    except (OSError, safetensors.SafetensorError) as error:
        raise InputError(
            f"the codec file {path} cannot be read ({error}): give a safetensors file of a codec, or 'kmeans', the"
            " embedded one."
        ) from None
    if form == file.FORMAT:
        from ttt_jax.codec.mimi.codec import MimiCodec

        mimi = file.read(path)
        return MimiCodec(mimi.params, mimi.cfg, mimi.use, mimi.name, mimi.digest)
    if any(key.endswith(_CODEBOOKS) for key in keys):
        raise InputError(
            f"{path} is a Mimi in the layout of Kyutai or Hugging Face: convert it by `{file.MADE_BY} {path} OUT`, and"
            " give OUT."
        )
    if name.startswith(MIMI_AT):
        raise InputError(
            f"{path} is no Mimi (its metadata state the format {form!r}): give one that `{file.MADE_BY}` made."
        )
    if form != kmeans.FORMAT:
        raise InputError(
            f"{path} is no codec file (its metadata state the format {form!r}, not {kmeans.FORMAT!r} or"
            f" {file.FORMAT!r}): give one, or 'kmeans', the embedded codec."
        )
    return kmeans.KMeansCodec.load(path)
