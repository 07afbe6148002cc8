"""Rows A of the fault matrix: backends and their streams."""

import pytest

from tests.support.fault_proxy import FaultProxy
from tests.support.raw_client import RawClient
from tests.support.scripted_backend import ScriptedBackend

pytestmark = pytest.mark.integration


async def test_A05_a_backend_that_dies_after_half_a_head(row):
    async with ScriptedBackend() as backend, FaultProxy(backend.port) as proxy:
        async with row.gateway(proxy.url) as gateway:
            proxy.to_client.cut_after = 30
            async with RawClient(gateway.data_address) as client:
                answer = await client.ask()
    assert (answer.status, answer.json["error"]["code"]) == (502, "upstream_failed")
    assert [line["end_reason"] for line in row.lines] == ["upstream_protocol"]
