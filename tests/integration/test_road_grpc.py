"""The road over gRPC: real clients of gRPC, the whole gateway, real backends of gRPC. Who passes, how much, and where to."""

import asyncio
import contextlib
import itertools
import json
import socket
import time
from types import SimpleNamespace

import aiohttp
import grpc
import grpc.aio
import numpy as np
import pytest
import tritonclient.grpc.aio
from grpc_health.v1 import health_pb2, health_pb2_grpc
from tritonclient.utils import InferenceServerException

from discovery.probe import Pace, Prober
from gateway import sources
from open_inference import inference_pb2
from policies.identity import generate_signing_key, jwks_of, mint
from tests.reference_backend.test_open_inference_grpc import GOOD
from tests.support.admin_client import api, scrape
from tests.support.grpc_backend import NOT_SERVING, SERVING, Caller, GrpcBackend, grpc_gateway, infer, inferred
from tests.support.model_store import ADDER, running_store
from tests.support.otlp_receiver import OtlpReceiver
from tests.support.ports import silent_listener
from tests.support.running_gateway import policy_with, running_gateway, until

LOOP = "uvloop"
pytestmark = pytest.mark.integration

TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
KEY = generate_signing_key()


def bearer(sub: str = "ann", **claims) -> str:
    named = {"issuer": "https://idp", "audience": "weir", "ttl": 300.0, "wall": time.time(), **claims}
    return f"Bearer {mint(KEY, sub=sub, **named)}"


def guarded(home, routes: str, plans: str = "{}", consumers: str = "[]") -> str:
    (home / "keys.json").write_text(jwks_of(KEY).decode())
    return f"""
version: 1
issuers: [{{issuer: "https://idp", audience: weir, algorithms: [ES256], jwks: keys.json}}]
plans: {plans}
consumers: {consumers}
routes: {routes}
"""


def is_refused(address) -> bool:
    with socket.socket() as client:
        return client.connect_ex((address.host, address.port)) != 0


async def test_a_call_goes_to_its_backend_and_back(tmp_path) -> None:
    async with GrpcBackend() as backend, grpc_gateway(tmp_path, backend) as (gateway, caller):
        call = caller.call(
            infer(id="7"), timeout=20, authorization="Bearer x", x_team="blue", x_weir_consumer="root",
            x_request_id="mine", traceparent=f"00-{TRACE}-{PARENT}-01", x_data_bin=b"\xff",
        )  # fmt: skip
        assert inference_pb2.ModelInferResponse.FromString(await call).model_name == "tiny"
        assert (backend.messages, backend.methods) == ([infer(id="7")], ["/inference.GRPCInferenceService/ModelInfer"])
        seen = backend.metadata[0]
        assert (seen["x-team"], seen["x-data-bin"], seen["x-request-id"]) == ("blue", b"\xff", "mine")
        assert (seen["x-weir-consumer"], seen["x-forwarded-for"], seen["x-forwarded-proto"]) == (
            "anonymous", "127.0.0.1", "http",
        )  # fmt: skip
        assert seen["traceparent"].startswith(f"00-{TRACE}-")
        assert PARENT not in seen["traceparent"]
        assert "authorization" not in seen
        assert 0 < seen["left"] <= 20  # the client's deadline, which is shorter than the route's
        assert 0 < int(seen["x-weir-deadline-ms"]) <= 20_000
        told = dict(await call.trailing_metadata())
        assert (told["x-request-id"], told["x-weir-attempts"]) == ("mine", "1")
        assert told["x-weir-policy"] == gateway.policy.policy.version
        assert told["x-weir-backend"] in {one.endpoint.id for one in gateway.fleet.backends.values()}
        assert told["server-timing"].startswith("auth;dur=")


