"""The key store as stories: rotation, outage, storms of unknown keys, and every bad answer an endpoint may give."""

from __future__ import annotations

import asyncio
import functools
import gzip
import json
import os
from contextlib import asynccontextmanager, suppress
from random import Random

import aiohttp
import pytest

from gateway import keys
from gateway.keys import KeyStore, Timing
from observability.events import KeysRefreshed
from policies.identity import ALGORITHMS, generate_signing_key, jwks_of
from policies.policy import Issuer
from tests.support import jwks_server as idp
from tests.support import virtual_clock
from tests.support.jwks_server import jwks_server

IDP = "https://idp.example.com"
WALL = 1_800_000_000.0  # Fri, 15 Jan 2027 08:00:00 GMT
OLD, NEW = jwks_of(generate_signing_key()), jwks_of(generate_signing_key())


def keys_in(*documents: bytes) -> list[dict]:
    return [key for document in documents for key in json.loads(document)["keys"]]


def kids(*documents: bytes) -> set[str]:
    return {key["kid"] for key in keys_in(*documents)}


def jwks(*members: dict) -> bytes:
    return json.dumps({"keys": members}).encode()


BOTH = jwks(*keys_in(OLD, NEW))


def issuer(jwks: str, name: str = IDP, algorithms=ALGORITHMS, audience=("weir",)) -> Issuer:
    return Issuer(name, audience, algorithms, jwks)


@asynccontextmanager
async def running(*issuers: Issuer, timing: Timing = Timing()):  # noqa: B008  frozen
    """A store that runs, whose issuers were all asked once, and the events it told."""
    events: list[KeysRefreshed] = []
    async with aiohttp.ClientSession() as session:
        store = KeyStore(issuers, session, events.append, Random(1), lambda: WALL, timing)
        task = asyncio.create_task(store.run())
        try:
            await store.wait_tried()
            yield store, events
        finally:
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task


def held(store: KeyStore, of: Issuer) -> set[str] | None:
    key_set = store.keys_of(of)
    return None if key_set is None else set(key_set.named)


def in_virtual_time(story):
    """Run an async test on a clock that jumps: real sockets on loopback, but an hour takes a moment."""

    @functools.wraps(story)
    def test(**arguments):
        virtual_clock.run(story(**arguments))

    return test


async def advance(seconds: float) -> None:
    await asyncio.sleep(seconds)


@in_virtual_time
async def test_keys_are_there_when_the_first_read_is_done():
    async with jwks_server(OLD) as server, running(issuer(server.url)) as (store, events):
        assert held(store, issuer(server.url)) == kids(OLD)
        assert events == [KeysRefreshed(IDP, "ok")]
        assert not store.is_failing(issuer(server.url))
        (status,) = store.statistics()
        assert (status.issuer, status.keys, status.result) == (IDP, 1, "ok")


@in_virtual_time
async def test_rotation_old_then_both_then_new():
    async with jwks_server(OLD) as server, running(issuer(server.url)) as (store, _):
        seen = [store.generation]
        for document in (BOTH, NEW):
            server.document = document
            await advance(300)  # whoever reads each five minutes has read by now
            assert held(store, issuer(server.url)) == kids(document)
            seen.append(store.generation)
        assert seen == sorted(set(seen))


@in_virtual_time
async def test_refresh_is_spread_and_never_later_than_five_minutes():
    times = []
    async with jwks_server(OLD) as server:
        server.answer = record_times(times)
        async with running(issuer(server.url)):
            await advance(3600)
    gaps = [after - before for before, after in zip(times, times[1:], strict=False)]
    assert all(239 < gap <= 300.1 for gap in gaps)
    assert len(set(gaps)) > 5


def record_times(times: list[float]):
    async def answer(_):
        times.append(asyncio.get_running_loop().time())
        return aiohttp.web.Response(body=OLD)

    return answer


@in_virtual_time
async def test_same_keys_in_another_spelling_change_nothing():
    async with jwks_server(BOTH) as server, running(issuer(server.url)) as (store, _):
        before = store.generation
        server.document = jwks(*reversed(keys_in(OLD, NEW)), {"kty": "oct", "kid": "x", "k": "AAAA"})
        await advance(300)
        assert server.asked == 2
        assert store.generation == before


