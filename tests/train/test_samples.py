"""Samples in training: where they begin, what they hear, what is written, and that nothing else changes."""

import dataclasses
import io
import os
import subprocess
import sys
import wave
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.helpers.drawing import digest, random_params
from tests.helpers.micro import files, source
from tests.helpers.small_tasks import CONFIG
from train import samples
from train.partition import shapes
from train.samples import Sampler
from ttt_jax.codec import CodecInfo, load_codec
from ttt_jax.data.codes import read_codes
from ttt_jax.data.corpus import CorpusConfig, load_coders
from ttt_jax.data.text import TokenizerInfo
from ttt_jax.errors import InputError
from ttt_jax.moshi import generate, model
from ttt_jax.moshi.generate import Sampling

# The same for all tests, so that programs compile once; the second recording is shorter than the prompt.
PROMPT, FRAMES = 12, 6
LENGTHS = (15, 7)
MODEL = CONFIG.model
STATED = CodecInfo("stated", "ab" * 32, 64), TokenizerInfo("cd" * 32, 512)


@pytest.fixture(scope="module")
def params():
    return jax.tree.map(jnp.asarray, random_params(shapes(MODEL), np.random.default_rng(0), np.float32))


@pytest.fixture(scope="module")
def coders():
    return load_coders(CorpusConfig())


def sampler(folder, coders=STATED, arrays=None, seed=0):
    recordings = source(files(LENGTHS) if arrays is None else arrays).recordings
    return Sampler(MODEL, recordings, *coders, folder, seed, frames=FRAMES, prompt=PROMPT)


def test_a_sample_is_its_prompt_and_what_the_model_says_to_the_user(tmp_path, params, coders, monkeypatch):
    """Greedy samples are what `forward` finds likeliest when it reads them: all tokens are heard where they belong."""
    greedy = partial(generate.generate, sampling=Sampling(temperature=0, text_temperature=0))
    monkeypatch.setattr(samples.generate, "generate", greedy)
    folder = sampler(tmp_path, coders)(100, params)
    assert folder == tmp_path / "samples" / "step-000100"
    silence = load_codec().encode(np.zeros(FRAMES * 1280, np.float32))
    for i, recording in enumerate(files(LENGTHS)):
        stored = read_codes(folder / f"micro-{i}.safetensors")
        begin = min(PROMPT, LENGTHS[i])
        assert stored.boundaries == (begin,)
        assert stored.codes.shape == (17, begin + FRAMES)
        np.testing.assert_array_equal(stored.codes[:, :begin], recording[:, :begin])
        rest = recording[9:, begin : begin + FRAMES]
        np.testing.assert_array_equal(stored.codes[9:, begin:], np.concatenate([rest, silence[:, rest.shape[1] :]], 1))
        mask = np.arange(PROMPT + FRAMES)[None] < stored.num_frames  # all of one length: one program
        codes = np.pad(stored.codes, ((0, 0), (0, mask.size - stored.num_frames)), constant_values=-1)
        outputs, _ = model.forward(params, codes[None], mask, model.init_state(MODEL, 1), MODEL)
        logits = [outputs.text_logits[0], *np.moveaxis(np.asarray(outputs.audio_logits[0]), 1, 0)]
        for stream, (values, delay) in enumerate(zip(logits, MODEL.delays, strict=False)):
            moshi = np.asarray(values)[begin + delay : stored.num_frames]  # the last delayed codes have no column
            drawn = stored.codes[stream, begin : begin + len(moshi)]
            assert len(moshi) == FRAMES - delay
            assert (moshi[np.arange(len(moshi)), drawn] >= moshi.max(1) - 1e-4).all(), f"{recording}, {stream}"


@pytest.mark.slow  # another program: tokens are drawn
def test_equal_steps_and_parameters_give_equal_files_and_nothing_else_changes(tmp_path, params):
    own = sampler(tmp_path / "a")
    before = digest(params)
    folders = [own(100, params), own(200, params), sampler(tmp_path / "b")(100, params)]
    compiled = generate.generate._cache_size(), model.forward._cache_size()
    for name in ("micro-0", "micro-1"):
        first, *rest = (read_codes(folder / f"{name}.safetensors").codes for folder in folders)
        assert all(np.array_equal(first, codes) for codes in rest)
    assert digest(params) == before  # still there, too: nothing was donated
    moved = jax.tree.map(lambda leaf: leaf + 0.3, params)
    others = own(300, moved), sampler(tmp_path / "c", seed=1)(100, params)
    for folder in others:
        assert not np.array_equal(read_codes(folder / "micro-1.safetensors").codes, first)
    assert (generate.generate._cache_size(), model.forward._cache_size()) == compiled