async def test_one_line_the_same_metrics_and_one_trace(tmp_path, capfd) -> None:
    async def refuse(message, context):
        await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "shape")

    async with OtlpReceiver() as receiver, GrpcBackend() as backend:
        config = f"telemetry: {{otlp: {receiver.url}, sample: 100%}}\n"
        async with grpc_gateway(tmp_path, backend, config=config) as (gateway, caller):
            await caller.ask(infer(), traceparent=f"00-{TRACE}-{PARENT}-00")
            backend.script = refuse
            refused = await caller.refused(infer())
            assert (refused.code, refused.details) == ("INVALID_ARGUMENT", "shape")
            metrics = await scrape(gateway)
            spans = await receiver.wait_spans(2)
            while not any(span.trace_id == TRACE and span.kind == "server" for span in spans):
                spans = await receiver.wait_spans(len(spans) + 1)
        assert metrics.value("weir_requests_total", route="chat", service="tiny", status="200", reason="ok") == 1
        assert metrics.value("weir_requests_total", route="chat", service="tiny", status="400", reason="ok") == 1
        of_trace = [span for span in receiver.spans if span.trace_id == TRACE]
        server = next(span for span in of_trace if span.kind == "server")
        assert (server.name, server.parent_id) == ("POST /inference.GRPCInferenceService/ModelInfer", PARENT)
        attempt = next(span for span in of_trace if span.name == "weir.attempt")
        assert backend.metadata[0]["traceparent"] == f"00-{TRACE}-{attempt.span_id}-01"
    lines = [json.loads(line) for line in capfd.readouterr().out.splitlines() if '"request_id"' in line]
    assert [(line["path"], line["status"], line["end_reason"], line["model"]) for line in lines] == [
        ("/inference.GRPCInferenceService/ModelInfer", 200, "ok", "tiny"),
        ("/inference.GRPCInferenceService/ModelInfer", 400, "ok", "tiny"),
    ]
    assert (lines[0]["bytes_in"], lines[0]["bytes_out"]) == (len(infer()), len(inferred()))


async def test_who_may_pass(tmp_path) -> None:
    routes = '[{name: team, match: {path: "/v2/models/tiny/infer"}, allow: ["group:blue"], to: [{service: tiny}]}]'
    async with (
        GrpcBackend() as backend,
        grpc_gateway(tmp_path, backend, policy=guarded(tmp_path, routes)) as (_, caller),
    ):
        blue = bearer(groups=["blue"])
        assert await caller.ask(authorization=blue) == inferred()
        table = [
            ({}, "UNAUTHENTICATED", "unauthenticated"),
            ({"authorization": "Bearer x"}, "UNAUTHENTICATED", "unauthenticated"),
            ({"authorization": bearer(ttl=-3600.0)}, "UNAUTHENTICATED", "unauthenticated"),
            ({"authorization": bearer()}, "PERMISSION_DENIED", "forbidden"),
            ({"authorization": blue, "message": infer("huge")}, "NOT_FOUND", "no_route"),
            ({"authorization": blue, "message": infer("")}, "INVALID_ARGUMENT", "bad_request"),
            ({"authorization": blue, "message": b"\xff"}, "INVALID_ARGUMENT", "bad_request"),
            ({"authorization": blue, "method": "ModelReady"}, "NOT_FOUND", "no_route"),
            ({"authorization": blue, "via": "1.1 weir-0123456789abcdef, " * 12}, "FAILED_PRECONDITION", "loop"),
        ]
        for options, status, code in table:
            refused = await caller.refused(**options)
            assert (refused.code, refused.trailers["x-weir-code"]) == (status, code), refused
            assert len(refused.trailers["x-request-id"]) == 32
        twice = caller.channel.unary_unary("/inference.GRPCInferenceService/ModelInfer")(
            infer(), metadata=(("authorization", blue), ("authorization", blue))
        )
        with pytest.raises(grpc.aio.AioRpcError, match="at most one Authorization"):
            await twice
        assert len(backend.messages) == 1


