"""llhttp's own test answers, as bytes from a hostile backend through the gateway's upstream connection; and the same bytes
through nginx and HAProxy.

`http_expected.json` says what a client is sent for each case ("relayed": status and bytes of the body; 502 for those that
it does not name), and the rest as for requests: see test_http_requests.py.
"""

import asyncio
import contextlib
import json
from asyncio import gather
from pathlib import Path

import pytest

from gateway.headers import ANSWER_HEADERS
from tests.support.http_cases import llhttp_answers, pieces, said
from tests.support.other_proxies import haproxy, nginx
from tests.support.raw_client import RawClient
from tests.support.reliability import rows_of
from tests.support.running_gateway import policy_with, running_gateway
from tests.support.scripted_backend import BackendConnection, Hangup, ScriptedBackend

pytestmark = pytest.mark.integration

LOOP = "uvloop"
EXPECTED = json.loads((Path(__file__).parent / "http_expected.json").read_text())["answers"]
POLICY = policy_with(
    retry="{attempts: 1}",
    breaker="{of_at_least: 100000}",
    timeout="{connect: 20s, first_byte: 20s, idle: 200ms, total: 1m}",
)
OURS = {
    "x-request-id", "x-weir-policy", "x-weir-backend", "x-weir-attempts", "x-ratelimit-limit-requests", "server-timing",
    "connection", "content-length", "transfer-encoding", "cache-control",
}  # fmt: skip
CASES = llhttp_answers()
# In pieces, a second answer comes when the first has ended, and may meet the next request: HTTP/1.1 cannot tell whose it is.
IN_PIECES = [case for case in CASES if case.name != "response/pipelining#"]


async def emit(connection: BackendConnection) -> None:
    await connection.send(CASES[int(connection.path[1:])].data)
    raise Hangup


async def drip(connection: BackendConnection) -> None:
    for piece in pieces(IN_PIECES[int(connection.path[1:])].data, 5):
        await connection.send(piece)
        await asyncio.sleep(0)


def test_the_expectations_are_about_cases_that_there_are():
    known = {name for cases in EXPECTED["disagreements"].values() for name in cases} | set(EXPECTED["relayed"])
    known |= {name for cases in EXPECTED["refused though valid"].values() for name in cases}
    assert known | set(EXPECTED["valid before what is not"]) <= {case.name for case in CASES}


async def test_what_is_relayed_to_a_client(tmp_path):
    async with ScriptedBackend(emit) as backend, running_gateway(tmp_path, backend.url, policy=POLICY) as gateway:
        seen = await said(gateway.data_address, CASES)
    assert {name: str(answer) for name, answer in seen.items() if answer.status != 502} == EXPECTED["relayed"]
    excused = {name for names in EXPECTED["refused though valid"].values() for name in names}
    for case in CASES:
        answer = seen[case.name]
        if case.expect == "reject":
            assert answer.status == 502 or case.name in EXPECTED["valid before what is not"], case
        else:
            assert answer.status != 502 or case.name in excused, case
        assert set(answer.headers) <= OURS | {name.decode() for name in ANSWER_HEADERS}, case
        if answer.status == 502:
            assert answer.whole, case
            assert json.loads(answer.body)["error"]["code"] == "upstream_failed", case


async def test_what_is_relayed_of_answers_that_come_in_pieces(tmp_path):
    """The same where the answer passes whole. Where it does not, some of it may have gone out: then it is cut."""

    async def drip_and_hang_up(connection: BackendConnection) -> None:
        await drip(connection)
        raise Hangup

    async with ScriptedBackend(drip_and_hang_up) as backend:
        async with running_gateway(tmp_path, backend.url, policy=POLICY) as gateway:
            seen = await said(gateway.data_address, IN_PIECES)
    whole = {name: str(answer) for name, answer in seen.items() if answer.status != 502 and answer.whole}
    assert whole == {
        name: answer for name, answer in EXPECTED["relayed"].items() if name in seen and not answer.endswith(" cut")
    }


@pytest.mark.parametrize(("cases", "tell"), [(CASES, emit), (IN_PIECES, drip)], ids=["whole", "in pieces"])
async def test_the_next_request_has_its_own_answer_whatever_came_before(tmp_path, cases, tell):
    """The backend does not hang up: what it sent too much, and what it left out, must not become the next one's."""

    async def stay(connection: BackendConnection) -> None:
        if connection.path.startswith("/own"):
            await connection.json({"own": connection.path})
        else:
            with contextlib.suppress(Hangup):
                await tell(connection)

    async def ask(number: int) -> None:
        async with ScriptedBackend(stay) as backend:
            (tmp_path / f"{number}").mkdir()
            async with running_gateway(tmp_path / f"{number}", backend.url, policy=POLICY) as gateway:
                for index in range(number, len(cases), 4):
                    await ask_twice(gateway, index)

    async def ask_twice(gateway, index: int) -> None:
        async with RawClient(gateway.data_address) as client:
            await client.ask(path=f"/{index}")
        async with RawClient(gateway.data_address) as client:
            answer = await client.ask(path=f"/own/{index}")
            assert (answer.status, answer.json) == (200, {"own": f"/own/{index}"}), cases[index]

    await gather(*(ask(number) for number in range(4)))


async def test_where_nginx_and_haproxy_relay_otherwise(tmp_path):
    homes = [tmp_path / name for name in ("gateway", "nginx", "haproxy")]
    for home in homes:
        home.mkdir()
    async with ScriptedBackend(emit) as one, ScriptedBackend(emit) as two, ScriptedBackend(emit) as three:
        async with (
            running_gateway(homes[0], one.url, policy=POLICY) as gateway,
            nginx(homes[1], two.port, 20_000) as at_nginx,
            haproxy(homes[2], three.port, 20_000) as at_haproxy,
        ):
            ours, nginxs, haproxys = await gather(
                said(gateway.data_address, CASES), said(at_nginx, CASES), said(at_haproxy, CASES)
            )
    seen = {
        name: {"nginx": str(nginxs[name]), "haproxy": str(haproxys[name])}
        for name in ours
        if not ours[name].read == nginxs[name].read == haproxys[name].read
    }
    assert seen == {name: each for cases in EXPECTED["disagreements"].values() for name, each in cases.items()}


def test_each_reason_has_its_line_in_the_documentation():
    known, excused = EXPECTED["disagreements"], EXPECTED["refused though valid"]
    counts = {reason: (len(known.get(reason, ())), len(excused.get(reason, ()))) for reason in {*known, *excused}}
    assert {row[0]: (int(row[-2]), int(row[-1])) for row in rows_of("Answers")} == counts