def test_samples_of_one_prompt_differ(tmp_path, params):
    folder = sampler(tmp_path, arrays=[files(LENGTHS)[0]] * 2)(1, params)
    first, second = (read_codes(folder / f"micro-{i}.safetensors").codes for i in (0, 1))
    np.testing.assert_array_equal(first[:, :PROMPT], second[:, :PROMPT])
    assert not np.array_equal(first, second)


def test_sound_and_text_are_written_where_codec_and_tokenizer_are_here(tmp_path, params, coders):
    codec, tokenizer = coders
    arrays = files(LENGTHS)
    arrays[0][1:9, 3] = -1  # a frame whose codes nobody knows
    arrays[0][0, :PROMPT] = tokenizer.encode("password")[0]
    folder = sampler(tmp_path, coders, arrays)(7, params)
    names = [f"micro-{i}.{kind}" for i in (0, 1) for kind in ("safetensors", "txt", "wav")]
    assert sorted(path.name for path in folder.iterdir()) == names
    stored = read_codes(folder / "micro-0.safetensors")
    assert (stored.codec, stored.tokenizer) == (codec.digest, tokenizer.digest)
    with wave.open(io.BytesIO((folder / "micro-0.wav").read_bytes())) as file:
        assert (file.getnchannels(), file.getframerate()) == (2, codec.sample_rate)
        sound = np.frombuffer(file.readframes(file.getnframes()), "<i2").reshape(-1, codec.frame_size, 2)
    assert len(sound) == PROMPT + FRAMES
    assert not sound[3, :, 0].any()
    other = codec.decode(stored.codes[9:]).reshape(-1, codec.frame_size)
    np.testing.assert_allclose(sound[:, :, 1] / 32767, other.clip(-1, 1), atol=1e-4)
    assert np.abs(sound[:, :, 0].astype(int)).max() > 100
    prompt, said = (folder / "micro-0.txt").read_text().splitlines()
    assert prompt == f"prompt: {tokenizer.decode(arrays[0][0, :PROMPT])}"
    assert said == f"model:  {tokenizer.decode(stored.codes[0, PROMPT:])}"


def test_codes_alone_are_written_where_the_codec_is_not_here(tmp_path, params):
    folder = sampler(tmp_path)(7, params)
    assert sorted(path.name for path in folder.iterdir()) == ["micro-0.safetensors", "micro-1.safetensors"]
    stored = read_codes(folder / "micro-1.safetensors")
    assert (stored.codec, stored.tokenizer) == ("ab" * 32, "cd" * 32)
    assert (stored.codes[9:, LENGTHS[1] :] == -1).all()  # the recording has ended, and nobody knows what silence is


def test_recordings_of_one_name_do_not_overwrite_each_other(tmp_path, params):
    with pytest.raises(InputError, match="--data.validation"):
        Sampler(MODEL, (), *STATED, tmp_path, 0)
    recordings = [dataclasses.replace(one, name="a b/x") for one in source(files(LENGTHS)).recordings]
    folder = Sampler(MODEL, recordings, *STATED, tmp_path, 0, frames=FRAMES, prompt=PROMPT)(7, params)
    assert sorted(path.stem for path in folder.iterdir()) == ["a-b-x", "a-b-x-2"]


SPREAD = """
import sys
from pathlib import Path
import jax
from tests.train.test_samples import MODEL, mixed, sampler
from ttt_jax.distributed import sharding
params = mixed()
params = jax.device_put(params, sharding.params_shardings(sharding.make_mesh(1, 2, 2), params))
assert len(params["depth"]["heads"].sharding.device_set) == 4
sampler(Path(sys.argv[1]))(1, params)
"""


def mixed():
    """Parameters of two types, as in training from converted weights, where what is frozen has that of its file."""
    params = model.init_params(MODEL, jax.random.key(0))
    return params | {"text_emb": params["text_emb"].astype(jnp.bfloat16)}


@pytest.mark.slow
def test_parameters_may_be_of_several_types_and_spread_over_a_mesh(tmp_path):
    whole = sampler(tmp_path / "whole")(1, mixed())
    flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=4 --xla_backend_optimization_level=0"}
    environment = os.environ | flags | {"JAX_PLATFORMS": "cpu", "JAX_DEFAULT_MATMUL_PRECISION": "highest"}
    if jax.config.jax_compilation_cache_dir is not None:
        environment["JAX_COMPILATION_CACHE_DIR"] = jax.config.jax_compilation_cache_dir
    subprocess.run([sys.executable, "-c", SPREAD, str(tmp_path / "spread")], env=environment, check=True)
    for name in ("micro-0.safetensors", "micro-1.safetensors"):
        alone, spread = (read_codes(folder / name).codes for folder in (whole, tmp_path / "spread/samples/step-000001"))
        assert alone.shape == spread.shape
        # Sums in another order may turn a draw that was a close call, but not most.
        assert (alone == spread).mean() > 0.9