async def test_how_much_may_be_sent(tmp_path) -> None:
    never = asyncio.Event()

    async def wait(message, context):
        await never.wait()

    plans = "{free: {requests: 3/minute, burst: 3, priority: high}, slow: {concurrency: 1}}"
    consumers = "[{match: {consumer: bob}, plan: slow}, {match: {any: true}, plan: free}]"
    policy = guarded(tmp_path, '[{name: all, match: {path: "/*"}, to: [{service: tiny}]}]', plans, consumers)
    async with GrpcBackend() as backend, grpc_gateway(tmp_path, backend, policy=policy) as (gateway, caller):
        ann, bob = bearer("ann"), bearer("bob")
        for left in ("2", "1"):
            call = caller.call(authorization=ann)
            await call
            assert dict(await call.trailing_metadata())["x-ratelimit-remaining-requests"] == left
            assert backend.metadata[-1]["x-weir-priority"] == "high"
        stream = caller.stream(authorization=ann)  # further messages of a stream cost what calls cost
        for _ in range(2):
            await stream.write(infer())
        assert await stream.read() == inferred()
        with pytest.raises(grpc.aio.AioRpcError, match="request limit of this plan"):
            await stream.read()
        assert await stream.code() is grpc.StatusCode.RESOURCE_EXHAUSTED  # once the first was answered
        refused = await caller.refused(authorization=ann)
        assert (refused.code, refused.trailers["x-weir-rule"]) == ("RESOURCE_EXHAUSTED", "plans.free.requests")
        assert 1 <= int(refused.trailers["retry-after"]) <= 26
        assert refused.trailers["grpc-retry-pushback-ms"] == refused.trailers["retry-after-ms"]
        backend.script = wait
        first = asyncio.ensure_future(caller.ask(authorization=bob))
        await until(lambda: backend.open)
        refused = await caller.refused(authorization=bob)
        assert (refused.code, refused.trailers["x-weir-code"]) == ("RESOURCE_EXHAUSTED", "concurrency")
        first.cancel()
        await until(lambda: not gateway.pipeline.inflight)
        never.set()
        assert (await scrape(gateway)).value("weir_limited_total", rule="plans.free.requests") == 2


async def test_a_backend_that_fails_is_left_alone_and_another_one_asked(tmp_path) -> None:
    async def fail(message, context):
        await context.abort(grpc.StatusCode.INTERNAL, "secret of the backend")

    async def busy(message, context):
        context.set_trailing_metadata((("retry-after", "7"),))
        await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "full")

    policy = policy_with(
        balance="round_robin", breaker="{of_at_least: 2, open: 60s, eject_at_most: 100%}", retry="{attempts: 2}"
    )
    async with (
        GrpcBackend() as one,
        GrpcBackend() as two,
        grpc_gateway(tmp_path, one, two, policy=policy) as (gateway, caller),
    ):
        port = one.port
        await one.stop()  # a connection that cannot be made is tried elsewhere
        async with asyncio.timeout(10):
            while {backend.breaker_state.value for backend in gateway.fleet.backends.values()} != {"open", "closed"}:
                assert await caller.ask() == inferred()
        await one.listen(port)
        two.script = busy
        refused = await caller.refused()
        assert (refused.code, refused.trailers["x-weir-code"]) == ("RESOURCE_EXHAUSTED", "queue_full")
        assert 7 <= int(refused.trailers["retry-after"]) <= 9
        two.script = fail
        for _ in range(2):
            refused = await caller.refused()
            assert (refused.code, refused.trailers["x-weir-code"]) == ("UNAVAILABLE", "upstream_failed")
            assert "secret" not in repr(refused)
        refused = await caller.refused()
        assert (refused.code, refused.trailers["x-weir-code"]) == ("UNAVAILABLE", "circuit_open")
        assert int(refused.trailers["grpc-retry-pushback-ms"]) > 1000
        metrics = await scrape(gateway)
        assert (
            metrics.value("weir_requests_total", route="chat", service="tiny", status="502", reason="upstream_error")
            == 2
        )
        assert metrics.value("weir_retries_total", service="tiny") >= 1


