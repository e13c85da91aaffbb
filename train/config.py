"""The configuration of a training run: frozen dataclasses and presets. Imports no jax."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from ttt_jax.config import MODEL_PRESETS, LoRAConfig, MoshiConfig, check
from ttt_jax.data.corpus import CorpusConfig
from ttt_jax.utils import config_json


def _check(prefix: str, config: object, above_0: Sequence[str] = (), least_0: Sequence[str] = ()) -> None:
    """Raises `InputError` unless the fields `above_0` are finite and above 0, and `least_0` finite and 0 or more."""
    for name in (*above_0, *least_0):
        value = getattr(config, name)
        expected = "a number above 0" if name in above_0 else "0 or more"
        sound = 0 <= value < math.inf and (value > 0 or name in least_0)
        check(sound, f"{prefix}{name}={value} is out of range: give {expected}.")


@dataclasses.dataclass(frozen=True)
class DataConfig(CorpusConfig):
    """Speech to train on, and its chunks and batches."""

    chunk: int = 64
    """Frames of a file that go through the model at once."""
    batch: int = 16
    """Rows of a batch; each follows one file after another, chunk by chunk."""
    from_start: bool = False
    """Whether rows begin each file at its first frame; else at a random frame of the first chunk, so that chunks end
    elsewhere in every pass."""

    def __post_init__(self) -> None:
        _check("data.", self, above_0=("chunk", "batch"))


@dataclasses.dataclass(frozen=True)
class TrainableConfig:
    """Parts that train, in any combination; all else is frozen in the type of its file."""

    base: bool = True
    """All weights of Moshi."""
    attention: str = "none"
    """Layers whose attention trains while the rest of the base is frozen (--trainable.no-base), as in model.ttt.layers:
    "29,30,31", "25-30", "all"."""
    ttt: bool = True
    """TTT layers, W0 and gates included."""
    lora: bool = True
    """Low-rank adapters; model.lora names their rank and their maps."""


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Devices along each axis of the mesh (docs/devices.md); one axis may be -1: all remaining devices."""

    data: int = -1
    """Copies of the weights; each works on other rows."""
    fsdp: int = 1
    """Devices that share a copy of the weights; each gathers a layer when needed and works on other rows."""
    tensor: int = 1
    """Devices that share each layer's heads and hidden units and work on the same rows."""

    def __post_init__(self) -> None:
        sizes = (self.data, self.fsdp, self.tensor)
        check(
            all(size == -1 or size >= 1 for size in sizes) and sizes.count(-1) <= 1,
            f"mesh={sizes} (data, fsdp, tensor) is no mesh: give sizes of 1 or more, at most one of them -1 for all"
            " other devices.",
        )


@dataclasses.dataclass(frozen=True)
class OptimConfig:
    """AdamW with linear warm-up and cosine decay, clipped by the global norm."""

    lr: float = 2e-3
    """Highest learning rate of all weights outside the TTT layers."""
    ttt_lr: float = 2e-3
    """Highest learning rate of the TTT layers (inner initial weights W0 included), gates apart."""
    gate_lr: float = 1e-2
    """Highest learning rate of the TTT layers' gates."""
    warmup_steps: int = 50
    """Steps of linear warm-up; at most half of the run's steps."""
    final_fraction: float = 0.05
    """Learning rate of the last step as a fraction of the highest."""
    beta1: float = 0.9
    """AdamW's decay of the mean gradient."""
    beta2: float = 0.95
    """AdamW's decay of the mean squared gradient."""
    weight_decay: float = 0.1
    """Decay of matrices and embeddings; biases, norms, gates, inner rates and W0 have none."""
    clip_norm: float = 1.0
    """Largest global norm of the gradient; longer ones are scaled down to it."""
    skips: int = 0
    """Steps that may be skipped because loss or gradient is not finite, before the run stops."""

    def __post_init__(self) -> None:
        _check("optim.", self, ("lr", "clip_norm"), ("ttt_lr", "gate_lr", "warmup_steps", "weight_decay", "skips"))
        for name in ("beta1", "beta2"):
            value = getattr(self, name)
            check(0 <= value < 1, f"optim.{name}={value} is out of range: give a number from 0 to below 1.")
        check(
            0 <= self.final_fraction <= 1,
            f"optim.final_fraction={self.final_fraction} is out of range: give a number from 0 to 1.",
        )


