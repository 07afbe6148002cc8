"""http-desync-guardian and llhttp's own tests, as bytes from a client through a real listener to a backend that takes down
what reaches it; and the same bytes through nginx and HAProxy.

`http_expected.json` says for each case what reaches the backend ("passes"; nothing, for those that it does not name), which
cases are refused although their corpus calls them valid, and why; and where nginx or HAProxy read a case otherwise, and
what it is about. docs/reliability.md has a line for each of these reasons.
"""

import json
import re
from asyncio import gather
from pathlib import Path

import pytest

from tests.support.http_cases import Case, Outcome, desync_guardian, llhttp_requests, llhttp_targets, outcomes
from tests.support.other_proxies import haproxy, nginx
from tests.support.recording_backend import RecordingBackend
from tests.support.reliability import rows_of
from tests.support.running_gateway import running_gateway

pytestmark = pytest.mark.integration

LOOP = "uvloop"
EXPECTED = json.loads((Path(__file__).parent / "http_expected.json").read_text())["requests"]
PATIENCE_MS = 300
CONFIG = f"limits: {{idle: {PATIENCE_MS}ms, head_timeout: {PATIENCE_MS}ms, body_timeout: {PATIENCE_MS}ms}}\n"
SLOW_CONFIG = f"limits: {{idle: {PATIENCE_MS}ms, head_timeout: 3s, body_timeout: 3s}}\n"
# Words that a refusal may have in common with a request: they are ours.
OUR_WORDS = {b"content-length", b"transfer-encoding", b"request", b"header", b"chunked", b"method", b"accepted"}
HEADERS = {  # of a refusal
    "content-type", "cache-control", "content-length", "x-request-id", "x-weir-policy", "server-timing", "connection",
}  # fmt: skip
SETS = {"http-desync-guardian": desync_guardian, "llhttp": llhttp_requests, "llhttp's targets": llhttp_targets}


def test_the_expectations_are_about_cases_that_there_are():
    names = {case.name for cases in SETS.values() for case in cases()}
    known = {name for cases in EXPECTED["disagreements"].values() for name in cases} | set(EXPECTED["passes"])
    known |= {name for cases in EXPECTED["refused though valid"].values() for name in cases}
    assert known | set(EXPECTED["valid before what is not"]) <= names


@pytest.mark.parametrize("which", SETS)
@pytest.mark.parametrize("piece", [None, 7], ids=["whole", "in pieces"])
async def test_what_reaches_a_backend(tmp_path, which, piece):
    cases, config = SETS[which](), CONFIG if piece is None else SLOW_CONFIG
    async with RecordingBackend() as backend, running_gateway(tmp_path, backend.url, config=config) as gateway:
        seen = await outcomes(gateway.data_address, backend, cases, piece)
    assert backend.stray == []
    passed = {name: str(outcome) for name, outcome in seen.items() if outcome.reached}
    assert passed == {name: read for name, read in EXPECTED["passes"].items() if name in seen}
    for case in cases:
        check(case, seen[case.name])


def check(case: Case, outcome: Outcome) -> None:
    """Against the word of the corpus, and what holds for each request whatever it is."""
    excused = {name for names in EXPECTED["refused though valid"].values() for name in names}
    if case.expect == "accept":
        assert outcome.reached or case.name in excused, case
    if case.expect == "reject":
        assert not outcome.reached or case.name in EXPECTED["valid before what is not"], case
        assert outcome.reached or outcome.statuses[-1] in (400, 405), (case, outcome.statuses)
    if case.expect == "first":
        assert len(outcome.reached) == 1, case
    assert len(outcome.reached) <= len(re.findall(rb"(?:HTTP|RTSP)/", case.data)), case
    assert "/hidden" not in {request.target for request in outcome.reached}, case
    assert all(status < 500 for status in outcome.statuses), (case, outcome.statuses)
    assert len(outcome.statuses) <= len(outcome.reached) + 1, case  # one refusal, then it is over
    if len(outcome.statuses) > len(outcome.reached):
        head, _, body = outcome.received.rpartition(b"\r\n\r\n")
        check_refusal(case, head[head.rindex(b"HTTP/1.1 ") :].decode(), body)


def check_refusal(case: Case, head: str, body: bytes) -> None:
    """It closes, and has nothing of the request in it."""
    headers = dict(line.split(": ") for line in head.split("\r\n")[1:])
    assert set(headers) <= HEADERS, case
    assert (headers["connection"], headers["content-type"]) == ("close", "application/json"), case
    assert re.fullmatch("[0-9a-f]{32}", headers["x-request-id"]), case
    if body:  # the answer to a HEAD has none
        error = json.loads(body)["error"]
        assert error["code"] in ("bad_request", "client_timeout"), case
        assert not words(case.data) & words(error["message"].encode()), case


def words(data: bytes) -> set[bytes]:
    """Of more than five letters, less those that are HTTP's."""
    return set(re.findall(rb"[a-z][a-z-]{5,}", data.lower())) - OUR_WORDS


async def test_where_nginx_and_haproxy_read_a_request_otherwise(tmp_path):
    cases = [case for make in SETS.values() for case in make()]
    homes = [tmp_path / name for name in ("gateway", "nginx", "haproxy")]
    for home in homes:
        home.mkdir()
    async with RecordingBackend() as one, RecordingBackend() as two, RecordingBackend() as three:
        async with (
            running_gateway(homes[0], one.url, config=CONFIG) as gateway,
            nginx(homes[1], two.port, PATIENCE_MS) as at_nginx,
            haproxy(homes[2], three.port, PATIENCE_MS) as at_haproxy,
        ):
            ours, nginxs, haproxys = await gather(
                outcomes(gateway.data_address, one, cases),
                outcomes(at_nginx, two, cases),
                outcomes(at_haproxy, three, cases),
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
    assert {row[0]: (int(row[-2]), int(row[-1])) for row in rows_of("Requests")} == counts
