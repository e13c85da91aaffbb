"""The embedded codec: streaming, causality, silence, decoding and its file."""

import itertools

import numpy as np
import pytest

from tests.helpers import codec_laws
from ttt_jax.codec import DEFAULT_FILE, load_codec
from ttt_jax.codec.kmeans import KMeansCodec, mel_filters, taper
from ttt_jax.data.audio.reader import read_audio
from ttt_jax.errors import InputError

VOICES = DEFAULT_FILE.parents[1] / "voices"
KNOWN = [
    [60, 16, 16, 26, 26, 26, 23, 23, 59, 22, 22, 7, 7, 7, 7, 7, 7, 7, 7, 7],
    [24, 11, 26, 39, 26, 11, 47, 1, 34, 24, 34, 56, 26, 56, 56, 56, 56, 56, 56, 56],
]


@pytest.fixture(scope="module")
def codec():
    return load_codec()


@pytest.fixture(scope="module")
def speech(codec):
    """Six seconds of a held-out recording, a few samples short of whole frames."""
    path = sorted(VOICES.glob("*/heldout-*.ogg"))[0]
    return read_audio(path, codec.sample_rate)[0, 32000 : 32000 + 75 * codec.frame_size - 100]


def parts(codec):
    """The tensors and metadata of a codec, free to be changed."""
    tensors = {key: value.copy() for key, value in codec.tensors.items()}
    return tensors, dict(codec.metadata)


@pytest.fixture(params=["encoder", "decoder"])
def stream(request, codec, speech):
    if request.param == "encoder":
        return codec_laws.encoding(codec, speech)
    return codec_laws.decoding(codec, speech, atol=0)


@pytest.mark.parametrize("law", codec_laws.LAWS)
def test_streams_keep_the_laws_of_codecs_bit_by_bit(stream, law):
    law(stream)


def test_states_are_equal_after_any_split(stream):
    frames = stream.frames[:, : codec_laws.FRAMES]
    _, whole = stream.step(frames, stream.init(codec_laws.ROWS), codec_laws.MASK)
    state = stream.init(codec_laws.ROWS)
    for frame, mask in enumerate(codec_laws.MASK.T):
        _, state = stream.step(frames[:, frame : frame + 1], state, mask[:, None])
    for got, expected in zip(state, whole, strict=True):
        np.testing.assert_array_equal(got, expected)


def test_recordings_of_any_lengths_are_one_batch(codec, speech):
    codec_laws.check_recordings(codec, speech, atol=0)


def test_bad_audio_and_bad_codes_are_refused(codec):
    codec_laws.check_errors(codec)


def test_codes_are_those_of_before(codec):
    """Codes in files and caches stay valid: their digest names the codec's parameters, not its code."""
    audio = np.random.default_rng(0).normal(0, 0.1, 20 * codec.frame_size).astype(np.float32)
    audio *= np.repeat(10.0 ** (-np.arange(20) / 5), codec.frame_size).astype(np.float32)
    assert codec.encode(audio)[[0, 7]].tolist() == KNOWN


def test_features_have_the_same_bits_for_any_number_of_frames(codec, speech):
    # codes could agree by luck where features differ in the last bit
    size, offline = codec.frame_size, codec.features(speech)
    for frames in (1, 3, 7):
        for start in range(1, 70, frames):
            # the frame before gives the left context; its own features lack theirs
            block = codec.features(speech[(start - 1) * size : (start + frames) * size])
            np.testing.assert_array_equal(block[1:], offline[start : start + frames])


def test_a_click_is_seen_by_the_windows_that_hold_it_and_no_others(codec):
    hop, frame, click = 256, 20, 20 * 1280 + 700
    audio = np.zeros(40 * 1280, np.float32)
    audio[click] = 0.9
    windows = codec.features(audio).reshape(-1, codec.num_bands)  # row i: the 512 samples before (i + 1) * hop
    seen = np.flatnonzero(np.abs(windows - windows[0]).max(axis=1) > 0.1)
    assert seen.tolist() == [i for i in range(len(windows)) if (i + 1) * hop - 512 < click < (i + 1) * hop]
    codes = codec.encode(audio)
    assert np.flatnonzero((codes != codes[:, :1]).any(axis=0)).tolist() == [frame]


