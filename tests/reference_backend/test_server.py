"""The paths beside those of the protocols, and what wraps all of them."""

import aiohttp
import pytest

pytest.importorskip("torch", reason="torch is not installed (pip install 'weir[backend]')")

from reference_backend.served import State  # noqa: E402
from tests.support.tiny_model import running_api  # noqa: E402


@pytest.mark.parametrize(
    ("state", "told", "status"),
    [
        (State.READY, "ready", 200),
        (State.ASLEEP, "ready", 200),  # who asks for it wakes it
        (State.DRAINING, "draining", 503),
        (State.LOADING, "loading", 503),
        (State.FAILED, "failed", 503),
    ],
)
async def test_health_is_readiness(state, told, status):
    async with running_api() as backend, aiohttp.ClientSession() as session:
        backend.served.state = state
        found = {}
        for path in ("/health", "/v2/health/ready", "/v2/health/live"):
            async with session.get(backend.url + path) as response:
                found[path] = (response.status, await response.json())
    assert found == {
        "/health": (status, {"status": told}),
        "/v2/health/ready": (status, {"ready": status == 200}),
        "/v2/health/live": (200, {"live": True}),
    }
