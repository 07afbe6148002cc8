"""Where models lie: `<root>/<name>/<version>/`, one directory a version, and which of them are wanted.

A version is a whole number and its directory has either a model as Hugging Face lays it out (config.json), which is a
language model, or a model.toml:

    kind = "tensor"              # or "embedding", "image", "language"
    executor = "torch_export"    # who runs it: reference_backend/executors/, or a module of your own by its full name
    file = "model.pt2"           # what the executor reads, in this directory
    max_batch = 32               # most rows (first dimension) that go into one run; 1: no batches
    max_waiting = 256            # most requests beyond max_batch; who else is taken says admission.py
    isolation = "process"        # or "thread": inside the server, for what takes microseconds

    [[inputs]]                   # where the file does not say
    name = "x"
    datatype = "FP32"
    shape = [-1, 64]

    [settings]                   # whatever else the executor wants to know; it judges them

Nothing here reads weights.
"""

from __future__ import annotations

import re
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec

from reference_backend.engine.config import ModelError
from reference_backend.tensors import TensorSpec

Kind = Literal["language", "tensor", "embedding", "image"]
Count = Annotated[int, msgspec.Meta(ge=1, le=1_000_000)]
_NAME = re.compile(r"[A-Za-z0-9._-]{1,128}")
_VERSION = re.compile(r"0|[1-9][0-9]{0,17}")
_WANTED = re.compile(r"all|latest(?:-[1-9][0-9]{0,3})?|[0-9]+(?:,[0-9]+)*")


class Card(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What model.toml says."""

    kind: Kind = "language"
    executor: str = ""
    file: str = ""
    max_batch: Count = 1
    max_waiting: Count = 256
    isolation: Literal["process", "thread"] = "process"
    inputs: tuple[TensorSpec, ...] = ()
    outputs: tuple[TensorSpec, ...] = ()
    settings: dict[str, Any] = {}

    def __post_init__(self) -> None:
        if (self.kind == "language") == bool(self.executor):
            raise ValueError("every kind but language needs an executor, and language has none")
        if Path(self.file).name != self.file:
            raise ValueError(f"file {self.file!r} must be the name of a file in the same directory")


@dataclass(frozen=True, slots=True)
class Entry:
    """One version of a model. An empty version is that of a directory outside of any repository."""

    name: str
    version: str
    directory: Path

    def __str__(self) -> str:
        return f"{self.name}@{self.version}" if self.version else self.name

    def card(self) -> Card:
        """What its directory says of it. Raises ModelError."""
        path = self.directory / "model.toml"
        try:
            return msgspec.convert(tomllib.loads(path.read_text()), Card)
        except FileNotFoundError:
            return Card()
        except (OSError, ValueError) as error:  # msgspec's and tomllib's errors are ValueErrors
            raise ModelError(f"{path}: {error}") from error


def split_id(text: str) -> tuple[str, str | None]:
    """`name` or `name@version` as name and version."""
    name, at, version = text.partition("@")
    return name, version if at else None


def versions(root: Path, name: str) -> list[Entry]:
    """All versions of a model, oldest first; none when there is no such model."""
    if not _NAME.fullmatch(name):
        return []
    try:
        found = [path for path in (root / name).iterdir() if _VERSION.fullmatch(path.name) and path.is_dir()]
    except OSError:
        return []
    return [Entry(name, path.name, path) for path in sorted(found, key=lambda path: int(path.name))]


def names(root: Path) -> list[str]:
    """The models that have a version. Raises ModelError when the root cannot be read."""
    try:
        return sorted(path.name for path in root.iterdir() if versions(root, path.name))
    except OSError as error:
        raise ModelError(f"{root}: cannot be read: {error.strerror}; --repository takes a directory") from error


def wanted(policy: str, found: list[Entry]) -> list[Entry]:
    """Which of a model's versions are served by `all`, `latest`, `latest-N` or `1,3`. Raises ValueError."""
    if not _WANTED.fullmatch(policy):
        raise ValueError(f"{policy!r} is none of: all, latest, latest-N, or versions like 1,3")
    if policy == "all":
        return found
    if policy.startswith("latest"):
        count = int(policy.removeprefix("latest").removeprefix("-") or 1)
        return found[-count:]
    named = set(policy.split(","))
    return [entry for entry in found if entry.version in named]
