"""One call of a client over gRPC, as the pipeline knows clients.

`context` is gRPC's own of that call. The call ends with `code`, `message` and `trailers`, which whoever serves it sends
when the pipeline is done: here they are only set.
"""

from __future__ import annotations

import asyncio
from math import inf
from random import Random
from typing import TYPE_CHECKING, Any

from gateway.client import Carry, Client
from gateway.head import Head, Lines
from gateway.rescue import retry_lines
from gateway.rpc.messages import encoded
from gateway.rpc.metadata import Metadata, address_in, pairs
from gateway.rpc.methods import Method, resource_in
from gateway.rpc.statuses import Code, code_of
from gateway.server import MOST_LINES
from policies.errors import BadRequest, BodyTooLarge, ClientTimeout, HeaderTooLarge, Refusal

if TYPE_CHECKING:
    from gateway.call import Call
    from gateway.trail import Trail


class RpcClient(Client):
    """`name` is the gateway's own, `due` when the client stops waiting (by the trail's clock; inf: it never does)."""

    __slots__ = ("_name", "code", "context", "due", "message", "metadata", "method", "response", "trailers")

    def __init__(self, context: Any, method: Method, carry: Carry, name: bytes, scheme: bytes, now: float) -> None:
        super().__init__(carry)
        self.context = context
        self.method = method
        self.metadata: Metadata = tuple(context.invocation_metadata())
        remaining = context.time_remaining()
        self.due: float = inf if remaining is None else now + remaining
        self.code = Code.OK
        self.message = ""
        self.trailers: Metadata = ()
        self.response: bytes | None = None  # of the gateway itself; a backend's goes out as it comes
        self._name = name
        self.forwarded_lines = b"via: 1.1 %b\r\nx-forwarded-for: %b\r\nx-forwarded-proto: %b\r\n" % (
            name,
            address_in(context.peer()).encode(),
            scheme,
        )

    def head_of(self, lines: Lines) -> Head:
        if len(lines) > MOST_LINES:
            raise HeaderTooLarge(f"The call has over {MOST_LINES} entries of metadata.")
        head = Head(lines)
        head.refuse_loop(self._name)
        return head

    async def read(self, call: Call, most: int, seconds: float) -> None:
        """The first message, and what it names."""
        try:
            async with asyncio.timeout(seconds):
                message = await self.context.read()
        except TimeoutError:
            raise ClientTimeout(f"The message did not come within {seconds:g} s.") from None
        call.body = self.checked(message, most)
        call.size, call.is_whole = len(message), True
        call.resource = resource_in(self.method, message)

    def checked(self, message: object, most: int) -> bytes:
        """What was read, if it is a message of a size that is taken. Raises BadRequest, BodyTooLarge."""
        if not isinstance(message, bytes):  # gRPC has told the client already if it was far too large
            raise BadRequest("The call brought no message.")
        if len(message) > most:
            raise BodyTooLarge(f"The message is larger than {most} bytes.")
        return message

    def answer(self, call: Call, trail: Trail, status: int, document: dict[str, Any]) -> int:  # noqa: ARG002  it is in the message
        self.response = response = encoded(f"{self.method.name}Response", document)
        self.end_well(call, trail, b"")
        return len(response)

    def end_well(self, call: Call, trail: Trail, more: bytes) -> None:
        """All has gone out. `more` are header lines beside those that every answer has."""
        self.trailers = pairs(call.id_line + trail.policy_line + more + trail.limit_lines + trail.server_timing())

    def refuse(
        self,
        refusal: Refusal,
        trail: Trail,
        protocol: str,  # noqa: ARG002  gRPC has one form for all
        request_id: str,
        rng: Random,
        *,
        close: bool,  # noqa: ARG002  a call is no connection
        head_only: bool,  # noqa: ARG002
    ) -> int:
        self.code, self.message = code_of(refusal), refusal.message
        lines = b"x-request-id: %b\r\n%b%b%bx-weir-code: %b\r\n" % (
            request_id.encode(),
            trail.policy_line,
            trail.limit_lines,
            trail.server_timing(),
            refusal.code.encode(),
        )
        if refusal.rule is not None:
            lines += b"x-weir-rule: %b\r\n" % refusal.rule.encode("ascii", "replace")
        self.trailers = pairs(lines + retry_lines(refusal, rng))
        told = dict(self.trailers)
        if "retry-after-ms" in told:  # what a client's own retry policy obeys; -1: do not come back
            pushback = "-1" if "x-should-retry" in told else told["retry-after-ms"]
            self.trailers += (("grpc-retry-pushback-ms", pushback),)
        return len(self.message)

    def abort(self) -> None:
        if self.code is Code.OK:
            self.code, self.message = Code.INTERNAL, "Something went wrong in the gateway; the answer is incomplete."