@pytest.mark.parametrize("start", [7 * 1280 + 640, 12 * 1280 + 333])
def test_a_burst_is_decoded_at_its_place(codec, start):
    burst = np.zeros(16 * 1280, np.float32)
    burst[start : start + 640] = np.random.default_rng(0).normal(0, 0.2, 640)
    decoded = codec.decode(codec.encode(burst))
    places = [np.average(np.arange(len(audio)), weights=np.square(audio)) for audio in (burst, decoded)]
    assert places[1] == pytest.approx(places[0], abs=64)  # a quarter of the hop between windows


def test_later_samples_change_no_earlier_code(codec, speech):
    changed = speech.copy()
    changed[40 * codec.frame_size :] = np.random.default_rng(0).uniform(-0.5, 0.5, len(speech) - 40 * codec.frame_size)
    before, after = codec.encode(speech), codec.encode(changed)
    np.testing.assert_array_equal(after[:, :40], before[:, :40])
    assert (after[:, 40] != before[:, 40]).any()


def test_the_window_is_a_periodic_hann_of_unit_energy():
    np.testing.assert_allclose(taper(4), np.array([0, 0.5, 1, 0.5]) / np.sqrt(1.5), atol=1e-12)


def test_silence_is_one_code_vector_and_faint_noise_does_not_scatter_it(codec):
    samples = 40 * codec.frame_size
    silence = codec.encode(np.zeros(samples, np.float32))
    assert (silence == silence[:, :1]).all()
    hiss = np.random.default_rng(0).normal(0, 1e-4, samples).astype(np.float32)  # -80 dB of full scale
    np.testing.assert_array_equal(codec.encode(hiss), silence)
    assert (codec.encode(500 * hiss) != silence).any()


def test_decoded_audio_has_whole_frames_and_is_reproducible_and_of_silence_silent(codec, speech):
    assert np.abs(codec.decode(codec.encode(np.zeros(4 * codec.frame_size, np.float32)))).max() < 1e-3
    codes = codec.encode(speech)[:, :5]
    audio = codec.decode(codes)
    assert audio.shape == (5 * codec.frame_size,)
    assert audio.dtype == np.float32
    np.testing.assert_array_equal(codec.decode(codes), audio)
    assert codec.decode(codes[:, :1]).shape == (codec.frame_size,)
    assert codec.decode(codes[:, :0]).shape == (0,)


def test_decoded_speech_is_far_nearer_to_the_original_than_shuffled_codes(codec, speech):
    def distance(codes):
        """Log-spectral distance in dB."""
        gap = codec.features(codec.decode(codes)) - codec.features(speech)
        return 10 / np.log(10) * np.sqrt(np.square(gap).mean())

    speech = speech[: 40 * codec.frame_size]
    codes = codec.encode(speech)
    shuffled = np.random.default_rng(0).permutation(codes, axis=1)
    assert distance(codes) < 0.5 * distance(shuffled)
    assert distance(codes) < 7


def test_decoding_adds_little_to_the_error_of_the_codes_in_any_part_of_a_frame(codec, speech):
    codes = codec.encode(speech)
    gap = codec.features(codec.decode(codes)) - codec.quantised_features(codes)
    gap = gap.reshape(len(gap), codec.num_subframes, codec.num_bands)
    decibel = 10 / np.log(10) * np.sqrt(np.square(gap).mean(axis=(0, 2)))
    # The first window of a frame holds samples that were given before its codes were known.
    assert decibel[0] < 2.6
    assert decibel[1:].max() < 1


def test_every_codebook_lowers_the_error(codec, speech):
    features, codes = codec.features(speech), codec.encode(speech)
    silence = codec.encode(np.zeros(1, np.float32))
    errors = []
    for used in range(9):
        # the entry of silence is zero in every codebook but the first
        kept = np.where(np.arange(8)[:, None] < used, codes, silence)
        errors.append(np.square(features - codec.quantised_features(kept)).mean())
    assert all(later < earlier for earlier, later in itertools.pairwise(errors))


