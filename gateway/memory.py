"""How much of the memory that this process may use is in use, as the kernel counts it for its control group.

What counts is what the kernel could not give back by itself: usage less the cache of files. The group nearest to its
limit decides, whether it is the process's own or one around it: where any of them is full, something in it is killed.
Both versions of cgroups are read (https://docs.kernel.org/admin-guide/cgroup-v2.html, .../cgroup-v1/memory.html).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

_UNLIMITED = 1 << 60  # version 1 has no word for it, only a number like this


class _Names(NamedTuple):
    """What the files of a group are called, and the lines of its statistics that tell the cache of files."""

    limit: str
    usage: str
    cache: tuple[str, str]


_V1 = _Names("memory.limit_in_bytes", "memory.usage_in_bytes", ("total_inactive_file", "total_active_file"))
_V2 = _Names("memory.max", "memory.current", ("inactive_file", "active_file"))


class Memory:
    """The groups of this process, as they are when it is made. Does not wait, does not raise."""

    def __init__(self, mount: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> None:
        self._groups = tuple(_groups(mount, own))

    def share(self) -> float | None:
        """The share in use, 1.0 for all; None where there is no limit, or none that can be read."""
        shares = [share for names, group in self._groups if (share := _share(names, group)) is not None]
        return max(shares, default=None)

    def __repr__(self) -> str:
        return f"<Memory {self.share()} of {[str(group) for _, group in self._groups]}>"


def _groups(mount: Path, own: Path) -> Iterator[tuple[_Names, Path]]:
    """The group of the process and those around it; in a container without a name space of its own, the outermost."""
    with suppress(OSError):
        for line in own.read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if controllers == "memory":
                names, root = _V1, mount / "memory"
            elif not controllers:
                names, root = _V2, mount
            else:
                continue
            group = root / path.lstrip("/")
            for each in (group, *group.parents):
                if (each / names.limit).is_file():
                    yield names, each
                if each == root:
                    break


def _share(names: _Names, group: Path) -> float | None:
    with suppress(OSError, ValueError):
        limit = (group / names.limit).read_text().strip()
        if limit == "max" or not 0 < int(limit) < _UNLIMITED:
            return None
        lines = (line.split() for line in (group / "memory.stat").read_text().splitlines())
        cache = sum(int(value) for name, value in lines if name in names.cache)
        return max(0, int((group / names.usage).read_text()) - cache) / int(limit)
    return None
