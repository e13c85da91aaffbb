"""Mimi as a codec: NumPy in and out, compiled for a few lengths, recordings of any length in blocks."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping

import jax
import jax.numpy as jnp
import numpy as np

from ttt_jax.codec.base import Codec, check_audio, check_codes, check_mask
from ttt_jax.codec.mimi import model
from ttt_jax.codec.mimi.config import MimiConfig, Use, check_use
from ttt_jax.errors import InputError

_BLOCK = {"cpu": 32, "gpu": 512}
"""Frames of all rows in one call, by device: enough to keep it busy, and no more memory than that takes."""


@functools.cache
def compiled(
    step: Callable[..., tuple[jax.Array, model.State]], device: jax.Device
) -> Callable[..., tuple[jax.Array, model.State]]:
    """Returns `model.encode` or `model.decode` as a program for a device that takes over the state's memory."""
    shardings = {}
    if device.platform == "gpu":  # which writes to the host's memory by itself, sooner than one asks for a copy
        host = jax.sharding.SingleDeviceSharding(device, memory_kind="pinned_host")
        shardings["out_shardings"] = (host, None)
    return jax.jit(step, static_argnames=("cfg", "use"), donate_argnames="state", **shardings)


@functools.lru_cache(maxsize=16)
def _everything(shape: tuple[int, int]) -> jax.Array:
    """The mask of all frames, which need not travel to the device again."""
    return jnp.ones(shape, bool)


_reset = jax.jit(model.reset, donate_argnames="state")


class MimiCodec(Codec):
    """A Mimi with the parameters `params`, by the names of `config.shapes`, on JAX's default device.

    A call of more frames than one is padded to a power of two, so that few lengths are compiled; a long one runs block
    by block. Raises `InputError` if `use` is not one of `cfg`.
    """

    def __init__(self, params: Mapping[str, np.ndarray], cfg: MimiConfig, use: Use, name: str, digest: str) -> None:
        check_use(cfg, use, name)
        self.cfg, self.use, self.name, self.digest = cfg, use, name, digest
        self.sample_rate, self.frame_rate, self.frame_size = cfg.sample_rate, cfg.frame_rate, cfg.frame_size
        self.num_codebooks, self.cardinality = use.num_codebooks, cfg.cardinality
        self.params = model.prepare(params, cfg, use)
        (self.device,) = self.params["vectors"].devices()

    def init_encoder(self, batch: int) -> model.State:
        """The state of `batch` streams of audio before their first sample."""
        return model.init_encoder(self.cfg, self.use, batch)

    def init_decoder(self, batch: int) -> model.State:
        """The state of `batch` streams of codes before their first frame."""
        return model.init_decoder(self.cfg, self.use, batch)

    def encode_step(
        self, audio: np.ndarray, state: model.State, mask: np.ndarray | None = None
    ) -> tuple[np.ndarray, model.State]:
        """As `Codec.encode_step`."""
        audio, mask = check_audio(self, audio, mask)
        _check_state(state, model.init_encoder, self, len(mask))
        frames, parts = audio.reshape(*mask.shape, self.frame_size), []
        for frame, block, there in self._blocks(frames, mask):
            block = block.reshape(len(block), -1)
            part, state = compiled(model.encode, self.device)(self.params, block, there, state, self.cfg, self.use)
            parts.append((frame, part))
        codes = np.empty((len(mask), self.num_codebooks, mask.shape[1]), np.int32)
        for frame, part in parts:  # only now, so that the device never waits
            to = codes[:, :, frame : frame + part.shape[2]]
            to[:] = np.asarray(part)[:, :, : to.shape[2]]
        return codes, state

    def decode_step(
        self, codes: np.ndarray, state: model.State, mask: np.ndarray | None = None
    ) -> tuple[np.ndarray, model.State]:
        """As `Codec.decode_step`."""
        codes, mask = check_codes(self, codes, mask)
        _check_state(state, model.init_decoder, self, len(mask))
        parts = []
        for frame, block, there in self._blocks(codes.swapaxes(1, 2), mask):
            block = block.swapaxes(1, 2)
            part, state = compiled(model.decode, self.device)(self.params, block, there, state, self.cfg, self.use)
            parts.append((frame * self.frame_size, part))
        audio = np.empty((len(mask), mask.shape[1] * self.frame_size), np.float32)
        for sample, part in parts:
            to = audio[:, sample : sample + part.shape[1]]
            to[:] = np.asarray(part)[:, : to.shape[1]]
        return audio, state

    def fork(self, state: model.State) -> model.State:
        """As `Codec.fork`."""
        return jax.tree.map(jnp.array, state)

    def reset(self, state: model.State, rows: np.ndarray) -> model.State:
        """As `Codec.reset`. Raises `InputError` if `rows` is not bool [B]."""
        return _reset(state, check_mask(rows, state.position.shape))

    def _blocks(self, frames: np.ndarray, mask: np.ndarray) -> Iterator[tuple[int, np.ndarray, np.ndarray | jax.Array]]:
        """Yields blocks of frames [B, n, ...] and mask [B, n], padded to a power of two, with their first frame."""
        if not mask.size:
            return
        most = 1 << max(0, (_BLOCK.get(self.device.platform, _BLOCK["gpu"]) // len(mask)).bit_length() - 1)
        for start in range(0, mask.shape[1], most):
            block, there = frames[:, start : start + most], mask[:, start : start + most]
            count = there.shape[1]
            if more := (1 << (count - 1).bit_length()) - count:
                block = np.pad(block, ((0, 0), (0, more), *((0, 0),) * (frames.ndim - 2)))
                there = np.pad(there, ((0, 0), (0, more)))
            yield start, block, _everything(there.shape) if there.all() else there


@functools.lru_cache(maxsize=64)
def _shape(init: Callable[..., model.State], cfg: MimiConfig, use: Use, rows: int) -> tuple[int, ...]:
    """The shape of the last inputs in a state of `init`, which differs between encoders and decoders."""
    return jax.eval_shape(lambda: init(cfg, use, rows)).past.shape


def _check_state(state: model.State, init: Callable[..., model.State], codec: MimiCodec, rows: int) -> None:
    """Raises `InputError` unless `state` is one of `init` of as many rows, which was not passed on before."""
    past = getattr(state, "past", None)
    if past is None or past.shape != _shape(init, codec.cfg, codec.use, rows):
        given = type(state).__name__ if past is None else f"a state whose `past` has the shape {list(past.shape)}"
        raise InputError(
            f"the codec got {given}, which is not of {init.__name__}({rows}): give what that or the call before"
            " returned, for as many rows."
        )
    if past.is_deleted():
        raise InputError(
            "the codec got a state that was passed on before, whose memory is used again: give the state of the latest"
            " call, or pass on a copy by fork."
        )
