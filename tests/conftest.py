"""What all tests share: Hypothesis tries the same examples each time, and a loaded machine is no failure."""

import os
from pathlib import Path

import pytest
from hypothesis import settings

import gateway.children  # first: it says how gRPC has to behave where children are started
import gateway.pipeline

IS_COMPILED = not gateway.pipeline.__file__.endswith(".py")
# Asked in each process that runs tests: `make test-compiled` puts the compiled build first on the path.
assert IS_COMPILED or "compiled" not in os.environ.get("PYTHONPATH", ""), "the compiled build is not first"

if not Path("/dev/nvidiactl").exists():
    # Without a GPU, Triton's kernels run in its interpreter. It asks when it is imported, by whichever test is the first.
    os.environ["TRITON_INTERPRET"] = "1"

settings.register_profile("weir", deadline=None, derandomize=True)
settings.register_profile("fuzz", deadline=None, max_examples=500)  # `make fuzz`: others each time
settings.load_profile("weir")


@pytest.fixture
def patient(monkeypatch):
    """A machine that is busy is no Redis that is away: for whoever does not test what is done about a slow one."""
    for name in ("store.STORE_SECONDS", "meter.STORE_SECONDS", "store.CONNECT_SECONDS", "store.TLS_CONNECT_SECONDS"):
        monkeypatch.setattr(f"gateway.{name}", 5.0)


def pytest_report_header():
    return f"the data path is {'compiled' if IS_COMPILED else 'Python'}"
