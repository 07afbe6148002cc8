"""Reads files that an operator names, and that may be something else the next time."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path


def read(path: Path, at_most: int) -> bytes:
    """The file's first `at_most` bytes. Never waits for a writer, as a pipe would make it. Raises OSError."""
    try:
        with open(path, "rb", opener=_without_waiting) as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise OSError(errno.EINVAL, "not a regular file", str(path))
            return file.read(at_most)
    except ValueError:  # a NUL in it
        raise OSError(errno.EINVAL, "no file can have this name", str(path)) from None


def _without_waiting(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NONBLOCK)
