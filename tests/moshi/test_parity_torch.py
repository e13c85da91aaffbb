"""The model beside PyTorch `moshi` itself, on random weights handed over in Kyutai's own files.

Needs torch and the PyPI package `moshi`; without them nothing runs here, and `moshi/test_parity.py` and
`moshi/test_parity_traps.py` compare with what `make_fixtures.py` stored of them. ``python -m pytest -m parity`` runs
these alone.
"""

# ruff: noqa: E402  what needs torch is imported where it is there

from __future__ import annotations

import inspect
import json
from functools import cache
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="parity with PyTorch needs torch")
pytest.importorskip("moshi", reason="parity with PyTorch needs the PyPI package moshi", exc_type=ImportError)

from moshi.models.lm import LMGen
from moshi.utils.sampling import sample_token
from safetensors.numpy import load_file, save_file
from scipy import stats

from tests.helpers import torch_moshi
from tests.helpers.drawing import quick_jit
from tests.helpers.torch_moshi import VARIANTS
from ttt_jax import convert
from ttt_jax.checkpoints import weights
from ttt_jax.config import TTTConfig
from ttt_jax.moshi import generate, model
from ttt_jax.moshi.loss import token_losses

pytestmark = pytest.mark.parity

ATOL = 1e-4
GREEDY = generate.Sampling(temperature=0, text_temperature=0)
FRAMES, CALLS, ROWS = 24, 48, 3
"""Three windows of 8 teacher-forced, six generated."""

variants = pytest.mark.parametrize("name", VARIANTS)

forward = quick_jit(model.forward, static_argnames="cfg")
stream_step = quick_jit(generate.stream_step, static_argnames=("cfg", "sampling"))
generated = quick_jit(generate.generate, static_argnames=("cfg", "sampling", "first_frame"))


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """By variant: (Kyutai's arguments, their model, our configuration, our parameters, their folder)."""

    @cache
    def make(name: str):
        kwargs = VARIANTS[name]
        theirs = torch_moshi.random_model(kwargs)
        folder = torch_moshi.write_folder(tmp_path_factory.mktemp("kyutai"), theirs, kwargs)
        return kwargs, theirs, *ours(folder, tmp_path_factory.mktemp("ours")), folder

    return make


def ours(folder: Path, into: Path, **options):
    """Configuration and parameters of a Kyutai folder, by way of our converter and our files."""
    convert.kyutai(folder, into / "model", **options)
    got = weights.load(into / "model")
    return got.cfg, got.params


def teacher_forced(
    cfg, params, codes: np.ndarray, parts: tuple[int, ...], forward=forward
) -> tuple[model.Outputs, np.ndarray]:
    """Outputs of teacher-forced calls of these lengths, time on axis 1, and the softmax of the extra heads."""
    state, outputs = model.init_state(cfg, len(codes)), []
    for stop, part in zip(np.cumsum(parts), parts, strict=True):
        frames = jnp.asarray(codes[:, :, stop - part : stop])
        out, state = forward(params, frames, jnp.ones((len(codes), part), bool), state, cfg=cfg)
        outputs.append(out._replace(targets=out.targets.swapaxes(1, 2), target_mask=out.target_mask.swapaxes(1, 2)))
    out = jax.tree.map(lambda *x: np.concatenate(x, 1), *outputs)
    heads = jax.nn.softmax(model.extra_logits(params, out.hidden, cfg)) if cfg.extra_heads else None
    return out, heads


def codes_of(kwargs: dict, rows: int = ROWS, frames: int = FRAMES, seed: int = 0) -> np.ndarray:
    return torch_moshi.random_codes(kwargs, rows, frames, seed)


def user_of(kwargs: dict, calls: int = CALLS, rows: int = ROWS, seed: int = 1) -> np.ndarray:
    streams = kwargs["n_q"] - kwargs["dep_q"]
    return np.random.default_rng(seed).integers(0, kwargs["card"], (rows, streams, calls)).astype(np.int32)


def stream(cfg, params, user, active=None, reset_before=None, sampling=GREEDY) -> np.ndarray:
    """Tokens of every call of `stream_step`, [B, 1 + Q, calls]."""
    rows, _, calls = user.shape
    active = np.ones((rows, calls), bool) if active is None else active
    params = generate.streaming_params(params, cfg)
    state, outs = model.init_state(cfg, rows), []
    for call in range(calls):
        if reset_before and call in reset_before:
            state = model.reset_rows(state, jnp.asarray(reset_before[call]), cfg)
        now = jnp.asarray(user[:, :, call]), jnp.asarray(active[:, call])
        moshi, state = stream_step(params, *now, state, cfg=cfg, sampling=sampling)
        outs.append(np.asarray(moshi))
    return np.stack(outs, -1)


