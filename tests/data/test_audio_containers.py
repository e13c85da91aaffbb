"""All containers: joined files, bytes around the sound, damage, levels, other formats."""

import os
import shlex
from pathlib import Path

import numpy as np
import pytest

from tests.helpers.sounds import (
    APE,
    APE_1,
    COUNT,
    FORMATS,
    ID3,
    RANDOM,
    RATE,
    TAG,
    encoded,
    flac_with_total,
    noise,
    refused,
    wav,
)
from ttt_jax.data.audio import reader
from ttt_jax.data.audio.containers import Source
from ttt_jax.data.audio.reader import read_audio
from ttt_jax.errors import InputError


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("block", [1 << 18, 1000])
def test_joined_files_are_read_one_after_the_other(read, files, monkeypatch, name, block):
    monkeypatch.setattr(reader, "_BLOCK", block)
    other = encoded(noise(10000, seed=1), **FORMATS[name])
    each = [read(files[name]), read(other), read(files[name])]
    joined = read(files[name] + other + files[name])
    np.testing.assert_array_equal(joined, np.concatenate(each, axis=1))


def test_joined_wavs_of_open_size_and_joined_flacs_of_open_length(read, files):
    assert read(wav(0xFFFFFFFF, 0xFFFFFFFF) + wav(0, 0) + wav(48000)).shape == (1, 3 * COUNT)
    assert read(2 * flac_with_total(files["flac"], 0)).shape == (1, 2 * COUNT)


@pytest.mark.parametrize("name", FORMATS)
def test_a_file_that_is_joined_and_cut_off_is_refused(read, files, name):
    twice = 2 * files[name]
    for keep in (0.51, 0.75, 0.98):
        refused(read, twice[: int(len(twice) * keep)], "cut off or damaged|sound nor a tag")


@pytest.mark.parametrize("name", ["wav", "flac", "vorbis", "mp3"])
def test_joined_files_of_two_rates_are_resampled_and_of_other_channels_refused(read, files, name):
    other = encoded(noise(12000), 8000, **FORMATS[name])
    for joined in (files[name] + other, other + files[name]):  # the resampler's last samples count in either order
        assert read(joined).shape == (1, COUNT + 24000)
    stereo = encoded(noise(channels=2), **FORMATS[name])
    refused(read, files[name] + stereo, "joined of files with 1 and 2 channels")


@pytest.mark.parametrize(
    "tail", [TAG, ID3 + TAG, APE + TAG, APE_1, APE_1 + TAG, bytes(2000), b"LYRICSBEGINabc000012LYRICS200" + TAG]
)
@pytest.mark.parametrize("name", FORMATS)
def test_tags_and_zeros_behind_the_sound_are_no_sound(read, files, caplog, name, tail):
    assert read(files[name] + tail).shape == (1, COUNT)
    assert not caplog.text


@pytest.mark.parametrize("name", FORMATS)
def test_a_tag_before_and_few_stray_bytes_behind_the_sound_are_left_out(read, files, caplog, name):
    assert read(ID3 + files[name] + b"hello\n").shape == (1, COUNT)
    assert "ends with 6 bytes that are neither sound nor a tag" in caplog.text
    refused(read, files[name] + RANDOM, "cut off or damaged")


def check_damaged(read, content, seed):
    """A damaged file is read or refused by one sentence; one that is cut off is never read."""
    rng = np.random.default_rng(seed)
    kind, at = rng.choice(["cut", "byte", "field", "sizes", "inserted", "zeros"]), rng.integers(len(content))
    if kind in ("field", "sizes"):
        at = rng.integers(100)
    new = {
        "cut": b"",
        "byte": rng.bytes(1),
        "field": rng.choice([b"\0", b"\xff", b"\x7f", b"\x80", b"\1"]),
        "sizes": rng.choice([b"\xff" * 4, bytes(4), b"\xff\xff\xff\x7f"]),
        "inserted": rng.bytes(rng.integers(1, 3000)),
        "zeros": bytes(rng.integers(1, 3000)),
    }[kind]
    rest = {"cut": b"", "inserted": content[at:]}.get(kind, content[at + len(new) :])
    try:
        samples = read(content[:at] + new + rest)
    except InputError as error:
        assert "\n" not in str(error)  # noqa: PT017
    else:
        assert kind != "cut"
        assert np.isfinite(samples).all()


@pytest.mark.parametrize("seeds", [range(12), pytest.param(range(100, 220), marks=pytest.mark.slow)], ids=str)
@pytest.mark.parametrize("name", FORMATS)
def test_damaged_files_are_read_or_refused(read, files, name, seeds):
    for seed in seeds:
        check_damaged(read, files[name] * (1 + seed % 2), seed)


INTEGERS = "holds samples of .* near second 1.0, where full scale is 1: divide them by"
DAMAGE = r"is damaged \(it holds samples of .* near second 1\.0.* copy or encode the file again"


@pytest.mark.parametrize(
    ("value", "message"),
    [
        *((value, INTEGERS) for value in (20.0, -127.0, 32767.0, 2.0**31)),
        *((value, DAMAGE) for value in (2.0**31 + 256, -1e10, 1e30)),
    ],
)
def test_a_sample_far_beyond_full_scale_is_an_integer_or_damage(read, value, message):
    samples = noise()
    samples[RATE] = value
    refused(read, encoded(samples, **FORMATS["float"]), message)


