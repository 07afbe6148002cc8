import asyncio
from random import Random

import pytest

from discovery.endpoint import ModelEntry, Registration, decode, id_of_place
from discovery.source import Changes
from discovery.static import StaticBackend, StaticSource
from discovery.watch import Watch
from tests.support.virtual_clock import virtual_time


def static(service, url, **fields):
    return StaticBackend(service, Registration(url=url, **fields))


def test_a_key_is_one_that_a_registration_may_have():
    backend = static("tiny", "http://127.0.0.1:9000")
    assert backend.key == f"tiny/{id_of_place('http://127.0.0.1:9000')}"
    decode(backend.key, b'{"url": "http://h"}')


def test_the_same_backend_twice_is_an_error():
    with pytest.raises(ValueError, match="two backends of service a are both at http://h:1/: name each url once"):
        StaticSource([static("a", "http://h:1"), static("b", "http://h:1"), static("a", "http://h:1/")])


@virtual_time
async def test_listed_once_and_then_silent_for_ever():
    source = StaticSource([static("tiny", "http://h:1", models=(ModelEntry("tiny"),))])
    deltas, events = [], []
    watch = Watch(source, deltas.append, events.append, Random(0))
    task = asyncio.create_task(watch.run())
    await asyncio.sleep(1000)
    task.cancel()
    await asyncio.wait({task})
    (delta,) = deltas
    assert [decode(item.key, item.value).host for item in delta.puts] == ["h"]
    assert {event.reason for event in events} == {"start", "", "periodic"}


@virtual_time
async def test_the_watch_stands_at_once():
    watch = StaticSource([]).watch(2)
    assert await anext(watch) == Changes()
    await watch.aclose()