def run(cfg, params, user, forced=None) -> np.ndarray:
    """Tokens of every call of one `generate`, one for each frame of `user`. With `forced` or without: one program for
    both."""
    rows, _, calls = user.shape
    if forced is None:
        forced = np.full((rows, 1 + cfg.dep_q, calls), generate.FREE, np.int32)
    options = {"cfg": cfg, "sampling": GREEDY, "forced": jnp.asarray(forced), "first_frame": "once"}
    mask, state = jnp.ones((rows, calls), bool), model.init_state(cfg, rows)
    return np.asarray(generated(params, jnp.asarray(user), mask, state, **options)[0])


def twice(user: np.ndarray) -> np.ndarray:
    """With the first frame handed in twice and the last left out."""
    return np.concatenate([user[:, :, :1], user[:, :, :-1]], 2)


# Teacher-forced


@variants
@pytest.mark.parametrize(
    "parts", [(FRAMES,), (1,) * FRAMES, (5, 1, 5, 5, 1, 5, 1, 1)], ids=["whole", "frames", "mixed"]
)
def test_teacher_forced_logits_equal_pytorch(pair, name, parts):
    kwargs, theirs, cfg, params, _ = pair(name)
    codes = codes_of(kwargs)
    expected = torch_moshi.grid(theirs, codes)
    got, _ = teacher_forced(cfg, params, codes, parts)
    for which in ("hidden", "text_logits", "audio_logits"):
        np.testing.assert_allclose(getattr(got, which), getattr(expected, which), rtol=0, atol=ATOL)


@variants
def test_pytorch_agrees_with_itself_step_by_step(pair, name):
    """Streaming caches against training: the reference is one function, so that either can be compared with."""
    kwargs, theirs, *_ = pair(name)
    codes = codes_of(kwargs)
    for one, other in zip(torch_moshi.grid(theirs, codes), torch_moshi.stepped(theirs, codes), strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=ATOL / 5)


@variants
def test_forward_equals_pytorch_on_undelayed_frames(pair, name):
    """`LMModel.forward` itself: its undelayed logits and masks, and what stands where it has NaN."""
    kwargs, theirs, cfg, params, _ = pair(name)
    codes = codes_of(kwargs)
    expected, got = torch_moshi.forward(theirs, codes), teacher_forced(cfg, params, codes, (FRAMES,))[0]
    np.testing.assert_array_equal(got.target_mask[:, :, 0], expected["text_mask"][:, 0])
    np.testing.assert_allclose(got.text_logits, expected["text_logits"][:, 0], rtol=0, atol=ATOL)
    for k in range(cfg.dep_q):
        delay = cfg.delays[1 + k]
        scored = FRAMES - delay  # the last `delay` frames of a delayed codebook are never predicted
        mask, logits = expected["mask"][:, k], expected["logits"][:, k]
        np.testing.assert_array_equal(got.target_mask[:, delay:, 1 + k], mask[:, :scored])
        np.testing.assert_allclose(got.audio_logits[:, delay:, k], logits[:, :scored], rtol=0, atol=ATOL)
        assert not got.target_mask[:, :delay, 1 + k].any()
        assert not mask[:, scored:].any()
        assert np.isnan(logits[:, scored:]).all()
    assert np.isfinite(got.audio_logits).all()


def test_targets_are_the_delayed_codes(pair):
    kwargs, theirs, cfg, params, _ = pair("mixed delays")
    codes = codes_of(kwargs)
    columns = torch_moshi.delayed(theirs, codes)[:, : 1 + cfg.dep_q, 1:].numpy()
    np.testing.assert_array_equal(teacher_forced(cfg, params, codes, (FRAMES,))[0].targets, columns.swapaxes(1, 2))


