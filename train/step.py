"""One optimiser step: a pure function from state and batch to state and metrics."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from train import optim
from train.config import LossConfig, TrainConfig
from train.windows import Batch
from ttt_jax.data.text import EPAD, PAD
from ttt_jax.moshi import model
from ttt_jax.moshi.loss import token_losses


class TrainState(NamedTuple):
    """All that a step changes."""

    step: jax.Array
    """Steps done, int32 []."""
    params: Any
    """Of `model.init_params`."""
    opt_state: Any
    """Of the optimiser."""
    stream: model.State
    """Where every batch row stands in its file: attention rings, TTT states, delayed tokens."""


class Metrics(NamedTuple):
    """What a step reports, scalars on the device; losses are of the weights that the step started from."""

    loss: jax.Array
    """The weighted mean cross-entropy that is minimised, nats."""
    streams: jax.Array
    """Mean cross-entropy of each predicted stream, unweighted, nats, [1 + Q]: text, own codebooks; NaN without targets."""
    half_variance: jax.Array
    """Half the variance of each stream's logits over its entries, mean over targets, [1 + Q]."""
    grad_norm: jax.Array
    """Global norm of the gradient before clipping."""
    rates: dict[str, jax.Array]
    """Learning rate by group."""
    ttt: dict[int, dict[str, jax.Array]]
    """Gates and norms by TTT layer (`model.ttt_summary`), after the step's frames, of the weights that read them."""


# Random draws of many shapes take long to optimise and run once: on CPU this compiles in a fifth of the time.
@partial(jax.jit, static_argnames="cfg", compiler_options={"xla_backend_optimization_level": 0})
def init(cfg: TrainConfig) -> TrainState:
    """The state before the first step."""
    params = model.init_params(cfg.model, jax.random.key(cfg.seed))
    stream = model.init_state(cfg.model, cfg.data.batch)
    return TrainState(jnp.zeros((), jnp.int32), params, optim.make_optimizer(cfg).init(params), stream)


def token_weights(targets: jax.Array, cfg: LossConfig) -> jax.Array:
    """Weight of every target in the loss, float32 [B, 1 + Q, T] for targets int32 [B, 1 + Q, T]."""
    padding = (targets[:, :1] == PAD) | (targets[:, :1] == EPAD)
    text = cfg.text * jnp.where(padding, cfg.text_padding, 1.0)
    audio = jnp.ones(targets[:, 1:].shape).at[:, 0].set(cfg.first_codebook)
    return jnp.concatenate([text, audio], 1)


def make_train_step(cfg: TrainConfig) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
    """The jitted step. It donates the state it is given."""
    optimizer = optim.make_optimizer(cfg)
    schedules = optim.schedules(cfg)

    def loss_fn(params: Any, batch: Batch, stream: model.State):
        outputs, stream = model.forward(params, batch.frames, batch.mask, stream, cfg.model)
        losses = token_losses(outputs)
        weights = token_weights(outputs.targets, cfg.loss) * outputs.target_mask
        loss = (losses * weights).sum() / jnp.maximum(weights.sum(), 1e-8)
        counts = outputs.target_mask.sum((0, 2))
        return loss, (losses.sum((0, 2)) / counts, _half_variance(outputs, counts), stream)

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        stream = model.reset_rows(state.stream, batch.reset, cfg.model)
        # The one place where gradients through time are cut. A step's state is its input, so nothing could flow back here;
        # whoever chains steps under one gradient relies on it.
        stream = jax.tree.map(jax.lax.stop_gradient, stream)
        (loss, (streams, half_variance, stream)), grads = jax.value_and_grad(loss_fn, has_aux=True)(
            state.params, batch, stream
        )
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        metrics = Metrics(
            loss=loss,
            streams=streams,
            half_variance=half_variance,
            grad_norm=optax.tree.norm(grads),
            rates={group: schedule(state.step) for group, schedule in schedules.items()},
            ttt=model.ttt_summary(state.params, stream, cfg.model),
        )
        return TrainState(state.step + 1, optax.apply_updates(state.params, updates), opt_state, stream), metrics

    return jax.jit(train_step, donate_argnums=0)


def _half_variance(outputs: model.Outputs, counts: jax.Array) -> jax.Array:
    text = outputs.text_logits.var(-1)[:, None]
    audio = outputs.audio_logits.var(-1).swapaxes(1, 2)
    variance = jnp.concatenate([text, audio], 1)
    return 0.5 * jnp.where(outputs.target_mask, variance, 0).sum((0, 2)) / counts
