"""Identification end to end: tokens, memory, and a real key endpoint that rotates, goes away and is lied about."""

from __future__ import annotations

import asyncio
import functools
import json
from contextlib import asynccontextmanager, suppress
from random import Random

import aiohttp
import pytest

from gateway import identify
from gateway.identify import Identifier
from gateway.keys import KeyStore
from policies.errors import KeysUnavailable, Unauthenticated
from policies.identity import EXPIRED, LEEWAY_SECONDS, NOT_ACCEPTED, generate_signing_key, jwks_of, mint, verify
from policies.policy import ANONYMOUS, Issuer, Plan, Policy, Principal
from tests.support import jwks_server as idp
from tests.support import virtual_clock
from tests.support.jwks_server import JwksServer, jwks_server

IDP = "https://idp.example.com"
WALL = 1_800_000_000.0
OLD, NEW, STRANGER = (generate_signing_key() for _ in range(3))
BOTH = json.dumps({"keys": [key for pem in (OLD, NEW) for key in json.loads(jwks_of(pem))["keys"]]}).encode()


def plan_of(principal: Principal) -> Plan:
    return Plan(f"plan of {principal.consumer}")


def bearer(pem: bytes = OLD, **changes) -> bytes:
    claims = {"sub": "ann", "groups": ["research"], "issuer": IDP, "audience": "weir", "ttl": 3600, "wall": WALL}
    return b"Bearer " + mint(pem, **claims | changes).encode()


def policy(server: JwksServer, audience: str = "weir", *, anonymous: bool = False) -> Policy:
    return Policy("v1", (Issuer(IDP, (audience,), ("ES256",), server.url),), anonymous)


class Door:
    """An identifier with its keys, and what they said to a caller."""

    def __init__(self, server: JwksServer, session: aiohttp.ClientSession, capacity: int) -> None:
        self.server = server
        self.keys = KeyStore(policy(server).issuers, session, [].append, Random(1), lambda: WALL)
        self.identifier = Identifier(self.keys, plan_of, capacity)
        self.identifier.use(policy(server))

    async def enter(self, authorization: bytes | None, wall: float = WALL) -> str:
        """Who came in, or why not, by the calls the pipeline makes."""
        try:
            entry = self.identifier.identify_nowait(authorization, wall)
            if entry is None:
                entry = await self.identifier.identify(authorization, wall)
        except Unauthenticated as refusal:
            return refusal.message
        except KeysUnavailable as refusal:
            return f"{refusal.status} again in {refusal.retry_after:g} s"
        return entry.principal.consumer

    def is_known(self, authorization: bytes, wall: float = WALL) -> bool:
        return self.identifier.identify_nowait(authorization, wall) is not None


@asynccontextmanager
async def open_door(document: bytes = jwks_of(OLD), capacity: int = 100, answer: idp.Answer | None = None):
    async with jwks_server(document) as server, aiohttp.ClientSession() as session:
        server.answer = answer
        door = Door(server, session, capacity)
        task = asyncio.create_task(door.keys.run())
        try:
            await door.keys.wait_tried()
            yield door
        finally:
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task


def in_virtual_time(story):
    @functools.wraps(story)
    def test(**arguments):
        virtual_clock.run(story(**arguments))

    return test


@pytest.fixture
def verified(monkeypatch) -> list[bytes]:
    """The tokens that were verified, as often as they were."""
    tokens: list[bytes] = []

    def counting(token, issuers, wall):
        tokens.append(token)
        return verify(token, issuers, wall)

    monkeypatch.setattr(identify, "verify", counting)
    return tokens


UNAVAILABLE = "503 again in 1 s"


@in_virtual_time
async def test_known_token_is_looked_up_and_not_verified_again(verified):
    async with open_door() as door:
        header = bearer()
        assert not door.is_known(header)
        entry = await door.identifier.identify(header, WALL)
        assert entry.principal == Principal("ann", frozenset({"research"}), issuer=IDP, expires_at=WALL + 3600)
        assert entry.plan == Plan("plan of ann")
        assert door.identifier.identify_nowait(header, WALL) is entry
        assert len(verified) == 1


@in_virtual_time
async def test_memory_holds_no_token():
    async with open_door() as door:
        header = bearer()
        await door.enter(header)
        await door.enter(header + b"x")
        remembered = repr((door.identifier._verified, door.identifier._refused)).encode()
        assert header[7:40] not in remembered


@pytest.mark.parametrize(
    "header",
    [None, b"", b" ", b"Bearer", b"Bearer ", b"Basic YW5uOnNlY3JldA==", b"Bearertoken x", b"\xff\xfe", b"Token abc"],
)
@in_virtual_time
async def test_without_a_bearer_token_nobody_enters(header):
    async with open_door() as door:
        assert await door.enter(header) == identify._NO_TOKEN


