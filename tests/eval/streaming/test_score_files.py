"""`score_files`: what is stored of each checkpoint, file and arm, on made-up scores and known answers. No model is
run."""

import dataclasses
import math
import types

import numpy as np
import pytest

from eval.inputs.dataset import EvalFile
from eval.results.schema import scores_path
from eval.streaming import score_files as module
from eval.streaming.score_files import checkpoint_info, file_infos, score_files
from eval.streaming.scores import load
from tests.helpers import made_scores, micro
from ttt_jax.checkpoints import loading
from ttt_jax.checkpoints.loading import Checkpoint
from ttt_jax.data import unigram
from ttt_jax.errors import InputError


def evaluated(name="a", frames=20, group=None, seed=0):
    return EvalFile(name, group or name, micro.files((frames,), seed)[0], (), {})


def checkpoint(name="tiny", params=True):
    return Checkpoint(name, micro.MODEL, {} if params else None, {"path": name, "weights": "w", "step": 3, "codec": {}})


@pytest.fixture
def streamed(monkeypatch):
    """Calls of `stream`, which gives made-up scores of tokens that come a frame late, as delays have them."""
    calls = []

    def stream(params, files, cfg, arms, **rest):
        calls.append(types.SimpleNamespace(params=params, files=files, arms=arms, **rest))
        late = [np.concatenate([np.full((len(file), 1), -1), file[:, :-1]], 1) for file in files]
        return made_scores.stream(params, late, cfg, arms, **rest)

    monkeypatch.setattr(module, "stream", stream)
    return calls


def test_the_unigram_baseline_is_scored_on_the_tokens_that_the_model_was_to_predict(streamed, tmp_path):
    file = evaluated()
    tables = unigram.fit([evaluated(seed=1).frames], micro.MODEL.target_streams.values())
    score_files([checkpoint()], [file], {"tiny": ("persist",)}, tmp_path, reset_every=8, baseline=tables)
    stored = load(scores_path(tmp_path, "tiny", file_infos([file])[0]))
    assert (stored.tokens[:, 0] == -1).all()
    assert np.isnan(stored.unigram[:, 0]).all()
    for row, table in enumerate(tables):
        np.testing.assert_allclose(stored.unigram[row, 1:], -table[file.frames[row, :-1]], rtol=1e-6)


def test_the_partner_of_permuted_is_the_longest_file_of_another_speaker(streamed, tmp_path):
    lengths = {"a1": 30, "a2": 29, "b1": 20, "b2": 25, "c": 10}
    files = [evaluated(name, frames, name[0]) for name, frames in lengths.items()]
    arms = {"tiny": ("persist", "permuted")}
    outcome = score_files([checkpoint()], files, arms, tmp_path, reset_every=8)
    assert outcome.partners == {"tiny": {"a1": "b2", "a2": "b2", "b1": "a1", "b2": "a1", "c": "a1"}}
    (call,) = streamed
    together = [file.shape[1] for file in call.files]
    assert [together[i] for i in call.partners] == [25 if frames >= 29 else 30 for frames in together]
    with pytest.raises(InputError, match="finds no file of another speaker beside a1 among the 2"):
        score_files([checkpoint("x")], files[:2], {"x": arms["tiny"]}, tmp_path, reset_every=8)


def test_checkpoints_without_weights_are_loaded_one_at_a_time(streamed, tmp_path, monkeypatch):
    loaded = []
    monkeypatch.setattr(loading, "load", lambda path: loaded.append(path) or checkpoint(path)._replace(params=path))
    both = [checkpoint("x", params=False), checkpoint("y", params=False)]
    arms = {"x": ("persist", "off"), "y": ("off",)}
    files = [evaluated(), evaluated("b", 15)]
    score_files(both, files, arms, tmp_path, reset_every=8, inner=["x"], losses_only=True, batch=1)
    assert loaded == ["x", "y"]
    assert [(call.params, call.arms, call.measured) for call in streamed] == [
        ("x", ("persist", "off"), True),
        ("x", ("persist", "off"), True),
        ("y", ("off",), False),
        ("y", ("off",), False),
    ]
    stored = load(scores_path(tmp_path, "x", file_infos(files)[1]))
    assert stored.arms.keys() == {"persist", "off"}
    persist = stored.arms["persist"]
    assert persist.nats.shape == (1 + micro.MODEL.dep_q, 15)
    assert (persist.entropy, persist.rank, persist.against_off, persist.inner) == (None,) * 4


def test_a_file_without_finite_predictions_under_one_checkpoint_has_scores_under_none(streamed, tmp_path, monkeypatch):
    whole = module.stream

    def spoilt(params, files, *args, **rest):
        found = whole(params, files, *args, **rest)
        if len(streamed) == 2:
            found[0].arms["off"].nats[:, 5:] = np.nan
        return found

    monkeypatch.setattr(module, "stream", spoilt)
    both, files = [checkpoint("x"), checkpoint("y")], [evaluated(), evaluated("b", 15)]
    outcome = score_files(both, files, {"x": ("off",), "y": ("off",)}, tmp_path, reset_every=8)
    assert list(outcome.failed) == ["a"]
    assert "y under off gives no finite predictions of a from frame 5 on" in outcome.failed["a"]
    assert sorted(path.name for path in tmp_path.rglob("*.npz")) == ["0001-b.npz"] * 2
    monkeypatch.setattr(module, "_diverged", lambda *_: "all diverged.")
    with pytest.raises(InputError, match="all diverged"):
        score_files([checkpoint("z")], files, {"z": ("off",)}, tmp_path, reset_every=8)


def test_what_is_recorded_of_a_checkpoint():
    info = checkpoint_info(checkpoint(), brief=True)
    assert (info.contexts, info.ttt_layers, info.max_delay, info.dtype) == ((8, 8), (1,), 1, "float32")
    assert info.about == {"path": "tiny", "step": 3, "weights": "w"}
    assert info.reach == 2 * 7 + 1 + 1
    sunk = checkpoint()
    sunk = sunk._replace(cfg=dataclasses.replace(sunk.cfg, attention_sink=3))
    assert (checkpoint_info(sunk).attention_sink, checkpoint_info(sunk).reach) == (3, math.inf)
    assert checkpoint_info(checkpoint()).about.keys() == {"path", "step", "weights", "codec"}


def test_a_checkpoint_that_is_not_the_described_one_any_more_is_refused(streamed, tmp_path, monkeypatch):
    newer = checkpoint()
    monkeypatch.setattr(loading, "load", lambda path: newer._replace(about=newer.about | {"weights": "newer"}))
    with pytest.raises(InputError, match="tiny has another checkpoint than when this command began"):
        score_files([checkpoint(params=False)], [evaluated()], {"tiny": ("persist",)}, tmp_path, reset_every=8)
    assert not streamed
