"""Who sent a call: whoever vets its head, reads its body, and is told what the gateway itself has to say.

One class for each way in, and all that the pipeline knows of their difference.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from random import Random

    from gateway.call import Call
    from gateway.head import Head, Lines
    from gateway.identify import Entry
    from gateway.relay import Ending
    from gateway.trail import Trail
    from gateway.upstream.endpoint import Lease
    from policies.errors import Refusal
    from policies.policy import Route

# Tries one backend, and tells the breaker, the balancer and the trail how it ended.
Carry = Callable[["Lease", "Call", "Trail", "Route", str], Awaitable["Ending"]]


class Client:
    """`forwarded_lines` say who it is to a backend; `carry` is how its calls are forwarded, None: over HTTP/1.1."""

    __slots__ = ("caller", "carry", "forwarded_lines")

    def __init__(self, carry: Carry | None = None) -> None:
        self.caller: Entry | None = None  # of the last request, as long as its header lines are repeated
        self.carry = carry
        self.forwarded_lines = b""

    def head_of(self, lines: Lines) -> Head:
        """The vetted head of these lines. Raises as `Head` does, and LoopDetected."""
        raise NotImplementedError

    def read(self, call: Call, most: int, seconds: float) -> Awaitable[None]:
        """Wait until `call.body` is whole. Raises BodyTooLarge, ClientTimeout, BadRequest."""
        raise NotImplementedError

    def answer(self, call: Call, trail: Trail, status: int, document: dict[str, Any]) -> int:
        """Send an answer of the gateway's own; return how many bytes it has."""
        raise NotImplementedError

    def refuse(
        self,
        refusal: Refusal,
        trail: Trail,
        protocol: str,
        request_id: str,
        rng: Random,
        *,
        close: bool,
        head_only: bool,
    ) -> int:
        """Send a refusal; return how many bytes it has."""
        raise NotImplementedError

    def abort(self) -> None:
        """An answer that is half out will never be whole: let the client see that."""
        raise NotImplementedError
