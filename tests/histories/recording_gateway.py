"""A whole gateway as a process of its own that writes down what it does, for a history.

    python -m tests.histories.recording_gateway weir.yaml RECORD NAME 5.0   # until its standard input ends

Each line of RECORD is a JSON document with `kind`: ready, view, pulse, breaker, ended. Times are those of
`time.perf_counter`. Delays of discovery are shortened (`GRACE_SECONDS` and so on below), so that a history of seconds
holds what would take minutes. The last argument is how many seconds a request waits for Redis (for 0.025), and a
connection to it (for 0.1), and leases of tokens are longer, so that a busy machine is no outage: what is then admitted
alone would blur what is counted.
"""

from __future__ import annotations

import asyncio
import os
import sys
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import uvloop

import discovery.discovery
import discovery.store
import gateway.app
import gateway.drain
import gateway.meter
import gateway.store
import policies.lease
from discovery.store import Snapshot
from discovery.watch import Timing, Watch
from gateway import config
from gateway.app import Gateway
from gateway.drain import wait_idle
from gateway.sources import Sources
from gateway.upstream.endpoint import Backend
from observability.request import RequestEnded

GRACE_SECONDS = 1.0  # for 15 s
DAMPING_SECONDS = 0.2  # for 2 s
BACKOFF_CAP_SECONDS = 0.5  # for 10 s
SILENCE_SECONDS = 0.6  # for 25 s; and a listing may take 1 s, for 30 s
LEASE_SECONDS = 10.0  # for 0.5 s
PULSE_SECONDS = 0.1


class RecordingGateway(Gateway):
    def __init__(self, settings: config.Config, name: str, descriptor: int) -> None:
        super().__init__(settings)
        self._name = name
        self._record = descriptor
        self._lives: dict[
            int, tuple[int, Backend]
        ] = {}  # its id -> a number that is never used again; it is kept alive

    def write(self, kind: str, **fields: Any) -> None:
        line = {"kind": kind, "at": self.clock(), "gateway": self._name, **fields}
        os.write(self._record, msgspec.json.encode(line) + b"\n")

    def _observers(self, stack):
        fanout = super()._observers(stack)
        fanout._of_requests += (self._note_ended,)
        return fanout

    def note_breaker(self, backend: Backend, state) -> None:
        self.write("breaker", key=backend.key, life=self._life(backend), state=state.value)

    def note_view(self, found, snapshot: Snapshot) -> None:
        # The fleet subscribed before us: it has taken in the same snapshot.
        backends = {
            key: (int(endpoint.zone or 0), f"{endpoint.address}:{endpoint.port}", self._life(self.fleet.backends[key]))
            for key, endpoint in snapshot.endpoints.items()
        }
        self.write("view", revision=found.watch.revision, backends=backends)

    def _note_ended(self, request: RequestEnded) -> None:
        attempts = [
            (f"{each.service}/{each.backend}", request.start + each.started, each.duration, each.outcome)
            for each in request.attempts
        ]
        self.write(
            "ended",
            request=request.request_id,
            consumer=request.consumer,
            status=request.status,
            code=request.code,
            reason=request.end_reason,
            attempts=attempts,
        )

    def _life(self, backend: Backend) -> int:
        return self._lives.setdefault(id(backend), (len(self._lives) + 1, backend))[0]

    def _accounts(self):
        return self.pipeline._admission._accounts.values()

    async def pulse(self) -> None:
        while True:
            counts = self.discovery.store.statistics()
            self.write(
                "pulse",
                revision=self.discovery.watch.revision,
                state=self.discovery.watch.state.value,
                waiting=counts.held + counts.damped,
                is_store_up=self.pipeline._admission._store.up,
                unreturned=sum(account.meter._slice.to_return() for account in self._accounts()),
            )
            await asyncio.sleep(PULSE_SECONDS)


async def run(file: Path, record: Path, name: str) -> None:
    descriptor = os.open(record, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    here = RecordingGateway(config.load(file, {}), name, descriptor)
    told = gateway.app._tell_breaker

    def tell_breaker(observe):
        tell = told(observe)

        def both(backend: Backend, state) -> None:
            here.note_breaker(backend, state)
            tell(backend, state)

        return both

    class RecordingSources(Sources):
        async def start_discovery(self, *arguments):
            found, load_streams = await super().start_discovery(*arguments)
            found.store.subscribe(partial(here.note_view, found))
            here.note_view(found, found.store.snapshot)
            return found, load_streams

    gateway.app._tell_breaker = tell_breaker
    gateway.app.Sources = RecordingSources
    ended = asyncio.Event()
    asyncio.get_running_loop().add_reader(sys.stdin.fileno(), ended.set)
    async with here.running():
        beating = asyncio.create_task(here.pulse())
        here.write("ready", data=str(here.data_address))
        await ended.wait()
        beating.cancel()
        await wait_idle(here.pipeline, 5.0)
        here._flush()


def main() -> None:
    file, record, name, store_seconds = sys.argv[1:]
    gateway.store.STORE_SECONDS = gateway.meter.STORE_SECONDS = float(store_seconds)
    gateway.store.CONNECT_SECONDS = float(store_seconds)
    gateway.store.LEASE_SECONDS, policies.lease.SPENDABLE_SECONDS = LEASE_SECONDS, 0.98 * LEASE_SECONDS
    gateway.drain.ACCEPT_SECONDS = 0.0
    discovery.store.GRACE_SECONDS = GRACE_SECONDS
    discovery.store.DAMPING_SECONDS = DAMPING_SECONDS
    timing = Timing(
        silence=SILENCE_SECONDS, ping=SILENCE_SECONDS, relist=5.0, listing=1.0, backoff_cap=BACKOFF_CAP_SECONDS
    )
    discovery.discovery.Watch = partial(Watch, timing=timing)
    uvloop.run(run(Path(file), Path(record), name))


if __name__ == "__main__":
    main()