async def test_a_backend_gets_what_it_is_well_for_over_http_and_over_grpc(tmp_path, monkeypatch) -> None:
    """One whose gRPC is dead and one whose HTTP is; then both come back."""
    monkeypatch.setitem(Prober.__init__.__kwdefaults__, "pace", Pace(interval=0.1))
    monkeypatch.setattr(sources, "GRPC_PACE", Pace(interval=0.1))
    policy = policy_with(balance="round_robin", retry="{attempts: 1}")
    async with (
        GrpcBackend() as one,
        GrpcBackend() as two,
        grpc_gateway(tmp_path, one, two, policy=policy) as (gateway, caller),
        aiohttp.ClientSession(f"http://{gateway.data_address}") as session,
    ):

        def health():
            at = {backend.endpoint.port: backend for backend in gateway.fleet.backends.values()}
            found = [at[int(each.url.rpartition(":")[2])] for each in (one, two)]
            return [(each.healthy, each.grpc_healthy) for each in found]

        async def is_asked(http, grpc):
            """Ask until all have been asked that should be. Whatever is asked is answered, and nobody else asked."""
            async with asyncio.timeout(20):
                for round_ in itertools.count(1):
                    async with session.post("/v1/chat/completions", json={"model": "tiny"}) as response:
                        assert response.status == 200
                    assert await caller.ask() == inferred()
                    seen = [bool(each.http.heads) for each in (one, two)], [bool(each.messages) for each in (one, two)]
                    assert not any(is_seen and not may for is_seen, may in zip(sum(seen, []), http + grpc, strict=True))
                    if round_ >= 10 and seen == (http, grpc):
                        break
            for each in (one, two):
                each.http.heads.clear()
                each.messages.clear()

        await until(lambda: health() == [(True, True), (True, True)], 20)
        await is_asked(http=[True, True], grpc=[True, True])
        port = one.port
        await one.stop()
        two.http.healthy = False
        await until(lambda: health() == [(True, False), (False, True)], 20)
        await is_asked(http=[True, False], grpc=[False, True])
        await one.listen(port)
        two.http.healthy = True
        one.health = NOT_SERVING  # it listens again, and says that it cannot serve
        await until(lambda: health() == [(True, False), (True, True)], 20)
        await is_asked(http=[True, True], grpc=[False, True])
        one.health = SERVING
        await until(lambda: health() == [(True, True), (True, True)], 20)
        await is_asked(http=[True, True], grpc=[True, True])
        told = [each["grpc_healthy"] for each in (await api(gateway, "backends"))["backends"]]
        assert told == [True, True]


async def test_calls_go_where_less_is_to_do_as_backends_tell_behind_their_answers(tmp_path) -> None:
    def telling(running):
        report = json.dumps({"named_metrics": {"num_requests_running": running}})

        async def script(message, context):
            context.set_trailing_metadata((("endpoint-load-metrics", f"JSON {report}"),))
            return inferred()

        return script

    policy = policy_with(balance="least_load")
    async with (
        GrpcBackend(telling(0)) as idle,
        GrpcBackend(telling(50)) as busy,
        grpc_gateway(tmp_path, idle, busy, policy=policy) as (gateway, caller),
    ):
        async with asyncio.timeout(20):
            while not (idle.messages and busy.messages):
                assert await caller.ask() == inferred()
        known = len(busy.messages)
        assert {round(each.reported) for each in gateway.fleet.backends.values()} == {0, 50}
        for _ in range(5):
            await caller.ask()
        assert len(busy.messages) == known


async def test_the_reference_backend_tells_its_load_behind_each_answer(tmp_path) -> None:
    slow = ADDER + "settings = {slow = 60}\n"
    (tmp_path / "store").mkdir()
    async with running_store(tmp_path / "store", {"adder/1": slow}) as store:
        port = int(store.grpc.rpartition(":")[2])
        async with (
            running_gateway(
                tmp_path, store.url, models="[adder]", config="grpc: {listen: 127.0.0.1:0}\n", grpc_ports=[port]
            ) as gateway,
            Caller(gateway.grpc_address) as caller,
            Caller(store.grpc) as others,
        ):
            waiting = [asyncio.ensure_future(others.ask(GOOD.SerializeToString(), timeout=60)) for _ in range(3)]
            [served] = store.pool
            await until(lambda: served.in_flight.count == 3)
            refused = await caller.refused(infer("adder"))
            assert refused.code == "INVALID_ARGUMENT"
            [backend] = gateway.fleet.backends.values()
            assert backend.reported == 3.0
            for each in waiting:
                each.cancel()
            await asyncio.wait(waiting)


