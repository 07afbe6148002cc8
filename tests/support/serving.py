"""`weir serve` as a process of its own, for what only a process can show: signals, exit codes, its standard output.

async with serving(tmp_path, backend.url, policy=...) as weir:
    ...                      # weir.data_address, weir.admin_address: as a gateway of this process has them
    weir.process.send_signal(signal.SIGTERM)
    await weir.wait_ended()
    weir.log                 # all that it wrote, unless `stdout` went elsewhere
"""

import asyncio
import contextlib
import json
import os
import signal
import sys
from collections.abc import AsyncIterator
from pathlib import Path

from gateway.config_fields import Address
from tests.support.ports import free_ports
from tests.support.running_gateway import OPEN_POLICY

_RUN = "from gateway.cli import main; main()"


class PortTaken(Exception):  # noqa: N818  what has happened, not an error
    """Somebody else took a port between our look and our use of it."""


class Weir:
    """A running `weir serve`. With several workers `admin_addresses` are those of each."""

    def __init__(self, process: asyncio.subprocess.Process, data: int, admin: int, workers: int) -> None:
        self.process = process
        self.data_address = Address("127.0.0.1", data)
        self.admin_addresses = [Address("127.0.0.1", admin + number) for number in range(workers)]
        self._log, self._errors = bytearray(), bytearray()
        self._reading = asyncio.gather(_read(process.stdout, self._log), _read(process.stderr, self._errors))

    @property
    def admin_address(self) -> Address:
        return self.admin_addresses[0]

    @property
    def log(self) -> str:
        """What it has written until now."""
        return self._log.decode()

    @property
    def errors(self) -> str:
        return self._errors.decode()

    @property
    def records(self) -> list[dict]:
        return [json.loads(line) for line in self.log.splitlines()]

    async def wait_ended(self, seconds: float = 60.0) -> int:
        """Its exit code."""
        async with asyncio.timeout(seconds):
            await self._reading
            return await self.process.wait()

    async def wait_listening(self) -> None:
        """Until the data port of each of them is open and each says that it is ready. Raises PortTaken.

        Who keeps several has heard of it then, too: a worker that ends before that is a start that failed.
        """
        async with asyncio.timeout(60):
            for number, address in enumerate(self.admin_addresses):
                while not await _is_ready(address) or not self._has_heard_of(number):
                    if self.process.returncode is not None:
                        await self.wait_ended()
                        raise PortTaken if "is in use" in self.errors else AssertionError(f"weir ended: {self.errors}")
                    await asyncio.sleep(0.05)

    def _has_heard_of(self, number: int) -> bool:
        return len(self.admin_addresses) == 1 or b"worker-%d is ready" % number in self._errors

    def children(self) -> list[int]:
        return [
            int(pid) for pid in Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        ]


@contextlib.asynccontextmanager
async def serving(
    home: Path,
    *urls: str,
    policy: str = OPEN_POLICY,
    config: str = "",
    workers: int = 1,
    others: dict[str, str] | None = None,
    setup: str = "",
    stdout: int = asyncio.subprocess.PIPE,
    wait: bool = True,
) -> AsyncIterator[Weir]:
    """`setup` is Python run before the command line: for shortening what is promised in minutes."""
    backends = [f'{{service: tiny, url: "{url}", models: [tiny]}}' for url in urls]
    backends += [f'{{service: {name}, url: "{url}", models: [{name}]}}' for name, url in (others or {}).items()]
    (home / "policy.yaml").write_text(policy)
    more = f"workers: {workers}\npolicy: policy.yaml\ndiscovery: {{static: [{', '.join(backends)}]}}\n{config}"
    while True:
        weir = await _start(home, more, workers, setup, stdout)
        try:
            if wait:
                await weir.wait_listening()
            yield weir
            if weir.process.returncode is None:
                weir.process.send_signal(signal.SIGTERM)
            await weir.wait_ended()
        except PortTaken:
            continue
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(weir.process.pid, signal.SIGKILL)
            with contextlib.suppress(TimeoutError):
                await weir.wait_ended(10)
        return


async def _start(home: Path, more: str, workers: int, setup: str, stdout: int) -> Weir:
    data, *admin = free_ports(1 + workers)
    (home / "weir.yaml").write_text(f"listen: 127.0.0.1:{data}\nadmin: {{listen: '127.0.0.1:{admin[0]}'}}\n{more}")
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", f"{setup}\n{_RUN}", "serve", "--config", str(home / "weir.yaml"),
        stdout=stdout, stderr=asyncio.subprocess.PIPE, start_new_session=True,
    )  # fmt: skip
    return Weir(process, data, admin[0], workers)


async def _read(stream: asyncio.StreamReader | None, into: bytearray) -> None:
    while stream is not None and (some := await stream.read(1 << 16)):
        into += some


async def _is_ready(admin: Address) -> bool:
    with contextlib.suppress(OSError, asyncio.IncompleteReadError):
        reader, writer = await asyncio.open_connection(admin.host, admin.port)
        try:
            writer.write(b"GET /readyz HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n")
            return (await reader.readline()).startswith(b"HTTP/1.1 200")
        finally:
            writer.close()
    return False
