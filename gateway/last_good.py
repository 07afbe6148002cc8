"""The text of the policy in force, kept for a worker that starts while the newest text cannot be used.

The parent of the workers makes one file without a name and gives it to each worker it starts. Whoever puts a policy in
force writes its text there; whoever starts begins with what is there. Nothing is left behind, however they end.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import tempfile
from collections.abc import Iterator

_DIGEST_BYTES = 32


@contextlib.contextmanager
def unnamed_file() -> Iterator[int]:
    """The descriptor of such a file, open as long as this is entered, and in the children that it is passed to."""
    with tempfile.TemporaryFile() as file:
        yield file.fileno()


class LastGood:
    """What several processes keep in the file of this descriptor."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    def read(self) -> bytes | None:
        """The text that was written last. None: nothing was, or its writer was killed half-way."""
        with self._locked():
            content = os.pread(self._descriptor, os.fstat(self._descriptor).st_size, 0)
        digest, text = content[:_DIGEST_BYTES], content[_DIGEST_BYTES:]
        return text if hashlib.sha256(text).digest() == digest else None

    def write(self, text: bytes) -> None:
        """Raises OSError when there is no room for it."""
        content = hashlib.sha256(text).digest() + text
        with self._locked():
            os.truncate(self._descriptor, os.pwrite(self._descriptor, content, 0))

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        """Alone among the processes; the system opens the lock of one that is killed."""
        fcntl.lockf(self._descriptor, fcntl.LOCK_EX)
        try:
            yield
        finally:
            fcntl.lockf(self._descriptor, fcntl.LOCK_UN)
