"""Entry of `python -m ttt_jax.convert`."""

from __future__ import annotations

import dataclasses
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import tyro

from ttt_jax.codec.mimi.config import Dtype as CodecDtype
from ttt_jax.codec.mimi.config import Use, Window
from ttt_jax.config import TTTConfig
from ttt_jax.convert.from_kyutai import kyutai
from ttt_jax.convert.mimi_files import mimi
from ttt_jax.convert.to_kyutai import Dtype, export
from ttt_jax.utils.command import parse, run

HELP = """Converts weights between Kyutai's layouts and ours.

  python -m ttt_jax.convert kyutai kyutai/moshiko-pytorch-bf16 weights/moshiko
  python -m ttt_jax.convert kyutai kmhf/hf-moshiko weights/moshiko
  python -m ttt_jax.convert kyutai FOLDER weights/moshiko-ttt --ttt-layers 29,30,31
  python -m ttt_jax.convert mimi kyutai/moshiko-pytorch-bf16 weights/mimi.safetensors
  python -m ttt_jax.convert export weights/moshiko-ttt exported

docs/checkpoints.md describes the folders."""


@dataclasses.dataclass(frozen=True)
class AddedTTT(TTTConfig):
    """TTT layers to add."""

    layers: Annotated[str, tyro.conf.arg(name="ttt-layers", prefix_name=False)] = "none"
    """Layers that get a TTT layer after self-attention: "29,30,31", "25-30", "-1" (the last), "middle", "all",
    "none"."""


@dataclasses.dataclass(frozen=True)
class KyutaiOptions:
    """Converts Moshi's weights, in Kyutai's layout or in Hugging Face's (MoshiForConditionalGeneration), to a folder of
    ours."""

    source: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="SOURCE")]
    """Folder with config.json and safetensors, a safetensors file, the index of shards, or a hub id: OWNER/NAME or
    OWNER/NAME@REVISION."""
    out: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="OUT")]
    """New folder for our weights, one file per layer, and their config.json."""
    config: Path | None = None
    """A config.json instead of the one in SOURCE."""
    lora: str | None = None
    """LoRA file of Kyutai's, hf://OWNER/NAME/FILE, or what the original system with TTT layers trained; unset: the file
    that config.json names."""
    merge_lora: bool = False
    """Add the adapters to the weights instead of keeping them apart."""
    ttt: AddedTTT = AddedTTT()
    """TTT layers to add."""
    seed: int = 0
    """Seed of the TTT layers."""
    dry_run: bool = False
    """Check everything, show what would be written, and write nothing."""


@dataclasses.dataclass(frozen=True)
class MimiOptions:
    """Converts a Mimi, Kyutai's audio codec, in their layout or in Hugging Face's (MimiModel), to a file of ours."""

    source: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="SOURCE")]
    """Safetensors file, a folder that holds it, or on the hub OWNER/NAME, OWNER/NAME@REVISION or
    hf://OWNER/NAME/FILE."""
    out: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="OUT")]
    """New file, whose name ends in .safetensors."""
    config: Path | None = None
    """Kyutai's mimi_config.json, or Hugging Face's config.json; unset: the one that SOURCE names, else that of Kyutai's
    Mimi."""
    num_codebooks: int = Use.num_codebooks
    """Codebooks that are written and read, the first ones."""
    dtype: CodecDtype = Use.dtype
    """Type of weights and activations when the codec runs; the file is float32."""
    window: Window = Use.window
    """What attention sees in a stream: all keys as in a whole recording (exact), or those that PyTorch's ring still has
    (reference)."""
    dry_run: bool = False
    """Check everything, show what would be written, and write nothing."""


@dataclasses.dataclass(frozen=True)
class ExportOptions:
    """Writes a checkpoint in Kyutai's layout."""

    checkpoint: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="CHECKPOINT")]
    """Folder that `kyutai` made, the folder of a training run, or a file that `mimi` made."""
    out: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="OUT")]
    """New folder for safetensors and config.json in Kyutai's layout."""
    merge_lora: bool = False
    """Add the adapters to the weights instead of writing a LoRA file."""
    dtype: Dtype | None = None
    """Type of weights and adapters; unset: as stored."""
    dry_run: bool = False
    """Check everything, show what would be written, and write nothing."""


Options = (
    Annotated[KyutaiOptions, tyro.conf.subcommand("kyutai")]
    | Annotated[MimiOptions, tyro.conf.subcommand("mimi")]
    | Annotated[ExportOptions, tyro.conf.subcommand("export")]
)


def main(args: Sequence[str]) -> int:
    """Runs the command line `args`. Returns the exit code."""
    options = parse(Options, "python -m ttt_jax.convert", args, description=HELP)
    log = logging.getLogger("convert")
    log.addHandler(logging.StreamHandler(sys.stdout))
    log.setLevel(logging.INFO)
    log.propagate = False
    if isinstance(options, ExportOptions):
        export(**vars(options))
    elif isinstance(options, MimiOptions):
        mimi(**vars(options))
    else:
        settings = {field.name: getattr(options.ttt, field.name) for field in dataclasses.fields(TTTConfig)}
        kyutai(**{**vars(options), "ttt": TTTConfig(**settings)})
    return 0


if __name__ == "__main__":
    sys.exit(run(lambda: main(sys.argv[1:])))
