"""Every flaw of the original system, pinned by a check that is seen to fail on a copy of this library that has the
flaw.

The findings are those of the study of the original (PyTorch), by number. A check holds the library to behaviour and
ends in its one assertion. A broken copy is the library's own text with a snippet replaced.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import jax
import numpy as np
import pytest

from eval.streaming import arms, runner
from tests.helpers import small_ttt
from tests.helpers.broken import Flaw, broken, edited
from tests.helpers.drawing import digest, quick_jit, random_params
from tests.helpers.small_ttt import ROWS, TOL, carried_state, config
from ttt_jax.config import DepthConfig, MoshiConfig, TTTConfig
from ttt_jax.moshi import model
from ttt_jax.ttt import inner, layer, network, state

pytestmark = pytest.mark.usefixtures("x64")

MODEL = MoshiConfig(
    dim=16,
    num_layers=1,
    num_heads=2,
    hidden=24,
    context=6,
    n_q=2,
    dep_q=1,
    card=45,
    text_card=47,
    delays=(0, 0, 1),
    dtype="float64",
    depth=DepthConfig(dim=8, num_layers=1, num_heads=2, hidden=12),
    ttt=TTTConfig(layers="all", hidden=(), mini_batch=4),
)
FRAMES = 8
ALL = np.ones((ROWS, FRAMES), bool)
ANY = config((4,), 4)
"""The layer where a flaw needs no other: a broken copy compiles anew, the library once for all checks."""
LINEAR = config((), 1)


def apart(got, expected) -> float:
    """Largest difference between two trees; a flaw must show in numbers, so there is none of what is not finite."""
    pairs = zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True)
    differences = [np.abs(np.asarray(a, np.float64) - np.asarray(b)).max() for a, b in pairs]
    if not np.isfinite(differences).all():
        raise FloatingPointError(differences)
    return max(differences)


def row(tree, index: int):
    return jax.tree.map(lambda leaf: np.asarray(leaf)[index], tree)


# Of the layer; names of `small_ttt` that call it are looked up late, since a broken copy brings its own.


def layer_setting(cfg: MoshiConfig, seed: int, frames: int = FRAMES):
    """Random parameters, hidden vectors and a state under way, and the generator for more."""
    params, x, rng = small_ttt.setting(cfg, seed, frames)
    return params, x, carried_state(cfg, rng), rng


def weights_of_outputs(x, state, rng):
    """For a loss that reads the outputs alone."""
    return rng.standard_normal(x.shape), jax.tree.map(np.zeros_like, state[:2])


def every_parameter_moves_the_output():
    """Finding 2: post-norm and output projection exist, are saved and are listed as trainable, and are never
    applied."""
    params, x, state, rng = layer_setting(LINEAR, 2)
    grads = small_ttt.value_and_grads(params, x, ALL, state, weights_of_outputs(x, state, rng), cfg=LINEAR)[1][0]
    assert {name for name, grad in grads.items() if not np.abs(grad).max() > 1e-6} == set()


def a_later_frame_changes_no_earlier_output():
    """Finding 3: the dual form has no causal mask, in either map, so a frame reads keys and targets of later ones."""
    params, x, state, rng = layer_setting(ANY, 3)
    outs = []
    for frame in range(FRAMES):
        changed = x.copy()
        changed[:, frame] = rng.standard_normal(changed[:, frame].shape)
        outs.append(small_ttt.call(params, changed, ALL, state, cfg=ANY)[0][:, :frame])
    out = small_ttt.call(params, x, ALL, state, cfg=ANY)[0]
    assert apart(outs[1:], [out[:, :frame] for frame in range(1, FRAMES)]) == 0


def a_call_hands_on_what_it_learned():
    """Finding 4: the two-layer network never writes its state back, so every call starts from the learned weights."""
    params, x, state, _ = layer_setting(ANY, 4, 2 * FRAMES)
    mask = np.ones(x.shape[:2], bool)
    got = small_ttt.run_split(params, x, mask, state, ANY, (FRAMES, FRAMES))
    assert apart(got, small_ttt.reference(params, x, mask, state, ANY)) <= TOL


def rows_keep_states_of_their_own():
    """Finding 5: the deeper networks write back the state of row 0, for every row."""
    params, x, state, rng = layer_setting(ANY, 5)
    changed = x.copy()
    changed[0] = rng.standard_normal(changed[0].shape)
    one, other = (small_ttt.call(params, y, ALL, state, cfg=ANY) for y in (x, changed))
    assert apart(row(other, 1), row(one, 1)) == 0


def a_read_is_one_step_down():
    """Finding 6: the output of the deeper networks reads W less twice the steps, while the state moves by one."""
    params, x, state, _ = layer_setting(ANY, 6)
    got = small_ttt.call(params, x, ALL, state, cfg=ANY)
    assert apart(got, small_ttt.reference(params, x, ALL, state, ANY)) <= TOL


def gaps_and_padding_teach_nothing():
    """Finding 8: rows of padding keep their rate, and the layer learns from their bias-only keys and targets."""
    params, x, state, _ = layer_setting(ANY, 8)
    valid = np.array([True, True, False, True, True, True, False, False])
    got = small_ttt.call(params, x, ALL & valid, state, cfg=ANY)[1]
    compact = small_ttt.reference(params, x[:, valid], ALL[:, valid], state, ANY)[1]
    assert apart(got, compact) <= TOL


def a_frame_alone_is_what_it_is_in_a_chunk():
    """Finding 8: a call of one frame is filled up with zeros to a mini-batch, which are learned from as well."""
    cfg = config((), 16)
    params, x, state, _ = layer_setting(cfg, 8)
    alone, chunk = (small_ttt.run_split(params, x, ALL, state, cfg, parts)[0] for parts in ((1,) * FRAMES, (FRAMES,)))
    assert apart(alone, chunk) <= TOL


def gradients_reach_the_learned_start_past_a_carried_state():
    """Finding 12: a detached state in place of the parameter gives the initial weights no gradient."""
    step = 1e-6
    params, x, state, rng = layer_setting(LINEAR, 12)
    base = {name: value for name, value in params.items() if name.startswith("inner_")}
    direction = {name: rng.standard_normal(value.shape) for name, value in base.items()}
    weights = weights_of_outputs(x, state, rng)

    def loss(base):
        return small_ttt.value_and_grads({**params, **base}, x, ALL, state, weights, cfg=LINEAR)

    up, down = (loss({name: base[name] + s * step * direction[name] for name in base})[0] for s in (1, -1))
    slope = sum((np.asarray(loss(base)[1][0][name]) * direction[name]).sum() for name in base)
    assert float(up - down) / (2 * step) == pytest.approx(slope, rel=1e-6)


# Of the model and of evaluation


def model_setting(seed: int):
    rng = np.random.default_rng(seed)
    shapes = jax.eval_shape(partial(model.init_params, MODEL), jax.random.key(0))
    files = rng.integers(0, MODEL.card, (ROWS, MODEL.num_streams, FRAMES), dtype=np.int32)
    return random_params(shapes, rng), files


def after(reset: Callable) -> list:
    """What row 1 puts out after its reset, and what it should: `reset` gives the state for either."""
    params, files = model_setting(7)
    compiled = quick_jit(model.forward, static_argnames="cfg")
    forward = lambda state: compiled(params, files, ALL, state, cfg=MODEL)  # noqa: E731
    fresh = model.init_state(MODEL, ROWS)
    moved = forward(fresh)[1]
    return [row(forward(state)[0].hidden, 1) for state in quick_jit(reset)(moved, fresh, np.arange(ROWS) == 1)]


def a_reset_row_is_a_fresh_one():
    """Finding 7: at a file's start the weights become a copy from the layer's construction, random and not learned."""
    got, expected = after(lambda moved, fresh, rows: (model.reset_rows(moved, rows, MODEL), fresh))
    assert apart(got, expected) == 0


def a_row_reset_in_its_ttt_states_goes_on_with_fresh_ones():
    """Finding 7, where the rest of the stream goes on."""

    def reset(moved, fresh, rows):
        layers = {name: run._replace(ttt=fresh.layers[name].ttt) for name, run in moved.layers.items()}
        return model.reset_ttt_rows(moved, rows), moved._replace(layers=layers)

    got, expected = after(reset)
    assert apart(got, expected) == 0


def frozen_weights_do_not_move():
    """Finding 5: weights adapt in eval mode whatever the flag says; here the flag is the arm's edit of the rate."""
    params, files = model_setting(7)
    scores = runner.stream(params, files, MODEL, ("persist", "frozen"), chunk=4, reset_every=4, measured=True)
    assert max(one.arms["frozen"].inner.displacement.max() for one in scores) == 0