ZIPPED = gzip.compress(NEW)
SMALL_RSA = {"kty": "RSA", "kid": "small", "n": "AQAB" * 40, "e": "AQAB"}
BAD_ANSWERS = {
    "server error": ({"status": 500}, "failed", "answered 500"),
    "not found": ({"status": 404, "document": NEW}, "failed", "answered 404"),
    "no content": ({"status": 204, "document": b""}, "failed", "answered 204"),
    "partial": ({"status": 206, "document": NEW}, "failed", "answered 206"),
    "redirect": ({"status": 302, "headers": {"location": "http://169.254.169.254/"}}, "failed", "answered 302"),
    "nothing": ({"document": b""}, "rejected", "not a JSON object"),
    "html": ({"document": b"<!doctype html><title>Sign in</title>"}, "rejected", "not a JSON object"),
    "no set": ({"document": b'{"error": "busy"}'}, "rejected", "no keys"),
    "empty set": ({"document": b'{"keys": []}'}, "rejected", "no keys"),
    "array": ({"document": b"[]"}, "rejected", "not a JSON object"),
    "deep": ({"document": b"[" * 100_000}, "rejected", "not a JSON object"),
    "65 keys": ({"document": jwks(*keys_in(NEW) * 65)}, "rejected", "65 keys"),
    "key twice": ({"document": jwks(*keys_in(NEW) * 2)}, "rejected", "stands for 2 keys"),
    "symmetric": ({"document": jwks({"kty": "oct", "k": "AAAA"})}, "rejected", "symmetric"),
    "small RSA": ({"document": jwks(SMALL_RSA)}, "rejected", "bits"),
    "300 KiB": ({"document": NEW + b" " * 300_000}, "rejected", "longer than 256 KiB"),
    "10 MiB": ({"answer": idp.flood}, "rejected", "longer than 256 KiB"),
    "compressed": ({"document": ZIPPED, "headers": {"content-encoding": "gzip"}}, "failed", "compressed"),
    "silence": ({"answer": idp.silence}, "failed", "no answer within 1 s"),
    "slow": ({"answer": idp.slow(NEW, 10)}, "failed", "no answer within 1 s"),
    "drip": ({"answer": idp.drip}, "failed", "no answer within 1 s"),
    "cut": ({"answer": idp.cut(NEW)}, "failed", "ClientPayloadError"),
}


@pytest.mark.parametrize(("behaviour", "result", "reason"), BAD_ANSWERS.values(), ids=BAD_ANSWERS)
@in_virtual_time
async def test_bad_answer_never_takes_the_last_good_set(behaviour, result, reason):
    async with jwks_server(OLD) as server, running(issuer(server.url)) as (store, events):
        before = store.generation
        for name, value in behaviour.items():
            setattr(server, name, value)
        await advance(302)
        assert held(store, issuer(server.url)) == kids(OLD)
        assert store.generation == before
        assert store.is_failing(issuer(server.url))
        assert events[-1].result == result
        assert reason in events[-1].reason
        assert server.url not in events[-1].reason


@pytest.mark.parametrize(("behaviour", "result", "reason"), BAD_ANSWERS.values(), ids=BAD_ANSWERS)
@in_virtual_time
async def test_bad_first_answer_is_no_set(behaviour, result, reason):
    async with jwks_server() as server:
        for name, value in behaviour.items():
            setattr(server, name, value)
        async with running(issuer(server.url)) as (store, events):
            assert store.keys_of(issuer(server.url)) is None
            assert (events[0].issuer, events[0].result) == (IDP, result)


@pytest.mark.parametrize(
    "url",
    [
        "http://127.0.0.1:1/",
        "http://[::1",
        "http://127.0.0.1:99999/",
        "http:///x",
        "ftp://127.0.0.1/",
        "http://\x00/",
        "://",
    ],
)
@in_virtual_time
async def test_address_that_leads_nowhere_is_a_failed_read(url):
    async with running(issuer(url)) as (store, events):
        assert events[0].result == "failed"
        assert store.keys_of(issuer(url)) is None
        assert "127.0.0.1" not in events[0].reason


@in_virtual_time
async def test_outage_keeps_the_keys_until_they_are_too_old_and_asks_gently():
    assert Timing().stale_at_most == 24 * 3600
    timing = Timing(stale_at_most=3600)
    async with jwks_server(OLD) as server, running(issuer(server.url), timing=timing) as (store, events):
        server.status = 503
        await advance(3600 - 60)
        assert held(store, issuer(server.url)) == kids(OLD)
        assert 100 < server.asked < 400  # each 15 s, in the mean
        before = store.generation
        await advance(120)
        assert held(store, issuer(server.url)) is None
        assert store.generation > before
        assert events[-1].reason == "answered 503"
        server.status = 200
        await advance(31)
        assert held(store, issuer(server.url)) == kids(OLD)
        assert events[-1] == KeysRefreshed(IDP, "ok")