async def test_backends_that_keep_to_no_rule(tmp_path) -> None:
    async def says_nothing(message, context):
        pass

    async def says_much(message, context):
        context.set_trailing_metadata((("x-weir-policy", "mine"), ("endpoint-load-metrics", "JSON {"), ("x-a", "b")))
        await context.abort(grpc.StatusCode.NOT_FOUND, "none\r\nx: y" + "z" * 3000)

    async with GrpcBackend(says_nothing) as backend, grpc_gateway(tmp_path, backend) as (gateway, caller):
        assert (await caller.refused()).trailers["x-weir-code"] == "upstream_failed"
        backend.script = says_much
        refused = await caller.refused()
        assert (refused.code, len(refused.details), refused.trailers.get("x-a")) == ("NOT_FOUND", 2000, None)
        assert refused.trailers["x-weir-policy"] == gateway.policy.policy.version
        backend.script = says_nothing
        stream = caller.stream()
        await stream.write(infer())
        await stream.done_writing()
        assert await stream.read() is grpc.aio.EOF  # an answer may be empty where it is a stream
        assert await stream.code() is grpc.StatusCode.OK
        metrics = await scrape(gateway)
        ends = {"route": "chat", "service": "tiny"}
        assert metrics.value("weir_requests_total", status="502", reason="upstream_protocol", **ends) == 1
        assert metrics.value("weir_requests_total", status="200", reason="ok", **ends) == 1
        assert metrics.value("weir_requests_total", status="404", reason="ok", **ends) == 1


async def test_times_run_out_where_they_should(tmp_path) -> None:
    async def wait(message, context):
        await asyncio.sleep(60)

    policy = policy_with(
        timeout="{connect: 200ms, first_byte: 100ms, total: 5s}",
        breaker="{of_at_least: 2, open: 60s, eject_at_most: 100%}",
    )
    async with GrpcBackend(wait) as backend, grpc_gateway(tmp_path, backend, policy=policy) as (gateway, caller):
        refused = await caller.refused(timeout=None)
        assert (refused.code, refused.trailers["x-weir-code"]) == ("DEADLINE_EXCEEDED", "upstream_timeout")
        assert refused.trailers["x-weir-rule"] == "routes.chat.timeout.first_byte"
        await until(lambda: not backend.open)
        for _ in range(3):  # impatient clients do not open the breaker of a backend that is only slow
            assert (await caller.refused(timeout=0.05)).code == "DEADLINE_EXCEEDED"
        await until(lambda: not gateway.pipeline.inflight and not backend.open)
        assert {one.breaker_state.value for one in gateway.fleet.backends.values()} == {"closed"}
        assert max(seen["left"] for seen in backend.metadata[1:]) < 0.06
        backend.script = lambda message, context: asyncio.sleep(0, inferred())
        assert await caller.ask() == inferred()
    with silent_listener() as port:
        async with (
            GrpcBackend() as backend,
            grpc_gateway(tmp_path, backend, policy=policy, grpc_ports=[port]) as (gateway, caller),
        ):
            refused = await caller.refused(timeout=None)
            assert (refused.code, refused.trailers["x-weir-code"]) == ("UNAVAILABLE", "no_backend")
            assert (await caller.refused(timeout=0.05)).code == "DEADLINE_EXCEEDED"
            await until(lambda: not gateway.pipeline.inflight)


async def test_a_client_that_leaves_takes_its_call_away_from_the_backend(tmp_path) -> None:
    async def wait(message, context):
        await asyncio.sleep(60)

    async with GrpcBackend(wait) as backend, grpc_gateway(tmp_path, backend) as (gateway, caller):
        calls = [caller.call(), caller.call()]
        stream = caller.stream()
        await stream.write(infer())
        await until(lambda: backend.open == 3)
        for call in (*calls, stream):
            call.cancel()
        await until(lambda: backend.cancelled == 3 and not gateway.pipeline.inflight)
        assert [one.inflight for one in gateway.fleet.backends.values()] == [0]
        metrics = await scrape(gateway)
        ends = {"route": "chat", "service": "tiny", "reason": "client_abort"}
        assert metrics.value("weir_requests_total", status="499", **ends) == 3


