"""Builds the embedded corpus: ``python -m corpus.build --work DIR`` from the root of a checkout.

Downloads the packages of ``sources.json`` with apt-get (Debian bookworm) into DIR, unpacks them without installing,
joins prompts of one voice into files of one to two minutes and writes, beside this script, ``voices/<voice>/`` (Ogg
Opus, word alignments, LICENSE, NOTICE) and the manifests ``train.jsonl`` and ``heldout.jsonl``. Needs numpy, soundfile
and, for this script alone, PyPI's G722 and pocketsphinx. The same sources and seed give the same files. Afterwards run
``python -m corpus.fit_tokenizer`` and ``python -m corpus.fit_codec``.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import re
import shutil
import struct
import subprocess
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from corpus.align import RATE, Aligner, spread, voiced_frames
from corpus.prompts import Prompt, drop_similar, read_asterisk, read_librivox, share_out
from ttt_jax.data.alignments import Word
from ttt_jax.data.audio.containers.ogg import checksum

HERE = Path(__file__).resolve().parent
SEED = 20260
SECONDS = 345.0  # of each Asterisk voice, gaps included
HELDOUT_SECONDS = 85.0
TRAIN_FILES = 4
GAP = (0.25, 0.45)  # seconds of silence between two prompts
EDGE = 0.3  # seconds of silence at either end of a file
FADE = 80  # samples, 5 ms, at either end of a prompt
# libsndfile's scale; 0.97 is about 26 kb/s. Opus sometimes lets the voice leak into the silent channel: then the next.
COMPRESSION = (0.97, 0.965, 0.96, 0.95, 0.93)


@dataclass(frozen=True)
class Voice:
    """Sources of a voice folder: packages, the stanza of their copyright file, licence and credit."""

    folder: str
    language: str
    packages: tuple[str, ...]
    stanza: str
    license: str
    credit: str


def _asterisk(folder: str, language: str, stanza: str, license_name: str, credit: str) -> Voice:
    names = (f"asterisk-core-sounds-{language}", f"asterisk-core-sounds-{language}-g722")
    return Voice(folder, language, names, stanza, license_name, credit)


_ALLISON = "recorded by Allison Smith (http://www.theivrvoice.com); financial contribution by Digium, Inc."
_JUNE = (
    "recorded by June Wallack (http://www.junewallack.com); translated by Clod Patry, Kristopher Lalletti and"
    " June Wallack"
)
_CARLO = (
    "recorded by Carlo Flora (http://www.carloflora.com, http://www.segreterietelefoniche.it); translated by Silvia"
    " Petrin"
)
VOICES = (
    _asterisk("en_us_f_allison", "en", "*", "CC-BY-SA-3.0", _ALLISON),
    _asterisk("es_mx_f_allison", "es", "*", "CC-BY-SA-3.0", _ALLISON),
    _asterisk("fr_ca_f_june", "fr", "fr-*", "CC-BY-SA-3.0", _JUNE),
    _asterisk("it_it_m_carlo", "it", "it-*", "CC-BY-3.0", _CARLO),
    _asterisk("ru_ru_f_ivrvoice", "ru", "ru-*", "CC-BY-3.0", "provided by Maxim Topal (http://www.ivrvoice.ru)"),
    Voice(
        "en_librivox",
        "en",
        ("pocketsphinx-testdata",),
        "*",
        "BSD-2",
        "recorded by a LibriVox volunteer whom the package does not name: Jane Austen, Sense and Sensibility,"
        " chapter 1",
    ),
)
URLS = {
    "CC-BY-SA-3.0": "https://creativecommons.org/licenses/by-sa/3.0/",
    "CC-BY-3.0": "https://creativecommons.org/licenses/by/3.0/",
}


def fetch(work: Path, voice: Voice) -> Path:
    """Returns one folder with all packages of a voice, downloaded and unpacked; refuses packages of another hash."""
    root, packages = work / "unpacked" / voice.folder, json.loads((HERE / "sources.json").read_text())["packages"]
    root.mkdir(parents=True, exist_ok=True)
    for name in voice.packages:
        source = packages[name]
        debs = list(work.glob(f"{name}_*.deb"))
        if not debs:
            subprocess.run(["apt-get", "download", f"{name}={source['version']}"], cwd=work, check=True)
            debs = list(work.glob(f"{name}_*.deb"))
        digest = hashlib.sha256(debs[0].read_bytes()).hexdigest()
        if digest != source["sha256"]:
            raise SystemExit(f"{debs[0]} has SHA-256 {digest}, sources.json expects {source['sha256']}")
        subprocess.run(["dpkg", "-x", str(debs[0]), str(root)], check=True)
    return root


def join(prompts: list[Prompt], aligner: Aligner | None, rng: random.Random) -> tuple[np.ndarray, dict]:
    """Returns float32 [samples] of the prompts with gaps between them, and the content of their alignment file."""
    pieces = [np.zeros(int(EDGE * RATE), np.float32)]
    position, rows, marks = len(pieces[0]), [], []
    for prompt in prompts:
        timed, method = align(prompt, aligner)
        start = position / RATE
        for word in timed:
            rows.append([word.text, [round(start + word.start, 2), round(start + word.end, 2)], word.speaker])
        marks.append(
            {"name": prompt.name, "start": round(start, 2), "seconds": round(prompt.seconds, 2), "method": method}
        )
        ramp = np.minimum(1.0, np.arange(len(prompt.audio), dtype=np.float32) / FADE)
        pieces += [prompt.audio * ramp * ramp[::-1], np.zeros(int(rng.uniform(*GAP) * RATE), np.float32)]
        position += len(pieces[-2]) + len(pieces[-1])
    pieces[-1] = np.zeros(int(EDGE * RATE), np.float32)
    methods = sorted({mark["method"] for mark in marks})
    content = {"alignments": rows, "alignment_method": "+".join(methods), "prompts": marks}
    return np.concatenate(pieces), content


def align(prompt: Prompt, aligner: Aligner | None) -> tuple[list[Word], str]:
    """Returns a prompt's timed words and the method: "pocketsphinx", or "spread" if that finds no path."""
    timed = aligner.align(list(prompt.words), prompt.audio) if aligner else None
    if timed is not None:
        return timed, "pocketsphinx"
    return spread(list(prompt.words), voiced_frames(prompt.audio)), "spread"


