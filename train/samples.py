"""Samples of a run in training: the model goes on where the beginning of a validation file ends."""

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
"""Recordings that are gone on with, the first of the validation."""


class _Prompt(NamedTuple):
    """Where a sample begins, and what the other voice says then."""

    name: str
    """Of its files."""
    frames: np.ndarray
    """int32 [K, P]: the recording's first frames."""
    other: np.ndarray
    """int32 [n_q - dep_q, frames + max_delay]: the other voice from frame P on, silent where the recording has ended."""


class Sampler:
    """Writes samples to RUN/samples/step-000100/: codes and, where codec and tokenizer are here, sound and text.

    Of each recording NAME: NAME.safetensors (a code file; its joint is where the model takes over), NAME.wav (left the
    model's voice, right the other) and NAME.txt. Equal steps and parameters give equal samples; nothing that training uses
    is read but the parameters, or changed. Shapes are always the same, so the programs compile once. For one process.

    Args:
        cfg: of the model.
        recordings: of the validation, at least one; the first two are read here.
        codec, tokenizer: of the recordings.
        run_dir: folder of the run.
        seed: of the random draws.
        frames: generated.
        prompt: frames of a recording that the model hears first; all of a shorter one.

    Raises:
        InputError: there is no recording, or one cannot be read.
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
            own, rest = tokens[:, :prompt], tokens[1 + cfg.dep_q :, prompt : prompt + frames + cfg.max_delay]
            other = np.concatenate([rest, silence[:, rest.shape[1] :]], 1)
            taken = name in [before.name for before in self._prompts]
            self._prompts.append(_Prompt(f"{name}-{i + 1}" if taken else name, own, other))
        self._begin = np.full((len(self._prompts), cfg.num_streams, prompt), ABSENT, np.int32)
        self._mask = np.zeros((len(self._prompts), prompt), bool)
        for row, own in enumerate(before.frames for before in self._prompts):
            self._begin[row, :, : own.shape[1]] = own
            self._mask[row, : own.shape[1]] = True

    def __call__(self, step: int, params: Any) -> Path:
        """Write the samples of the model with `params` after `step`; their folder. Raises `OSError` if it cannot be written."""
        folder = self._folder / f"step-{step:06d}"
        for before, own in zip(self._prompts, self._generate(params), strict=True):
            goes_on = np.concatenate([own, before.other[:, : self._num_frames]])
            self._write(folder / before.name, np.concatenate([before.frames, goes_on], 1), before.frames.shape[1])
        return folder

    def _generate(self, params: Any) -> np.ndarray:
        """Own tokens of the frames behind the prompts, int32 [B, 1 + Q, frames]."""
        cfg, rows = self._cfg, len(self._prompts)
        state = model.init_state(cfg, rows, [(self._seed + row) % 2**32 for row in range(rows)])
        _, state = model.forward(params, jnp.asarray(self._begin), jnp.asarray(self._mask), state, cfg)
        # A call takes the other voice's frame before the one that it generates, the first that of the prompt's last frame.
        heard = np.stack([np.concatenate([p.frames[1 + cfg.dep_q :, -1:], p.other[:, :-1]], 1) for p in self._prompts])
        mask = np.ones((rows, heard.shape[2]), bool)
        weights = generate.streaming_params(params, cfg)
        own, _ = generate.generate(weights, jnp.asarray(heard), jnp.asarray(mask), state, cfg, first_frame="once")
        return np.asarray(own)[:, :, cfg.max_delay :]  # the first calls complete frames of the prompt

    def _write(self, path: Path, tokens: np.ndarray, joint: int) -> None:
        """The files of one sample: int32 [K, T], generated from frame `joint` on."""
        codec, tokenizer, codebooks = self._codec, self._tokenizer, self._cfg.dep_q
        about = Codes(
            tokens,
            codec.frame_rate,
            codec.digest,
            codec.name,
            codec.cardinality,
            tokenizer.digest,
            "moshi",
            boundaries=(joint,),
        )
        write_codes(path.with_name(path.name + ".safetensors"), about)
        if not isinstance(codec, CodecInfo):
            voices = [_decode(codec, tokens[1 : 1 + codebooks]), _decode(codec, tokens[1 + codebooks :])]
            write_atomically(path.with_name(path.name + ".wav"), _wav(np.stack(voices), codec.sample_rate))
        if not isinstance(tokenizer, TokenizerInfo):
            heard, said = (tokenizer.decode(tokens[0, part]) for part in (slice(joint), slice(joint, None)))
            text = f"prompt: {heard}\nmodel:  {said}\n"
            write_atomically(path.with_name(path.name + ".txt"), text.encode())


def _silence(codec: Codec | CodecInfo, num_frames: int) -> np.ndarray:
    """Codes of silence, int32 [codebooks, T]; absent tokens, which the model reads as nothing, where nobody knows them."""
    if isinstance(codec, CodecInfo):
        return np.full((codec.num_codebooks, num_frames), ABSENT, np.int32)
    return codec.encode(np.zeros(num_frames * codec.frame_size, np.float32))


def _decode(codec: Codec, codes: np.ndarray) -> np.ndarray:
    """Sound of codes int [codebooks, T], float32 [samples], silent in frames that are not all known."""
    known = (codes >= 0).all(0)
    sound = codec.decode(np.where(known, codes, 0)).reshape(len(known), codec.frame_size)
    return np.where(known[:, None], sound, 0).reshape(-1)


def _wav(channels: np.ndarray, sample_rate: int) -> bytes:
    """A wav file of float [channels, samples] in [-1, 1], 16 bits a sample; louder is clipped."""
    content = io.BytesIO()
    with wave.open(content, "wb") as file:
        file.setnchannels(len(channels))
        file.setsampwidth(2)
        file.setframerate(sample_rate)
        file.writeframes((channels.T.clip(-1, 1) * 32767).round().astype("<i2").tobytes())
    return content.getvalue()