async def test_a_stream_goes_both_ways_message_by_message(tmp_path) -> None:
    async def echo(message, context):
        request = inference_pb2.ModelInferRequest.FromString(message)
        for part in range(2):
            await context.write(inferred(id=f"{request.id}.{part}"))
        if request.id == "breaks":
            await context.abort(grpc.StatusCode.INTERNAL, "secret")

    def part(answer: bytes) -> str:
        return inference_pb2.ModelInferResponse.FromString(answer).id

    async with GrpcBackend(echo) as backend, grpc_gateway(tmp_path, backend) as (gateway, caller):
        stream, heard = caller.stream(), []
        for name in "ab":
            await stream.write(infer(id=name))
            heard += [part(await stream.read()), part(await stream.read())]
        await stream.done_writing()
        assert await stream.read() is grpc.aio.EOF
        assert heard == ["a.0", "a.1", "b.0", "b.1"]
        assert (await stream.code(), dict(await stream.trailing_metadata())["x-weir-attempts"]) == (
            grpc.StatusCode.OK, "1",
        )  # fmt: skip

        for last, code, told in (
            (infer("other"), grpc.StatusCode.INVALID_ARGUMENT, "must name the same model"),
            (b"\xff", grpc.StatusCode.INVALID_ARGUMENT, "not one of this method"),
            (infer(id="breaks"), grpc.StatusCode.UNAVAILABLE, "the answer is incomplete"),
        ):
            stream = caller.stream()
            await stream.write(infer(id="a"))
            assert [part(await stream.read()), part(await stream.read())] == ["a.0", "a.1"]
            await stream.write(last)
            with contextlib.suppress(grpc.aio.AioRpcError):
                while await stream.read() is not grpc.aio.EOF:
                    pass
            assert (await stream.code(), told in await stream.details()) == (code, True)
            await until(lambda: not backend.open)
        assert not gateway.pipeline.inflight


async def test_a_new_policy_is_for_new_calls_and_the_end_waits_for_the_old(tmp_path) -> None:
    go = asyncio.Event()

    async def wait(message, context):
        await go.wait()
        return inferred()

    async with GrpcBackend(wait) as backend, grpc_gateway(tmp_path, backend) as (gateway, caller):
        old = asyncio.ensure_future(caller.ask())
        await until(lambda: backend.open)
        version = gateway.policy.policy.version
        (tmp_path / "policy.yaml").write_text(policy_with(match='{path: "/v1/*"}'))
        await until(lambda: gateway.policy.policy.version != version)
        assert (await caller.refused()).trailers["x-weir-code"] == "no_route"
        health = health_pb2_grpc.HealthStub(caller.channel)
        watch = health.Watch(health_pb2.HealthCheckRequest(service="inference.GRPCInferenceService"))
        assert (await watch.read()).status == health_pb2.HealthCheckResponse.SERVING
        gateway.pipeline.draining = True
        assert (await watch.read()).status == health_pb2.HealthCheckResponse.NOT_SERVING
        watch.cancel()
        gateway.grpc.stop_accepting()
        await until(lambda: is_refused(gateway.grpc_address))
        go.set()
        assert await old == inferred()


