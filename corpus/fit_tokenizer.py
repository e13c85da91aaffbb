"""Fits the text tokenizer: ``python -m corpus.fit_tokenizer`` from the root of a checkout, after ``corpus.build``.

A SentencePiece model of 512 pieces over the words of the training files (``train.jsonl``), all five languages. Its ids
are Moshi's: 0 unknown (EPAD in a stream), 1 and 2 begin and end, 3 padding. Text is folded to lower case.
"""

from __future__ import annotations

import io
from pathlib import Path

from ttt_jax.data.alignments import read_beside
from ttt_jax.data.manifest import read_manifest

HERE = Path(__file__).resolve().parent
PIECES = 512
# Letters that every word of these languages needs, even if the training text lacks them.
LETTERS = "abcdefghijklmnopqrstuvwxyzàâäçèéêëìíîïñòóôöùúûüœабвгдежзийклмнопрстуфхцчшщъыьэюяё0123456789'.,!?-"


def training_text() -> list[str]:
    """Returns the words of each training file as one line."""
    contents = [read_beside(entry.alignment)[1] for entry in read_manifest(HERE / "train.jsonl").entries]
    return [" ".join(row[0] for row in content["alignments"]) for content in contents]


def main() -> None:
    """Writes tokenizer/spm512.model and its NOTICE."""
    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(training_text()),
        model_writer=model,
        model_type="bpe",
        vocab_size=PIECES,
        character_coverage=1.0,
        required_chars=LETTERS,
        normalization_rule_name="nmt_nfkc_cf",
        max_sentence_length=1 << 16,
        num_threads=1,
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=3,
        minloglevel=2,
    )
    folder = HERE / "tokenizer"
    folder.mkdir(exist_ok=True)
    (folder / f"spm{PIECES}.model").write_bytes(model.getvalue())
    (folder / "NOTICE").write_text(
        f"spm{PIECES}.model is fitted to the transcripts of the training files in ../voices, which are under"
        " CC-BY-SA-3.0\n(English, Spanish: Allison Smith, Digium; French: June Wallack) and CC-BY-3.0 (Italian: Carlo"
        " Flora; Russian:\nMaxim Topal). It is therefore distributed under CC-BY-SA-3.0\n"
        "(https://creativecommons.org/licenses/by-sa/3.0/, text in ../voices/en_us_f_allison/LICENSE), not under the\n"
        "licence of the project's code. Authors and sources in full: the NOTICE of each folder in ../voices.\n"
        "Made by corpus/fit_tokenizer.py.\n",
        encoding="utf-8",
    )


if __name__ == "__main__":
    main()
