"""Streaming generation: forced tokens, seeds by row, the scan, first-frame conventions, saved and forked states."""

import dataclasses
import json
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import save_file

from tests.helpers.drawing import quick_jit
from tests.helpers.micro import MODEL
from ttt_jax.checkpoints import stream_state
from ttt_jax.config import DepthConfig, LoRAConfig, MoshiConfig, TTTConfig
from ttt_jax.errors import InputError
from ttt_jax.moshi import generate, model
from ttt_jax.moshi.generate import FREE, Sampling

CFG = dataclasses.replace(MODEL, n_q=6, dep_q=3, delays=(0, 0, 1, 1, 0, 1, 1), card=16, text_card=20)
ROWS, CALLS = 3, 20
step = quick_jit(generate.stream_step.__wrapped__, static_argnames=("cfg", "sampling"), donate_argnames="state")
scan = quick_jit(
    generate.generate.__wrapped__, static_argnames=("cfg", "sampling", "first_frame"), donate_argnames="state"
)
reset_rows = quick_jit(partial(model.reset_rows, cfg=CFG, seeds=[7]))
HOT = Sampling(temperature=2.0, top_k=12, text_temperature=2.0, text_top_k=15)


@pytest.fixture(scope="module")
def params():
    return quick_jit(model.init_params, static_argnums=0)(CFG, jax.random.key(0))


def codes(seed=0, calls=CALLS, rows=ROWS):
    return np.random.default_rng(seed).integers(0, CFG.card, (rows, CFG.n_q - CFG.dep_q, calls)).astype(np.int32)


def run(params, user, state=None, mask=None, forced=None, cfg=CFG, sampling=HOT):
    """Moshi's tokens of each call, [B, 1 + Q, calls], and the state."""
    rows, _, calls = user.shape
    state = model.init_state(cfg, rows) if state is None else state
    mask = np.ones((rows, calls), bool) if mask is None else mask
    outs = []
    for call in range(calls):
        given = None if forced is None else jnp.asarray(forced[..., call])
        moshi, state = step(
            params, jnp.asarray(user[..., call]), jnp.asarray(mask[:, call]), state, cfg, sampling, given
        )
        outs.append(np.asarray(moshi))
    return np.stack(outs, -1), state