def test_gradients_equal_pytorch(pair):
    """Of the mean cross-entropy over scored tokens, to embeddings, attention and depth transformer; NaN reaches
    neither."""
    kwargs, theirs, cfg, params, _ = pair("moshi")
    codes = codes_of(kwargs)
    out = theirs(torch.from_numpy(codes).long())
    theirs.zero_grad()
    total = 0
    for logits, mask, target in (
        (out.logits, out.mask, codes[:, 1 : 1 + cfg.dep_q]),
        (out.text_logits, out.text_mask, codes[:, :1]),
    ):
        target = torch.from_numpy(np.maximum(target, 0)).long()
        total += torch.nn.functional.cross_entropy(logits[mask], target[mask], reduction="sum")
    total.backward()

    def loss(params):
        state, mask = model.init_state(cfg, ROWS), jnp.ones((ROWS, FRAMES), bool)
        return token_losses(model.forward(params, jnp.asarray(codes), mask, state, cfg=cfg)[0]).sum()

    value, grads = quick_jit(jax.value_and_grad(loss))(params)
    assert float(value) == pytest.approx(float(total.detach()), rel=1e-6)
    layers, named = grads["layers"][cfg.runs[0].name], dict(theirs.named_parameters())
    by_set = lambda name: grads["depth"][name].reshape(2, cfg.dep_q, -1, cfg.depth.dim)  # noqa: E731
    pairs = {
        "text_emb.weight": grads["text_emb"],
        "emb.5.weight": grads["audio_emb"][5],
        "transformer.layers.1.self_attn.in_projs.0.weight": layers["attention"]["qkv"][1],
        "transformer.layers.2.norm2.alpha": layers["norm2"][2],
        "out_norm.alpha": grads["out_norm"],
        "depformer.layers.1.self_attn.in_projs.2.weight": by_set("qkv")[1, 2],
        "depformer.layers.0.gating.1.linear_in.weight": by_set("gate_up")[0, 1],
        "depformer_emb.1.weight": grads["depth"]["audio_emb"][1],
    }
    for name, got in pairs.items():
        expected = named[name].grad.numpy()
        np.testing.assert_allclose(
            np.asarray(got).reshape(expected.shape), expected, rtol=0, atol=1e-5 * np.abs(expected).max(), err_msg=name
        )
    theirs.zero_grad()


# Streams


@variants
def test_greedy_stream_equals_pytorch_token_for_token(pair, name):
    """The first frame handed in twice, as Kyutai's ``run_inference`` does."""
    kwargs, theirs, cfg, params, _ = pair(name)
    user = user_of(kwargs)
    expected = torch_moshi.stream(theirs, twice(user)).tokens
    np.testing.assert_array_equal(run(cfg, params, twice(user)), expected)
    assert (expected[:, :, : cfg.max_delay] == -1).all()
    if name == "moshi":  # where `generate` hands it in twice itself
        heard, mask, state = (
            jnp.asarray(user[:, :, :-1]),
            jnp.ones((ROWS, CALLS - 1), bool),
            model.init_state(cfg, ROWS),
        )
        np.testing.assert_array_equal(generated(params, heard, mask, state, cfg=cfg, sampling=GREEDY)[0], expected)


def test_greedy_stream_that_drops_its_first_frame_equals_pytorch(pair):
    """As Kyutai's server does; and what the first frame holds changes nothing."""
    kwargs, theirs, cfg, params, _ = pair("moshi")
    user = user_of(kwargs)
    changed = user.copy()
    changed[:, :, 0] = (changed[:, :, 0] + 7) % kwargs["card"]
    expected = torch_moshi.stream(theirs, user).tokens
    np.testing.assert_array_equal(torch_moshi.stream(theirs, changed).tokens, expected)
    for frames in (user, changed):
        np.testing.assert_array_equal(run(cfg, params, frames), expected)


@pytest.mark.parametrize("name", ["moshi", "mixed delays"])
def test_rows_paused_and_reset_on_their_own_equal_pytorch(pair, name):
    """Row 0 runs on; the others pause at random, from the very first call too, and start again at different calls."""
    kwargs, theirs, cfg, params, _ = pair(name)
    rng, user = np.random.default_rng(5), user_of(kwargs)
    active = rng.random((ROWS, CALLS)) < 0.7
    active[0] = True
    active[2, 0] = False
    rows = np.arange(ROWS)
    reset_before = {11: rows == 1, 12: rows == 2, 13: rows == 2, 30: rows > 0, 31: rows == 2}
    expected = torch_moshi.stream(theirs, user, active, reset_before).tokens
    got = stream(cfg, params, user, active, reset_before)
    np.testing.assert_array_equal(got, expected)
    assert (got[:, 0][~active] == -1).all()
    np.testing.assert_array_equal(got[0], torch_moshi.stream(theirs, user[:1]).tokens[0])


