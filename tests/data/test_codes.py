"""Code files: their tensor and their metadata."""

import numpy as np
import safetensors.numpy

from ttt_jax.data.codes import Codes, Source, read_codes, write_codes


def test_code_files_of_others_need_only_rate_and_codec(tmp_path):
    metadata = {"frame_rate": "12.5", "codec": "d" * 64}
    safetensors.numpy.save_file({"codes": np.zeros((8, 5), np.int64)}, tmp_path / "a.safetensors", metadata=metadata)
    codes = read_codes(tmp_path / "a.safetensors")
    assert codes[1:] == (12.5, "d" * 64, None, None, None, None, (), (), None)
    assert codes.codes.dtype == np.int32
    assert (codes.num_frames, codes.seconds, codes.has_text) == (5, 0.4, False)


def test_code_files_return_what_was_written(tmp_path):
    source = Source("\u00e9\udcff.wav", "0" * 64, 0.25, 4, 0)
    tokens = np.full((17, 9), 40000, np.int32)  # no int16
    codes = Codes(tokens, 12.5, "d", "name", 50000, "t", "moshi", (source, source._replace(start=4)), (4,), "i")
    write_codes(tmp_path / "sub" / "a.safetensors", codes)
    found = read_codes(tmp_path / "sub" / "a.safetensors")
    np.testing.assert_array_equal(found.codes, tokens)
    assert found[1:] == codes[1:]
    assert found.has_text
    assert [path.name for path in (tmp_path / "sub").iterdir()] == ["a.safetensors"]
