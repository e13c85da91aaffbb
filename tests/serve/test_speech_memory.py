"""Constant time and memory of a talk: a step and a join write the state where it lies, and no step is compiled again
or copies a ring."""

from __future__ import annotations

import dataclasses
import subprocess
import sys

import jax
import numpy as np
import pytest

from bench import speech as bench
from tests.helpers import micro, tiny_mimi
from tests.helpers.eval_models import params
from ttt_jax.moshi.generate import Sampling
from ttt_jax.serve import speech
from ttt_jax.serve.server import warm_up
from ttt_jax.serve.speech import Speech, State
from ttt_jax.serve.talks import Talks

ROWS = 3
MODEL = dataclasses.replace(micro.MODEL, n_q=8, dep_q=4, card=32, delays=(0, 0, 1, 1, 1, 0, 1, 1, 1))


@pytest.fixture(scope="module")
def small() -> Speech:
    """Windows of eight and three frames."""
    return Speech(params(MODEL), MODEL, tiny_mimi.codec(), Sampling())


def step(given: Speech, state: State, measured: bool) -> State:
    sound, everyone = bench.noise(given, ROWS)[0], np.ones(ROWS, bool)
    return given.step(sound, everyone, everyone, state, bench.kyutai_settings(ROWS), measured)[1]


def places(state: State) -> list[tuple[int, tuple[int, ...], np.dtype]]:
    """Address, shape and type of each array."""
    leaves = jax.block_until_ready(jax.tree.leaves(state))
    return [(leaf.unsafe_buffer_pointer(), leaf.shape, leaf.dtype) for leaf in leaves]


@pytest.mark.parametrize("measured", [False, True])
def test_steps_beyond_the_windows_write_every_array_where_it_lies_and_compile_once(small, measured):
    state = step(small, small.init_state(range(ROWS)), measured)
    there, programs = places(state), speech._with_mimi._cache_size()
    for _ in range(2 * MODEL.context):
        old, state = state, step(small, state, measured)
        assert all(leaf.is_deleted() for leaf in jax.tree.leaves(old))
        assert places(state) == there
    assert speech._with_mimi._cache_size() == programs


def test_a_join_writes_one_row_where_it_lies(small):
    state = small.init_state(range(ROWS))
    there = places(state)
    for row in range(ROWS):
        state = speech.put(state, row, small.init_state([7]))
        assert places(state) == there


def test_a_fork_compiles_nothing_in_a_server_that_has_warmed_up(small):
    talks = Talks(small, 4, measured=True)
    warm_up(talks)
    changes = (speech._put, speech._put_first, speech._begin, speech._with_mimi)
    programs = [change._cache_size() for change in changes]
    talk = talks.take(talks.join())
    talks.step({talks.join(talk=talk): np.zeros(small.codec.frame_size, np.float32)})
    assert [change._cache_size() for change in changes] == programs


def test_no_step_copies_a_ring():
    wide = Speech(params(MODEL), dataclasses.replace(MODEL, context=20_000), tiny_mimi.codec(), Sampling())
    state, everyone = wide.init_state(range(ROWS)), np.ones(ROWS, bool)
    static = {"cfg": wide.cfg, "mimi_cfg": wide.codec.cfg, "use": wide.codec.use, "most": wide.most, "measured": True}
    weights, sound = (wide.params, wide.codec.params), bench.noise(wide, ROWS)[0]
    lowered = speech._with_mimi.lower(weights, sound, everyone, everyone, state, bench.kyutai_settings(ROWS), **static)
    used = lowered.compile().memory_analysis()
    assert used.alias_size_in_bytes == bench.bytes_of(state)  # all of it lies where the old one lay
    rings = jax.tree.leaves([run.kv_cache for run in state.model.layers.values()])
    assert used.temp_size_in_bytes < min(ring.nbytes for ring in rings) / 2


FRESH = """
import jax
from pathlib import Path
from ttt_jax.config import MoshiConfig, TTTConfig
from ttt_jax.moshi import model
most = lambda: int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) * 1024
jax.block_until_ready(jax.numpy.zeros(3) + 1)
before = most()
cfg = MoshiConfig(dim=64, num_layers=16, num_heads=2, context=2**15, ttt=TTTConfig(layers="none"))
state = jax.block_until_ready(model.init_state(cfg, 1))
print((most() - before) / sum(leaf.nbytes for leaf in jax.tree.leaves(state)))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_fresh_state_is_never_there_twice():
    ran = subprocess.run([sys.executable, "-c", FRESH], stdout=subprocess.PIPE, text=True, check=True)
    assert 0.9 < float(ran.stdout) < 1.3


def test_the_benchmark_prints_every_figure(small, capsys, monkeypatch):
    monkeypatch.setattr(bench.figures, "copy_bandwidth", lambda: 1e9)
    bench.many_talks(small, frames=3, rows=ROWS, plain=True)
    lines = capsys.readouterr().out.splitlines()
    starts = ("every byte", "Speech.step, measured", "a session", "Speech.step, plain", "join", "take", "fork", "Talks")
    assert len(lines) == len(starts)
    for line, start in zip(lines, starts, strict=True):
        assert line.startswith(f" 3 rows: {start}")


@pytest.mark.slow
def test_the_benchmark_of_a_long_talk_reports_its_beginning_and_its_tenths(small, capsys):
    bench.one_talk(small, 500)
    spans = [line.split(":")[0] for line in capsys.readouterr().out.splitlines()]
    assert spans[:3] == ["frames 20 to 35", "frames 35 to 50", "frames 85 to 100"]
    assert spans[-1] == "frames 485 to 500"
    assert len(spans) == 11