def equal(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def test_forced_tokens_come_out_and_the_others_do_not_know(params):
    forced = np.full((ROWS, 1 + CFG.dep_q, CALLS), FREE, np.int32)
    rng = np.random.default_rng(1)
    forced[0, 0] = rng.integers(0, CFG.text_card, CALLS)  # text of row 0
    forced[1, 2, 5:9] = rng.integers(0, CFG.card, 4)  # a delayed codebook of row 1, in four frames
    forced[1, 1, 7] = -1  # silence of the model's input
    moshi, _ = run(params, codes(), forced=forced)
    free, _ = run(params, codes())
    shift = CFG.max_delay  # call s completes frame s - max_delay
    for row in range(2):
        given = forced[row, :, : CALLS - shift]
        np.testing.assert_array_equal(moshi[row, :, shift:][given != FREE], given[given != FREE])
    np.testing.assert_array_equal(moshi[2], free[2])
    np.testing.assert_array_equal(moshi[1, :, : 5 + shift], free[1, :, : 5 + shift])
    assert (moshi[0, 1:, shift:] != free[0, 1:, shift:]).any()  # what is forced is heard by the other streams


def test_forcing_what_was_generated_changes_nothing(params):
    """Forced tokens take the place that sampled ones have, in the depth transformer's input and in the history."""
    moshi, state = run(params, codes())
    forced = np.full((ROWS, 1 + CFG.dep_q, CALLS), FREE, np.int32)
    forced[..., : CALLS - CFG.max_delay] = moshi[..., CFG.max_delay :]
    again, forced_state = run(params, codes(), forced=forced)
    np.testing.assert_array_equal(again, moshi)
    equal(forced_state, state)


def test_a_rows_draws_depend_on_its_seed_alone(params):
    both, _ = run(params, np.repeat(codes(rows=1), 3, 0), model.init_state(CFG, 3, seeds=[7, 8, 7]))
    np.testing.assert_array_equal(both[0], both[2])
    assert (both[0] != both[1]).any()
    alone, _ = run(params, codes(rows=1), model.init_state(CFG, 1, seeds=[7]))
    np.testing.assert_array_equal(alone[0], both[2])
    state = reset_rows(run(params, codes(rows=1))[1], jnp.ones(1, bool))
    np.testing.assert_array_equal(run(params, codes(rows=1), state)[0], alone)


def test_wrong_number_of_seeds():
    for seeds in ([1, 2], [1, 2, -1], [1, 2, 2**32]):
        with pytest.raises(InputError, match="for each of the 3 rows"):
            model.init_state(CFG, 3, seeds=seeds)


def test_values_that_cannot_be(params):
    state, user = model.init_state(CFG, 1), jnp.asarray(codes(rows=1))
    for sampling in (Sampling(temperature=-1.0), Sampling(top_k=-1), Sampling(text_temperature=float("nan"))):
        with pytest.raises(InputError, match="cannot be"):
            generate.stream_step(params, user[..., 0], jnp.ones(1, bool), state, CFG, sampling)
    with pytest.raises(InputError, match='first_frame="Twice"'):
        generate.generate(params, user, jnp.ones((1, CALLS), bool), state, CFG, HOT, first_frame="Twice")
    with pytest.raises(InputError, match="name rows 0 to 0"):
        model.fork_rows(state, [0, 1])


@pytest.mark.slow
def test_top_k_of_0_is_all(params):
    every = HOT._replace(top_k=CFG.card, text_top_k=CFG.text_card)
    expected, _ = run(params, codes(), sampling=every)
    got, _ = run(params, codes(), sampling=every._replace(top_k=0, text_top_k=0))
    np.testing.assert_array_equal(got, expected)


def test_no_two_draws_share_noise(params):
    """Where all logits are 0 a token is the place of the largest noise: by row, position and codebook."""
    silent = {**params, "text_head": 0 * params["text_head"]}
    silent["depth"] = {**params["depth"], "heads": 0 * params["depth"]["heads"]}
    moshi, _ = run(silent, codes(), model.init_state(CFG, ROWS, seeds=[7, 8, 7]))
    sizes = [HOT.text_top_k] + CFG.dep_q * [HOT.top_k]
    shape = (max(sizes), len(sizes))
    for row, seed in enumerate((7, 8, 7)):
        for column in range(CALLS - CFG.max_delay):
            key = jax.random.fold_in(jax.random.key(seed, impl="threefry2x32"), column)
            noise = np.asarray(jax.random.gumbel(key, shape))
            for stream, of_stream in enumerate(noise[:size, i] for i, size in enumerate(sizes)):
                call = column - CFG.delays[stream] + CFG.max_delay  # frame s - delay comes out max_delay calls later
                if column >= CFG.delays[stream]:
                    assert moshi[row, stream, call] == of_stream.argmax()


def test_the_first_column_reads_what_is_sampled_where_a_stream_has_not_begun():
    """Each codebook's likeliest token is the one before plus 1; codebook 2 of 3 begins a frame later than its
    neighbours."""
    cfg = dataclasses.replace(CFG, num_layers=1, delays=(0, 0, 1, 0, 0, 0, 0), card=8, ttt=TTTConfig(layers="none"))
    params = jax.tree.map(
        lambda leaf: np.zeros(leaf.shape, np.float32), model.init_params.eval_shape(cfg, jax.random.key(0))
    )
    places = np.eye(9, cfg.depth.dim, dtype=np.float32)
    params["depth"]["text_emb"][:8], params["depth"]["audio_emb"][:] = places[:8], places
    params["depth"]["heads"][:, np.arange(1, 8), np.arange(7)] = 1
    params["depth"]["heads"][:, 7, 8] = 2  # after an initial token
    greedy = Sampling(temperature=0, text_temperature=0)
    moshi, _ = run(params, codes(calls=4)[:1] % 8, model.init_state(cfg, 1), cfg=cfg, sampling=greedy)
    np.testing.assert_array_equal(moshi[0], np.array([[-1, 0, 0, 0], [-1, 1, 1, 1], [-1, 2, 2, 2], [-1, 3, 3, 3]]))


@pytest.mark.parametrize(("top_k", "kept"), [(1, 1), (5, 5), (12, 12), (0, 16), (99, 16)])
def test_as_many_tokens_as_top_k_come_into_question(top_k, kept):
    state = model.init_state(CFG, 1)
    text, audio = generate._gumbel(state, CFG, Sampling(top_k=top_k, text_top_k=top_k))
    assert audio.shape == (1, CFG.dep_q, kept)
    assert text.shape == (1, CFG.text_card if kept == 16 else kept)
    assert generate._gumbel(state, CFG, Sampling(temperature=0, text_temperature=0)) == (None, None)


def test_draws_follow_the_softmax_over_the_likeliest():
    logits = jnp.asarray(np.random.default_rng(0).normal(size=12), jnp.float32)
    k, temperature, draws = 5, 0.7, 20_000
    noise = jax.random.gumbel(jax.random.key(0), (draws, k))
    tokens = np.asarray(generate.sample(jnp.broadcast_to(logits, (draws, 12)), noise, temperature))
    likeliest = np.argsort(-np.asarray(logits))[:k]
    expected = np.exp(np.asarray(logits)[likeliest] / temperature)
    expected /= expected.sum()
    counts = np.array([(tokens == token).sum() for token in likeliest])
    assert counts.sum() == draws
    assert ((counts - draws * expected) ** 2 / (draws * expected)).sum() < 18.5  # chi-squared, 4 degrees: p = 0.001


@pytest.mark.slow
def test_generate_is_the_scan_of_steps(params):
    user, mask = codes(), np.random.default_rng(2).random((ROWS, CALLS)) < 0.7
    expected, state = run(params, user, mask=mask)
    got, scanned = scan(
        params, jnp.asarray(user), jnp.asarray(mask), model.init_state(CFG, ROWS), CFG, HOT, first_frame="once"
    )
    np.testing.assert_array_equal(got, expected)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), scanned, state)


