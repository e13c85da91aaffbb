"""Laws of Mimi's streams, for both windows: splits, batches, masks, pauses, resets, causality; bfloat16."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.helpers import codec_laws, tiny_mimi
from tests.helpers.comparing import same
from tests.helpers.tiny_mimi import CFG
from ttt_jax.codec.mimi import codec as of_arrays
from ttt_jax.codec.mimi import model
from ttt_jax.codec.mimi.config import Use
from ttt_jax.errors import InputError

ATOL = 1e-5
"""Of audio and states, which reach 5: products of other numbers of rows add in another order. Codes are equal."""
ROWS, FRAMES, PADDED = codec_laws.ROWS, codec_laws.FRAMES, 8
MASK = np.pad(codec_laws.MASK, ((0, 0), (0, 2)))
"""At the length that six frames are padded to: the program is that of the other laws."""


@pytest.fixture(scope="module", params=["exact", pytest.param("reference", marks=pytest.mark.slow)])
def codec(request):
    return tiny_mimi.codec(Use(4, window=request.param))


@pytest.fixture(scope="module")
def streams(codec):
    audio = tiny_mimi.audio(ROWS * 2 * FRAMES)
    return {"encoder": codec_laws.encoding(codec, audio), "decoder": codec_laws.decoding(codec, audio, ATOL)}


@pytest.fixture(params=["encoder", "decoder"])
def stream(request, streams):
    return streams[request.param]


def test_states_of_others_and_states_passed_on_twice_are_refused(codec):
    step = lambda state: codec.encode_step(np.zeros((ROWS, 0), np.float32), state)  # noqa: E731
    for state in (codec.init_encoder(ROWS + 1), codec.init_decoder(ROWS), None):
        with pytest.raises(InputError, match=rf"which is not of init_encoder\({ROWS}\): give what that"):
            step(state)
    state = codec.init_encoder(ROWS)
    codec.reset(state, np.ones(ROWS, bool))
    with pytest.raises(InputError, match="a state that was passed on before, .* pass on a copy by fork"):
        step(state)


@pytest.mark.parametrize("law", codec_laws.LAWS)
def test_streams_keep_the_laws_of_codecs(stream, law):
    law(stream)


def test_codes_are_various(streams):
    """Else their equality would say little."""
    assert all(len(np.unique(row)) >= 12 for row in np.moveaxis(streams["decoder"].frames, 2, 0))


def test_states_are_equal_after_any_split(stream):
    frames = stream.frames[:, :FRAMES]
    _, whole = stream.step(frames, stream.init(ROWS), codec_laws.MASK)
    for size in (1, 3):
        state = stream.init(ROWS)
        for start in range(0, FRAMES, size):
            call = slice(start, start + size)
            _, state = stream.step(frames[:, call], state, codec_laws.MASK[:, call])
        np.testing.assert_array_equal(state.position, whole.position)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=ATOL), state, whole)


def test_long_recordings_go_block_by_block(codec, streams, monkeypatch):
    frames = streams["decoder"].frames
    monkeypatch.setitem(of_arrays._BLOCK, "cpu", 4)
    got, _ = streams["encoder"].step(streams["encoder"].frames, codec.init_encoder(ROWS))
    np.testing.assert_array_equal(got, frames)
    parts, _ = streams["decoder"].step(frames, codec.init_decoder(ROWS))
    monkeypatch.setitem(of_arrays._BLOCK, "cpu", 8)
    whole, _ = streams["decoder"].step(frames, codec.init_decoder(ROWS))
    streams["decoder"].is_equal(parts, whole)


def test_recordings_of_any_lengths_are_one_batch(codec):
    codec_laws.check_recordings(codec, tiny_mimi.audio(FRAMES), ATOL)


def test_bad_audio_and_bad_codes_are_refused(codec):
    codec_laws.check_errors(codec)


@pytest.mark.parametrize("junk", [np.nan, np.inf, 1e30])
def test_what_a_frame_that_is_left_out_holds_changes_no_bit(codec, junk):
    """Of codes, audio, latents elsewhere and states; from the first frame on and in later ones."""
    encode, decode = (  # programs that are compiled already for the other laws
        jax.jit(step, static_argnames=("cfg", "use"), donate_argnames="state") for step in (model.encode, model.decode)
    )
    results = []
    for content in (0, junk):
        audio = tiny_mimi.audio(PADDED, ROWS).reshape(ROWS, PADDED, -1)
        audio[~MASK] = content
        state = codec.init_encoder(ROWS)
        for _ in range(2):
            codes, state = encode(codec.params, audio.reshape(ROWS, -1), MASK, state, codec.cfg, codec.use)
        heard = np.where(MASK[:, None], codes, -1 if content == 0 else 7).astype(np.int32)
        said, after = decode(codec.params, heard, MASK, codec.init_decoder(ROWS), codec.cfg, codec.use)
        results.append((codes, state, said, after))
    same(*results)
    codes, state, said, after = results[0]
    assert (np.moveaxis(np.asarray(codes), 1, 2)[~MASK] == -1).all()
    assert (np.asarray(said).reshape(ROWS, PADDED, -1)[~MASK] == 0).all()
    assert np.asarray(state.position).tolist() == (2 * CFG.stride * MASK.sum(1)).tolist()
    assert np.asarray(after.position).tolist() == (CFG.stride * MASK.sum(1)).tolist()


def test_a_call_that_a_row_is_left_out_of_changes_no_bit_of_its_state(stream):
    """One frame or several; a row that has begun, and one that has not."""
    for begun in (True, False):
        for frames in (1, 3):
            state = stream.init(ROWS)
            if begun:
                _, state = stream.step(stream.frames[:, :FRAMES], state)
            before = jax.tree.map(np.array, state)
            rows = np.array([True, False, True])
            _, after = stream.step(stream.frames[:, :frames], state, np.repeat(rows[:, None], frames, 1))
            after = jax.tree.map(np.array, after)
            same(jax.tree.map(lambda x: x[1], after), jax.tree.map(lambda x: x[1], before))
            assert (after.position[rows] > before.position[rows]).all()


@pytest.mark.parametrize("frame", [1, 4])
def test_nothing_depends_on_what_comes_later(stream, frame):
    """Bit by bit: not on the frame of any later sample or code, and on its own."""
    frames = stream.frames[:, :FRAMES].copy()
    before, _ = stream.step(frames, stream.init(ROWS))
    frames[:, frame] = stream.frames[:, FRAMES]
    after, _ = stream.step(frames, stream.init(ROWS))
    np.testing.assert_array_equal(after[:, :frame], before[:, :frame])
    assert (after[:, frame] != before[:, frame]).any(1).all()


def test_the_first_changed_sample_is_that_of_the_code(streams):
    """A code is heard from the first sample of its frame on."""
    decoder = streams["decoder"]
    frames = decoder.frames[:, :FRAMES].copy()
    before, _ = decoder.step(frames, decoder.init(ROWS))
    frames[:, 3, 0] = (frames[:, 3, 0] + 1) % CFG.cardinality
    after, _ = decoder.step(frames, decoder.init(ROWS))
    changed = (after != before).reshape(ROWS, -1)
    assert (changed.argmax(1) == 3 * CFG.frame_size).all()


def test_a_row_is_fresh_bit_by_bit_after_a_reset(stream):
    _, state = stream.step(stream.frames[:, :FRAMES], stream.init(ROWS))
    rows = np.array([False, True, True])
    kept, fresh = jax.tree.map(np.array, state), jax.tree.map(np.array, stream.init(ROWS))
    got = jax.tree.map(np.array, stream.reset(state, rows))
    same(jax.tree.map(lambda x: x[1:], got), jax.tree.map(lambda x: x[1:], fresh))
    same(jax.tree.map(lambda x: x[:1], got), jax.tree.map(lambda x: x[:1], kept))


@pytest.mark.slow
def test_windows_differ_from_the_frame_on_where_a_stream_loses_a_key():
    """The fourth frame's first latent has six before it, of which PyTorch's ring of six has lost one more by then."""
    audio = tiny_mimi.audio(ROWS * 2 * FRAMES)
    streams = [codec_laws.decoding(tiny_mimi.codec(Use(4, window=w)), audio, ATOL) for w in ("exact", "reference")]
    frames = streams[0].frames[:, :FRAMES]
    expected, got = (stream.step(frames, stream.init(ROWS))[0] for stream in streams)
    apart = np.abs(got - expected).max((0, 2)) > 10 * ATOL
    assert apart.tolist() == [False] * 3 + [True] * 3


@pytest.mark.slow
def test_bfloat16_is_near_float32():
    """Its audio is 25 dB or more above the difference, as three digits of activations let expect; states keep their
    types."""
    audio, rows = tiny_mimi.audio(2 * FRAMES, ROWS), ROWS
    codec, wide = tiny_mimi.codec(Use(4, dtype="bfloat16")), tiny_mimi.codec()
    first, second = np.split(audio, 2, 1)
    expected, _ = wide.encode_step(first, wide.init_encoder(rows))
    codes, encoder = codec.encode_step(first, codec.init_encoder(rows))
    more, encoder = codec.encode_step(second, encoder)
    got, decoder = codec.decode_step(expected, codec.init_decoder(rows))
    reference, _ = wide.decode_step(expected, wide.init_decoder(rows))
    for after in (encoder, decoder):
        assert after.position.dtype == jnp.int32
        assert {leaf.dtype for leaf in (after.past, *after.caches)} == {jnp.dtype(jnp.bfloat16)}
    assert np.isfinite(got).all()
    assert ((more >= 0) & (more < CFG.cardinality)).all()
    assert (codes == expected)[:, 0].mean() > 0.8  # the semantic codebook; later ones quantise rounding, too
    noise = np.square(got - reference).mean() / np.square(reference).mean()
    assert 10 * np.log10(noise) < -25
    for name, array in codec.params.items():
        assert array.dtype == (jnp.float32 if name.startswith("quantizer/") else jnp.bfloat16), name


def test_no_rows_give_no_rows():
    codec = tiny_mimi.codec()
    nothing = np.zeros((0, 2 * CFG.frame_size), np.float32)
    codes, state = codec.encode_step(nothing, codec.init_encoder(0))
    assert codes.shape == (0, codec.num_codebooks, 2)
    assert codec.decode_step(codes, codec.init_decoder(0))[0].shape == nothing.shape
    assert state.position.shape == (0,)