@pytest.mark.parametrize(
    ("scale", "clipped", "message"),
    [
        (1.0, 0, ""),
        (6.0, 0, "is clipped: 29 % of its samples are at full scale"),
        (10.0, 0, "has a peak of 3.0, where full scale is 1"),
        (0.0, 0, "is silent: all its samples are 0"),
        (0.003, 0, "is nearly silent: its peak is -61 dB of full scale"),
        (1.0, 0.002, ""),
        *((1.0, share, f"is clipped: {100 * share:.0f} % of its samples are at full scale") for share in (0.02, 0.6)),
    ],
)
@pytest.mark.parametrize("name", ["wav", "float", "flac"])
def test_doubtful_levels_are_reported(read, caplog, name, scale, clipped, message):
    samples = noise() * scale
    samples[: int(clipped * COUNT) : 2] = 1
    samples[1 : int(clipped * COUNT) : 2] = -1
    content = encoded(samples, **FORMATS["float" if scale > 1 else name])
    np.testing.assert_allclose(read(content)[0], samples[:, 0], atol=1e-4)
    assert [text.split(" ", 1)[1].startswith(message) for text in caplog.messages[:1]] == [True] * bool(message)


OTHERS = {
    "an MP4 file": b"\0\0\0\x1cftypM4A \0\0\2\0isomiso2",
    "a Matroska or WebM file": b"\x1a\x45\xdf\xa3\x9fB\x86\x81\1",
    "a NIST SPHERE file": b"NIST_1A\n   1024\n",
    "an AIFF file": b"FORM\0\0\x10\0AIFFCOMM",
    "an AIFC file": b"FORM\0\0\x10\0AIFCFVER",
    "a CAF file": b"caff\0\1\0\0desc",
    "an AU file": b".snd\0\0\0\x18",
    "an ASF file": b"\x30\x26\xb2\x75\x8e\x66\xcf\x11\xa6\xd9",
    "an AMR file": b"#!AMR\n",
    "a raw AAC stream": b"\xff\xf1\x50\x80\x2e\x7f\xfc",
    "MPEG audio of a free bit rate": b"\xff\xfb\x00\xc4",
    "a W64 file": b"riff\x2e\x91\xcf\x11\xa5\xd6",
    "an AVI file": b"RIFF\0\0\x10\0AVI LIST",
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_formats_are_named_with_what_converts_them(read, name):
    message = rf"is {name}.*convert it first, for example by ffmpeg -i sound sound\.flac\.$"
    refused(read, OTHERS[name] + bytes(100) + RANDOM, message)


@pytest.mark.parametrize("name", ["talk.flac", "a b.FLAC", "flac", "it's.wav", "a$b;c.wav"])
@pytest.mark.parametrize(("content", "options"), [(OTHERS["an MP4 file"], []), (wav(96000), ["-ignore_length", "1"])])
def test_the_command_that_converts_is_one_for_a_shell_and_keeps_the_file(tmp_path, name, content, options):
    (tmp_path / name).write_bytes(content + RANDOM[:100])
    with pytest.raises(InputError, match="for example by") as caught:
        read_audio(tmp_path / name, RATE)
    words = shlex.split(str(caught.value)[:-1].split("for example by ", 1)[1])
    assert words[:-1] == ["ffmpeg", *options, "-i", name]
    assert words[-1].lower() != name.lower()
    assert words[-1].startswith(name.split(".")[0])


@pytest.mark.parametrize(
    ("content", "name"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid", "a Git LFS file"),
        (b"/annex/objects/SHA256E-s1--ab.wav\n", "a git-annex file"),
        (b"<!DOCTYPE html><html>", "a web page"),
        (b"PK\x03\x04aaaaaaaaaaaa", "a zip archive"),
    ],
)
def test_what_is_no_sound_is_named(read, content, name):
    refused(read, content, f"{name}.*, no sound: give a wav, flac, ogg or mp3 file")


@pytest.mark.parametrize("ending", ["wav", "mp3", "raw", "txt"])
def test_the_content_decides_and_not_the_ending(tmp_path, files, ending):
    for content in files.values():
        (tmp_path / f"sound.{ending}").write_bytes(content)
        assert read_audio(tmp_path / f"sound.{ending}", RATE).shape == (1, COUNT)


@pytest.mark.parametrize(
    "name", [b"caf\xe9.wav", b"\xff\xfe \n.wav", "e\u0301 \u00e9 \U0001f3a4.wav".encode(), b"-i 100%.wav"]
)
def test_files_of_any_name_and_links_to_them_are_read(tmp_path, files, name):
    path = Path(os.fsdecode(os.fsencode(tmp_path) + b"/" + name))
    path.write_bytes(files["wav"])
    link = path.with_suffix(".link")
    link.symlink_to(path)
    for given in (path, str(path), link):
        assert read_audio(given, RATE).shape == (1, COUNT)
    path.write_bytes(files["wav"][:-100])
    with pytest.raises(InputError, match="is cut off or damaged"):
        read_audio(path, RATE)


def test_a_broken_link_a_pipe_and_a_device_are_refused(tmp_path):
    (tmp_path / "link.wav").symlink_to(tmp_path / "nowhere.wav")
    with pytest.raises(InputError, match=r"link\.wav does not exist"):
        read_audio(tmp_path / "link.wav", RATE)
    os.mkfifo(tmp_path / "pipe.wav")
    for path in (tmp_path / "pipe.wav", "/dev/zero"):
        with pytest.raises(InputError, match="it is no regular file"):
            read_audio(path, RATE)


def test_an_error_of_the_disk_is_reported(tmp_path, files, monkeypatch):
    path = tmp_path / "a.wav"
    path.write_bytes(files["wav"])
    before = Source.read

    def fail(self, at, count):
        if 20000 < at < 40000:  # not where the container is walked
            raise OSError(5, "Input/output error")
        return before(self, at, count)

    monkeypatch.setattr(Source, "read", fail)
    with pytest.raises(InputError, match=r"a\.wav cannot be read \(Input/output error\)"):
        read_audio(path, RATE)