@pytest.mark.parametrize(
    "header", [b"Bearer a", b"Bearer a.b.c", b"Bearer  ", b"Bearer \xff", b"Bearer " + b"a" * 10_000]
)
@in_virtual_time
async def test_what_is_no_token_is_not_accepted(header):
    async with open_door() as door:
        assert await door.enter(header) == NOT_ACCEPTED
        assert await door.enter(header) == NOT_ACCEPTED


@in_virtual_time
async def test_exactly_one_token():
    async with open_door() as door:
        assert await door.enter(bearer() + b" " + bearer()[7:]) == NOT_ACCEPTED
        assert await door.enter(bearer() + b", " + bearer()) == NOT_ACCEPTED


@in_virtual_time
async def test_scheme_has_no_case():
    async with open_door() as door:
        token = bearer()[7:]
        assert [await door.enter(scheme + token) for scheme in (b"bearer ", b"BEARER ", b"Bearer  ")] == ["ann"] * 3


@in_virtual_time
async def test_anonymous_callers_are_served_where_the_policy_says_so():
    async with open_door() as door:
        assert await door.enter(None) == identify._NO_TOKEN
        door.identifier.use(policy(door.server, anonymous=True))
        entry = door.identifier.identify_nowait(None, WALL)
        assert (entry.principal, entry.plan) == (ANONYMOUS, plan_of(ANONYMOUS))
        assert await door.enter(b"Bearer wrong") == NOT_ACCEPTED
        door.identifier.use(policy(door.server))
        assert await door.enter(None) == identify._NO_TOKEN


@in_virtual_time
async def test_memory_ends_with_the_token():
    async with open_door() as door:
        header = bearer(ttl=60)
        last = WALL + 60 + LEEWAY_SECONDS
        assert await door.enter(header) == "ann"
        assert door.is_known(header, last - 0.1)
        assert await door.enter(header, last) == EXPIRED
        assert door.identifier.statistics() == {"verified": 0, "refused": 1}


@in_virtual_time
async def test_memory_ends_with_the_policy():
    async with open_door() as door:
        header = bearer()
        first = await door.identifier.identify(header, WALL)
        door.identifier.use(policy(door.server))
        assert not door.is_known(header)
        assert await door.identifier.identify(header, WALL) is not first
        door.identifier.use(policy(door.server, audience="other"))
        assert await door.enter(header) == NOT_ACCEPTED
        door.identifier.use(Policy("none"))
        assert await door.enter(header) == NOT_ACCEPTED


@in_virtual_time
async def test_rotation_story():
    """D8: both keys in the overlap; the old one refused five minutes after it was removed, cached or not."""
    async with open_door() as door:
        old, new = bearer(OLD), bearer(NEW)
        assert await door.enter(old) == "ann"
        door.server.document = BOTH
        asked = door.server.asked
        assert await door.enter(new) == "ann"  # the unknown kid fetched the set
        assert door.server.asked == asked + 1
        assert await door.enter(old) == "ann"
        door.server.document = jwks_of(NEW)
        await asyncio.sleep(300)
        assert not door.is_known(old)
        assert await door.enter(old) == NOT_ACCEPTED
        assert await door.enter(new) == "ann"


@in_virtual_time
async def test_storm_of_unknown_kids_costs_one_fetch():
    """D4, and the caller with a good token does not feel it."""
    async with open_door() as door:
        asked = door.server.asked
        storm = [bearer(STRANGER, kid=f"kid-{n}") for n in range(1000)]
        told = await asyncio.gather(*map(door.enter, storm))
        assert set(told) == {NOT_ACCEPTED}
        assert door.server.asked == asked + 1
        assert await door.enter(bearer()) == "ann"
        await asyncio.sleep(9.9)
        await asyncio.gather(*map(door.enter, storm))
        assert door.server.asked == asked + 1


@in_virtual_time
async def test_kid_published_after_a_refusal_is_known_after_ten_seconds():
    """An unknown kid is not remembered as bad: only the pause between two fetches keeps it out."""
    async with open_door() as door:
        header = bearer(NEW)
        assert await door.enter(header) == NOT_ACCEPTED
        door.server.document = BOTH
        assert await door.enter(header) == NOT_ACCEPTED
        await asyncio.sleep(10)
        assert await door.enter(header) == "ann"


