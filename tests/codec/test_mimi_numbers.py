"""Mimi's arithmetic: distances and products in true float32, gradients, numbers of codebooks."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params

from tests.helpers import tiny_mimi
from tests.helpers.drawing import quick_jit
from tests.helpers.tiny_mimi import CFG, USE
from ttt_jax.codec.mimi import file, layers, model
from ttt_jax.codec.mimi.codec import MimiCodec
from ttt_jax.codec.mimi.config import Use, shapes
from ttt_jax.errors import InputError

# Products in float32


def tensorfloat32(x):
    """float32 rounded to the ten bits of mantissa that TF32 keeps."""
    bits = np.asarray(x, np.float32).view(np.uint32)
    return ((bits + 0xFFF + ((bits >> 13) & 1)) & ~np.uint32(0x1FFF)).view(np.float32)


def bfloat16(x):
    return np.asarray(x, np.float32).astype(ml_dtypes.bfloat16).astype(np.float32)


def scores(x, codebook, half_norms):
    """In float64."""
    return x.astype(np.float64) @ codebook.astype(np.float64).T - half_norms.astype(np.float64)


@pytest.fixture(scope="module")
def crowded():
    """Vectors [24, 256], a codebook of 16 entries around each of them, and half of their squared lengths: which is
    nearest is a matter of some millionths of the products."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((24, 256))
    directions = rng.standard_normal((24, 16, 256))
    directions /= np.linalg.norm(directions, axis=-1, keepdims=True)
    radii = 1 + 0.0005 * np.stack([rng.permutation(16) for _ in x])
    codebook = (x[:, None] + radii[..., None] * directions).reshape(-1, 256).astype(np.float32)
    half_norms = (0.5 * np.square(codebook.astype(np.float64)).sum(-1)).astype(np.float32)
    nearest = 16 * np.arange(24) + radii.argmin(1)
    return x.astype(np.float32), codebook, half_norms, nearest


@pytest.mark.parametrize("rows", [1, 8, 24])
@pytest.mark.parametrize("default", ["bfloat16", "tensorfloat32", "float32"])
def test_nearest_entries_are_those_of_float64_whatever_the_default(crowded, rows, default):
    """On a GPU this fails if the product is left to TF32; see the next test."""
    x, codebook, half_norms, expected = crowded
    with jax.default_matmul_precision(default):
        got = jax.jit(layers.nearest)(x[:rows], codebook, half_norms)
    np.testing.assert_array_equal(got, expected[:rows])
    np.testing.assert_array_equal(scores(x, codebook, half_norms).argmax(-1), expected)


@pytest.mark.parametrize("rounded", [tensorfloat32, bfloat16])
def test_operands_of_less_precision_would_give_other_entries(crowded, rounded):
    """Already those of the first vectors: the test above notices it at any number of rows."""
    x, codebook, half_norms, expected = crowded
    got = scores(rounded(x), rounded(codebook), half_norms).argmax(-1)
    assert got[0] != expected[0]
    assert (got != expected).mean() > 0.5


def dots(jaxpr):
    """All products in a program, also those in its parts."""
    for eqn in jaxpr.eqns:
        if eqn.primitive.name in ("dot_general", "conv_general_dilated"):
            yield eqn
        for inner in jaxprs_in_params(eqn.params):
            yield from dots(inner)


@pytest.mark.parametrize(("shape", "default"), [((1, 1), "bfloat16"), ((2, 3), "tensorfloat32")])
def test_every_product_of_a_program_is_of_the_highest_precision(shape, default):
    """By itself, not by what a user has set."""
    rows, frames = shape
    params, mask = tiny_mimi.codec().params, jnp.ones(shape, bool)
    audio, codes = jnp.zeros((rows, frames * CFG.frame_size)), jnp.zeros((rows, 4, frames), jnp.int32)
    for fun, init, given in ((model.encode, model.init_encoder, audio), (model.decode, model.init_decoder, codes)):
        with jax.default_matmul_precision(default):
            program = jax.make_jaxpr(functools.partial(fun, cfg=CFG, use=USE))(
                params, given, mask, init(CFG, USE, rows)
            )
        found = list(dots(program.jaxpr))
        assert len(found) > 10
        for eqn in found:
            assert eqn.invars[0].aval.dtype == eqn.params["preferred_element_type"] == jnp.float32
            assert eqn.params["precision"] == (jax.lax.Precision.HIGHEST, jax.lax.Precision.HIGHEST), eqn