def test_first_frame_twice_is_for_fresh_rows_only(params):
    user = codes()
    twice = np.concatenate([user[..., :1], user], -1)
    expected, _ = run(params, twice)
    args = params, jnp.asarray(user), jnp.ones((ROWS, CALLS), bool)
    got, state = scan(*args, model.init_state(CFG, ROWS), CFG, HOT)
    np.testing.assert_array_equal(got, expected)


@pytest.mark.slow
def test_rows_that_have_begun_hear_each_frame_once(params):
    user = codes()
    args = params, jnp.asarray(user), jnp.ones((ROWS, CALLS), bool)
    expected, _ = scan(*args, model.init_state(CFG, ROWS), CFG, HOT)
    # Rows that have begun hear each frame once: a stream in two pieces is the stream.
    half = CALLS // 2
    first, state = scan(args[0], *(x[..., :half] for x in args[1:]), model.init_state(CFG, ROWS), CFG, HOT)
    second, state = scan(args[0], *(x[..., half:] for x in args[1:]), state, CFG, HOT)
    assert (second[..., 0] == -1).all()
    np.testing.assert_array_equal(np.concatenate([first, second[..., 1:]], -1), expected)


def test_forced_frames_of_generate_are_those_that_each_row_makes(params):
    user, mask = codes(), np.ones((ROWS, CALLS), bool)
    mask[1, 3:6] = False  # a pause
    forced = np.random.default_rng(3).integers(0, CFG.card, (ROWS, 1 + CFG.dep_q, 8)).astype(np.int32)
    got, _ = scan(
        params, jnp.asarray(user), jnp.asarray(mask), model.init_state(CFG, ROWS), CFG, HOT, jnp.asarray(forced)
    )
    got = np.asarray(got)
    for row in range(ROWS):
        complete = got[row][:, (got[row] != -1).all(0)]
        np.testing.assert_array_equal(complete[:, :8], forced[row])


