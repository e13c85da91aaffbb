"""Validation carries the state along each file and starts afresh at the next file and at the next validation."""

import dataclasses

import jax.numpy as jnp
import numpy as np

from tests.helpers.micro import files, source
from tests.helpers.small_step import CONFIG, one_device
from train import validate
from train.step import Sums
from ttt_jax.moshi import model

LENGTHS, CHUNK = (20, 9, 12), 8


def count_frames(params, batch, stream, cfg, block, measured):
    """In place of `chunk_sums`: the loss of a frame is the number of frames that its row read in earlier chunks."""
    stream = model.reset_rows(stream, batch.reset, cfg.model)
    frames, streams = batch.mask.sum(1), jnp.ones(1 + cfg.model.dep_q)
    losses, count = stream.position * frames, frames.sum()
    inner = jnp.full((len(cfg.model.ttt_layers), 3), losses.sum())
    sums = Sums(losses.sum(), count, losses, losses.sum() * streams, streams, count * streams, inner, count)
    return sums, stream._replace(position=stream.position + frames)


def test_the_state_is_carried_along_a_file_and_fresh_at_the_next(monkeypatch):
    monkeypatch.setattr(validate, "chunk_sums", count_frames)
    cfg = dataclasses.replace(CONFIG, data=dataclasses.replace(CONFIG.data, batch=2, chunk=CHUNK))
    recordings = source([file[: cfg.model.num_streams] for file in files(LENGTHS)]).recordings
    validation = validate.Validation(cfg, one_device(), recordings, range(2), {}, {})
    before = [frame // CHUNK * CHUNK for length in LENGTHS for frame in range(length)]
    for _ in range(2):
        found = validation({}, {})
        assert found["frames"] == sum(LENGTHS)
        means = [found["loss"], *found["streams"].values(), *found["ttt"]["1"].values()]
        assert len(means) == 1 + 1 + cfg.model.dep_q + 3
        np.testing.assert_allclose(means, sum(before) / sum(LENGTHS), atol=1e-4)
