"""Event streams of LaunchDarkly, eventsource-parser and the Web Platform Tests, and some in OpenAI's form, through a real
gateway: piece by piece as they were written down, and byte by byte.
"""

import contextlib
import json

import pytest

from tests.support.corpora import event_streams, rows
from tests.support.event_stream import Event, events_of
from tests.support.raw_client import CHAT, Answer, RawClient
from tests.support.running_gateway import policy_with, running_gateway
from tests.support.scripted_backend import BackendConnection, ScriptedBackend

pytestmark = pytest.mark.integration

LOOP = "uvloop"
NO_BREAKER = policy_with(breaker="{of_at_least: 10k}")  # streams that end too soon are failures


def bytewise(pieces: list[bytes]) -> list[bytes]:
    return [bytes([byte]) for piece in pieces for byte in piece]


def cases(cut) -> dict[str, list[bytes]]:
    return {name: pieces if cut is None else cut(pieces) for name, pieces in event_streams().items()}


@contextlib.asynccontextmanager
async def streaming(home, path: str, streams: dict[str, list[bytes]]):
    """Asks for a stream by its name: `await ask(name)`."""

    async def send(connection: BackendConnection) -> None:
        name = json.loads(connection.body)["user"]
        await connection.begin_events()
        for piece in streams[name]:
            await connection.chunk(piece)
        await connection.send(b"0\r\n\r\n")

    async with ScriptedBackend(send) as backend, running_gateway(home, backend.url, policy=NO_BREAKER) as gateway:

        async def ask(name: str) -> Answer:
            async with RawClient(gateway.data_address) as client:
                return await client.ask({**CHAT, "stream": True, "user": name}, path=path)

        yield ask


def test_the_reader_that_judges_agrees_with_the_corpus() -> None:
    streams = event_streams()
    for case in rows("sse"):
        expected = [Event(event["type"], event["data"], event["id"]) for event in case["events"]]
        assert events_of(b"".join(streams[case["id"]])) == expected, case["id"]


@pytest.mark.parametrize("cut", [None, bytewise])
@pytest.mark.parametrize("path", ["/hooks", "/v1/responses"])
async def test_a_stream_whose_kind_has_no_last_event_passes_byte_for_byte(tmp_path, path, cut) -> None:
    streams = cases(cut)
    async with streaming(tmp_path, path, streams) as ask:
        for name, pieces in streams.items():
            answer = await ask(name)
            assert (answer.status, answer.headers["content-type"], answer.whole) == (200, "text/event-stream", True)
            assert answer.body == b"".join(pieces), name


@pytest.mark.parametrize("cut", [None, bytewise])
async def test_a_chat_is_whole_when_it_says_so_and_else_ends_with_an_error(tmp_path, cut) -> None:
    """Whoever reads it sees the events that have ended and nothing of one that has not."""
    streams = cases(cut)
    async with streaming(tmp_path, "/v1/chat/completions", streams) as ask:
        for name, pieces in streams.items():
            stream = b"".join(pieces)
            answer = await ask(name)
            told, ended = events_of(answer.body), events_of(stream)
            if any(event.data.startswith(("[DONE]", '{"error"')) for event in ended):
                assert (answer.body, answer.whole) == (stream, True), name
            elif answer.status == 502:  # nothing had gone out
                assert (ended, answer.whole, answer.json["error"]["code"]) == ([], True, "upstream_failed"), name
            else:
                assert (told[:-1], answer.whole) == (ended, False), name
                assert json.loads(told[-1].data)["error"]["code"] == "upstream_failed"
