"""A store for leased meters that lives in this process: `lease_ledger` behind a wire that takes its time.

Needs a running loop, at best with a virtual clock. Each replica has its own; they share a ledger.

    store = LedgerStore(ledger, "a")
    store.silent = True      # questions arrive, answers do not; the borrower is told so after 25 ms
    store.up = False         # known to be away
"""

from __future__ import annotations

import asyncio
import itertools

from gateway.meter import STORE_SECONDS, Borrower
from policies.lease import Ask, Grant
from tests.support.lease_ledger import MICRO, Ledger

EPOCH = 1_800_000_000 * MICRO


class LedgerStore:
    def __init__(self, ledger: Ledger, replica: str = "a", *, round_trip: float = 0.0005) -> None:
        self.ledger = ledger
        self.replica = replica
        self.round_trip = round_trip
        self.up = True
        self.silent = False
        self.asked: list[Ask] = []
        self._numbers = itertools.count(1)

    def submit(self, borrower: Borrower) -> None:
        if not self.up:
            borrower.answer(None)
            return
        asyncio.get_running_loop().call_soon(self._send, borrower)

    def _send(self, borrower: Borrower) -> None:
        ask = borrower.ask()
        self.asked.append(ask)
        asyncio.get_running_loop().call_later(self.round_trip / 2, self._arrive, borrower, ask)

    def _arrive(self, borrower: Borrower, ask: Ask) -> None:
        loop = asyncio.get_running_loop()
        now = EPOCH + round(loop.time() * MICRO)
        grant: Grant | None
        grant = self.ledger.lease(borrower.key, borrower.limit, self.replica, next(self._numbers), ask, now)
        if self.silent:
            loop.call_later(STORE_SECONDS - self.round_trip / 2, borrower.answer, None)
        else:
            loop.call_later(self.round_trip / 2, borrower.answer, grant)