# Gradients


WIDE = Use(num_codebooks=4, dtype="float64")
"""No choice of users: float64, so that differences are exact enough."""
OF_DECODER = [name for name in shapes(CFG) if name.startswith(("decoder", "upsample"))]
OF_QUANTISER = [name for name in shapes(CFG) if name.startswith("quantizer") and "/input" not in name]


def test_gradients_through_the_decoder_are_those_of_differences(x64):
    """For each parameter that decoding reads and for the latents, in a direction half random and half its own; the
    audio is float32, which leaves 1e-4 to rounding."""
    rng, mask = np.random.default_rng(0), jnp.ones((1, 4), bool)
    params = model.by_name(model.prepare(tiny_mimi.params(), CFG, WIDE), CFG)
    params = {name: params[name].astype(jnp.float64) for name in OF_DECODER + OF_QUANTISER}
    codes = jnp.asarray(rng.integers(0, CFG.cardinality, (1, 4, 4)), jnp.int32)
    wanted = jnp.asarray(rng.standard_normal((1, 4 * CFG.frame_size)))
    state = model.init_decoder(CFG, WIDE, 1)

    def loss(at):
        latents = layers.dequantise(at[0], codes) + at[1]
        audio, _ = model.decode_latents(at[0], latents, mask, state, CFG, WIDE)
        return jnp.square(audio - wanted).mean()

    here = params, jnp.zeros((1, 4, CFG.dim))
    value, gradient = quick_jit(loss), jax.device_get(quick_jit(jax.grad(loss))(here))
    base = jax.device_get(here)
    for name in ("latents", *params):
        slope, at = (tree[1] if name == "latents" else tree[0][name] for tree in (gradient, base))
        assert np.isfinite(slope).all(), name
        assert "codebooks" in name or (slope != 0).all(), name
        noise = rng.standard_normal(slope.shape)
        step = 1e-3 * (slope / np.linalg.norm(slope) + noise / np.linalg.norm(noise))
        sides = [(base[0], at + d) if name == "latents" else (base[0] | {name: at + d}, base[1]) for d in (step, -step)]
        difference = float(value(sides[0]) - value(sides[1])) / 2
        np.testing.assert_allclose((slope * step).sum(), difference, rtol=1e-3, err_msg=name)
    for part, rows in (("semantic", codes[:, :1]), ("acoustic", codes[:, 1:])):
        slope = np.asarray(gradient[0][f"quantizer/{part}/codebooks"])
        for book, used in zip(slope, np.moveaxis(rows, 1, 0), strict=True):
            assert np.flatnonzero(book.any(1)).tolist() == np.unique(used).tolist()


# Codebooks