def test_stream_reads_absent_codes_like_pytorch(pair):
    """-1 of the user's stream is the zero vector, not code 0 and not the initial token."""
    kwargs, theirs, cfg, params, _ = pair("moshi")
    user = user_of(kwargs)
    user[1, :, 10:30] = -1
    user[2, 1] = -1
    expected = torch_moshi.stream(theirs, user).tokens
    np.testing.assert_array_equal(run(cfg, params, user), expected)
    for other in (0, kwargs["card"]):
        assert (torch_moshi.stream(theirs, np.where(user == -1, other, user)).tokens != expected).any()


# Forced tokens


def forced_frames(kwargs: dict, share_text: float, share_audio: float, seed: int = 3) -> np.ndarray:
    """Own tokens of frames, [B, 1 + Q, CALLS], of which these shares are given and the others `FREE`."""
    rng = np.random.default_rng(seed)
    predicted = 1 + kwargs["dep_q"]
    tokens = torch_moshi.random_codes(kwargs, ROWS, CALLS, seed, absent=False)[:, :predicted]
    share = np.array([share_text] + (predicted - 1) * [share_audio])[None, :, None]
    return np.where(rng.random(tokens.shape) < share, tokens, generate.FREE).astype(np.int32)


@pytest.mark.parametrize("name", ["moshi", "mixed delays"])
@pytest.mark.parametrize(("text", "audio"), [(1, 0), (0.3, 0), (0, 1), (0.5, 1)])
def test_forced_tokens_equal_pytorch(pair, name, text, audio):
    """Text given by `on_text_hook`, whole columns of audio by `on_audio_hook`."""
    kwargs, theirs, cfg, params, _ = pair(name)
    user, forced = user_of(kwargs), forced_frames(kwargs, text, audio)
    expected = torch_moshi.stream(theirs, user, forced=torch_moshi.on_grid(forced, kwargs["delays"])).tokens
    got = run(cfg, params, user, forced)
    np.testing.assert_array_equal(got, expected)
    frames = CALLS - cfg.max_delay
    given = forced[:, :, :frames] != generate.FREE
    np.testing.assert_array_equal(got[:, :, cfg.max_delay :][given], forced[:, :, :frames][given])


@pytest.mark.parametrize("name", ["moshi", "mixed delays", "shared"])
def test_single_forced_codebooks_are_read_by_those_after_them(pair, name):
    """Where PyTorch's hook comes too late: it replaces tokens of a column after the whole column was sampled from
    others."""
    kwargs, theirs, cfg, params, _ = pair(name)
    user, forced = user_of(kwargs), forced_frames(kwargs, 0.3, 0.4)
    columns = torch_moshi.on_grid(forced, kwargs["delays"])
    inside, hooked = (torch_moshi.stream(theirs, user, forced=columns, forced_inside=x).tokens for x in (True, False))
    np.testing.assert_array_equal(run(cfg, params, user, forced), inside)
    assert (hooked != inside).any()


# Random draws


def test_default_sampling_is_pytorchs():
    default = {name: value.default for name, value in inspect.signature(LMGen).parameters.items()}
    assert generate.Sampling() == (default["temp"], default["top_k"], default["temp_text"], default["top_k_text"])


