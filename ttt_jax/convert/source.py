"""Finds Kyutai's files in a folder, beside a file, or in a repository of the Hugging Face hub."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from ttt_jax.checkpoints.weights import LORA
from ttt_jax.convert import model_card
from ttt_jax.convert.kyutai_config import FILES
from ttt_jax.convert.state_dict import INDEX, SHARD, Beside
from ttt_jax.errors import InputError
from ttt_jax.utils import config_json
from ttt_jax.utils.paths import local

CONFIG = "config.json"
MOSHI = "model.safetensors"
MIMI = "tokenizer-e351c8d8-checkpoint125.safetensors"
TOKENIZER = "tokenizer_spm_32k_3.model"
"""Defaults of Kyutai's loader for names in config.json."""
PICKLED = {".pt", ".pth", ".bin", ".ckpt", ".th"}
LICENCES = ("LICENSE", "LICENSE.md", "LICENSE.txt", "LICENCE", "LICENCE.md", "LICENCE.txt")
FINE_TUNED = "consolidated.safetensors"
"""Weights of a full fine-tune by moshi-finetune, beside a config.json that still has the base's `moshi_name`."""


class Source(NamedTuple):
    """Kyutai's files."""

    name: str
    """As the user gave it."""
    config: dict[str, Any] | None
    """config.json; None: there is none."""
    where: str
    """Names config.json in messages."""
    fetch: Callable[[str], Path | None]
    """Returns the local path of a file, if it exists, by its name there, hf://OWNER/NAME/FILE or file://PATH."""
    folder: Path | None
    """Local folder; None: the hub."""
    file: Path | None = None
    """The weights if the user named them."""
    repository: str | None = None
    revision: str | None = None
    """Commit on the hub."""

    @property
    def raw(self) -> dict[str, Any]:
        """config.json, or {}."""
        return self.config or {}

    def need(self, name: str, what: str) -> Path:
        """Returns the path of the file `name`. Raises `InputError` if there is none."""
        path = self.fetch(name)
        if path is None:
            raise InputError(f"{self.name} has no {name}: put {what} there, or correct its name in {self.where}.")
        return path

    def weights(self) -> tuple[Path, Beside]:
        """Returns the path of the language model's weights or of the index of their shards, and a function that finds
        files beside it. Raises `InputError` if there are none, or several files that could be meant."""
        if self.file is not None:
            return self.file, self.fetch
        name = self.raw.get("moshi_name") or MOSHI
        folder = name.rpartition("/")[0]

        def beside(other: str) -> Path | None:
            return self.fetch(f"{folder}/{other}" if folder else other)

        path = self.fetch(name) or self.fetch(name + INDEX) or self.fetch(FINE_TUNED)
        if path is None and self.folder is not None and not self.raw.get("moshi_name"):
            path = self._only(self.folder)
        if path is None and self.folder is not None and self.fetch(LORA):
            how = f"give those as SOURCE, and {self.folder / LORA} by --lora"
            raise InputError(f"{self.name} holds adapters ({LORA}) without the weights that they belong to: {how}.")
        return path or self.need(name, "the weights"), beside

    def _only(self, folder: Path) -> Path | None:
        """Returns the only file or index of weights; None if there are adapters only. Else raises `InputError`."""
        beside = {self.raw.get("mimi_name") or MIMI, self.raw.get("lora_name"), LORA, "ttt.safetensors"}
        paths = [path for path in sorted(folder.glob("*.safetensors")) if path.name not in beside]
        shards = [path for path in paths if SHARD.fullmatch(path.name)]
        paths = [path for path in paths if path not in shards] + sorted(folder.glob(f"*.safetensors{INDEX}"))
        if len(paths) == 1:
            return paths[0]
        if paths:
            names = ", ".join(path.name for path in paths)
            raise InputError(f"{self.name} has no {MOSHI} but {names}: name the one to convert as SOURCE.")
        if shards:
            return shards[0]
        if self.fetch(LORA):
            return None
        if pickled := [path.name for path in sorted(folder.iterdir()) if path.suffix in PICKLED]:
            raise InputError(f"{self.name} holds {pickled[0]}, which is pickled: give weights as safetensors.")
        raise InputError(f"{self.name} holds no {MOSHI}: give a folder with the weights as safetensors.")

    def tokenizer(self) -> Path | None:
        """Returns the path of the text tokenizer, if there is one."""
        return self.fetch(self.raw.get("tokenizer_name") or TOKENIZER)

    def mimi(self) -> str:
        """Returns the name of the codec's file, on the hub with its repository."""
        name = self.raw.get("mimi_name") or MIMI
        return f"hf://{self.repository}/{name}" if self.repository and "://" not in name else name

    def mimi_config(self) -> Path | None:
        """Returns the path of the codec's configuration, if config.json names one that exists."""
        name = self.raw.get("mimi_config_name")
        return self.fetch(name) if name else None

    def licence(self) -> tuple[str, list[Path]]:
        """Returns the weights' licence in README.md, or "unknown", and the licence files."""
        names = LICENCES if self.folder is not None else LICENCES[:1]
        readme = self.fetch("README.md")
        text = readme.read_text(encoding="utf-8", errors="replace") if readme else ""
        return model_card.licence(text), [path for name in names if (path := self.fetch(name))]