async def test_at_the_end_of_the_drain_a_client_is_told(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("gateway.drain.ACCEPT_SECONDS", 0.0)
    monkeypatch.setattr("gateway.drain.DRAIN_SECONDS", 0.2)

    async def wait(message, context):
        await asyncio.sleep(60)

    async with GrpcBackend(wait) as backend:
        async with grpc_gateway(tmp_path, backend) as (gateway, caller):
            address = gateway.grpc_address
            asking = asyncio.ensure_future(Caller(address).refused(timeout=None))
            await until(lambda: backend.open)
        refused = await asking
        assert (refused.code, refused.trailers["x-weir-code"]) == ("UNAVAILABLE", "draining")


async def test_what_the_gateway_answers_itself(tmp_path) -> None:
    async with GrpcBackend() as backend, grpc_gateway(tmp_path, backend) as (gateway, caller):
        await until(lambda: not gateway.not_ready())
        live = await caller.ask(b"", "ServerLive")
        ready = await caller.ask(b"", "ServerReady")
        about = inference_pb2.ServerMetadataResponse.FromString(await caller.ask(b"", "ServerMetadata"))
        assert inference_pb2.ServerLiveResponse.FromString(live).live
        assert inference_pb2.ServerReadyResponse.FromString(ready).ready
        assert (about.name, about.version) == ("weir", gateway.version)
        health = health_pb2_grpc.HealthStub(caller.channel)
        for service in ("", "inference.GRPCInferenceService"):
            answer = await health.Check(health_pb2.HealthCheckRequest(service=service))
            assert answer.status == health_pb2.HealthCheckResponse.SERVING
        with pytest.raises(grpc.aio.AioRpcError) as unknown:
            await health.Check(health_pb2.HealthCheckRequest(service="other"))
        assert unknown.value.code() is grpc.StatusCode.NOT_FOUND
        assert (await caller.refused(method="ModelTrain")).code == "UNIMPLEMENTED"
        assert not backend.messages
        await caller.ask(method="ModelReady")
        assert backend.methods == ["/inference.GRPCInferenceService/ModelReady"]
        metrics = await scrape(gateway)
        assert metrics.value("weir_requests_total", route="gateway", service="", status="200", reason="ok") == 3


async def test_a_backend_that_is_gone_is_left_and_one_without_grpc_is_not_asked(tmp_path) -> None:
    async with GrpcBackend() as backend, grpc_gateway(tmp_path, backend) as (gateway, caller):
        await caller.ask()
        (one,) = gateway.fleet.backends.values()
        channel = one.channel
        gateway.fleet.replace({})
        assert (repr(channel), one.channel) == ("<Channel 0 under way, closed>", None)
        refused = await caller.refused()
        assert (refused.code, refused.trailers["x-weir-code"]) == ("UNAVAILABLE", "no_backend")
    async with GrpcBackend() as backend, grpc_gateway(tmp_path, backend, grpc_ports=()) as (gateway, caller):
        refused = await caller.refused()
        assert (refused.code, "`grpc_port`" in refused.details) == ("UNAVAILABLE", True)


async def test_tritons_client_before_our_own_backend(tmp_path) -> None:
    kind = tritonclient.grpc.InferInput
    routes = '[{name: models, match: {path: "/v2/*"}, to: [{service: tiny}]}]'
    policy = guarded(tmp_path, routes, "{free: {requests: 1/minute, burst: 8}}", "[{match: {any: true}, plan: free}]")

    def inputs():
        row = np.ones((1, 3), dtype=np.float32)
        made = [kind("left", [1, 3], "FP32"), kind("right", [1, 3], "FP32"), kind("words", [1], "BYTES")]
        for each, array in zip(made, (row, row, np.array([b"ab"], dtype=np.object_)), strict=True):
            each.set_data_from_numpy(array)
        return made

    async with running_store(tmp_path / "store", {"adder/1": ADDER}) as store:
        backend = SimpleNamespace(url=store.url, port=store.grpc.rpartition(":")[2])
        async with (
            grpc_gateway(tmp_path, backend, policy=policy, models="[adder]") as (gateway, _),
            tritonclient.grpc.aio.InferenceServerClient(str(gateway.grpc_address)) as client,
        ):
            token = {"authorization": bearer()}
            assert await client.is_server_live()
            assert (await client.get_server_metadata()).name == "weir"
            assert await client.is_model_ready("adder", headers=token)
            assert (await client.get_model_metadata("adder", headers=token)).inputs[0].datatype == "FP32"
            assert (await client.get_model_config("adder", headers=token)).config.input[0].name == "left"
            index = await client.get_model_repository_index(headers=token)
            assert [(one.name, one.state) for one in index.models] == [("adder", "READY")]
            assert (await client.infer("adder", inputs(), headers=token)).as_numpy("sum").tolist() == [[2, 2, 2]]
            (one,) = gateway.fleet.backends.values()
            assert one._reported_until  # it told its load in the trailers

            async def asked():
                for number in range(9):
                    yield {"model_name": "adder", "inputs": inputs(), "request_id": str(number)}

            async def listen():
                async for answer in client.stream_infer(asked(), headers=token):
                    answers.append(answer)

            answers = []
            with pytest.raises(grpc.aio.AioRpcError, match="request limit of this plan"):
                await listen()
            assert [(result.get_response().id, error) for result, error in answers] == [
                ("0", None), ("1", None), ("2", None),
            ]  # fmt: skip
            with pytest.raises(InferenceServerException, match="a bearer token is needed") as refused:
                await client.infer("adder", inputs())
            assert refused.value.status() == "StatusCode.UNAUTHENTICATED"
