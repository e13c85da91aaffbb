"""Cross-entropy on the delayed grid."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from ttt_jax.moshi.model import Outputs


def token_losses(outputs: Outputs) -> jax.Array:
    """Cross-entropy in nats of every token that `forward` scored, [B, 1 + Q, T]: text, then the own codebooks; 0 where masked."""
    audio = _cross_entropy(outputs.audio_logits, outputs.targets[:, 1:].swapaxes(1, 2)).swapaxes(1, 2)
    text = _cross_entropy(outputs.text_logits, outputs.targets[:, 0])[:, None]
    return jnp.where(outputs.target_mask, jnp.concatenate([text, audio], 1), 0)


def _cross_entropy(logits: jax.Array, targets: jax.Array) -> jax.Array:
    # Masked targets lie outside the classes; any class does, the caller masks the result.
    index = jnp.clip(targets, 0, logits.shape[-1] - 1)[..., None]
    return jax.nn.logsumexp(logits, axis=-1) - jnp.take_along_axis(logits, index, -1)[..., 0]
