from __future__ import annotations

import io
from dataclasses import replace

import pytest
from rich.console import Console

from discovery.discovery import Seen
from discovery.endpoint import Endpoint, Model
from discovery.probe import Checked
from gateway import backends
from gateway.children import CannotRun
from tests.support.grpc_backend import GrpcBackend

ENDPOINT = Endpoint(
    key="tiny/a", service="tiny", id="a", scheme="http", host="gpu-1", port=9000, address="10.0.0.1",
    models=(Model("tiny", "2"), Model("[red]small")),
)  # fmt: skip


@pytest.mark.parametrize(
    ("seen", "cells"),
    [
        (
            Seen("tiny/a", ENDPOINT, Checked(True, "status 200")),
            ("tiny", "a", "http://gpu-1:9000", "tiny:2, [red]small", "1", "serving", "passing (status 200)"),
        ),
        (
            Seen("tiny/b", None, Checked(False, "url: is not one")),
            ("tiny", "b", "", "", "", "ignored", "url: is not one"),
        ),
    ],
)
def test_row(seen, cells):
    assert backends.row(seen) == cells


def test_what_is_registered_is_shown_as_text_and_not_taken_for_markup():
    console = Console(file=io.StringIO(), width=200, record=True)
    console.print(backends.table([Seen("tiny/a", ENDPOINT, Checked(True, "status 200"))]))
    assert "[red]small" in console.export_text()


@pytest.mark.integration
async def test_one_that_speaks_grpc_is_asked_there_too():
    async def over_http(_endpoint):
        return Checked(True, "status 200")

    async with GrpcBackend() as backend:
        speaking, check = replace(ENDPOINT, address="127.0.0.1", grpc_port=backend.port), backends.both(over_http)
        assert await check(ENDPOINT) == Checked(True, "status 200")
        assert await check(speaking) == Checked(True, "status 200, gRPC: SERVING")
        await backend.stop()
        assert await check(speaking) == Checked(False, "status 200, gRPC: cannot connect")


@pytest.mark.integration
async def test_an_etcd_that_is_not_there_is_named():
    with pytest.raises(CannotRun, match=r"no answer from etcd: http://127\.0\.0\.1:1: .*; start it, or name another"):
        await backends.look("http://127.0.0.1:1")
