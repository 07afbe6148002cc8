"""The small operations of a layer in C (native.c), each one call for what torch says in several.

A small model on a CPU takes longer to be called than to compute. These are for one thread and float32, and the matrix
products stay torch's. They are built once, where there is a C compiler, when they are first wanted (in about a second),
and kept in the user's cache. Their twins are torch's own operations (`operations.py`, `attention.py`): those run where
these cannot, and are what the tests compare with.
"""

from __future__ import annotations

import ctypes
import functools
import os
import platform
import shlex
import subprocess
import tempfile
from hashlib import blake2b
from pathlib import Path

from torch import Tensor

SOURCE = Path(__file__).with_suffix(".c")
# Sums may be added up in any order, which is what vectors need; all that would lose NaN stays off.
FLAGS = (
    *("-O3", "-march=native", "-shared", "-fPIC", "-fassociative-math", "-freciprocal-math"),
    *("-fno-signed-zeros", "-fno-trapping-math", "-fno-math-errno"),
)
BUILD_SECONDS = 60
Pointer, Int, Float = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float


class NativeError(Exception):
    """These operations cannot be had here, and why."""


class Native:
    """The library. Tensors are contiguous, in float32; numbers of rows, blocks and positions are int64."""

    def __init__(self, library: Path) -> None:
        found = ctypes.PyDLL(str(library))  # calls take microseconds: to let go of the interpreter would cost more
        self._norm, self._silu_times, self._attend = found.norm, found.silu_times, found.attend
        self._norm.argtypes = (Pointer, Pointer, Int, Int, Float)
        self._silu_times.argtypes = (Pointer, Pointer, Int, Int)
        self._attend.argtypes = (*[Int] * 8, Float, *[Pointer] * 8)
        for each in (self._norm, self._silu_times, self._attend):
            each.restype = None

    def __reduce__(self) -> tuple[object, ...]:
        return native, ()  # a copy is the same

    def norm(self, x: Tensor, epsilon: float) -> Tensor:
        """Rows of x [rows, width] over the root of their sum of squares plus epsilon."""
        normed = x.new_empty(x.shape)
        self._norm(x.data_ptr(), normed.data_ptr(), *x.shape, epsilon)
        return normed

    def silu_times(self, gate_up: Tensor) -> Tensor:
        """Gate and up side by side [rows, 2 * width]: silu of the gate, times up."""
        rows, width = gate_up.shape
        found = gate_up.new_empty(rows, width // 2)
        self._silu_times(gate_up.data_ptr(), found.data_ptr(), rows, width // 2)
        return found

    def attend(
        self, qkv: Tensor, gains: Tensor | None, turns: Tensor, positions: Tensor, pages: Tensor, tables: Tensor,
        slots: Tensor, *, generating: int, heads: int, epsilon: float,
    ) -> Tensor:  # fmt: skip
        """Turn queries and keys [rows, heads + 2 * kv_heads, width] in place, keep keys and values, and look.

        Only the first `generating` rows look, at the blocks of their slots up to their positions; of the others [rows,
        heads * width] is not yet written. Pages are those of a layer: [2 * kv_heads, blocks, size, width].
        """
        rows, _, width = qkv.shape
        seen = qkv.new_empty(rows, heads * width)
        self._attend(
            rows, generating, heads, pages.shape[0] // 2, width, *pages.shape[1:3], tables.shape[1], epsilon,
            turns.data_ptr(), positions.data_ptr(), tables.data_ptr(), slots.data_ptr(),
            pages.data_ptr(), qkv.data_ptr(), None if gains is None else gains.data_ptr(), seen.data_ptr(),
        )  # fmt: skip
        return seen


@functools.cache
def native() -> Native:
    """The operations, for this machine. Raises NativeError where they cannot be built."""
    try:
        return Native(built(_cache()))
    except subprocess.CalledProcessError as error:
        raise NativeError(f"the C compiler refuses {SOURCE.name}: {error.stderr.decode(errors='replace')}") from error
    except (OSError, RuntimeError, subprocess.SubprocessError) as error:
        raise NativeError(str(error)) from error


def built(folder: Path) -> Path:
    """The library in a folder of them: built now, unless it was before, from the same for such a machine."""
    command = [*shlex.split(os.environ.get("CC", "cc")), *FLAGS]
    made_of = (SOURCE.read_bytes(), repr(command).encode(), _machine())
    library = folder / f"native-{blake2b(b'|'.join(made_of), digest_size=12).hexdigest()}.so"
    if not library.exists():
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as place:
            made = Path(place) / library.name
            subprocess.run(  # noqa: S603  a compiler, and our own source
                [*command, SOURCE, "-o", made, "-lm"], check=True, capture_output=True, timeout=BUILD_SECONDS
            )
            made.rename(library)
    return library


def _cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "weir"


def _machine() -> bytes:
    """What `-march=native` depends on: a home may be shared by machines that differ."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else [platform.processor()]
    told = {line for line in lines if line.startswith(("flags", "Features", "model name", "CPU part"))}
    return "\n".join([platform.machine(), *sorted(told)]).encode()