def write_ogg(path: Path, audio: np.ndarray) -> None:
    """Writes float32 [samples] as the left channel of an Ogg Opus file whose right channel is silent."""
    import soundfile

    stereo = np.stack([audio, np.zeros_like(audio)], axis=1)
    for level in COMPRESSION:
        soundfile.write(path, stereo, RATE, format="OGG", subtype="OPUS", compression_level=level)
        left, right = soundfile.read(path, always_2d=True)[0].T
        # Clicks of up to 1e-3, half a millisecond long, stay at some files' ends.
        if np.abs(right).max() < 2e-3 and np.sqrt(np.mean(right**2)) < 1e-5 and len(left) == len(audio):
            break
    else:
        raise SystemExit(f"{path}: the encoder did not keep the right channel silent or the length")
    path.write_bytes(_with_serial(path.read_bytes(), 1))


def _with_serial(data: bytes, serial: int) -> bytes:
    """Returns an Ogg stream with this serial number; encoders draw random ones, which would change every build."""
    pages, at = [], 0
    while at < len(data):
        segments = data[at + 26]
        size = 27 + segments + sum(data[at + 27 : at + 27 + segments])
        page = bytearray(data[at : at + size])
        page[14:18] = struct.pack("<I", serial)
        page[22:26] = struct.pack("<I", checksum(bytes(page)))
        pages.append(bytes(page))
        at += size
    return b"".join(pages)


