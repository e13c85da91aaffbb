"""From the folder of a checkpoint to a model that talks."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from ttt_jax.checkpoints import loading
from ttt_jax.codec import Codec, CodecInfo, load_codec
from ttt_jax.data.corpus import fit_model
from ttt_jax.data.text import Tokenizer, TokenizerInfo
from ttt_jax.errors import InputError
from ttt_jax.moshi.generate import Sampling
from ttt_jax.serve.speech import Speech


class Loaded(NamedTuple):
    """A checkpoint that talks."""

    speech: Speech
    tokenizer: Tokenizer | TokenizerInfo
    """`TokenizerInfo` where there is none: tokens then have no text."""
    checkpoint: loading.Checkpoint


def load(path: str | Path, codec: str | None = None, most: Sampling = Sampling()) -> Loaded:
    """Returns the checkpoint in `path` (`loading.load`) with its codec and tokenizer.

    Args:
      codec: a codec in place of the checkpoint's (`ttt_jax.codec.load_codec`); most: as in `Speech`.

    Raises:
      InputError: `path` is no checkpoint, its codec is not here, or another codec than it was trained with is given.
    """
    checkpoint = loading.load(path)
    own, tokenizer = coders(checkpoint, codec)
    cfg = fit_model(checkpoint.cfg, own, tokenizer, checkpoint.name, checkpoint.codec)
    return Loaded(Speech(checkpoint.params, cfg, own, most), tokenizer, checkpoint)


def coders(checkpoint: loading.Checkpoint, codec: str | None) -> tuple[Codec, Tokenizer | TokenizerInfo]:
    """Returns the codec, the given one or the checkpoint's own, and the tokenizer. Raises `InputError` as `load`."""
    if codec is None:
        own, tokenizer = loading.coders(checkpoint)
    elif checkpoint.corpus is None:
        own, tokenizer = load_codec(codec), loading.tokenizer_of_weights(checkpoint)
    else:
        own, tokenizer = load_codec(codec), loading.coders(checkpoint)[1]
    if isinstance(own, CodecInfo):
        raise InputError(
            f"{checkpoint.name} was trained on files of codes of {own.name}, which is not here: give that codec by"
            " --codec."
        )
    return own, tokenizer
