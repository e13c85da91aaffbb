"""The files of a talk: voice, conversation, text, subtitles, codes, inner losses and picture."""

from __future__ import annotations

import io
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from eval.generating import figure, results, text
from eval.generating.inputs import DUPLEX_OUTPUT, Input
from eval.generating.results import TalkResults
from eval.generating.talk import Made
from eval.results.schema import Skipped, as_json
from ttt_jax.config import FRAME_RATE
from ttt_jax.data.codes import Codes, write_codes
from ttt_jax.errors import InputError
from ttt_jax.serve import saved
from ttt_jax.serve.load import Loaded
from ttt_jax.utils.files import write_atomically
from ttt_jax.utils.paths import printable

ENDINGS = {
    ".wav": "Moshi's voice, mono, at the codec's rate",
    ".conversation.wav": "stereo: left Moshi, right the user",
    ".text.json": "text, words with seconds, the text token of each frame",
    ".vtt": "the words as subtitles (WebVTT)",
    ".codes.safetensors": "text and codes of both streams, for eval generate --score and eval stream",
    ".diagnostics.npz": "inner losses and displacement by frame and TTT layer",
    ".png": "both voices, words, inner losses and displacement",
    ".state.safetensors": "the talk after the last frame, for --load-state",
}
"""Endings of a talk's files, and their content."""

SOFTWARE = "ttt_jax eval generate"
"""What wav files name as their maker: an answer beside an input.wav is replaced only if it does."""


def write(
    folder: Path,
    made: Made,
    loaded: Loaded,
    layers: Sequence[int],
    gates: Sequence[float],
    every: int,
    silence: int,
) -> TalkResults:
    """Writes the files of a talk to `folder`, and the answer beside an input.wav; returns its results.

    Args:
      layers: indices of the TTT layers; gates: their mean size; every: frames from one record of inner losses to the
        next, 0 for none; silence: samples that `made.user` has behind those of the file.
    """
    codec, name, kept = loaded.speech.codec, made.source.name, list(ENDINGS)
    rate, frames = codec.sample_rate, made.moshi.shape[1]
    spoken = text.words(made.moshi[0], loaded.tokenizer)
    content = text.as_json(str(made.source.path), made.moshi[0], spoken)
    diagnostics = None if made.inner is None or not every else _diagnostics(made, layers, every)

    def path(ending: str) -> Path:
        return folder / f"{name}{ending}"

    write_atomically(path(".wav"), _wav(made.voice, rate))
    write_atomically(path(".conversation.wav"), _wav(np.stack([made.voice, made.user], 1), rate))
    write_atomically(path(".text.json"), as_json(content))
    write_atomically(path(".vtt"), text.webvtt(spoken).encode())
    tokenizer = loaded.tokenizer.digest
    rows = np.concatenate([made.moshi, made.codes])
    write_codes(
        path(".codes.safetensors"), Codes(rows, FRAME_RATE, codec.digest, codec.name, codec.cardinality, tokenizer)
    )
    if diagnostics is None:
        kept.remove(".diagnostics.npz")
    else:
        packed = io.BytesIO()
        np.savez_compressed(packed, **diagnostics)
        write_atomically(path(".diagnostics.npz"), packed.getvalue())
    title = f"{name}: {loaded.checkpoint.name}"
    figure.write(folder, name, title, rate, made.voice, made.user, spoken, diagnostics, gates)
    if made.talk is None:
        kept.remove(".state.safetensors")
    else:
        saved.save(path(".state.safetensors"), made.talk, loaded.speech, loaded.checkpoint.about["weights"])
    if made.source.answer is not None:
        write_atomically(made.source.answer, _answer(made, rate, len(made.user) - silence))
    seconds = len(made.user) / rate
    means = None if diagnostics is None else {key: value.mean(0).tolist() for key, value in diagnostics.items()}
    return TalkResults(
        name,
        str(made.source.path),
        made.source.digest,
        made.seed,
        frames,
        seconds,
        float(made.latency.sum() / seconds),
        results.quantiles(made.latency),
        results.perplexity(made.log_probs),
        text.counts(made.moshi[0]),
        content["text"],
        [] if means is None else means["loss_base"],
        [] if means is None else means["loss_before"],
        [] if diagnostics is None else diagnostics["displacement"][-1].tolist(),
        [f"{name}{ending}" for ending in kept],
        None if made.source.answer is None else str(made.source.answer),
    )


def _diagnostics(made: Made, layers: Sequence[int], every: int) -> dict[str, np.ndarray]:
    """Returns every so many frames of the measurement, [N, L] each, with frames, seconds and layers."""
    at = np.arange(0, len(made.latency), every)
    return {
        "frames": at,
        "seconds": at / FRAME_RATE,
        "layers": np.array(layers, int),
        **{name: value[at] for name, value in made.inner._asdict().items()},
    }


def _wav(samples: np.ndarray, rate: int) -> bytes:
    """Returns samples, [n] or [n, channels], as a wav file of 16 bits."""
    import soundfile

    content, channels = io.BytesIO(), 1 if samples.ndim == 1 else samples.shape[1]
    with soundfile.SoundFile(content, "w", rate, channels, "PCM_16", format="WAV") as sound:
        sound.software = SOFTWARE
        sound.write(np.clip(samples, -1, 1 - 2.0**-15))
    return content.getvalue()


def _answer(made: Made, rate: int, heard: int) -> bytes:
    """Returns Moshi's voice as a wav file of the rate and the length of the recording, of which `heard` samples were
    read at `rate`."""
    import soundfile
    import soxr

    info = soundfile.info(made.source.path)
    own, length = info.samplerate, info.frames
    if abs(length * rate / own - heard) > 1:  # a header that does not know the length
        length = round(heard * own / rate)
    voice = made.voice if own == rate else soxr.resample(made.voice, rate, own, "HQ")
    samples = np.zeros(length, np.float32)
    samples[: len(voice)] = voice[:length]
    return _wav(samples, own)


def without_foreign_answers(inputs: Sequence[Input]) -> tuple[list[Input], list[Skipped]]:
    """Returns the recordings that pass `check_answer`, and why the others do not."""
    usable, skipped = [], []
    for source in inputs:
        try:
            check_answer(source)
            usable.append(source)
        except InputError as error:
            skipped.append(Skipped(source.name, printable(str(error))))
    return usable, skipped


def check_answer(source: Input) -> None:
    """Raises `InputError` if an answer cannot be written beside the recording, or one of another origin is there."""
    import soundfile

    if source.answer is None:
        return
    if not os.access(source.answer.parent, os.W_OK):
        raise InputError(f"{source.answer} cannot be written: mend that, or copy the folder.")
    if not os.path.lexists(source.answer):
        return
    try:
        with soundfile.SoundFile(source.answer) as sound:
            ours = sound.software.startswith(SOFTWARE)
    except soundfile.SoundFileError:
        ours = False
    if not ours:
        raise InputError(
            f"{source.answer} exists and was not written by this command: move it away, or give the folder without it"
            f" (an answer is written beside each input.wav as {DUPLEX_OUTPUT})."
        )