def evaluation_leaves_the_parameters():
    """Finding 5: in eval mode the state of row 0 goes into the learned parameters, over sessions and benchmark items.

    Arrays of JAX cannot be written to, but the dicts that hold them can.
    """
    params, files = model_setting(5)
    before = digest(params)
    runner.stream(params, files, MODEL, ("persist", "frozen"), chunk=4, reset_every=4, measured=True)
    assert digest(params) == before


OF_INNER, OF_LAYER = (inner, small_ttt), (layer, small_ttt)

RESET_TO_NOISE = {
    "    def one(a: jax.Array, b: jax.Array) -> jax.Array:\n": "    def one(a, b):\n"
    "        import numpy as np\n\n"
    "        a = a + np.random.default_rng(0).normal(0, 0.02, a.shape).astype(a.dtype)\n"
}

FLAWS = {
    "no norm, no projection": Flaw(
        every_parameter_moves_the_output,
        OF_LAYER,
        {
            "z = network.layer_norm(": "z, _ = z.reshape(x.shape), network.layer_norm(",
            'output = self._project("out", z.astype(x.dtype))': 'self._project("out", z)\n        output = z',
        },
    ),
    "look-ahead": Flaw(
        a_later_frame_changes_no_earlier_output,
        (network, state, *OF_INNER),
        {"return jnp.tril(jnp.ones((frames, frames), bool))": "return jnp.ones((frames, frames), bool)"},
    ),
    "state lost": Flaw(
        a_call_hands_on_what_it_learned,
        OF_INNER,
        {"return TTTState(displacement, open_steps, ": "return TTTState(state.displacement, state.open_steps, "},
    ),
    "row 0 for all": Flaw(
        rows_keep_states_of_their_own,
        OF_INNER,
        {
            "return TTTState(displacement, open_steps, state.count + valid)": (
                "first = lambda s: jnp.broadcast_to(s[:1], s.shape)\n"
                "    return TTTState(*jax.tree.map(first, (displacement, open_steps)), state.count + valid)"
            )
        },
    ),
    "parameters written": Flaw(
        evaluation_leaves_the_parameters,
        (runner,),
        {
            "    scores = [_file_scores(": "    for name, run in state.layers.items():\n"
            "        for i, (w, b) in enumerate(run.ttt.displacement):\n"
            '            params["layers"][name]["ttt"][f"inner_w{i}"] += w[:, 0]\n'
            '            params["layers"][name]["ttt"][f"inner_b{i}"] += b[:, 0]\n'
            "    scores = [_file_scores(",
        },
    ),
    "doubled update": Flaw(
        a_read_is_one_step_down,
        OF_INNER,
        {"Seen(own, x.overlap": "Seen(own._replace(steps=tuple(2 * step for step in own.steps)), x.overlap"},
    ),
    "reset to noise": Flaw(a_reset_row_is_a_fresh_one, (model,), RESET_TO_NOISE),
    "TTT states reset to noise": Flaw(a_row_reset_in_its_ttt_states_goes_on_with_fresh_ones, (model,), RESET_TO_NOISE),
    "padding learns": Flaw(
        gaps_and_padding_teach_nothing, OF_INNER, {"eta=jnp.where(filled, xs.eta, 0)": "eta=xs.eta"}
    ),
    "calls filled up": Flaw(
        a_frame_alone_is_what_it_is_in_a_chunk,
        OF_LAYER,
        {
            "    @nn.compact\n    def __call__(": "    def __call__(self, x, mask, state, measured=False):\n"
            "        frames = x.shape[1]\n"
            "        pad = (0, 0), (0, -frames % self.cfg.ttt.mini_batch)\n"
            "        x, mask = jnp.pad(x, (*pad, (0, 0))), jnp.pad(mask, pad, constant_values=True)\n"
            "        out, state, measurement = self.filled(x, mask, state, measured)\n"
            "        return out[:, :frames], state, measurement\n\n"
            "    @nn.compact\n    def filled("
        },
    ),
    "gradient cut": Flaw(
        gradients_reach_the_learned_start_past_a_carried_state,
        OF_INNER,
        {
            "    place = layout(mask, state.count, cfg.mini_batch)\n": "    carried = (state.count > 0).any()\n"
            "    base = jax.tree.map(lambda w: jnp.where(carried, jax.lax.stop_gradient(w), w), base)\n"
            "    place = layout(mask, state.count, cfg.mini_batch)\n"
        },
    ),
    "frozen is not": Flaw(frozen_weights_do_not_move, (arms, runner), {'(("rate_bias", -jnp.inf),)': "()"}),
}

DEFAULT = {
    "no norm, no projection",
    "look-ahead",
    "state lost",
    "reset to noise",
    "parameters written",
    "frozen is not",
}
"""One for each module that flaws edit; the others are slow, since every broken copy compiles anew."""


@pytest.mark.parametrize("flaw", FLAWS.values(), ids=FLAWS)
def test_library_is_sound(flaw):
    flaw.check()


def test_every_flaw_edits_what_is_there():
    assert all(edited(flaw) for flaw in FLAWS.values())
    assert {FLAWS[name].modules[0] for name in DEFAULT} == {flaw.modules[0] for flaw in FLAWS.values()}


@pytest.mark.parametrize(
    "flaw",
    [pytest.param(flaw, id=name, marks=[pytest.mark.slow] * (name not in DEFAULT)) for name, flaw in FLAWS.items()],
)
def test_broken_copy_is_caught(flaw):
    with broken(flaw), pytest.raises(AssertionError) as caught:
        flaw.check()
    assert caught.traceback[-1].name == flaw.check.__name__, "the assertion should be the check's own"
