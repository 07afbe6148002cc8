import asyncio
import json
from contextlib import asynccontextmanager
from ipaddress import ip_network

import pytest

from discovery.source import KeyValue, Rejected
from discovery.vetting import Vetting, system_resolver
from discovery.watch import Delta
from tests.support.virtual_clock import virtual_time

ALLOWED = [ip_network("10.0.0.0/8"), ip_network("127.0.0.0/8"), ip_network("fd00::/8")]


class Names:
    """A resolver whose answers a test writes."""

    def __init__(self, **answers):
        self.answers = answers
        self.asked = []
        self.running = self.most_running = 0

    async def __call__(self, name):
        self.asked.append(name)
        self.running += 1
        self.most_running = max(self.running, self.most_running)
        try:
            answer = self.answers.get(name, OSError("unknown"))
            if isinstance(answer, float):
                await asyncio.sleep(answer)
            if isinstance(answer, OSError):
                raise answer
            return answer
        finally:
            self.running -= 1


class Desk:
    """A vetting with everything it said: who is accepted now, who was rejected and why."""

    def __init__(self, names=None, **options):
        self.accepted = {}
        self.events = []
        self.forgotten = []
        self.published = 0
        self.names = names or Names()
        self.vetting = Vetting(
            self.publish,
            self.forgotten.append,
            self.events.append,
            allow_networks=ALLOWED,
            resolve=self.names,
            **options,
        )

    def publish(self, verdict):
        self.published += 1
        self.accepted.update((each.key, each) for each in verdict.puts)
        for key in (*verdict.deletes, *verdict.rejected):
            self.accepted.pop(key, None)

    def put(self, **urls):
        items = [KeyValue(f"s/{key}", json.dumps({"url": url}).encode(), 1) for key, url in urls.items()]
        self.vetting.apply(Delta(tuple(items), ()))

    def raw(self, key, value):
        self.vetting.apply(Delta((KeyValue(key, value, 1),), ()))

    def delete(self, *keys):
        self.vetting.apply(Delta((), tuple(f"s/{key}" for key in keys)))

    @property
    def addresses(self):
        return {key.removeprefix("s/"): each.address for key, each in self.accepted.items()}


@asynccontextmanager
async def working(desk):
    task = asyncio.create_task(desk.vetting.run())
    try:
        yield desk
    finally:
        task.cancel()
        await asyncio.wait({task})
        assert task.cancelled()


@pytest.mark.parametrize(
    ("url", "address"),
    [
        ("http://10.1.2.3:80", "10.1.2.3"),
        ("http://[fd00::1]", "fd00::1"),
        ("http://[::ffff:10.0.0.1]", "10.0.0.1"),
        ("http://169.254.169.254", None),  # where clouds keep credentials
        ("http://[::ffff:169.254.169.254]", None),
        ("http://192.168.0.1", None),
        ("http://0.0.0.0", None),
        ("http://[::]", None),
        ("http://[::1]", None),
        ("http://8.8.8.8", None),
    ],
)
def test_an_address_is_decided_at_once(url, address):
    desk = Desk()
    desk.put(a=url)
    assert desk.addresses == ({"a": address} if address else {})
    assert len(desk.events) == (0 if address else 1)


def test_a_whole_listing_is_one_verdict_and_poison_stops_nothing():
    desk = Desk()
    desk.put(a="http://10.0.0.1", b="http://evil@10.0.0.2", c="http://10.0.0.3")
    assert (set(desk.addresses), desk.published) == ({"a", "c"}, 1)
    assert desk.events == [Rejected("s/b", "url: must not carry a user or password")]


def test_poison_drops_the_last_good_value_and_is_told_once():
    desk = Desk()
    desk.put(a="http://10.0.0.1")
    for _ in range(3):
        desk.raw("s/a", b"{")
    assert desk.addresses == {}
    assert len(desk.events) == 1
    desk.put(a="http://10.0.0.1")
    assert desk.addresses == {"a": "10.0.0.1"}
    desk.raw("s/a", b"{")
    assert len(desk.events) == 2


def test_what_is_told_of_a_hostile_key_is_plain():
    desk = Desk()
    desk.raw("\x1b[2J\n\u202e" + "x" * 500, b"{}")
    assert desk.events[0].key == "?[2J??" + "x" * 194
    desk.raw("s/i", '{"url": "http://10.0.0.1", "state": "\u202e\\u001b[2J"}'.encode())
    assert desk.events[1].reason.isascii()
    assert desk.events[1].reason.isprintable()