def test_the_shipped_file_is_small_and_named_for_what_it_is(codec):
    assert DEFAULT_FILE.stat().st_size <= 1_000_000
    assert codec.name == f"melkmeans-{codec.num_codebooks}x{codec.cardinality}"
    assert (codec.num_codebooks, codec.frame_rate, codec.sample_rate) == (8, 12.5, 16000)
    assert "SA" in codec.metadata["licence"]
    assert (DEFAULT_FILE.parent / "NOTICE").is_file()


def test_digest_follows_the_parameters_and_nothing_else(codec):
    tensors, metadata = parts(codec)
    assert KMeansCodec(tensors, metadata | {"licence": "another"}).digest == codec.digest
    assert KMeansCodec(tensors, metadata | {"floor": "1e-6"}).digest != codec.digest
    for key in tensors:
        tensors, _ = parts(codec)
        tensors[key].flat[-1] += 1e-3
        assert KMeansCodec(tensors, metadata).digest != codec.digest


def test_saved_codec_is_the_same_codec(codec, speech, tmp_path):
    codec.save(tmp_path / "copy.safetensors")
    copy = load_codec(tmp_path / "copy.safetensors")
    assert copy.digest == codec.digest
    assert copy.metadata == codec.metadata
    assert [path.name for path in tmp_path.iterdir()] == ["copy.safetensors"]
    np.testing.assert_array_equal(copy.encode(speech[:5000]), codec.encode(speech[:5000]))


def test_mel_filters_average_power():
    mel = mel_filters(40, 512, 16000, 60, 7600)
    np.testing.assert_allclose(mel.sum(axis=1), 1, rtol=1e-6)
    centres = mel.argmax(axis=1)
    assert (np.diff(centres) >= 1).all()


@pytest.mark.parametrize("content", [b"not a codec", DEFAULT_FILE.read_bytes()[:-1000]])
def test_file_that_is_no_codec_is_refused_by_name(tmp_path, content):
    (tmp_path / "bad.safetensors").write_bytes(content)
    with pytest.raises(InputError, match="bad.safetensors cannot be read"):
        load_codec(tmp_path / "bad.safetensors")


@pytest.mark.parametrize(("rate", "size"), [("32000", "1280"), ("16000", "1600"), ("24000", "1280"), ("24000", "1920")])
def test_a_codec_may_have_another_sample_rate_but_not_another_frame_rate(codec, tmp_path, rate, size):
    tensors, metadata = parts(codec)
    KMeansCodec(tensors, metadata | {"sample_rate": rate, "frame_size": size}).save(tmp_path / "new.safetensors")
    if int(rate) / int(size) == 12.5:
        assert load_codec(tmp_path / "new.safetensors").frame_rate == 12.5
    else:
        with pytest.raises(InputError, match=r"new.safetensors gives .* frames a second .*but models read 12\.5"):
            load_codec(tmp_path / "new.safetensors")


@pytest.mark.parametrize("value", ["inf", "nan", "-1", "0", "1280.5", "1e400"])
@pytest.mark.parametrize("key", ["frame_size", "sample_rate", "window"])
def test_sizes_that_are_none_are_refused(codec, key, value):
    tensors, metadata = parts(codec)
    with pytest.raises(InputError, match="do not fit together"):
        KMeansCodec(tensors, metadata | {key: value})


def test_codec_with_missing_or_misshapen_parameters_is_refused(codec):
    tensors, metadata = parts(codec)
    for bad_tensors, bad_metadata, message in (
        (tensors, metadata | {"format": "other"}, "format 'other'"),
        (tensors, {key: value for key, value in metadata.items() if key != "floor"}, "floor"),
        (tensors, metadata | {"window": "wide"}, "no number"),
        ({key: tensors[key] for key in ("codebooks", "mean")}, metadata, "lacks mel"),
        (tensors | {"mean": tensors["mean"][:-1]}, metadata, "do not fit together"),
        (tensors | {"mean": np.full_like(tensors["mean"], np.nan)}, metadata, "do not fit together"),
    ):
        with pytest.raises(InputError, match=message):
            KMeansCodec(bad_tensors, bad_metadata)