@in_virtual_time
async def test_each_outage_begins_with_quick_tries():
    async with jwks_server(OLD) as server, running(issuer(server.url)) as (store, _):
        for _ in range(2):
            server.status = 503
            await advance(1800)
            server.status = 200
            await advance(31)
            assert not store.is_failing(issuer(server.url))
        server.status = 503
        await store.refetch(issuer(server.url))
        asked = server.asked
        await advance(5)
        assert server.asked >= asked + 2


@in_virtual_time
async def test_each_fetch_is_told():
    async with jwks_server(OLD) as server, running(issuer(server.url)) as (_, events):
        await advance(3600)
        assert events == [KeysRefreshed(IDP, "ok")] * server.asked


@pytest.mark.parametrize(
    ("date", "skew"),
    [
        ("Fri, 15 Jan 2027 08:00:00 GMT", 0.0),
        ("Fri, 15 Jan 2027 07:00:00 GMT", 3600.0),
        ("Fri, 15 Jan 2027 08:01:00 GMT", -60.0),
        ("", None),
        ("tomorrow", None),
        ("Fri, 31 Feb 99999999999 08:00:00 GMT", None),
    ],
)
@in_virtual_time
async def test_the_issuers_clock_is_heard(date, skew):
    async with jwks_server(OLD) as server:
        server.headers["date"] = date
        async with running(issuer(server.url)) as (store, _):
            assert [status.skew for status in store.statistics()] == [skew]
            assert held(store, issuer(server.url)) == kids(OLD)


@in_virtual_time
async def test_long_body_is_not_read_to_its_end():
    async with jwks_server() as server:
        server.answer = idp.flood
        async with running(issuer(server.url)) as (_, events):
            assert "longer than 256 KiB" in events[0].reason
            await advance(1)
        assert server.finished == 0


@in_virtual_time
async def test_keys_come_when_the_issuer_does():
    async with jwks_server(OLD) as server:
        server.answer = idp.silence
        async with running(issuer(server.url)) as (store, _):
            assert store.keys_of(issuer(server.url)) is None
            server.answer = None
            await advance(5)
            assert held(store, issuer(server.url)) == kids(OLD)


@in_virtual_time
async def test_start_does_not_wait_for_an_issuer_that_is_away():
    async with jwks_server(OLD) as good, jwks_server() as bad:
        bad.answer = idp.silence
        loop = asyncio.get_running_loop()
        began = loop.time()
        async with running(issuer(bad.url, "https://bad.example"), issuer(good.url)) as (store, _):
            assert loop.time() - began <= 2
            assert held(store, issuer(good.url)) == kids(OLD)


@in_virtual_time
async def test_storm_of_unknown_keys_is_one_fetch_in_ten_seconds():
    async with jwks_server(OLD) as server, running(issuer(server.url)) as (store, _):
        for _ in range(3):
            asked = server.asked
            for _ in range(10):  # ten waves of a hundred, one second apart
                await asyncio.gather(*(store.refetch(issuer(server.url)) for _ in range(100)))
                await advance(0.99)
            assert server.asked == asked + 1
            await advance(0.2)


@in_virtual_time
async def test_those_who_ask_while_keys_are_on_their_way_get_them():
    async with jwks_server(OLD) as server, running(issuer(server.url)) as (store, _):
        server.answer = idp.slow(BOTH, 0.5)
        first = asyncio.create_task(store.refetch(issuer(server.url)))
        await advance(0.3)
        await store.refetch(issuer(server.url))
        assert held(store, issuer(server.url)) == kids(BOTH)
        await first
        assert server.asked == 2


@in_virtual_time
async def test_one_who_leaves_does_not_take_the_fetch_along():
    async with jwks_server(OLD) as server, running(issuer(server.url)) as (store, _):
        server.answer = idp.slow(BOTH, 0.5)
        leaver = asyncio.create_task(store.refetch(issuer(server.url)))
        stayer = asyncio.create_task(store.refetch(issuer(server.url)))
        await advance(0.1)
        leaver.cancel()
        await stayer
        assert held(store, issuer(server.url)) == kids(BOTH)
        assert server.asked == 2


@in_virtual_time
async def test_waiting_for_keys_ends():
    async with jwks_server(OLD) as server, running(issuer(server.url)) as (store, _):
        server.answer = idp.silence
        loop = asyncio.get_running_loop()
        began = loop.time()
        await store.refetch(issuer(server.url))
        assert loop.time() - began <= 2
        assert held(store, issuer(server.url)) == kids(OLD)


@in_virtual_time
async def test_store_that_does_not_run_lets_nobody_wait_long():
    async with aiohttp.ClientSession() as session:
        store = KeyStore([issuer("http://127.0.0.1:1/")], session, [].append, Random(1), lambda: WALL)
        await store.wait_tried()
        await store.refetch(issuer("http://127.0.0.1:1/"))
        assert asyncio.get_running_loop().time() <= 4.1


