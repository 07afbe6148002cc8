"""Channels to backends: gRPC's own connections, one to each backend, made when it is first asked for.

A channel goes to the address that discovery has checked and pinned, and to nobody else: gRPC is given no name to
resolve, no proxy, no service config. A connection that breaks is made anew by gRPC; one that cannot be made ends the
channel, so that the next call tries at once instead of sitting out gRPC's backoff.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from types import TracebackType
from typing import Any, Self

import grpc
import grpc.aio

from discovery.endpoint import Endpoint
from gateway.certificates import Pem


class Channel:
    """Held by `with` while a call is under way on it. `pem` gives what https backends are spoken to with."""

    def __init__(self, endpoint: Endpoint, most_bytes: int, pem: Callable[[], Pem]) -> None:
        host = f"ipv6:[{endpoint.address}]" if ":" in endpoint.address else f"ipv4:{endpoint.address}"
        target = f"{host}:{endpoint.grpc_port}"
        options = [
            ("grpc.default_authority", f"{_in_brackets(endpoint.host)}:{endpoint.grpc_port}"),
            ("grpc.enable_http_proxy", 0),
            ("grpc.service_config_disable_resolution", 1),
            ("grpc.use_local_subchannel_pool", 1),
            ("grpc.max_receive_message_length", most_bytes),
            ("grpc.max_send_message_length", -1),
            ("grpc.compression_enabled_algorithms_bitset", 1),  # identity: nothing is unpacked here
        ]
        self._channel: Any
        if endpoint.scheme == "https":
            files = pem()
            credentials = grpc.ssl_channel_credentials(files.ca, files.key, files.cert)
            options.append(("grpc.ssl_target_name_override", endpoint.host))
            self._channel = grpc.aio.secure_channel(target, credentials, options)
        else:
            self._channel = grpc.aio.insecure_channel(target, options)
        self._calls: dict[str, Any] = {}
        self._under_way = 0
        self._is_closed = False
        self._closing: asyncio.Task[None] | None = None

    def __repr__(self) -> str:
        return f"<Channel {self._under_way} under way{', closed' if self._is_closed else ''}>"

    async def is_ready(self) -> bool:
        """Wait until there is a connection, or for certain none."""
        state = self._channel.get_state(try_to_connect=True)
        while state is not grpc.ChannelConnectivity.READY:
            if state in (grpc.ChannelConnectivity.TRANSIENT_FAILURE, grpc.ChannelConnectivity.SHUTDOWN):
                return False
            await self._channel.wait_for_state_change(state)
            state = self._channel.get_state(try_to_connect=True)
        return True

    def unary(self, name: str) -> Any:
        """What calls the method of this full name, with bytes for bytes."""
        call = self._calls.get(name)
        if call is None:
            call = self._calls[name] = self._channel.unary_unary(name)
        return call

    def stream(self, name: str) -> Any:
        """As `unary`, for a method that has streams both ways."""
        call = self._calls.get(name)
        if call is None:
            call = self._calls[name] = self._channel.stream_stream(name)
        return call

    def close(self) -> None:
        self._is_closed = True
        self._close_if_unused()

    def __enter__(self) -> Self:
        self._under_way += 1
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._under_way -= 1
        self._close_if_unused()

    def _close_if_unused(self) -> None:
        if self._is_closed and not self._under_way and self._closing is None:
            self._closing = asyncio.get_running_loop().create_task(self._channel.close())


def _in_brackets(host: str) -> str:
    return f"[{host}]" if ":" in host else host
