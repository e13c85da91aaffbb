"""From the folder of a checkpoint to a model that talks."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ttt_jax.checkpoints import loading
from ttt_jax.codec import Codec, CodecInfo, load_codec
from ttt_jax.config import MoshiConfig
from ttt_jax.data.corpus import fit_model
from ttt_jax.data.text import Tokenizer, TokenizerInfo
from ttt_jax.errors import InputError
from ttt_jax.moshi.generate import Sampling
from ttt_jax.moshi.model import Params
from ttt_jax.serve.speech import Speech


class Loaded(NamedTuple):
    """A checkpoint that talks."""

    speech: Speech
    tokenizer: Tokenizer | TokenizerInfo
    """`TokenizerInfo` where there is none: tokens then have no text."""
    checkpoint: loading.Checkpoint


def load(
    path: str | Path,
    codec: str | None = None,
    most: Sampling = Sampling(),
    context: int | None = None,
    attention_sink: int | None = None,
) -> Loaded:
    """Returns the checkpoint in `path` (`loading.load`) with its codec and tokenizer.

    Args:
      codec: a codec in place of the checkpoint's (`ttt_jax.codec.load_codec`); most: as in `Speech`.
      context: attention window in frames in place of the checkpoint's; layers with a shorter one keep it.
      attention_sink: first frames that stay in attention's window, in place of the checkpoint's.

    Raises:
      InputError: `path` is no checkpoint, its codec is not here, another codec than it was trained with is given, or
        the window cannot be.
    """
    checkpoint = loading.load(path)
    own, tokenizer = coders(checkpoint, codec)
    cfg = fit_model(checkpoint.cfg, own, tokenizer, checkpoint.name, checkpoint.codec)
    params, cfg = with_window(checkpoint.params, cfg, context, attention_sink)
    return Loaded(Speech(params, cfg, own, most), tokenizer, checkpoint)


def with_window(
    params: Params, cfg: MoshiConfig, context: int | None, attention_sink: int | None
) -> tuple[Params, MoshiConfig]:
    """Returns parameters and configuration with another attention window and sink, in frames; None keeps them.

    Raises `InputError` for a window that cannot be.
    """
    changes: dict[str, Any] = {}
    if context is not None:
        layers = tuple((layer, min(frames, context)) for layer, frames in cfg.layer_context)
        changes |= {"context": context, "layer_context": layers}
    if attention_sink is not None:
        changes["attention_sink"] = attention_sink
    changed = dataclasses.replace(cfg, **changes)
    if [run.name for run in changed.runs] == [run.name for run in cfg.runs]:
        return params, changed
    # Layers whose windows have become alike, or different, are stacked anew.
    layer = {
        run.start + i: jax.tree.map(lambda leaf, i=i: leaf[i], params["layers"][run.name])
        for run in cfg.runs
        for i in range(run.stop - run.start)
    }
    stacked = {
        run.name: jax.tree.map(lambda *leaves: jnp.stack(leaves), *(layer[i] for i in range(run.start, run.stop)))
        for run in changed.runs
    }
    return {**params, "layers": stacked}, changed


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