@pytest.mark.parametrize("count", [1, 3])
def test_fewer_codebooks_are_the_first_ones(count):
    few, all_of_them = (model.prepare(tiny_mimi.params(), CFG, Use(n)) for n in (count, 4))
    latents = np.random.default_rng(0).standard_normal((2, 5, CFG.dim), np.float32)
    quantise = quick_jit(layers.quantise, static_argnames="num_codebooks")
    codes = quantise(few, latents, num_codebooks=count)
    np.testing.assert_array_equal(codes, quantise(all_of_them, latents, num_codebooks=4)[:, :count])
    got = layers.dequantise(few, codes)
    assert got.shape == latents.shape
    np.testing.assert_allclose(got, layers.dequantise(all_of_them, codes), atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("count", [1, 32])
def test_one_codebook_and_all_of_kyutais_number(count):
    cfg = dataclasses.replace(CFG, codebooks=32)
    mimi = file.make(tiny_mimi.params(cfg=cfg), cfg, Use(count), licence="unknown", source="random")
    codec = MimiCodec(mimi.params, mimi.cfg, mimi.use, mimi.name, mimi.digest)
    codes = codec.encode(tiny_mimi.audio(3))
    assert codes.shape == (count, 3)
    assert np.isfinite(codec.decode(codes)).all()


@pytest.mark.parametrize("count", [0, 5, -1])
def test_other_numbers_of_codebooks_are_refused(count):
    message = f"num_codebooks={count} is no number of codebooks of a Mimi that has 4: give 1 to 4"
    with pytest.raises(InputError, match=message) as caught:
        file.make(tiny_mimi.params(), CFG, Use(count), licence="unknown", source="here")
    assert str(caught.value).count(". ") == 0
    with pytest.raises(InputError, match=f"here: {message}"):
        MimiCodec(tiny_mimi.params(), CFG, Use(count), "here", "")


@pytest.mark.parametrize("other", [{"window": "lossy"}, {"dtype": "float16"}])
def test_other_uses_are_refused(other):
    (key, value) = next(iter(other.items()))
    with pytest.raises(InputError, match=f"here: {key} is '{value}', but must be") as caught:
        MimiCodec(tiny_mimi.params(), CFG, Use(4, **other), "here", "")
    assert str(caught.value).count(". ") == 0


# Sizes


@pytest.mark.parametrize(
    ("sizes", "words"),
    [
        ({"dim": 0}, "mimi.dim=0 is not a size: give 1 or more"),
        ({"dim": "16"}, "mimi.dim is '16', but must be of type int"),
        ({"stride": True}, "mimi.stride is True, but must be of type int"),
        ({"context": 6.0}, "mimi.context is 6.0, but must be of type int"),
        ({"max_period": float("nan")}, "mimi.max_period=nan is not a period"),
        ({"ratios": ()}, r"mimi.ratios=\(\) is no list of factors"),
        ({"ratios": (8, 0)}, r"mimi.ratios=\(8, 0\) is no list of factors"),
        ({"num_heads": 16}, "mimi.num_heads=16 does not divide mimi.dim=16 into heads of even width"),
        ({"compress": 3}, "mimi.compress=3 does not divide mimi.filters=4"),
        ({"codebooks": 1}, "mimi.codebooks=1 leaves no acoustic ones"),
    ],
)
def test_sizes_that_cannot_be_are_refused(sizes, words):
    with pytest.raises(InputError, match=words) as caught:
        dataclasses.replace(CFG, **sizes)
    assert str(caught.value).count(". ") == 0


# The forms that products and attention take on a GPU


def test_a_gpus_forms_compute_the_same(monkeypatch):
    """Frames of one row, of a size that reductions read, and of three rows; past the window, with a paused row."""

    def on_gpu(*args, cuda, **others):
        return cuda(*args)

    audio = tiny_mimi.audio(8, 3)
    mask = np.ones((3, 8), bool)
    mask[1, 3:5] = False
    codec = tiny_mimi.codec()
    codes, _ = codec.encode_step(audio, codec.init_encoder(3), mask)
    heard, _ = codec.decode_step(codes, codec.init_decoder(3), mask)
    monkeypatch.setattr(jax.lax, "platform_dependent", on_gpu)
    for rows in (slice(0, 1), slice(None)):
        count = len(audio[rows])
        # New functions, since the programs of others are kept.
        encode = quick_jit(lambda *args: model.encode(*args, CFG, USE))
        decode = quick_jit(lambda *args: model.decode(*args, CFG, USE))
        encoder, decoder = codec.init_encoder(count), codec.init_decoder(count)
        for frame in range(8):
            there, samples = mask[rows, frame, None], slice(frame * CFG.frame_size, (frame + 1) * CFG.frame_size)
            got, encoder = encode(codec.params, audio[rows, samples], there, encoder)
            np.testing.assert_array_equal(got[..., 0], codes[rows, :, frame])
            got, decoder = decode(codec.params, codes[rows, :, frame, None], there, decoder)
            np.testing.assert_allclose(got, heard[rows, samples], rtol=0, atol=1e-5)


# Convolutions


@pytest.mark.parametrize("kernel", [1, 3])
def test_a_convolution_frame_by_frame_is_the_whole_one(kernel):
    """Also one that needs no sample of the past."""
    rng = np.random.default_rng(0)
    params = {"a/w": jnp.asarray(rng.standard_normal((4, kernel, 2)))}
    x, past = jnp.asarray(rng.standard_normal((2, 6, 2))), jnp.zeros((2, kernel - 1, 2))
    whole, _ = layers.conv(params, "a", x, past, layers.Advance(jnp.full(2, 3), 3))
    for start in (0, 2, 4):
        y, past = layers.conv(params, "a", x[:, start : start + 2], past, layers.Advance(jnp.ones(2, int), 1))
        np.testing.assert_allclose(y, whole[:, start : start + 2], atol=1e-5)
