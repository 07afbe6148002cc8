"""`weir up` with small programs in place of the real ones; the real ones run in tests/integration/test_weir_up.py."""

from __future__ import annotations

import asyncio
import io
import json
import os
import shlex
import signal
import socket
import sys

import pytest
from rich.console import Console

from gateway import up
from gateway.children import CannotRun, ChildFailed, Program
from gateway.stack import Options, Ports
from tests.support.ports import free_ports

pytestmark = pytest.mark.integration


@pytest.fixture
def options(tmp_path):
    return Options(*free_ports(2), directory=tmp_path / ".weir")


@pytest.fixture
def console():
    return Console(width=40, record=True, file=io.StringIO())


def sleeper(name, ready=True):
    async def is_ready():
        return ready

    return Program(
        name, (sys.executable, "-I", "-S", "-c", "import time; time.sleep(60)"), is_ready=is_ready, grace=5.0
    )


class FakeProbe:
    def __init__(self, session):
        pass

    async def models(self, port, token):
        return ["tiny"]

    async def refuses(self, port, token, path, body):
        return False


@pytest.fixture
def fakes(monkeypatch):
    monkeypatch.setattr(up, "check_needs", lambda options: None)
    monkeypatch.setattr(up, "Probe", FakeProbe)
    return lambda stages: monkeypatch.setattr(up, "plan", lambda *_: stages)


async def test_it_ends_in_a_box_and_stops_on_a_signal(options, console, fakes):
    fakes([[sleeper("etcd")], [sleeper("gateway")]])
    running = asyncio.create_task(up.up(options, console, wall=lambda: 1e9))
    async with asyncio.timeout(60):
        while "Ctrl-C" not in console.export_text(clear=False):
            await asyncio.sleep(0.005)
        os.kill(os.getpid(), signal.SIGINT)
        await running
    said = console.export_text()
    assert said.index("etcd is ready") < said.index("gateway is ready") < said.index("Weir is up")
    assert said.rstrip().endswith("stopped; nothing is left running")


async def test_a_start_that_fails_is_told_and_leaves_the_folder_free(options, console, fakes):
    broken = Program(
        "gateway", (sys.executable, "-c", "raise SystemExit(3)"), is_ready=sleeper("", ready=False).is_ready
    )
    fakes([[sleeper("etcd")], [broken]])
    for _ in range(2):
        with pytest.raises(ChildFailed, match="gateway ended with exit code 3"):
            await up.up(options, console, wall=lambda: 1e9)
    assert "Weir is up" not in console.export_text()


async def test_two_in_one_folder(options, console, fakes):
    fakes([[sleeper("etcd")]])
    first = asyncio.create_task(up.up(options, console, wall=lambda: 1e9))
    async with asyncio.timeout(60):
        while "Ctrl-C" not in console.export_text(clear=False):
            await asyncio.sleep(0.005)
        with pytest.raises(CannotRun, match="another `weir up` runs in"):
            await up.up(options, console, wall=lambda: 1e9)
        os.kill(os.getpid(), signal.SIGTERM)
        await first


@pytest.mark.parametrize(("which", "option"), [("port", "--port"), ("admin_port", "--admin-port")])
def test_a_port_in_use_is_told_before_anything_starts(options, which, option):
    with socket.create_server(("127.0.0.1", getattr(options, which))), pytest.raises(CannotRun) as told:
        up.check_needs(options)
    port = getattr(options, which)
    assert str(told.value) == f"port {port}: Address already in use; stop what uses it, or choose another with {option}"


def test_missing_torch_is_told_before_anything_starts(options, monkeypatch):
    monkeypatch.setattr(up.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(CannotRun, match=r"need torch; install it with `pip install weir\[backend\]`"):
        up.check_needs(options)


def test_one_port_for_both_is_told_before_anything_starts(options):
    with pytest.raises(CannotRun, match=f"--port and --admin-port are both {options.port}; they must differ"):
        up.check_needs(Options(options.port, options.port, directory=options.directory))


@pytest.mark.parametrize(
    ("models", "takes", "path"),
    [
        (["tiny"], {"/v1/chat/completions", "/v1/embeddings"}, "/v1/chat/completions"),
        (["minilm"], {"/v1/embeddings"}, "/v1/embeddings"),
        (["tiny-t2i"], {"/v1/images/generations"}, "/v1/images/generations"),
        (["adder"], set(), "/v1/models"),
        ([], set(), "/v1/models"),
    ],
)
async def test_what_is_printed_is_something_that_the_model_takes(models, takes, path):
    class Probe:
        async def models(self, port, token):
            return models

        async def refuses(self, port, token, path, body):
            return path not in takes

    words = await up.first_request(8080, "token", Probe())
    assert words[:5] == ["curl", "-N", f"http://127.0.0.1:8080{path}", "-H", "authorization: Bearer token"]
    assert [json.loads(word)["model"] for word in words if word.startswith("{")] == (models if takes else [])


def test_the_curl_line_is_one_line_however_narrow_the_terminal(options, console):
    curl = up._curl(options.port, "/v1/chat/completions", "a" * 300, "-d", "{}")
    up.print_box(console, options, Ports.choose(0), "a" * 300, curl)
    [line] = [line for line in console.export_text().splitlines() if line.startswith("curl")]
    assert shlex.split(line) == curl