@in_virtual_time
async def test_outage_with_keys_known():
    """D5: tokens of known keys are served; one with an unknown key may be good, so it is told to come again."""
    async with open_door() as door:
        door.server.answer = idp.silence
        await asyncio.sleep(600)
        assert await door.enter(bearer()) == "ann"
        assert await door.enter(bearer(sub="bob")) == "bob"
        assert await door.enter(bearer(NEW)) == UNAVAILABLE
        assert await door.enter(bearer(NEW)) == UNAVAILABLE
        assert await door.enter(bearer(STRANGER, kid=json.loads(jwks_of(OLD))["keys"][0]["kid"])) == NOT_ACCEPTED


@in_virtual_time
async def test_cold_start_without_keys_is_unavailable_and_not_unauthenticated():
    """D6: and what no key could make good is refused all the same."""
    async with open_door(answer=idp.silence) as door:
        loop = asyncio.get_running_loop()
        began = loop.time()
        assert await door.enter(bearer()) == UNAVAILABLE
        assert loop.time() - began <= 2
        assert await door.enter(b"Bearer eyJhbGciOiJub25lIn0." + bearer()[7:].split(b".")[1] + b".") == NOT_ACCEPTED
        assert await door.enter(bearer(issuer="https://other.example")) == NOT_ACCEPTED
        door.server.answer = None
        await asyncio.sleep(35)
        assert await door.enter(bearer()) == "ann"


@in_virtual_time
async def test_request_that_comes_before_the_first_answer_waits_for_it():
    async with open_door(answer=idp.slow(jwks_of(OLD), 0.9)) as door:
        other = policy(door.server).issuers[0]
        door.keys.update([])
        door.keys.update([other])
        door.identifier.use(policy(door.server))
        assert await door.enter(bearer()) == "ann"


@in_virtual_time
async def test_refusal_is_remembered_for_ten_seconds(verified):
    async with open_door() as door:
        header = bearer(OLD)[:-20] + b"A" * 20
        for _ in range(1000):
            assert await door.enter(header) == NOT_ACCEPTED
        assert len(verified) == 1
        assert await door.enter(header, WALL + 9.9) == NOT_ACCEPTED
        assert len(verified) == 1
        assert await door.enter(header, WALL + 10) == NOT_ACCEPTED
        assert len(verified) == 2


@in_virtual_time
async def test_clock_that_is_set_right_ends_refusals():
    """D9: a gateway an hour ahead refuses good tokens; once corrected it must not go on for an hour."""
    async with open_door() as door:
        header = bearer(ttl=60)
        assert await door.enter(header, WALL + 3600) == EXPIRED
        assert await door.enter(header, WALL) == "ann"


@in_virtual_time
async def test_new_keys_end_refusals():
    async with open_door() as door:
        header = bearer(NEW, kid=json.loads(jwks_of(OLD))["keys"][0]["kid"])
        assert await door.enter(header) == NOT_ACCEPTED
        renamed = json.loads(jwks_of(NEW))["keys"][0] | {"kid": json.loads(jwks_of(OLD))["keys"][0]["kid"]}
        door.server.document = json.dumps({"keys": [renamed]}).encode()
        await asyncio.sleep(300)
        assert await door.enter(header) == "ann"


@in_virtual_time
async def test_memories_are_bounded_and_the_least_used_goes_first(monkeypatch):
    monkeypatch.setattr(identify, "_MAX_REFUSED", 5)
    async with open_door(capacity=3) as door:
        a, b, c, d = (bearer(sub=name) for name in "abcd")
        for header in (a, b, c, a, d):
            await door.enter(header)
        assert [door.is_known(header) for header in (a, b, c, d)] == [True, False, True, True]
        for n in range(20):
            await door.enter(b"Bearer %d" % n)
        assert door.identifier.statistics() == {"verified": 3, "refused": 5}


@in_virtual_time
async def test_until_a_policy_is_used_nobody_is_accepted():
    async with open_door() as door:
        fresh = Identifier(door.keys, plan_of)
        assert fresh.identify_nowait(None, WALL) is None
        with pytest.raises(Unauthenticated):
            await fresh.identify(bearer(), WALL)


async def test_where_nobody_issues_tokens_one_is_neither_needed_nor_looked_at() -> None:
    async with aiohttp.ClientSession() as session:
        keys = KeyStore((), session, lambda _event: None, Random(1), lambda: WALL)
        identifier = Identifier(keys, plan_of)
        identifier.use(Policy("v", anonymous=True))
        for authorization in (None, b"Bearer sk-made-up", b"Basic x"):
            entry = identifier.identify_nowait(authorization, 0.0)
            assert entry is not None
            assert entry.plan == plan_of(ANONYMOUS)
