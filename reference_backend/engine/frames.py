"""What the server and its worker say to each other over a socket: four bytes of length, then MessagePack.

The server begins with `Start`; the worker answers `Ready` or `Refused`. Then requests and their ends go one way, and
one `Turn` for each turn of the engine the other way, with everything that became known in it. A `Ping` comes back. When
nothing is under way the worker can be told to `Sleep`, and to `Wake`; `Ready` says that it is done.
Both ends are ours, of one version, on one machine, with one monotonic clock: deadlines are its seconds.
"""

from __future__ import annotations

import msgspec

from reference_backend.engine.config import Narrow
from reference_backend.engine.request import Delta, Load, Picture, Sampling

LENGTH_BYTES = 4


class Start(msgspec.Struct, tag=True, array_like=True, frozen=True):
    """The model to load and the sizes to run it with; None: what is sensible.

    What stands below `dummy` is said by the first of several ranks to the others: who they are, where they meet.
    """

    model: str
    end_tokens: list[int]
    slots: int
    context: int | None
    cache_tokens: int | None
    quantize: Narrow | None = None
    ranks: int = 1
    dummy: bool = False  # random weights instead of those of the directory
    rank: int = 0
    meeting: str = ""
    seed: int | None = None


class Ask(msgspec.Struct, tag=True, array_like=True, frozen=True):
    """A request. `ticket` is the server's number for it."""

    ticket: int
    prompt: list[int]
    sampling: Sampling
    deadline: float | None
    priority: int
    tenant: str
    salt: bytes
    pictures: list[Picture] = []


class Abort(msgspec.Struct, tag=True, array_like=True, frozen=True):
    ticket: int


class Sleep(msgspec.Struct, tag=True, array_like=True, frozen=True):
    """Give the device back, and be ready to have it again. Nothing is under way."""


class Wake(msgspec.Struct, tag=True, array_like=True, frozen=True):
    """Be as before `Sleep`."""


Told = Ask | Abort | Sleep | Wake  # what an engine is told


class Lockstep(msgspec.Struct, tag=True, array_like=True, frozen=True):
    """From the first rank to another one: take this turn. `took` is the seconds of the one before, if there was one."""

    messages: list[Told]
    now: float
    took: float | None


class Ready(msgspec.Struct, tag=True, array_like=True, frozen=True):
    """The model is loaded and has produced a token; or it sleeps, where it was told to."""

    context: int
    load: Load = Load(0, 0, 0.0)


class Refused(msgspec.Struct, tag=True, array_like=True, frozen=True):
    """The model cannot be served, and why, in one line."""

    reason: str


class Ping(msgspec.Struct, tag=True, array_like=True, frozen=True):
    """Is it there? It is, if it says the same."""


class Turn(msgspec.Struct, tag=True, array_like=True, frozen=True):
    deltas: list[tuple[int, Delta]]
    load: Load


encode = msgspec.msgpack.Encoder().encode
decode_for_worker = msgspec.msgpack.Decoder(Start | Told | Ping | Lockstep).decode
decode_for_server = msgspec.msgpack.Decoder(Ready | Refused | Turn | Ping).decode


def framed(message: msgspec.Struct) -> bytes:
    """A message with its length before it."""
    body = encode(message)
    return len(body).to_bytes(LENGTH_BYTES, "big") + body


class Unframed:
    """Cuts a stream of bytes into the messages that have arrived whole."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, data: bytes) -> list[bytes]:
        """Take what has come; give the bodies that are complete by now."""
        self._buffer += data
        bodies, at = [], 0
        while len(self._buffer) - at >= LENGTH_BYTES:
            end = at + LENGTH_BYTES + int.from_bytes(self._buffer[at : at + LENGTH_BYTES], "big")
            if end > len(self._buffer):
                break
            bodies.append(bytes(self._buffer[at + LENGTH_BYTES : end]))
            at = end
        del self._buffer[:at]
        return bodies