def test_a_stream_goes_on_after_a_prompt(params):
    """`forward` over a prompt and then steps give what steps with the prompt forced give."""
    user = codes()
    prompt = 6
    moshi = np.random.default_rng(4).integers(0, CFG.card, (ROWS, 1 + CFG.dep_q, prompt)).astype(np.int32)
    forced = np.concatenate([moshi, np.full((ROWS, 1 + CFG.dep_q, CALLS - prompt), FREE, np.int32)], -1)
    # Call s takes the user's frame s - 1; call 0 ignores what it is given.
    expected, _ = run(params, np.concatenate([user[..., :1], user[..., :-1]], -1), forced=forced)
    frames = np.concatenate([moshi, user[..., :prompt]], 1)
    read = quick_jit(partial(model.forward, cfg=CFG))
    _, state = read(params, frames, np.ones((ROWS, prompt), bool), model.init_state(CFG, ROWS))
    got, _ = run(params, user[..., prompt - 1 : -1], state)
    np.testing.assert_array_equal(got, expected[..., prompt:])


@pytest.mark.parametrize("dtype", ["float32", pytest.param("bfloat16", marks=pytest.mark.slow)])
def test_a_saved_stream_goes_on_to_the_bit(params, tmp_path, dtype):
    cfg, user = dataclasses.replace(CFG, dtype=dtype), codes()
    expected, end = run(params, user, cfg=cfg)
    _, state = run(params, user[..., :9], cfg=cfg)
    stream_state.save_state(tmp_path / "state", state, cfg)
    loaded = stream_state.load_state(tmp_path / "state", cfg)
    equal(loaded, state)
    assert [leaf.dtype for leaf in jax.tree.leaves(loaded)] == [leaf.dtype for leaf in jax.tree.leaves(state)]
    got, went = run(params, user[..., 9:], loaded, cfg=cfg)
    np.testing.assert_array_equal(got, expected[..., 9:])
    equal(went, end)


