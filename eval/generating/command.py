"""`python -m eval generate`: options, and the way from recordings to voices."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
from tyro.conf import Positional, arg

from eval.generating.inputs import Channel
from eval.results import folder as folders
from eval.results import schema
from eval.results.schema import RESULTS, Skipped
from ttt_jax.errors import InputError
from ttt_jax.utils.command import PARTIAL, cost, keep_compiled, machine, shortened
from ttt_jax.utils.files import file_digest
from ttt_jax.utils.paths import local, whole_name

if TYPE_CHECKING:
    from eval.generating.inputs import Input
    from eval.generating.results import TalkResults
    from ttt_jax.serve.load import Loaded
    from ttt_jax.serve.talks import TalkSettings

Arm = Literal["persist", "reset", "frozen", "off"]
SCORED = ("checkpoint", "files", "arm", "reset_every", "batch", "out", "score")
"""Options that --score takes."""


@dataclasses.dataclass(frozen=True)
class Options:
    """Let a checkpoint listen to recordings, and write what it says.

    The user's voice is a mono file, or the right channel of a stereo one. Each file is a talk of its own. For a file
    NAME the folder of results holds NAME.wav (Moshi's voice), NAME.conversation.wav (left Moshi, right the user),
    NAME.text.json, NAME.vtt, NAME.png, NAME.codes.safetensors and NAME.diagnostics.npz; results.json is of all files.
    Output and input are aligned: frame f of the output is what Moshi says while it hears frame f.

    A folder that holds files input.wav, such as one of Full-Duplex-Bench, gives an output.wav of the same rate and
    length beside each.

    Exit code: 0 done, 2 an input to mend, 3 done but some files were skipped.
    """

    checkpoint: Annotated[Positional[str | None], arg(metavar="CHECKPOINT")] = None
    """Folder of a run, of one of its checkpoints (RUN/checkpoints/STEP), or of converted weights."""
    files: Annotated[Positional[tuple[str, ...]], arg(metavar="FILE_OR_FOLDER [FILE_OR_FOLDER ...]")] = ()
    """Recordings (wav, flac, ogg, mp3; any rate), folders of them, or manifests. A file named twice is taken once."""
    out: Annotated[str | None, arg(metavar="FOLDER")] = None
    """Folder for the results; unset: generate-DATA (score-DATA) in CHECKPOINT's folder. Results of the same files,
    checkpoint and options are replaced; a folder with others is refused."""
    channel: Channel = "auto"
    """The user's channel of stereo files; auto: the right one, or the left one where the right one is silent."""
    silence: Annotated[float, arg(metavar="SECONDS")] = 0.0
    """Silence that Moshi hears after each file; outputs are longer by as much."""
    temperature: float = 0.8
    """Of the codes; 0: the most likely ones."""
    top_k: int = 250
    """Codes to choose from; 0: all."""
    text_temperature: float = 0.7
    """Of the text; 0: the most likely token."""
    text_top_k: int = 25
    """Text tokens to choose from; 0: all."""
    seed: int = 0
    """A file's talk draws by this seed and the file's content, so it does not depend on the other files; results.json
    has the seed of each talk."""
    first_frame: Literal["twice", "once"] = "twice"
    """twice: Moshi hears the first frame, as in training; once: it is lost, as in Kyutai's server. A talk that goes on
    loses none."""
    arm: Arm | None = None
    """Memory kept (persist), cleared every --reset-every frames (reset), not learning (frozen), without effect (off);
    unset: persist, with --score all of them."""
    reset_every: Annotated[int | None, arg(metavar="N")] = None
    """Frames between resets; unset: a training chunk of the run, or 1250."""
    gate: Annotated[float | None, arg(metavar="X")] = None
    """tanh(alpha) of all TTT layers, -1 to 1; unset: as trained."""
    context: Annotated[int | None, arg(metavar="N")] = None
    """Attention window in frames; layers with a shorter one keep it; unset: as trained."""
    attention_sink: Annotated[int | None, arg(metavar="N")] = None
    """First frames of a talk that stay in attention's window; unset: as trained."""
    codec: str | None = None
    """Codec in place of the checkpoint's: kmeans, mimi, or a path."""
    load_state: Annotated[str | None, arg(metavar="FILE")] = None
    """A talk that --save-state wrote; each file goes on from there."""
    save_state: bool = False
    """Write NAME.state.safetensors: the talk after the file and its silence."""
    keep_state: bool = False
    """The files follow each other in one talk, in the order given."""
    diagnostics_every: Annotated[int, arg(metavar="N")] = 1
    """Frames from one record of the inner losses to the next; 0: measure neither them nor perplexity."""
    batch: int = 8
    """Most files side by side."""
    score: bool = False
    """Score given conversations (stereo: left Moshi, right the user; or code files) in place of talking, as `python -m
    eval stream --data` does, and store its results. A mono file is Moshi's voice then."""

    def __post_init__(self) -> None:
        if self.checkpoint is None or not self.files:
            raise InputError("give the folder of a checkpoint and one or more recordings or folders of them.")
        least = {"silence": 0, "reset_every": 1, "context": 1, "attention_sink": 0, "diagnostics_every": 0, "batch": 1}
        least |= dict.fromkeys(("temperature", "top_k", "text_temperature", "text_top_k", "seed"), 0)
        for name, smallest in least.items():
            value = getattr(self, name)
            if value is not None and not smallest <= value < 2**32:
                raise InputError(f"{_flag(name)} {value} is out of range: give {smallest} or more.")
        for field in dataclasses.fields(self):
            if self.score and field.name not in SCORED and getattr(self, field.name) != field.default:
                raise InputError(
                    f"{_flag(field.name)} has no effect with --score, which says nothing: leave one of them out."
                )
        if self.reset_every is not None and not self.score and self.arm != "reset":
            raise InputError(f"--reset-every {self.reset_every} has no effect without --arm reset: give both.")
        if self.gate is not None and not -1 <= self.gate <= 1:
            raise InputError(f"--gate {self.gate} is out of range: give -1 to 1.")
        if self.gate is not None and self.arm == "off":
            raise InputError(f"--gate {self.gate} has no effect with --arm off: leave one of them out.")

    @property
    def data(self) -> str:
        """The recordings in a word: the path, or the first one's name and how many follow."""
        rest = len(self.files) - 1
        return self.files[0] if not rest else f"{whole_name(local(self.files[0]))}-and-{rest}-more"


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def main(options: Options) -> int:
    """Runs the command; returns the exit code: 0, or 3 if files were skipped. Raises `InputError`."""
    if options.score:
        from eval.generating import score

        return score.main(options)
    from eval.generating import inputs as recordings
    from eval.generating import outputs, replace, results
    from eval.streaming.score_files import checkpoint_info
    from ttt_jax.moshi.generate import Sampling
    from ttt_jax.serve import load
    from ttt_jax.serve.talks import TalkSettings

    sampling = Sampling(options.temperature, options.top_k, options.text_temperature, options.text_top_k)
    memory = {"frozen": "frozen", "off": "off"}.get(options.arm, "on")
    settings = TalkSettings(sampling, memory, options.gate)
    inputs, skipped = recordings.find(options.files)
    _report(skipped)
    loaded = load.load(options.checkpoint, options.codec, sampling, options.context, options.attention_sink)
    keep_compiled(loaded.checkpoint.cache_dir / "compiled")
    if not loaded.speech.cfg.ttt_layers and (options.arm not in (None, "off") or options.gate is not None):
        raise InputError(f"{loaded.checkpoint.name} has no TTT layers: leave --arm and --gate out.")
    usable, kept = outputs.without_foreign_answers(inputs)
    if not usable:
        raise InputError(kept[0].reason)
    _report(kept)
    skipped += kept
    folder = folders.find(options.out, "generate", options.checkpoint, options.data)
    folders.make(folder)
    contexts = loaded.speech.cfg.contexts  # the window that is used
    info = dataclasses.replace(checkpoint_info(loaded.checkpoint, brief=True), contexts=contexts)
    setting = _setting(options, loaded)
    asked = replace.subject(options.data, {source.name: source.digest for source in usable}, skipped, info, setting)
    replace.replaced(folder, asked, usable)  # errors are reported before the work
    with folders.staged(folder) as new:
        files = _talk(options, settings, setting, loaded, usable, skipped, new)
        made = results.Results(options.data, setting, info, files, skipped)
        about = {"figures": results.FIGURES, "files_by_ending": outputs.ENDINGS}
        about |= {"codec": {"name": loaded.speech.codec.name, "digest": loaded.speech.codec.digest}}
        schema.write(new, made, about | {"evaluated_with": machine(), "cost": cost()})
        folders.replace(folder, new, replace.replaced(folder, asked, usable))
    print(f"\n{results.table(made)}\n")
    print("\n".join(map(str, [folder / RESULTS, *(file.answer for file in files if file.answer)])))
    return PARTIAL if skipped else 0


def _talk(
    options: Options,
    settings: TalkSettings,
    setting: dict[str, Any],
    loaded: Loaded,
    inputs: Sequence[Input],
    skipped: list[Skipped],
    folder: Path,
) -> list[TalkResults]:
    """Talks to all recordings and writes what came of them to `folder`; returns results in the order of `inputs`.

    Adds unusable recordings to `skipped`. Raises `InputError` if none can be used.
    """
    from tqdm import tqdm

    from eval.generating import outputs, talk
    from eval.generating.inputs import read
    from ttt_jax.config import FRAME_RATE
    from ttt_jax.serve import saved
    from ttt_jax.serve.talks import Talks

    speech, checkpoint = loaded.speech, loaded.checkpoint
    begin = None
    if options.load_state is not None:
        begin = saved.load(local(options.load_state), speech, checkpoint.about["weights"])
    reset_every, keep, save = setting["--reset-every"], options.keep_state, options.save_state
    plan = talk.Plan(settings, options.first_frame, options.seed, reset_every, begin, keep, save)
    rows = 1 if options.keep_state else min(options.batch, len(inputs))
    talks = Talks(speech, rows, measured=options.diagnostics_every > 0)
    count = "1 file" if len(inputs) == 1 else f"{len(inputs)} files, {rows} at a time"
    print(f"{checkpoint.name} listens to {count} ...", flush=True)
    talk.warm_up(talks, settings)
    rate = speech.codec.sample_rate
    silence = round(options.silence * rate)

    def heard(source: Input) -> np.ndarray:
        return np.pad(read(source.path, rate, options.channel), (0, silence))

    layers, gates = speech.cfg.ttt_layers, _gates(loaded, settings)
    files: dict[str, TalkResults] = {}
    with tqdm(unit="frame", unit_scale=True, leave=False, mininterval=0.5) as bar:
        for made in talk.generate(talks, inputs, heard, plan, bar.update):
            if isinstance(made, Skipped):
                skipped.append(made)
                _report([made])
                continue
            every = options.diagnostics_every
            files[made.source.name] = outputs.write(folder, made, loaded, layers, gates, every, silence)
            bar.set_postfix_str(f"{len(files)} of {len(inputs)} files")
    if not files:
        raise InputError("none of the recordings can be used, for the reasons above: mend one or give others.")
    done = [files[source.name] for source in inputs if source.name in files]
    spent, spoken = cost()["seconds"], sum(file.frames for file in done) / FRAME_RATE
    print(f"{spoken:.1f} s of speech in {spent:.1f} s, loading and compiling included")
    return done


def _report(skipped: Sequence[Skipped]) -> None:
    from tqdm import tqdm

    for reason in shortened([file.reason for file in skipped]):
        tqdm.write(f"skipped: {reason}", file=sys.stderr)


def _setting(options: Options, loaded: Loaded) -> dict[str, Any]:
    """Returns the options that change what is said, by flag, as results store them."""
    from eval.streaming.command import RESET_EVERY

    names = ("channel", "silence", "temperature", "top_k", "text_temperature", "text_top_k", "seed", "first_frame")
    setting = {_flag(name): getattr(options, name) for name in (*names, "keep_state", "gate", "diagnostics_every")}
    setting |= {"--arm": options.arm or "persist", "--reset-every": None}
    if options.arm == "reset":
        setting["--reset-every"] = options.reset_every or loaded.checkpoint.chunk or RESET_EVERY
    setting |= {_flag(name): getattr(options, name) for name in ("context", "attention_sink", "codec")}
    state = options.load_state
    return setting | {"--load-state": None if state is None else file_digest(local(state))}


def _gates(loaded: Loaded, settings: TalkSettings) -> list[float]:
    """Returns the mean size of each TTT layer's gate in a talk."""
    cfg, layers = loaded.checkpoint.cfg, loaded.checkpoint.params["layers"]
    runs = [run for run in cfg.runs if run.has_ttt]
    means = [
        float(np.abs(np.tanh(gate)).mean()) for run in runs for gate in np.asarray(layers[run.name]["ttt"]["gate"])
    ]
    if settings.memory == "off":
        return [0.0] * len(means)
    return means if settings.gate is None else [abs(settings.gate)] * len(means)