@in_virtual_time
async def test_new_policy_keeps_the_keys_of_issuers_that_did_not_change():
    async with jwks_server(OLD) as one, jwks_server(NEW) as two, running(issuer(one.url)) as (store, _):
        generation = store.generation
        store.update([issuer(one.url, audience=("other",)), issuer(two.url, "https://two.example")])
        assert held(store, issuer(one.url)) == kids(OLD)
        assert store.generation > generation
        await store.wait_tried()
        assert held(store, issuer(two.url, "https://two.example")) == kids(NEW)
        assert one.asked == 1


@in_virtual_time
async def test_issuer_that_left_the_policy_is_forgotten_and_asked_no_more():
    async with jwks_server(OLD) as server, running(issuer(server.url)) as (store, _):
        server.answer = idp.slow(OLD, 0.5)
        waiter = asyncio.create_task(store.refetch(issuer(server.url)))
        await advance(0.1)
        store.update([])
        async with asyncio.timeout(0.1):
            await waiter
        assert store.keys_of(issuer(server.url)) is None
        assert store.is_failing(issuer(server.url))
        await store.refetch(issuer(server.url))
        asked = server.asked
        await advance(3600)
        assert server.asked == asked
        assert store.statistics() == []


@in_virtual_time
async def test_other_algorithms_are_other_keys():
    async with jwks_server(OLD) as server, running(issuer(server.url)) as (store, events):
        store.update([issuer(server.url, algorithms=("RS256",))])
        await store.wait_tried()
        assert store.keys_of(issuer(server.url, algorithms=("RS256",))) is None
        assert events[-1].result == "rejected"


class TestFile:
    """On a real clock, because files are read in a thread; each story waits for what it tells of."""

    timing = Timing(file_refresh=0.01, refetch=0.01, fetch=5.0, retry=0.01)

    @staticmethod
    async def until(condition) -> None:
        async with asyncio.timeout(10):
            while not condition():
                await asyncio.sleep(0.005)

    @pytest.mark.parametrize("way", ["rename", "in place", "symlink"])
    async def test_change_is_seen(self, tmp_path, way):
        path = tmp_path / "keys.json"
        (tmp_path / "old.json").write_bytes(OLD)
        (tmp_path / "new.json").write_bytes(NEW)
        if way == "symlink":
            path.symlink_to("old.json")
        else:
            path.write_bytes(OLD)
        async with running(issuer(str(path)), timing=self.timing) as (store, events):
            assert held(store, issuer(str(path))) == kids(OLD)
            if way == "in place":
                path.write_bytes(NEW)
            elif way == "rename":
                (tmp_path / "new.json").replace(path)
            else:
                (tmp_path / "next").symlink_to("new.json")
                (tmp_path / "next").replace(path)
            await self.until(lambda: held(store, issuer(str(path))) == kids(NEW))
            assert {event.result for event in events} <= {"ok", "rejected"}  # an in-place write may be seen half done

    async def test_file_that_goes_bad_and_comes_back_is_told_once_each(self, tmp_path, monkeypatch):
        reads = []
        read_file = keys._read_file
        monkeypatch.setattr(keys, "_read_file", lambda path: reads.append(path) or read_file(path))
        path = tmp_path / "keys.json"
        path.write_bytes(OLD)
        async with running(issuer(str(path)), timing=self.timing) as (store, events):

            async def look_often() -> None:
                enough = len(reads) + 4
                await self.until(lambda: len(reads) >= enough)

            await look_often()
            path.unlink()
            await look_often()
            for document in (b'{"keys": []}', OLD):
                (tmp_path / "next").write_bytes(document)
                (tmp_path / "next").replace(path)
                await look_often()
            assert [event.result for event in events] == ["ok", "failed", "rejected", "ok"]
            assert "No such file" in events[1].reason
            assert held(store, issuer(str(path))) == kids(OLD)

    @pytest.mark.parametrize("kind", ["missing", "directory", "pipe", "null byte", "endless"])
    async def test_what_is_no_file_is_a_failed_read(self, tmp_path, kind):
        path = tmp_path / "keys"
        if kind == "directory":
            path.mkdir()
        elif kind == "pipe":
            os.mkfifo(path)
        location = {"null byte": f"{path}\x00", "endless": "/dev/zero"}.get(kind, str(path))
        async with running(issuer(location), timing=self.timing) as (store, events):
            assert events[0].result == "failed"
            assert store.keys_of(issuer(location)) is None