def write_notices(folder: Path, voice: Voice, copyright_file: Path) -> None:
    """Writes LICENSE (the legal text of the package) and NOTICE (author, source, changes)."""
    text = copyright_file.read_text(encoding="utf-8")
    stanza = next(part for part in text.split("\n\n") if part.startswith(f"Files: {voice.stanza}\n"))
    versions = json.loads((HERE / "sources.json").read_text())["packages"]
    sources = "\n".join(f"  {name} {versions[name]['version']} (Debian bookworm)" for name in voice.packages)
    if voice.license in URLS:
        body = text.split(f"\n\nLicense: {voice.license}\n", 1)[1].split("\n\nLicense: ", 1)[0]
        head = f"{voice.license}, {URLS[voice.license]}\nLegal text as the Debian package carries it:\n\n"
        terms = f"{voice.license} ({URLS[voice.license]}), legal text in LICENSE"
    else:
        body = stanza.split(f"License: {voice.license}\n", 1)[1]
        head = (
            "LibriVox recordings are in the public domain (https://librivox.org/pages/public-domain/).\n"
            "The package that carries these excerpts is distributed under the following terms:\n\n"
            "Copyright 1995-2014 Carnegie Mellon University, 2014-2015 Alpha Cephei Inc.\n\n"
        )
        terms = "public domain (LibriVox); the package's own terms (BSD, two clauses) in LICENSE"
    body = re.sub(r"^ \.$", "", body, flags=re.M)
    body = re.sub(r"[ \t]+$", "", re.sub(r"^ ", "", body, flags=re.M), flags=re.M)
    (folder / "LICENSE").write_text(head + body.strip("\n") + "\n", encoding="utf-8")
    changes = (
        "Changes made: prompts trimmed to the speech (5 ms fades), several joined with short silences into one file,"
        " a\nsilent second channel added, encoded as Ogg Opus at 16 kHz. Transcripts: reduced to words, single digits"
        " spelled\nout, a few misspellings corrected, times added. The JSON files beside the recordings are derived"
        " from these\ntranscripts and stand under the same terms."
    )
    (folder / "NOTICE").write_text(
        f"Author: {voice.credit}\nTerms: {terms}\nSource packages:\n{sources}\n{changes}\n\n"
        f"From the packages' copyright file:\n\n{stanza.strip()}\n",
        encoding="utf-8",
    )


def build_voice(voice: Voice, root: Path) -> tuple[list[dict], list[dict]]:
    """Writes a voice's folder; returns its manifest lines for training and held out."""
    rng = random.Random(f"{SEED} {voice.folder}")
    aligner = Aligner() if voice.language == "en" else None  # a new one each time: it adapts to the speech
    if voice.folder == "en_librivox":
        heldout, files = read_librivox(root), []
    else:
        prompts = drop_similar(read_asterisk(root, voice.language))
        heldout, files = share_out(prompts, SECONDS, HELDOUT_SECONDS, TRAIN_FILES, sum(GAP) / 2, SEED)
    folder = HERE / "voices" / voice.folder
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    write_notices(folder, voice, next(root.glob("usr/share/doc/*/copyright")))
    lines = []
    named = [("heldout-1", heldout)] + [(f"train-{i}", file) for i, file in enumerate(files, start=1)]
    for name, members in named:
        audio, content = join(members, aligner, rng)
        write_ogg(folder / f"{name}.ogg", audio)
        rows = ",\n  ".join(json.dumps(row, ensure_ascii=False) for row in content.pop("alignments"))
        rest = json.dumps(content, ensure_ascii=False)[1:]
        (folder / f"{name}.json").write_text(f'{{"alignments": [\n  {rows}\n],\n{rest}\n', encoding="utf-8")
        path = f"voices/{voice.folder}/{name}.ogg"
        speaker = voice.folder.rsplit("_", 1)[-1]  # one woman speaks English and Spanish
        duration = round(len(audio) / RATE, 4)
        lines.append({"path": path, "duration": duration, "voice": voice.folder, "speaker": speaker})
    return lines[1:], lines[:1]


def main() -> None:
    """Builds all voices and the two manifests."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for downloaded and unpacked packages")
    work = parser.parse_args().work
    work.mkdir(parents=True, exist_ok=True)
    built = [build_voice(voice, fetch(work, voice)) for voice in VOICES]
    for name, parts in zip(("train", "heldout"), zip(*built, strict=True), strict=True):
        text = "".join(json.dumps(line) + "\n" for part in parts for line in part)
        (HERE / f"{name}.jsonl").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
