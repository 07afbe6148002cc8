"""What a layer does on a CPU, in C (native.c).

A small model takes longer to be called than to compute: here one call does what torch says in several. A large one
takes as long as its weights take to be read: products of few rows read them once, and share them evenly between
threads, which the library behind torch does not (MKL on an AMD EPYC: 2 to 5 times as long for 8 rows). All is float32.

It is built once, where there is a C compiler, when it is first wanted (in a second or two), and kept in the user's
cache. The twins are torch's own operations (`operations.py`, `attention.py`): those run where this cannot, and are what
the tests compare with.
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

import torch
from torch import Tensor

SOURCE = Path(__file__).with_suffix(".c")
PANEL = 32  # columns of a matrix that lie together
# Sums may be added up in any order, which is what vectors need; all that would lose NaN stays off.
FLAGS = (
    *("-O3", "-march=native", "-fPIC", "-fopenmp", "-fassociative-math", "-freciprocal-math"),
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
        self._norm, self._silu_times, self._attend, self._rows = (
            found.norm, found.silu_times, found.attend, found.rows,
        )  # fmt: skip
        self._product = ctypes.CDLL(str(library)).product  # but this takes seconds, of a long batch and a large matrix
        self._product.argtypes = (Pointer, Pointer, Pointer, Int, Pointer, Int, Int, Int)
        self._norm.argtypes = (Pointer, Pointer, Int, Int, Float)
        self._silu_times.argtypes = (Pointer, Pointer, Int, Int)
        self._attend.argtypes = (*[Int] * 8, Float, *[Pointer] * 8)
        self._rows.argtypes = (Pointer, Pointer, Pointer, Int, Int)
        for each in (self._norm, self._silu_times, self._product, self._attend, self._rows):
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

    def product(self, x: Tensor, panels: Tensor, start: Tensor | None) -> Tensor:
        """Rows of x [rows, in] times a matrix in panels [out / 32, in, 32]: [rows, out].

        They are added to `start`, if there is one: [rows, out], or [out] for each row.
        """
        rows, width = len(x), len(panels) * PANEL
        found = x.new_empty(rows, width)
        step = 0 if start is None or start.dim() == 1 else width
        self._product(
            x.data_ptr(), panels.data_ptr(), None if start is None else start.data_ptr(), step, found.data_ptr(),
            rows, panels.shape[1], width,
        )  # fmt: skip
        return found

    def rows(self, panels: Tensor, ids: Tensor) -> Tensor:
        """Rows of a matrix in panels [out / 32, in, 32]: [ids, in]. Whoever calls knows that they are there."""
        found = panels.new_empty(len(ids), panels.shape[1])
        self._rows(panels.data_ptr(), ids.data_ptr(), found.data_ptr(), *found.shape)
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


def in_panels(matrix: Tensor) -> Tensor | None:
    """A copy of a matrix [out, in] as `Native.product` takes it, or None where it takes none."""
    if matrix.dtype != torch.float32 or matrix.shape[0] % PANEL:
        return None
    return matrix.unflatten(0, (-1, PANEL)).transpose(1, 2).contiguous()


@functools.cache
def native() -> Native:
    """The operations, for this machine. Raises NativeError where they cannot be built."""
    try:
        return Native(built(_cache()))
    except subprocess.CalledProcessError as error:
        reason = error.stderr.decode(errors="replace").partition("\n")[0]
        raise NativeError(f"the C compiler refuses {SOURCE.name}: {reason}") from error
    except (OSError, RuntimeError, ValueError, subprocess.SubprocessError) as error:  # ValueError: a CC of open quotes
        raise NativeError(str(error)) from error


def built(folder: Path) -> Path:
    """The library in a folder of them: built now, unless it was before, from the same for such a machine.

    Raises NativeError where others could have put it there.
    """
    compiler = shlex.split(os.environ.get("CC") or "cc")
    command = [*compiler, *FLAGS]
    made_of = (SOURCE.read_bytes(), repr(command).encode(), _machine())
    library = folder / f"native-{blake2b(b'|'.join(made_of), digest_size=12).hexdigest()}.so"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    told = folder.stat()
    if told.st_uid != os.geteuid() or told.st_mode & 0o022:  # such as /tmp/weir: what is loaded runs as we do
        raise NativeError(f"{folder} is not ours alone to write to; `chmod go-w` it, or set XDG_CACHE_HOME")
    if not library.exists():
        with tempfile.TemporaryDirectory(dir=folder) as place:
            made, compiled = Path(place) / library.name, Path(place) / "native.o"
            # In two steps, so that it has no OpenMP of its own: torch's is there, and two would be in each other's way.
            _run([*command, "-c", SOURCE, "-o", compiled])
            _run([*compiler, "-shared", compiled, "-o", made, "-lm"])
            made.rename(library)
    return library


def _run(command: list[str | Path]) -> None:
    subprocess.run(command, check=True, capture_output=True, timeout=BUILD_SECONDS)  # noqa: S603  a compiler, our source


def _cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "weir"


def _machine() -> bytes:
    """What `-march=native` depends on: a home may be shared by machines that differ."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else [platform.processor()]
    told = {line for line in lines if line.startswith(("flags", "Features", "model name", "CPU part"))}
    return "\n".join([platform.machine(), *sorted(told)]).encode()