def test_forks_share_the_past_and_nothing_else(params):
    user = codes()
    _, state = run(params, user[..., :9])
    fork = model.fork_rows(state, [1, 1, 0])
    before = jax.tree.map(np.asarray, state)
    both, _ = run(params, user[[1, 1, 0], :, 9:], fork)
    np.testing.assert_array_equal(both[0], both[1])  # the same draws
    equal(before, state)  # the fork was donated, not what it was made of
    apart, _ = run(params, user[[1, 1, 0], :, 9:], model.fork_rows(state, [1, 1, 0], seeds=[5, 6, 7]))
    assert (apart[0] != apart[1]).any()
    expected, _ = run(params, user[..., 9:], state)
    np.testing.assert_array_equal(both[0], expected[1])
    np.testing.assert_array_equal(both[2], expected[0])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: path.unlink(), "is not a file"),
        (lambda path: path.write_bytes(path.read_bytes()[:-5]), "is damaged or no safetensors file"),
        (lambda path: path.write_bytes(b"{}"), "is damaged or no safetensors file"),
    ],
)
def test_damaged_state(tmp_path, damage, message):
    path = tmp_path / "state"
    stream_state.save_state(path, model.init_state(CFG, 1), CFG)
    damage(path)
    with pytest.raises(InputError, match=message):
        stream_state.load_state(path, CFG)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda leaves, about: about.clear(), "does not name its model"),
        (lambda leaves, about: about.update(model="{"), "does not name its model"),
        (lambda leaves, about: leaves.update(position=leaves["position"].astype(np.int64)), "has position of shape"),
        (lambda leaves, about: leaves.pop("history"), "lacks history"),
    ],
)
def test_state_with_something_else_in_it(tmp_path, change, message):
    path = tmp_path / "state"
    stream_state.save_state(path, model.init_state(CFG, 1), CFG)
    with safe_open(path, "np") as file:
        leaves, about = {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118
    change(leaves, about)
    save_file(leaves, path, about)
    with pytest.raises(InputError, match=message):
        stream_state.load_state(path, CFG)


def test_state_of_another_model(tmp_path):
    stream_state.save_state(tmp_path / "state", model.init_state(CFG, 1), CFG)
    with pytest.raises(InputError, match="whose context is 8 where this one's is 9"):
        stream_state.load_state(tmp_path / "state", dataclasses.replace(CFG, context=9))


def test_a_state_knows_its_sink_and_older_ones_have_none(tmp_path):
    path, state, sunk = tmp_path / "state", model.init_state(CFG, 1), dataclasses.replace(CFG, attention_sink=2)
    stream_state.save_state(path, state, CFG)
    with pytest.raises(InputError, match="whose attention_sink is 0 where this one's is 2"):
        stream_state.load_state(path, sunk)
    older = json.loads(stream_state.describe(CFG))
    assert older.pop("attention_sink") == 0
    with pytest.MonkeyPatch.context() as patch:  # as it was before there was the field
        patch.setattr(stream_state, "describe", lambda _: json.dumps(older))
        stream_state.save_state(path, state, CFG)
    equal(stream_state.load_state(path, CFG), state)
    with pytest.raises(InputError, match="whose attention_sink is 0 where this one's is 2"):
        stream_state.load_state(path, sunk)


def test_a_state_goes_on_by_any_implementation(tmp_path):
    path, state, ttt = tmp_path / "state", model.init_state(CFG, 1), dataclasses.replace(CFG.ttt, impl="xla")
    stream_state.save_state(path, state, CFG)
    equal(stream_state.load_state(path, dataclasses.replace(CFG, ttt=ttt)), state)


def test_a_state_with_the_sum_of_the_open_mini_batch_is_refused(tmp_path):
    path = tmp_path / "state"
    # As they were written before there were formats.
    stream_state.write(path, model.init_state(CFG, 1), {"model": stream_state.describe(CFG)})
    message = r"has the format None, not 'ttt_jax.state/2', in which TTT states hold the steps .* give a state that"
    with pytest.raises(InputError, match=message):
        stream_state.load_state(path, CFG)


def test_state_that_is_not_written_leaves_the_old_one(tmp_path, monkeypatch):
    path = tmp_path / "state"
    stream_state.save_state(path, model.init_state(CFG, 1), CFG)
    old = path.read_bytes()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(InputError, match="could not be written .No space left on device."):
        stream_state.save_state(path, model.init_state(CFG, 2), CFG)
    assert path.read_bytes() == old
    assert list(tmp_path.iterdir()) == [path]


def rich():
    """A configuration with all that converted weights can have."""
    return MoshiConfig(
        dim=32, num_layers=2, num_heads=2, hidden=48, context=8, n_q=4, dep_q=4, card=16, text_card=20,
        delays=(0, 0, 1, 1, 1), extra_heads=2, extra_heads_dim=3, ttt=TTTConfig(layers="1", mini_batch=4),
        depth=DepthConfig(dim=16, num_layers=2, num_heads=2, hidden=24, schedule=(0, 1, 1, 0), low_rank=6),
        lora=LoRAConfig(rank=3, scaling=0.5),
    )  # fmt: skip


def with_adapters(params, key):
    """Adapters that do something: B starts at 0."""
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: jax.random.normal(key, leaf.shape) * 0.2 if path[-1].key.endswith("_lora_b") else leaf,
        params,
    )


@pytest.mark.slow
def test_streamed_tokens_are_the_likeliest_that_forward_gives():
    """With shared weight sets, low-rank tables, adapters: each generated token is the teacher-forced argmax given those
    before."""
    cfg = rich()
    params = with_adapters(quick_jit(model.init_params, static_argnums=0)(cfg, jax.random.key(1)), jax.random.key(2))
    user = np.zeros((2, 0, 14), np.int32)
    moshi, _ = run(params, user, cfg=cfg, sampling=Sampling(temperature=0, text_temperature=0))
    frames = moshi[..., cfg.max_delay :]
    outputs, _ = model.forward(
        params, jnp.asarray(frames), jnp.ones((2, frames.shape[-1]), bool), model.init_state(cfg, 2), cfg
    )
    likeliest = np.concatenate(
        [outputs.text_logits.argmax(-1)[:, None], outputs.audio_logits.argmax(-1).swapaxes(1, 2)], 1
    )
    scored = np.asarray(outputs.target_mask)
    np.testing.assert_array_equal(likeliest[scored], np.asarray(outputs.targets)[scored])


@pytest.mark.slow
def test_streaming_params_give_the_same_bits(params):
    """On a CPU in float32 they are the same numbers in other arrays."""
    user = codes()
    expected, state = run(params, user)
    got, streamed = run(generate.streaming_params(params, CFG), user)
    np.testing.assert_array_equal(got, expected)
    equal(streamed, state)
