from __future__ import annotations

import os

import aiohttp
import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from gateway import stack
from gateway.children import CannotRun
from gateway.home import Home
from gateway.stack import Options, Ports, Probe, find_program, plan


def names(stages):
    return [[program.name for program in stage] for stage in stages]


def test_ports_are_all_different():
    ports = Ports.choose(backends=5)
    everything = {ports.etcd, ports.etcd_peer, ports.redis, *ports.backends}
    assert len(everything) == 8


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (Options(), [["etcd", "Redis"], ["backend-1", "backend-2", "gateway"]]),
        (Options(redis=False, backends=1), [["etcd"], ["backend-1", "gateway"]]),
        (Options(backends=0), [["etcd", "Redis"], ["gateway"]]),
    ],
)
def test_stages(tmp_path, options, expected):
    ports = Ports.choose(options.backends)
    assert names(plan(options, Home(tmp_path), ports, Probe(None), "token")) == expected


def test_the_gateway_is_told_where_its_neighbours_are(tmp_path):
    [[etcd, _], [backend, _, gateway]] = plan(Options(port=9000), Home(tmp_path), Ports.choose(2), Probe(None), "token")
    assert gateway.env["WEIR_LISTEN"] == "127.0.0.1:9000"
    assert f"--listen-client-urls={gateway.env['WEIR_ETCD']}" in etcd.argv
    assert gateway.env["WEIR_ETCD"] in backend.argv
    assert not any("token" in argument for program in (etcd, backend, gateway) for argument in program.argv)


def test_a_wrapper_on_the_path_is_passed_over(tmp_path, monkeypatch):
    for folder, content in (("wrappers", b"#!/usr/bin/python3\n"), ("servers", b"\x7fELF")):
        (tmp_path / folder).mkdir()
        program = tmp_path / folder / "etcd"
        program.write_bytes(content)
        program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}/servers{os.pathsep}{tmp_path}/wrappers")
    assert find_program("etcd", "no_such_package", "etcd") == f"{tmp_path}/servers/etcd"
    monkeypatch.setenv("PATH", f"{tmp_path}/wrappers")
    with pytest.raises(CannotRun, match="etcd is not on the PATH; install it, or"):
        find_program("etcd", "no_such_package", "etcd")


async def test_probe_takes_refusals_and_nonsense_for_a_no():
    async def models(request):
        return {
            "Bearer good": web.json_response({"data": [{"id": "tiny"}]}),
            "Bearer empty": web.json_response({"data": []}),
            "Bearer odd": web.Response(text="<html>"),
        }.get(request.headers["authorization"], web.Response(status=401))

    async def chat(request):
        return web.Response(status=400 if (await request.json())["model"] == "minilm" else 200)

    app = web.Application()
    app.router.add_get("/v1/models", models)
    app.router.add_post("/v1/chat/completions", chat)
    async with TestServer(app) as server, aiohttp.ClientSession(timeout=stack.PROBE_TIMEOUT) as session:
        probe = Probe(session)
        assert await probe.models(server.port, "good") == ["tiny"]
        assert [await probe.models(server.port, token) for token in ("empty", "odd", "bad")] == [[], [], []]
        assert not await probe.answers(f"http://127.0.0.1:{server.port}/none")()
        assert await stack.accepts(server.port)()
        ask = "/v1/chat/completions"
        assert await probe.refuses(server.port, "good", ask, {"model": "minilm"})
        assert not await probe.refuses(server.port, "good", ask, {"model": "tiny"})
        port = server.port
        await server.close()
        assert not await probe.refuses(port, "good", ask, {"model": "minilm"})
        assert await probe.models(port, "good") == []
        assert not await stack.accepts(port)()
