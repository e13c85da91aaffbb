"""The checks pass on the model and fail, each in its line, on broken copies of a step."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from eval import __main__ as command
from eval.check_state import checks as check
from eval.check_state import command as check_command
from eval.check_state.results import Results
from eval.results import schema
from tests.helpers import eval_models, micro
from tests.helpers.drawing import quick_jit
from tests.helpers.micro import MODEL
from ttt_jax.checkpoints import stream_state
from ttt_jax.config import TTTConfig
from ttt_jax.errors import InputError
from ttt_jax.moshi import model

FRAMES = 16
LINES = {
    "changes": "the fast weights change at every frame",
    "builds": "each frame starts from what the last one left",
    "saved": "saved and loaded, the state is the same to the bit",
    "reset": "a reset clears its own row and no other",
    "rows": "a row does not depend on its neighbour",
    "parameters": "the checkpoint's parameters stay as they are",
    "calls": "frame by frame equals calls of 7 and 16 frames",
}
RUN = "layers_01_01"
quick = quick_jit(check.forward.__wrapped__, static_argnames="cfg")
forward = partial(quick, cfg=MODEL)


@pytest.fixture(autouse=True)
def quick_programs(monkeypatch):
    """All tests share three programs that compile quickly."""
    monkeypatch.setattr(check, "forward", quick)


def run(call=forward, params=None, cfg=MODEL):
    return check.check(params or eval_models.params(), eval_models.tokens(FRAMES), cfg, call)


def failed(report) -> set[str]:
    assert [entry.what for entry in report.checks] == list(LINES.values())
    return {name for name, entry in zip(LINES, report.checks, strict=True) if not entry.passed}


def edit_ttt(params, **leaves):
    """Parameters with leaves of the TTT layer replaced; the rest is shared."""
    ttt = {**params["layers"][RUN]["ttt"], **leaves}
    return {**params, "layers": {**params["layers"], RUN: {**params["layers"][RUN], "ttt": ttt}}}


def with_ttt(state, change):
    """The state with the displacement and open steps of the TTT layer changed."""
    run_state = state.layers[RUN]
    ttt = run_state.ttt._replace(
        displacement=jax.tree.map(change, run_state.ttt.displacement),
        open_steps=jax.tree.map(change, run_state.ttt.open_steps),
    )
    return state._replace(layers={**state.layers, RUN: run_state._replace(ttt=ttt)})


def test_the_model_passes():
    report = run(call=None)
    assert failed(report) == set()
    assert report.passed
    assert "persist:" in report.meaning


# Broken copies of `forward`.


def keeps_the_old_state(params, frames, mask, state):
    return forward(params, frames, mask, state)[0], state


def keeps_the_old_fast_weights(params, frames, mask, state):
    nats, new = forward(params, frames, mask, state)
    old = state.layers[RUN].ttt
    ttt = new.layers[RUN].ttt._replace(displacement=old.displacement, open_steps=old.open_steps)
    return nats, new._replace(layers={**new.layers, RUN: new.layers[RUN]._replace(ttt=ttt)})


def resets_at_every_call(params, frames, mask, state):
    return forward(params, frames, mask, model.reset_ttt_rows(state, np.array([True, True])))


def misses_a_frame(params, frames, mask, state):
    missed = frames.shape[2] == 1 and int(state.position[0]) == 5
    return (keeps_the_old_fast_weights if missed else forward)(params, frames, mask, state)


def leaks_rows(params, frames, mask, state):
    nats, state = forward(params, frames, mask, state)
    return nats, with_ttt(state, lambda leaf: leaf + 1e-6 * leaf[:, ::-1])


def learns_into_the_parameters(params, frames, mask, state):
    result = forward(params, frames, mask, state)
    params["text_head"] = params["text_head"] * (1 + 1e-7)
    return result


def depends_on_the_call(params, frames, mask, state):
    nats, state = forward(params, frames, mask, state)
    return nats, state if frames.shape[2] == 1 else with_ttt(state, lambda leaf: leaf * 1.001)


def loses_numbers(params, frames, mask, state):
    nats, state = forward(params, frames, mask, state)
    return nats * (jnp.nan if frames.shape[2] == 1 else 1), state


@pytest.mark.parametrize(
    ("call", "lines", "meaning"),
    [
        (keeps_the_old_state, {"changes", "builds", "calls"}, "do not persist"),
        (keeps_the_old_fast_weights, {"changes", "builds", "calls"}, "do not persist"),
        (resets_at_every_call, {"builds", "calls"}, "are reset"),
        (misses_a_frame, {"changes", "calls"}, "do not persist"),
        (leaks_rows, {"rows"}, "cannot be relied on"),
        (learns_into_the_parameters, {"parameters"}, "cannot be relied on"),
        (depends_on_the_call, {"calls"}, "cannot be relied on"),
        (loses_numbers, {"calls"}, "cannot be relied on"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_a_broken_step_fails_in_its_line(call, lines, meaning):
    report = run(call, edit_ttt(eval_models.params()))  # a copy, which a step may change
    assert failed(report) == lines
    assert not report.passed
    assert meaning in report.meaning
    if call is misses_a_frame:
        assert report.checks[0].figure == "layer 1: no change at 1 of 16 frames, first at frame 6"


@pytest.mark.parametrize("rate", [pytest.param("no base rate", marks=pytest.mark.slow), "no learned rate"])
def test_no_inner_rate_fails(rate):
    cfg, params = MODEL, eval_models.params()
    if rate == "no base rate":
        cfg = dataclasses.replace(cfg, ttt=dataclasses.replace(cfg.ttt, base_lr=0.0))
    else:
        params = edit_ttt(params, rate_bias=jnp.full_like(params["layers"][RUN]["ttt"]["rate_bias"], -jnp.inf))
    report = run(partial(quick, cfg=cfg), params, cfg)
    assert failed(report) == {"changes", "builds"}
    assert "layer 1: no change at 16 of 16 frames, first at frame 1" in report.checks[0].figure


def test_a_state_that_loses_bits_in_its_file_fails(monkeypatch):
    load = stream_state.load_state

    def narrow(path, cfg):
        return with_ttt(load(path, cfg), lambda leaf: leaf.astype(jnp.bfloat16).astype(leaf.dtype))

    monkeypatch.setattr(stream_state, "load_state", narrow)
    assert failed(run()) == {"saved"}


@pytest.mark.parametrize(
    "reset",
    [
        lambda state, cfg: state,
        lambda state, cfg: check.fresh_state(cfg, 2),
        lambda state, cfg: model.reset_rows(state, np.array([False, True]), cfg),
        lambda state, cfg: with_ttt(model.reset_rows(state, np.array([True, False]), cfg), lambda leaf: leaf + 1e-8),
    ],
    ids=["nothing", "both rows", "the other row", "not to the start"],
)
def test_a_broken_reset_fails(monkeypatch, reset):
    monkeypatch.setattr(check, "reset_first", reset)
    assert failed(run()) == {"reset"}


def test_every_row_is_checked():
    holds = np.ones((4, 1, 2), bool)
    holds[2, 0, 1] = False
    found = check.at_every_frame("changes", holds, "no change", MODEL, 1)
    assert found == ("changes", False, "layer 1: no change at 1 of 4 frames, first at frame 3")


@pytest.mark.slow
def test_every_layer_is_checked():
    cfg = dataclasses.replace(MODEL, ttt=TTTConfig(layers="all", mini_batch=1, hidden=()))
    params = eval_models.params(cfg)
    report = run(partial(quick, cfg=cfg), params, cfg)
    assert failed(report) == set()
    assert report.trace.digest.shape == (FRAMES + 1, 2, 2)
    ttt = params["layers"]["layers_00_01"]["ttt"]
    still = {**ttt, "rate_bias": ttt["rate_bias"].at[1].set(-jnp.inf)}
    report = run(
        partial(quick, cfg=cfg),
        {**params, "layers": {"layers_00_01": {**params["layers"]["layers_00_01"], "ttt": still}}},
        cfg,
    )
    assert failed(report) == {"changes", "builds"}
    assert report.checks[0].figure.startswith("layer 1: no change at 16 of 16 frames")


def test_the_digest_does_not_see_the_count():
    (ttt,) = check.fast_weights(model.init_state(MODEL, 2), MODEL)
    counted = ttt._replace(count=ttt.count + 1)
    moved = ttt._replace(open_steps=jax.tree.map(lambda leaf: leaf + 1, ttt.open_steps))
    assert check.digests_of([ttt]) == check.digests_of([counted]) != check.digests_of([moved])


def test_the_table_is_shortened_in_the_middle():
    digest = np.char.add("d", np.arange(51 * 4).astype(str)).reshape(51, 2, 2)
    lines = check_command.table(check.Trace(digest, None, None), 3)
    assert len(lines) == 1 + (1 + check_command.HEAD + check_command.TAIL) + 1
    assert not any(" NO" in line for line in lines)
    assert lines[-1].split() == ["50", digest[50, 0, 0], "yes"]


# The command

integration = pytest.mark.integration


def main(*args):
    return command.main(["check-state", *map(str, args)])


@integration
def test_the_command_passes(tiny_run, capsys):
    assert main(tiny_run.run, "--audio", tiny_run.heldout, "--frames", FRAMES) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("run: TTT layers 1, mini-batch 4, float32; 16 frames (1.3 s) of ")
    assert lines[-1] == "PASS"
    assert [line for line in lines if "  PASS  " in line] == [
        line for line in lines if line.startswith(tuple(LINES.values()))
    ]


@integration
def test_the_checks_are_stored_and_replaced(tiny_run, tmp_path, capsys):
    args = (tiny_run.run, "--audio", tiny_run.heldout, "--out", tmp_path / "state", "--frames")
    for _ in range(2):
        assert main(*args, FRAMES) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "PASS"
    stored = schema.read(tmp_path / "state", Results)
    assert (stored.passed, stored.file.frames, stored.checkpoint.name) == (True, FRAMES, "run")
    assert [entry.what for entry in stored.checks if entry.passed] == [entry.what for entry in stored.checks]
    assert stored.meaning.startswith("The fast weights persist")
    with pytest.raises(InputError, match="holds results on .*give another folder by --out"):
        main(*args, FRAMES - 1)


@integration
def test_the_command_fails(tiny_run, capsys, monkeypatch):
    monkeypatch.setattr(check, "forward", lambda *call, cfg: keeps_the_old_state(*call))
    assert main(tiny_run.run, "--audio", tiny_run.heldout, "--frames", FRAMES) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == "FAIL"
    assert sum("  FAIL  " in line for line in lines) == 3
    assert sum(line.endswith(" NO") for line in lines) == check_command.HEAD + check_command.TAIL


def test_without_a_checkpoint_an_untrained_tiny_is_checked(monkeypatch):
    monkeypatch.setattr(model, "init_params", lambda cfg, key: cfg.dim)
    tiny = check_command.fresh_tiny()
    assert (tiny.name, tiny.params, tiny.cfg.ttt_layers) == ("tiny, freshly initialised", 128, (0,))


@integration
def test_mistakes_are_reported(tiny_run, tmp_path):
    plain = dataclasses.replace(MODEL, ttt=dataclasses.replace(MODEL.ttt, layers="none"))
    eval_models.write_run(tmp_path / "plain", micro.config(model=plain))
    eval_models.write_codes(tmp_path / "foreign.safetensors", eval_models.tokens(FRAMES), "another")
    for args, message in (
        ((tmp_path / "nowhere",), "is no checkpoint"),
        ((tmp_path / "plain",), "plain has no TTT layers"),
        ((tiny_run.run, "--frames", 1), "--frames 1 cannot show persistence"),
        ((tiny_run.run, "--audio", tiny_run.heldout, "--frames", 46), "lasts 45 frames"),
        ((tiny_run.run, "--audio", tmp_path / "foreign.safetensors"), "does not fit run: run was trained with"),
        ((tiny_run.run, "--audio", tmp_path / "no.wav"), "no.wav does not exist"),
    ):
        with pytest.raises(InputError, match=message):
            main(*args)
