"""As in tests/integration: a module that says `LOOP = "uvloop"` runs on the loop that the gateway runs on."""

from tests.integration.conftest import pytest_asyncio_loop_factories  # noqa: F401  a hook: found by its name