def test_beyond_the_cap_the_first_stay_and_the_others_are_asked_for_again():
    desk = Desk(max_backends=2)
    desk.put(a="http://10.0.0.1", b="http://10.0.0.2", c="http://10.0.0.3")
    assert set(desk.addresses) == {"a", "b"}
    assert desk.forgotten == ["s/c"]
    assert desk.events == [Rejected("s/c", "there are 2 backends already")]
    desk.put(a="http://10.0.0.9")
    assert desk.addresses["a"] == "10.0.0.9"
    desk.delete("b")
    desk.put(c="http://10.0.0.3")
    assert set(desk.addresses) == {"a", "c"}


@virtual_time
async def test_a_name_is_pinned_to_the_first_allowed_of_its_addresses():
    desk = Desk(Names(mixed=["169.254.169.254", "fe80::1%eth0", "10.0.0.7", "10.0.0.8"], bad=["192.168.1.1"]))
    async with working(desk):
        desk.put(a="http://mixed", b="http://mixed:81", c="http://bad", d="http://nowhere")
        assert desk.addresses == {}
        await desk.vetting.wait_resolved()
        assert desk.addresses == {"a": "10.0.0.7", "b": "10.0.0.7"}
        assert desk.accepted["s/a"].host == "mixed"
        assert sorted(desk.names.asked) == ["bad", "mixed", "nowhere"]
        assert {event.key: event.reason for event in desk.events} == {
            "s/c": "url: the host has no address inside allow_networks",
            "s/d": "url: the host cannot be resolved",
        }


@virtual_time
async def test_a_pinned_name_moves_only_when_its_address_is_gone():
    names = Names(h=["10.0.0.1", "10.0.0.2"])
    desk = Desk(names)
    async with working(desk):
        desk.put(a="http://h")
        await desk.vetting.wait_resolved()
        names.answers["h"] = ["10.0.0.2", "10.0.0.1"]
        await asyncio.sleep(31)
        assert desk.addresses == {"a": "10.0.0.1"}
        names.answers["h"] = OSError("resolver is away")
        await asyncio.sleep(31)
        assert desk.addresses == {"a": "10.0.0.1"}
        names.answers["h"] = ["10.0.0.2"]
        await asyncio.sleep(31)
        assert desk.addresses == {"a": "10.0.0.2"}
        names.answers["h"] = ["169.254.169.254"]  # rebound
        await asyncio.sleep(31)
        assert desk.addresses == {}


@virtual_time
async def test_a_name_that_appears_later_is_found():
    names = Names()
    desk = Desk(names)
    async with working(desk):
        desk.put(a="http://h")
        await asyncio.sleep(3)
        names.answers["h"] = ["10.0.0.1"]
        await asyncio.sleep(5)
        assert desk.addresses == {"a": "10.0.0.1"}
        assert len(desk.events) == 1


@virtual_time
async def test_slow_lookups_are_bounded_and_do_not_hold_up_addresses():
    names = Names(**{f"slow{i}": 60.0 for i in range(20)})
    desk = Desk(names)
    async with working(desk):
        desk.put(**{f"n{i}": f"http://slow{i}" for i in range(20)}, plain="http://10.0.0.1")
        assert set(desk.addresses) == {"plain"}
        await asyncio.sleep(20 / 4 * 2 + 0.1)
        assert names.most_running == 4
        assert len(desk.events) == 20


@virtual_time
async def test_late_news_of_a_name_that_nobody_uses_is_dropped():
    names = Names(h=1.0)
    desk = Desk(names)
    async with working(desk):
        desk.put(a="http://h")
        await asyncio.sleep(0.5)
        desk.delete("a")
        await desk.vetting.wait_resolved()
        await asyncio.sleep(100)
        assert (desk.addresses, desk.events, names.asked) == ({}, [], ["h"])
        assert repr(desk.vetting) == "<Vetting 0 accepted, 0 ignored, 0 names>"


@virtual_time
async def test_the_old_endpoint_stays_until_the_new_name_is_known():
    names = Names(new=["10.0.0.2"])
    desk = Desk(names)
    async with working(desk):
        desk.put(a="http://10.0.0.1")
        desk.put(a="http://new")
        assert desk.addresses == {"a": "10.0.0.1"}
        await desk.vetting.wait_resolved()
        assert desk.addresses == {"a": "10.0.0.2"}
        desk.put(a="http://10.0.0.3")
        await asyncio.sleep(100)
        assert desk.addresses == {"a": "10.0.0.3"}
        assert names.asked == ["new"]


async def test_the_system_knows_localhost():
    assert set(await system_resolver("localhost")) & {"127.0.0.1", "::1"}
    with pytest.raises(OSError, match=r"."):
        await system_resolver("no-such-name.invalid")
