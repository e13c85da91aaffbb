"""Samples of a run in training: the model continues the beginning of a validation file."""

from __future__ import annotations

import io
import re
import wave
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from ttt_jax.codec import Codec, CodecInfo
from ttt_jax.config import MoshiConfig
from ttt_jax.data.codes import Codes, write_codes
from ttt_jax.data.frames import ABSENT, Recording
from ttt_jax.data.text import Tokenizer, TokenizerInfo
from ttt_jax.errors import InputError
from ttt_jax.moshi import generate, model
from ttt_jax.utils.files import write_atomically

RECORDINGS = 2
"""Number of validation files that are continued, the first ones."""


class _Prompt(NamedTuple):
    """The beginning of a sample, and the user's stream after it."""

    name: str
    frames: np.ndarray
    """int32 [K, P]: the recording's first frames."""
    user: np.ndarray
    """int32 [n_q - dep_q, frames + max_delay]: the user's stream from frame P on, silent after the recording's end."""


class Sampler:
    """Writes samples to RUN/samples/step-000100/: codes and, where codec and tokenizer are here, sound and text.

    Each recording NAME gives NAME.safetensors (a code file whose boundary is the first generated frame), NAME.wav (left
    Moshi's voice, right the user's) and NAME.txt. Equal steps, parameters and `seed` give equal samples. Training
    is not changed. The programs compile once. It works in one process only.

    The model reads the first `prompt` frames of each of the first two of `recordings`, and generates `frames`. Raises
    `InputError` if there is no recording, or one cannot be read.
    """

    def __init__(
        self,
        cfg: MoshiConfig,
        recordings: Sequence[Recording],
        codec: Codec | CodecInfo,
        tokenizer: Tokenizer | TokenizerInfo,
        run_dir: Path,
        seed: int,
        frames: int = 125,
        prompt: int = 125,
    ):
        if not recordings:
            raise InputError("samples need a file to begin with, but there are none: name some with --data.validation.")
        self._cfg, self._codec, self._tokenizer, self._folder = cfg, codec, tokenizer, run_dir / "samples"
        self._seed, self._num_frames = seed, frames
        silence = _silence(codec, frames + cfg.max_delay)
        self._prompts = []
        for i, recording in enumerate(recordings[:RECORDINGS]):
            tokens, name = recording.read(), re.sub(r"[^\w.-]+", "-", recording.name)
            begin, rest = tokens[:, :prompt], tokens[1 + cfg.dep_q :, prompt : prompt + frames + cfg.max_delay]
            user = np.concatenate([rest, silence[:, rest.shape[1] :]], 1)
            taken = name in [before.name for before in self._prompts]
            self._prompts.append(_Prompt(f"{name}-{i + 1}" if taken else name, begin, user))
        self._begin = np.full((len(self._prompts), cfg.num_streams, prompt), ABSENT, np.int32)
        self._mask = np.zeros((len(self._prompts), prompt), bool)
        for row, begin in enumerate(before.frames for before in self._prompts):
            self._begin[row, :, : begin.shape[1]] = begin
            self._mask[row, : begin.shape[1]] = True

    def __call__(self, step: int, params: Any) -> Path:
        """Writes samples of the model with `params` after `step` and returns their folder. Raises `OSError`."""
        folder = self._folder / f"step-{step:06d}"
        for prompt, moshi in zip(self._prompts, self._generate(params), strict=True):
            generated = np.concatenate([moshi, prompt.user[:, : self._num_frames]])
            self._write(folder / prompt.name, np.concatenate([prompt.frames, generated], 1), prompt.frames.shape[1])
        return folder

    def _generate(self, params: Any) -> np.ndarray:
        """Returns Moshi's tokens of the frames after the prompts, int32 [B, 1 + Q, frames]."""
        cfg, rows = self._cfg, len(self._prompts)
        state = model.init_state(cfg, rows, [(self._seed + row) % 2**32 for row in range(rows)])
        _, state = model.forward(params, jnp.asarray(self._begin), jnp.asarray(self._mask), state, cfg)
        # A call takes the user's frame before the one that it generates; the first takes the prompt's last frame.
        user = np.stack([np.concatenate([p.frames[1 + cfg.dep_q :, -1:], p.user[:, :-1]], 1) for p in self._prompts])
        mask = np.ones((rows, user.shape[2]), bool)
        weights = generate.streaming_params(params, cfg)
        moshi, _ = generate.generate(weights, jnp.asarray(user), jnp.asarray(mask), state, cfg, first_frame="once")
        return np.asarray(moshi)[:, :, cfg.max_delay :]  # the first calls complete frames of the prompt

    def _write(self, path: Path, tokens: np.ndarray, boundary: int) -> None:
        """Writes the files of one sample, int32 [K, T], generated from frame `boundary` on."""
        codec, tokenizer, codebooks = self._codec, self._tokenizer, self._cfg.dep_q
        about = Codes(
            tokens,
            codec.frame_rate,
            codec.digest,
            codec.name,
            codec.cardinality,
            tokenizer.digest,
            "moshi",
            boundaries=(boundary,),
        )
        write_codes(path.with_name(path.name + ".safetensors"), about)
        if not isinstance(codec, CodecInfo):
            voices = np.stack([tokens[1 : 1 + codebooks], tokens[1 + codebooks :]])
            sound, _ = codec.decode_step(voices, codec.init_decoder(2), (voices >= 0).all(1))
            write_atomically(path.with_name(path.name + ".wav"), _wav(sound, codec.sample_rate))
        if not isinstance(tokenizer, TokenizerInfo):
            prompt, generated = (tokenizer.decode(part) for part in np.split(tokens[0], [boundary]))
            text = f"prompt: {prompt}\nmodel:  {generated}\n"
            write_atomically(path.with_name(path.name + ".txt"), text.encode())


def _silence(codec: Codec | CodecInfo, num_frames: int) -> np.ndarray:
    """Codes of silence, int32 [codebooks, T]; absent tokens, which the model skips, without a codec."""
    if isinstance(codec, CodecInfo):
        return np.full((codec.num_codebooks, num_frames), ABSENT, np.int32)
    return codec.encode(np.zeros(num_frames * codec.frame_size, np.float32))


def _wav(channels: np.ndarray, sample_rate: int) -> bytes:
    """Returns a wav file of float [channels, samples], clipped to [-1, 1], with 16 bits a sample."""
    content = io.BytesIO()
    with wave.open(content, "wb") as file:
        file.setnchannels(len(channels))
        file.setsampwidth(2)
        file.setframerate(sample_rate)
        file.writeframes((channels.T.clip(-1, 1) * 32767).round().astype("<i2").tobytes())
    return content.getvalue()