def find(name: str) -> Source:
    """Returns an existing folder or file, else OWNER/NAME, OWNER/NAME@REVISION or hf://OWNER/NAME/FILE on the hub.
    Raises `InputError` if `name` is none of them."""
    path = local(name)
    if path.is_dir():
        return _local(name, path, None)
    if path.is_file():
        if path.suffix in PICKLED:
            raise InputError(f"{name} is pickled: give weights as safetensors.")
        return _local(name, path.parent, path)
    if named := re.fullmatch(r"hf://([\w-][\w.-]*/[\w-][\w.-]*)/(.+)", name):
        source = _hub(name, named[1], None)
        return source._replace(file=source.need(named[2], "the file"))
    match = re.fullmatch(r"(?:hf://)?([\w-][\w.-]*/[\w-][\w.-]*?)(?:@([\w./-]+))?", name)
    if match is None or path.suffix == ".safetensors":
        how = "give a folder, a safetensors file, or OWNER/NAME"
        raise InputError(f"{name} is no folder or file here and no hub id: {how}.")
    return _hub(name, match[1], match[2])


def _local(name: str, folder: Path, file: Path | None) -> Source:
    def fetch(wanted: str) -> Path | None:
        if wanted.startswith("hf://"):
            return _from_hub(wanted)
        path = Path(wanted.removeprefix("file://")) if wanted.startswith("file://") else folder / wanted
        return path if path.is_file() else None

    path = fetch(CONFIG)
    return Source(name, read_config(path) if path else None, str(folder / CONFIG), fetch, folder, file)


def _hub(name: str, repository: str, revision: str | None) -> Source:
    def fetch(wanted: str) -> Path | None:
        if wanted.startswith("hf://"):
            return _from_hub(wanted)
        return download(repository, wanted, revision)

    path = fetch(CONFIG)
    if path is None and fetch(MOSHI) is None and fetch(MOSHI + INDEX) is None:
        how = "give a repository of Kyutai's PyTorch weights"
        raise InputError(f"{name} on the hub has neither {CONFIG} nor {MOSHI}: {how}.")
    if path is not None and "snapshots" in path.parts:  # all further files from the same commit
        parts = path.parts[::-1]
        revision = parts[parts.index("snapshots") - 1]
    config = read_config(path) if path else None
    return Source(name, config, f"{CONFIG} of {name}", fetch, None, None, repository, revision)


def _from_hub(name: str) -> Path | None:
    owner, repository, file = (name.removeprefix("hf://").split("/", 2) + ["", ""])[:3]
    return download(f"{owner}/{repository}", file, None)


def download(repository: str, name: str, revision: str | None) -> Path | None:
    """Returns a file of a hub repository, by the hub's client and cache; None if the repository has no such file.

    Raises `InputError` if the repository is unknown or closed, or the file is not cached and the hub cannot be reached.
    """
    from huggingface_hub import hf_hub_download, utils

    try:
        return Path(hf_hub_download(repository, name, revision=revision))
    except utils.LocalEntryNotFoundError:
        if _known_absent(repository, name, revision):
            return None
        problem = (
            f"there is no folder {repository} here, {name} of {repository} on the hub is not in the hub's cache, and"
            " the hub cannot be reached (no network, or offline mode): go online, or correct the path."
        )
    except utils.EntryNotFoundError:
        return None
    except utils.GatedRepoError:
        problem = f"{repository} on the hub is closed to you: accept its conditions there, log in by `hf auth login`."
    except utils.RevisionNotFoundError:
        problem = f"{repository} on the hub has no revision {revision}: name a branch, tag or commit."
    except (utils.RepositoryNotFoundError, utils.HFValidationError):
        there = "neither a folder or file here nor a repository of the hub that you can read"
        problem = f"{repository} is {there}: correct the name, or log in by `hf auth login`."
    except Exception as error:  # errors of the client's transport differ in type from version to version
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        problem = f"{name} of {repository} could not be had from the hub ({reason}): try again, or give a folder."
    raise InputError(problem)


def _known_absent(repository: str, name: str, revision: str | None) -> bool:
    """Returns whether a file counts as absent offline: the hub's cache holds the repository without it.

    Weights and config.json do so only if the cache has recorded their absence, or holds an index of shards.
    """
    from huggingface_hub import _CACHED_NO_EXIST, try_to_load_from_cache

    if isinstance(try_to_load_from_cache(repository, name + INDEX, revision=revision), str):
        return True
    if name.endswith(".safetensors") or name == CONFIG:
        return try_to_load_from_cache(repository, name, revision=revision) is _CACHED_NO_EXIST
    known = (try_to_load_from_cache(repository, other, revision=revision) for other in (CONFIG, MOSHI) if other != name)
    return any(isinstance(path, str) for path in known)


def read_config(path: Path) -> dict[str, Any]:
    """Reads Kyutai's config.json. Raises `InputError` if it is no object or, for example, a file's name no string."""
    raw = config_json.read_json(path, "a config.json of Kyutai's")
    if not isinstance(raw, dict):
        raise InputError(f"{path} holds no object: give the config.json that belongs to the weights.")
    for key in FILES:
        config_json.conform(str | None, raw.get(key), str(path), key)
    config_json.conform(bool | None, raw.get("lora"), str(path), "lora")
    config_json.conform(dict | None, raw.get("lm_gen_config"), str(path), "lm_gen_config")
    return raw
