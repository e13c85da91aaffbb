"""Entry of `python -m ttt_jax.convert`."""

from __future__ import annotations

import dataclasses
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import tyro

from ttt_jax.config import TTTConfig
from ttt_jax.convert.from_kyutai import kyutai
from ttt_jax.convert.to_kyutai import Dtype, export
from ttt_jax.utils.command import plain_input_errors, run

DESCRIPTION = """Bring Kyutai's weights in, and ours out in their layout.

  python -m ttt_jax.convert kyutai kyutai/moshiko-pytorch-bf16 weights/moshiko
  python -m ttt_jax.convert kyutai kmhf/hf-moshiko weights/moshiko
  python -m ttt_jax.convert kyutai FOLDER weights/moshiko-ttt --ttt-layers 29,30,31
  python -m ttt_jax.convert export weights/moshiko-ttt exported

docs/checkpoints.md describes the folders."""


@dataclasses.dataclass(frozen=True)
class AddedTTT(TTTConfig):
    """TTT layers to be added."""

    layers: Annotated[str, tyro.conf.arg(name="ttt-layers", prefix_name=False)] = "none"
    """Layers that get a TTT layer after self-attention: "29,30,31", "25-30", "-1" (the last), "middle", "all", "none"."""


@dataclasses.dataclass(frozen=True)
class Kyutai:
    """Convert Moshi's weights, in Kyutai's layout or in Hugging Face's (MoshiForConditionalGeneration), to a folder of ours."""

    source: tyro.conf.Positional[str]
    """Folder with config.json and safetensors, a safetensors file or the index of shards, or a hub id OWNER/NAME, OWNER/NAME@REVISION."""
    out: tyro.conf.Positional[Path]
    """New folder."""
    config: Path | None = None
    """A config.json instead of the one in SOURCE."""
    lora: str | None = None
    """LoRA file of Kyutai's, or hf://OWNER/NAME/FILE, or what the original system with TTT layers trained; unset: the one that
    config.json names, if it does."""
    merge_lora: bool = False
    """Add the adapters to the weights instead of keeping them apart."""
    ttt: AddedTTT = AddedTTT()
    """TTT layers to be added."""
    seed: int = 0
    """Seed of the TTT layers."""
    dry_run: bool = False
    """Check all, show what would be written, and write nothing."""

    def __call__(self) -> None:
        """Run the command."""
        fields = {field.name: getattr(self.ttt, field.name) for field in dataclasses.fields(TTTConfig)}
        kyutai(
            self.source,
            self.out,
            config=self.config,
            lora=self.lora,
            merge_lora=self.merge_lora,
            ttt=TTTConfig(**fields),
            seed=self.seed,
            dry_run=self.dry_run,
        )


@dataclasses.dataclass(frozen=True)
class Export:
    """Write a checkpoint in Kyutai's layout."""

    checkpoint: tyro.conf.Positional[Path]
    """Folder that `kyutai` made, or the folder of a training run."""
    out: tyro.conf.Positional[Path]
    """New folder."""
    merge_lora: bool = False
    """Add the adapters to the weights instead of writing a LoRA file."""
    dtype: Dtype | None = None
    """Type of weights and adapters; unset: as they are."""
    dry_run: bool = False
    """Check all, show what would be written, and write nothing."""

    def __call__(self) -> None:
        """Run the command."""
        export(self.checkpoint, self.out, merge_lora=self.merge_lora, dtype=self.dtype, dry_run=self.dry_run)


def main(args: Sequence[str]) -> int:
    """Run the command line `args`; the exit code: 0 done, 2 an input to mend, 130 interrupted."""
    with plain_input_errors():
        command = tyro.extras.subcommand_cli_from_dict(
            {"kyutai": Kyutai, "export": Export},
            prog="python -m ttt_jax.convert",
            description=DESCRIPTION,
            args=list(args),
        )
    log = logging.getLogger("convert")
    log.addHandler(logging.StreamHandler(sys.stdout))
    log.setLevel(logging.INFO)
    log.propagate = False
    command()
    return 0


if __name__ == "__main__":
    sys.exit(run(lambda: main(sys.argv[1:])))
