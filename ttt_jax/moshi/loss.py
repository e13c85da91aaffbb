"""Cross-entropy on the delayed grid, as a whole or a block of frames at a time."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from ttt_jax.config import MoshiConfig
from ttt_jax.moshi.model import Encoded, Outputs, Params, Remat, predict


class Scores(NamedTuple):
    """Losses of the tokens of a call."""

    nats: jax.Array
    """Cross-entropy, [B, 1 + Q, T]: text, then Moshi's codebooks; 0 where masked."""
    half_variance: jax.Array
    """Half the variance of a token's logits over its entries, [B, 1 + Q, T]; 0 where masked. Without gradient."""


def token_losses(outputs: Outputs) -> jax.Array:
    """Cross-entropy in nats of every token that `forward` scored, [B, 1 + Q, T]: text, then Moshi's codebooks; 0 where
    masked."""
    return _nats(outputs.text_logits, outputs.audio_logits, outputs.targets, outputs.target_mask)


def score(params: Params, encoded: Encoded, cfg: MoshiConfig, block: int, remat: Remat = "none") -> Scores:
    """`token_losses` of the result of `encode`, a block of frames at a time, so that never all logits are stored.

    Args:
      block: most frames (rows times length) whose logits exist at once; with more than one block the backward pass
        computes them again.
      remat: as in `encode`; unless "none", the backward pass computes a single block again, too.
    """
    rows, length = encoded.hidden.shape[:2]
    blocks = min(length, -(-rows * length // block))
    size = -(-length // blocks)
    blocks = -(-length // size)

    def one(hidden: jax.Array, targets: jax.Array, mask: jax.Array) -> Scores:
        text, audio = predict(params, hidden, targets, cfg)
        variances = jax.lax.stop_gradient([text.var(-1)[:, None], audio.var(-1).swapaxes(1, 2)])
        return Scores(_nats(text, audio, targets, mask), jnp.where(mask, 0.5 * jnp.concatenate(variances, 1), 0))

    if blocks == 1:
        one = one if remat == "none" else jax.checkpoint(one)
        return one(encoded.hidden, encoded.targets, encoded.target_mask)

    def cut(x: jax.Array, axis: int) -> jax.Array:
        """The frames along `axis` as [blocks, ..., size, ...], filled up with zeros: masked frames."""
        x = jnp.pad(x, [(0, blocks * size - length if i == axis else 0) for i in range(x.ndim)])
        return jnp.moveaxis(x.reshape(*x.shape[:axis], blocks, size, *x.shape[axis + 1 :]), axis, 0)

    def join(x: jax.Array) -> jax.Array:
        return jnp.moveaxis(x, 0, 2).reshape(*x.shape[1:3], blocks * size)[..., :length]

    xs = cut(encoded.hidden, 1), cut(encoded.targets, 2), cut(encoded.target_mask, 2)
    body = jax.checkpoint(lambda _, x: (None, one(*x)), prevent_cse=False)
    return jax.tree.map(join, jax.lax.scan(body, None, xs)[1])


def _nats(text: jax.Array, audio: jax.Array, targets: jax.Array, mask: jax.Array) -> jax.Array:
    codes = _cross_entropy(audio, targets[:, 1:].swapaxes(1, 2)).swapaxes(1, 2)
    return jnp.where(mask, jnp.concatenate([_cross_entropy(text, targets[:, 0])[:, None], codes], 1), 0)


def _cross_entropy(logits: jax.Array, targets: jax.Array) -> jax.Array:
    # Masked targets lie outside the classes; any class does, the caller masks the result.
    index = jnp.clip(targets, 0, logits.shape[-1] - 1)[..., None]
    return jax.nn.logsumexp(logits, axis=-1) - jnp.take_along_axis(logits, index, -1)[..., 0]