@dataclasses.dataclass(frozen=True)
class LossConfig:
    """Weight of a token in the mean cross-entropy that is minimised; if all are 1, every token counts the same.

    Kyutai's fine-tuning (first codebook 100, other codebooks 1, text as much as all audio, text padding 0.5) is about
    text=107, text_padding=0.5, codebooks=100 1; it normalises text and audio apart, here all weights share one sum.
    """

    text: float = 1.0
    """Weight of a text token."""
    text_padding: float = 1.0
    """Factor on the weight of text targets that are padding (PAD, EPAD); Kyutai uses 0.5."""
    codebooks: tuple[float, ...] = (1.0,)
    """Weights of tokens of the first codebook, the second and so on; the last number is for all that follow. Kyutai:
    100 1."""
    block: int = 2048
    """Frames on a device whose logits exist at once: memory against time, without effect on results."""

    def __post_init__(self) -> None:
        _check("loss.", self, ("block",), ("text", "text_padding"))
        check(
            bool(self.codebooks) and all(0 <= weight < math.inf for weight in self.codebooks),
            f"loss.codebooks={self.codebooks} are no weights: give one number of 0 or more for all, or one for each.",
        )


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """One training run."""

    model: MoshiConfig = MODEL_PRESETS["tiny"]
    """Moshi's language model; card and text_card follow the codec and the tokenizer."""
    data: DataConfig = DataConfig()
    trainable: TrainableConfig = TrainableConfig()
    optim: OptimConfig = OptimConfig()
    loss: LossConfig = LossConfig()
    mesh: MeshConfig = MeshConfig()
    base: str | None = None
    """Folder of converted weights to start from (python -m ttt_jax.convert); unset: weights at random."""
    state: Literal["persist", "reset"] = "persist"
    """Whether the TTT layers' fast weights are kept along the file or cleared at the end of each chunk."""
    bptt: int = 1
    """Chunks that a step spans; gradients flow through the kept state from chunk to chunk, back to the start of the
    step."""
    carry_attention: bool = True
    """Whether attention sees earlier chunks through its KV cache, or each chunk alone."""
    accumulate: int = 1
    """Parts of a batch that are computed one after another: less memory, the same step."""
    remat: Literal["none", "dots", "layers"] = "none"
    """What the backward pass computes again: nothing; all but the temporal transformer's products; all but its layers'
    inputs. Both also compute the depth transformer and the heads again."""
    name: str = "tiny"
    """Name of the run; its folder is runs/NAME-DATE-TIME unless run_dir is given."""
    run_dir: str | None = None
    """Folder of the run's results; it must not hold a run yet."""
    steps: int = 150
    """Optimiser steps."""
    seed: int = 0
    """Seed of the initial weights and of the order of files."""
    log_every: int = 1
    """Steps between lines in metrics.jsonl."""
    eval_every: int = 0
    """Steps between validations on data.validation (unset: the held-out files); 0: none."""
    checkpoint_every: int = 50
    """Steps between checkpoints; the last step and every validation always have one."""
    keep: int = 2
    """Latest checkpoints to keep; the best by validation is kept as well."""
    sample_every: int = 0
    """Steps between samples: 10 s of speech that the model generates after 10 s of a validation file; 0: none."""
    tensorboard: bool = False
    """Whether to write metrics for TensorBoard as well (needs the package tensorboardX)."""
    wandb: str | None = None
    """Project of Weights & Biases to send metrics to (needs the package wandb)."""

    def __post_init__(self) -> None:
        positive = ("steps", "log_every", "checkpoint_every", "keep", "bptt", "accumulate")
        _check("", self, positive, ("eval_every", "sample_every"))
        check(
            self.data.batch % self.accumulate == 0,
            f"accumulate={self.accumulate} does not divide data.batch={self.data.batch}: choose a divisor.",
        )
        check(
            self.state == "persist" or self.bptt == 1,
            f"bptt={self.bptt} has no effect with state=reset, where nothing crosses the end of a chunk: leave one of"
            " them out.",
        )
        check(
            self.trainable != TrainableConfig(False, "none", False, False),
            "trainable names nothing that trains: give --trainable.ttt, --trainable.lora, --trainable.attention or"
            " --trainable.base.",
        )
        check(
            self.model.dtype != "float64",
            "model.dtype=float64 is for tests of the model: train in float32 or bfloat16.",
        )
        check(0 <= self.seed < 2**32, f"seed={self.seed} is out of range: give a whole number from 0 to {2**32 - 1}.")


PRESETS: dict[str, TrainConfig] = {
    "tiny": TrainConfig(),
    "small": TrainConfig(
        model=MODEL_PRESETS["small"],
        data=DataConfig(chunk=256, batch=16),
        optim=OptimConfig(lr=3e-4, ttt_lr=3e-4, gate_lr=3e-3, warmup_steps=15),
        name="small",
        steps=120,
        eval_every=10,
        checkpoint_every=40,
    ),
    "moshi-7b": TrainConfig(
        model=dataclasses.replace(MODEL_PRESETS["moshi-7b"], lora=LoRAConfig(rank=128)),
        data=DataConfig(chunk=1250, batch=4, codec="files"),
        trainable=TrainableConfig(base=False),
        optim=OptimConfig(lr=2e-6, ttt_lr=1e-4, gate_lr=1e-3, warmup_steps=100),
        loss=LossConfig(text=107.0, text_padding=0.5, codebooks=(100.0, 1.0)),
        accumulate=4,
        remat="layers",
        name="moshi-7b",
        steps=2_000,
        log_every=1,
        checkpoint_every=100,
    ),
}
"""Named runs: `tiny` takes minutes on a laptop's CPU, `small` on a GPU; `moshi-7b` has the shape of Kyutai's model."""


CHANGEABLE = ("mesh", "accumulate", "remat", "model.ttt.impl")
"""Fields that may change when a run is resumed: they decide how it is computed, not what."""


def load(path: Path) -> TrainConfig:
    """The configuration stored in `path`, without its run folder, so that running it starts a new one."""
    values = config_json.read_json(path, "the config.json of a run")
    return dataclasses.replace(config_json.from_dict(TrainConfig, values, str(path)), run_dir=None)