@pytest.mark.parametrize(("temperature", "top_k"), [(0.8, 250), (0.7, 25), (1.3, 3), (0.2, 1)])
def test_sample_draws_what_pytorch_draws_from_the_same_noise(temperature, top_k):
    """PyTorch takes the largest p / q, q exponential; ours the largest log p + g, g Gumbel: the same draw where g =
    -log q."""
    logits = 3 * torch.randn(2000, 60, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(1)
    expected = sample_token(logits, True, temperature, top_k)
    torch.manual_seed(1)
    noise = -np.log(torch.empty(2000, min(top_k, 60)).exponential_(1).numpy())
    got = generate.sample(jnp.asarray(logits.numpy()), jnp.asarray(noise), temperature)
    np.testing.assert_array_equal(got, expected)


def test_frames_are_drawn_from_pytorchs_distribution(tmp_path):
    """All tokens of a first frame, jointly, against their exact probabilities from PyTorch's logits."""
    kwargs = VARIANTS["moshi"] | {"delays": [0] * 7}
    theirs = torch_moshi.random_model(kwargs)
    cfg, params = ours(torch_moshi.write_folder(tmp_path, theirs, kwargs), tmp_path)
    sampling = generate.Sampling(temperature=1.5, top_k=2, text_temperature=0.6, text_top_k=4)
    frames, exact = first_frame_distribution(theirs, sampling)
    rows = 8192
    drawn = stream(cfg, params, user_of(kwargs, 1, rows), sampling=sampling)[:, :, 0]
    assert chi_square(drawn, frames, exact) > 1e-3

    gen = LMGen(theirs, temp=1.5, top_k=2, temp_text=0.6, top_k_text=4)
    torch.manual_seed(0)
    with gen.streaming(rows):
        reference = gen.step(torch.from_numpy(user_of(kwargs, 1, rows)).long())[..., 0].numpy()
    assert chi_square(reference, frames, exact) > 1e-3
    # The test can tell: temperatures the other way round, and 5 % off, are far from these draws.
    for other in (sampling._replace(temperature=0.6, text_temperature=1.5), sampling._replace(temperature=1.2)):
        assert chi_square(drawn, *first_frame_distribution(theirs, other)) < 1e-9


@torch.no_grad()
def first_frame_distribution(theirs, sampling: generate.Sampling) -> tuple[np.ndarray, np.ndarray]:
    """All frames [N, 1 + Q] that can come first, and their probabilities."""
    initial = theirs._get_initial_token()
    hidden, text = theirs.forward_text(initial)
    paths = [((), 1.0)]
    for stream_ in range(1 + theirs.dep_q):
        longer = []
        for tokens, chance in paths:
            if stream_ == 0:
                logits, temperature, k = text[0, 0, 0], sampling.text_temperature, sampling.text_top_k
            else:
                column = initial.clone()
                column[0, : len(tokens), 0] = torch.tensor(tokens)
                logits = theirs.forward_depformer_training(column, hidden)[0, stream_ - 1, 0]
                temperature, k = sampling.temperature, sampling.top_k
            p, ids = torch.topk(torch.softmax(logits / temperature, -1), k)
            p = p / p.sum()
            longer += [((*tokens, int(i)), chance * float(x)) for i, x in zip(ids, p, strict=True)]
        paths = longer
    return np.array([tokens for tokens, _ in paths]), np.array([chance for _, chance in paths])


def chi_square(drawn: np.ndarray, frames: np.ndarray, exact: np.ndarray) -> float:
    """p-value; cells expected fewer than 8 times are taken together. 0 where a frame was drawn that cannot be."""
    index = {tuple(frame): i for i, frame in enumerate(frames)}
    counts = np.zeros(len(frames))
    for frame in drawn:
        if tuple(frame) not in index:
            return 0.0
        counts[index[tuple(frame)]] += 1
    expected = exact / exact.sum() * len(drawn)
    rare = expected < 8
    pool = lambda x: np.append(x[~rare], x[rare].sum()) if rare.any() else x  # noqa: E731
    return stats.chisquare(pool(counts), pool(expected)).pvalue


# Extra heads, adapters


def frames_of(tokens: np.ndarray, user: np.ndarray, delay: int) -> np.ndarray:
    """The first frames [B, K, FRAMES] of a stream, undelayed: call s gave frame s - delay and was given the user's s -
    1."""
    return np.concatenate([tokens[:, :, delay : delay + FRAMES], user[:, :, 1 : 1 + FRAMES]], 1)


def test_extra_heads_equal_pytorch(pair):
    """Against `step_with_extra_heads` along a stream; ours come from `forward` over the frames that were generated."""
    kwargs, theirs, cfg, params, _ = pair("heads")
    user = user_of(kwargs)
    got = torch_moshi.stream(theirs, user)
    delay = cfg.max_delay
    out, heads = teacher_forced(cfg, params, frames_of(got.tokens, user, delay), (FRAMES,))
    np.testing.assert_allclose(out.text_logits, got.text_logits[:, :FRAMES], rtol=0, atol=ATOL)
    assert heads.shape == (ROWS, FRAMES, 4, 6)
    np.testing.assert_allclose(heads[:, delay:], got.heads[:, delay:FRAMES], rtol=0, atol=ATOL)


LORA = VARIANTS["shared"] | {"extra_heads_num_heads": 2}
RANK, SCALING = 4, 1.5


@pytest.fixture(scope="module")
def adapted(tmp_path_factory):
    """Their folders, of the base and of the adapters, and their model with the adapters apart."""
    base = torch_moshi.random_model(LORA)
    folder = torch_moshi.write_folder(tmp_path_factory.mktemp("base"), base, LORA)
    theirs = torch_moshi.with_lora(base, RANK, SCALING)
    return folder, torch_moshi.write_lora_folder(tmp_path_factory.mktemp("lora"), theirs, LORA, RANK, SCALING), theirs


def their_adapted(folder: Path, adapters: Path, fuse: bool):
    """What Kyutai's loader makes of these files."""
    kwargs = LORA | {"lora": True, "lora_rank": RANK, "lora_scaling": SCALING}
    files = folder / "model.safetensors", kwargs
    more = {"lora_weights": adapters / "lora.safetensors", "fuse_lora": fuse}
    return torch_moshi.loaders.get_moshi_lm(*files, dtype=torch.float32, **more)


@pytest.mark.parametrize("merged", [False, True], ids=["apart", "merged"])
def test_adapters_equal_pytorch(adapted, tmp_path, merged):
    folder, adapters, model_in_memory = adapted
    codes = codes_of(LORA)
    theirs = their_adapted(folder, adapters, merged)
    expected = torch_moshi.grid(theirs, codes)
    for one, other in zip(expected, torch_moshi.grid(model_in_memory, codes), strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=ATOL / 2)
    options = {"config": adapters / "config.json", "lora": adapters / "lora.safetensors", "merge_lora": merged}
    cfg, params = ours(folder, tmp_path, **options)
    assert cfg.lora.rank == (0 if merged else RANK)
    got, heads = teacher_forced(cfg, params, codes, (FRAMES,))
    for which in ("hidden", "text_logits", "audio_logits"):
        np.testing.assert_allclose(getattr(got, which), getattr(expected, which), rtol=0, atol=ATOL)
    np.testing.assert_allclose(heads, torch_moshi.heads(theirs, expected.hidden), rtol=0, atol=ATOL)
    user = user_of(LORA)
    np.testing.assert_array_equal(run(cfg, params, user), torch_moshi.stream(theirs, user).tokens)


def test_adapters_matter(adapted, tmp_path):
    """The update that the tests above compare is no trifle."""
    folder, adapters, _ = adapted
    codes = codes_of(LORA)
    base = torch_moshi.grid(torch_moshi.load_folder(folder), codes)
    with_adapters = torch_moshi.grid(their_adapted(folder, adapters, False), codes)
    assert all(np.abs(a - b).mean() > 0.1 for a, b in zip(base, with_adapters, strict=True))


# Files


def bits(path: Path) -> dict[str, tuple]:
    """Name, type, shape and bytes of every tensor."""
    return {name: (x.dtype, x.shape, x.tobytes()) for name, x in load_file(path).items()}


@variants
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_export_gives_back_kyutais_files(pair, tmp_path, name, dtype):
    """Names, shapes, types and bits; the package loads them strictly and computes the same bits."""
    kwargs, theirs, *_ = pair(name)
    source = torch_moshi.write_folder(tmp_path / "source", theirs, kwargs, dtype=dtype)
    convert.kyutai(source, tmp_path / "checkpoint")
    convert.export(tmp_path / "checkpoint", tmp_path / "back")
    assert bits(tmp_path / "back" / "model.safetensors") == bits(source / "model.safetensors")
    codes = codes_of(kwargs)
    traces = [torch_moshi.grid(torch_moshi.load_folder(x), codes) for x in (source, tmp_path / "back")]
    for one, other in zip(*traces, strict=True):
        np.testing.assert_array_equal(one, other)


def test_export_gives_back_adapters(adapted, tmp_path):
    """Apart: their file to the bit, which the package loads. Merged: what the package itself merges, to rounding."""
    folder, adapters, _ = adapted
    convert.kyutai(folder, tmp_path / "checkpoint", lora=adapters / "lora.safetensors")
    convert.export(tmp_path / "checkpoint", tmp_path / "apart")
    assert bits(tmp_path / "apart" / "lora.safetensors") == bits(adapters / "lora.safetensors")
    assert bits(tmp_path / "apart" / "model.safetensors") == bits(folder / "model.safetensors")
    config = json.loads((tmp_path / "apart" / "config.json").read_text())
    assert (config["lora"], config["lora_rank"], config["lora_scaling"]) == (True, RANK, SCALING)
    back = torch_moshi.load_folder(tmp_path / "apart", lora_weights=tmp_path / "apart" / "lora.safetensors")
    codes = codes_of(LORA)
    expected = torch_moshi.grid(their_adapted(folder, adapters, False), codes)
    for one, other in zip(torch_moshi.grid(back, codes), expected, strict=True):
        np.testing.assert_array_equal(one, other)

    convert.export(tmp_path / "checkpoint", tmp_path / "merged", merge_lora=True)
    got = torch_moshi.load_folder(tmp_path / "merged").state_dict()
    for name, value in their_adapted(folder, adapters, True).state_dict().items():
        np.testing.assert_allclose(got[name], value, rtol=0, atol=1e-6, err_msg=name)


def test_kyutais_loader_refuses_adapters_on_some_maps(adapted, tmp_path):
    """Which is why export does not write them."""
    folder, adapters, _ = adapted
    some = {name: x for name, x in load_file(adapters / "lora.safetensors").items() if "self_attn" in name}
    save_file(some, tmp_path / "lora.safetensors")
    with pytest.raises(NotImplementedError, match="meta tensor"):
        their_adapted(folder, tmp_path, False)


@pytest.mark.parametrize("name", ["moshi", "shared"])
def test_names_of_a_state_dict_are_read_too(pair, tmp_path, name):
    """`save_file(model.state_dict())`: attention maps codebook by codebook, as fine-tuning and quantisation write
    them."""
    kwargs, theirs, cfg, params, _ = pair(name)
    source = torch_moshi.write_folder(tmp_path / "source", theirs, kwargs, fused=False)
    assert "depformer.layers.0.self_attn.in_projs.0.weight" in load_file(source / "model.safetensors")
    other_cfg, other = ours(source, tmp_path)
    assert other_cfg == cfg
    jax.tree.map(np.testing.assert_array_equal, other, params)


@pytest.mark.parametrize("layers", ["all", "0,2"])
def test_added_ttt_layers_change_nothing_before_training(pair, tmp_path, layers):
    """Not a bit in float32 where XLA orders sums as they are written, else rounding; yet the output projection has a
    gradient.

    Optimised, the two models are two programs, whose norms are fused with other operations each.
    """
    kwargs, theirs, cfg, params, folder = pair("moshi")
    ttt_cfg, ttt_params = ours(folder, tmp_path, ttt=TTTConfig(layers=layers, hidden=(1,), mini_batch=4))
    assert ttt_cfg.ttt_layers
    codes = codes_of(kwargs)
    ways = [((FRAMES,), forward, 0), ((1, 1), forward, 0)]
    if layers == "all":
        ways.append(((FRAMES,), model.forward, ATOL / 10))
    for parts, run_, atol in ways:
        one, other = (teacher_forced(*x, codes, parts, run_)[0] for x in ((cfg, params), (ttt_cfg, ttt_params)))
        for which in ("hidden", "text_logits", "audio_logits"):
            np.testing.assert_allclose(getattr(one, which), getattr(other, which), rtol=0, atol=atol)

    def loss(params):
        state, mask = model.init_state(ttt_cfg, ROWS), jnp.ones((ROWS, FRAMES), bool)
        return token_losses(model.forward(params, jnp.asarray(codes), mask, state, cfg=ttt_cfg)[0]).mean()

    grads = quick_jit(jax.grad(loss))(ttt_params)
    for run_ in (run_ for run_ in ttt_cfg.runs if run_.has_ttt):
        kernel = grads["layers"][run_.name]["ttt"]["out_kernel"]
        assert (np.abs(kernel).reshape(len(kernel), -1).max(1) > 1e-6).all()


def test_exported_ttt_layers_are_ignored_by_pytorch(pair, tmp_path):
    kwargs, theirs, _, _, folder = pair("moshi")
    convert.kyutai(folder, tmp_path / "checkpoint", ttt=TTTConfig(layers="1"))
    convert.export(tmp_path / "checkpoint", tmp_path / "back")
    assert load_file(tmp_path / "back" / "ttt.safetensors")
    codes = codes_of(kwargs)
    again = torch_moshi.load_folder(tmp_path / "back")
    for one, other in zip(torch_moshi.grid(theirs, codes), torch_moshi.grid(again, codes), strict=True):
        np.testing.assert_array_equal(one, other)


# Where the two differ by choice (docs/deviations.md)


def test_pytorch_loses_keys_when_several_positions_enter_a_full_ring(pair):
    """Five at a time: once the cache is full all but a call's last see too few keys there; ours see all of the
    window."""
    kwargs, theirs, cfg, params, _ = pair("moshi")
    codes, call = codes_of(kwargs, frames=20), 5
    full, fives = torch_moshi.grid(theirs, codes).hidden, torch_moshi.stepped(theirs, codes, call).hidden
    apart = np.abs(fives - full).max(-1)
    assert apart[:, :call].max() < ATOL
    assert (apart[:, 2 * call :].reshape(ROWS, -1, call)[..., :-1] > 100 * ATOL).all()
    got, _ = teacher_forced(cfg, params, codes, 4 * (call,))
    np.testing.assert_allclose(got.hidden, full, rtol=0, atol=ATOL)


def test_initial_tokens_are_no_targets(pair):
    """A code of Moshi's that is the initial token has no logit: we leave it out, PyTorch's mask does not."""
    kwargs, theirs, cfg, params, _ = pair("moshi")
    codes = codes_of(kwargs)
    codes[0, 1, 4], codes[0, 0, 5] = kwargs["card"], kwargs["text_card"]
    expected, got = torch_moshi.forward(theirs, codes), teacher_forced(cfg, params, codes, (FRAMES,))[0]
    assert expected["mask"][0, 0, 4]
    assert expected["text_mask"][0, 0, 5]
    assert not got.target_mask[0, 4, 1]
    assert not got.target_mask[0, 5, 0]
    np.testing.assert_allclose(got.hidden, torch_moshi.grid(theirs, codes).hidden, rtol=0, atol=ATOL)


def test_ids_below_absent_are_zero_here_and_id_0_there(pair):
    """-2 is no input; PyTorch clamps it to 0, ours takes it for absent."""
    kwargs, theirs, cfg, params, _ = pair("moshi")
    codes = codes_of(kwargs)
    below, absent, zero = (codes.copy() for _ in range(3))
    below[:, 4, 3:9], absent[:, 4, 3:9], zero[:, 4, 3:9] = -2, -1, 0
    np.testing.assert_array_equal(torch_moshi.grid(theirs, below).hidden, torch_moshi.grid(theirs, zero).hidden)
    got = teacher_forced(cfg, params, below, (FRAMES,))[0].hidden
    np.testing.assert_allclose(got, torch_moshi.grid(theirs, absent).hidden, rtol=0, atol=ATOL)


@pytest.mark.parametrize("name", ["moshi", "delay 2"])
def test_samples_before_a_stream_begins_feed_the_depth_transformer_alone(pair, name):
    """Training gives it the initial token there, streaming its own sample; ours do as PyTorch in both, and neither is
    heard."""
    kwargs, theirs, cfg, params, _ = pair(name)
    user = user_of(kwargs)
    codes = frames_of(torch_moshi.stream(theirs, user).tokens, user, cfg.max_delay)
    out, _ = teacher_forced(cfg, params, codes, (FRAMES,))
    taught = np.concatenate([out.text_logits.argmax(-1)[:, :, None], out.audio_logits.argmax(-1)], 2)
    begun = np.arange(FRAMES)[:, None] >= np.array(cfg.delays[: 1 + cfg.dep_q])
    np.testing.assert_array_equal(np.where(begun, taught, 0), np.where(begun, out.targets, 0))


@pytest.mark.parametrize("name", ["moshi", "shared"])
def test_bfloat16_is_as_close_to_float32_as_pytorchs(pair, tmp_path, name):
    """Rounding differs, so tensors cannot be compared: neither may lie further from the float32 of the same weights."""
    kwargs, theirs, *_ = pair(name)
    folder = torch_moshi.write_folder(tmp_path, theirs, kwargs, dtype=torch.bfloat16)
    codes = torch_moshi.random_codes(kwargs, 8, 64, absent=False)
    exact, half = (torch_moshi.grid(torch_moshi.load_folder(folder, x), codes) for x in (torch.float32, torch.bfloat16))
    cfg, params = ours(folder, tmp_path)
    assert cfg.dtype == "bfloat16"
    got, _ = teacher_forced(cfg, params, codes, (64,))
    assert got.text_logits.dtype == got.audio_logits.dtype == np.float32
    for which in ("text_logits", "audio_logits"):
        error, allowed = (
            np.abs(np.asarray(getattr(x, which), np.float64) - getattr(exact, which)).mean() for x in (got, half)
        )
        assert error < allowed
        agree = (getattr(got, which).argmax(-1) == getattr(exact, which).argmax(-1)).mean()
        assert agree > 0.9
