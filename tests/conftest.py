"""What all tests share: Hypothesis tries the same examples each time, and a loaded machine is no failure."""

import os

from hypothesis import settings

import gateway.children  # first: it says how gRPC has to behave where children are started
import gateway.pipeline

IS_COMPILED = not gateway.pipeline.__file__.endswith(".py")
# Asked in each process that runs tests: `make test-compiled` puts the compiled build first on the path.
assert IS_COMPILED or "compiled" not in os.environ.get("PYTHONPATH", ""), "the compiled build is not first"

settings.register_profile("weir", deadline=None, derandomize=True)
settings.register_profile("fuzz", deadline=None, max_examples=500)  # `make fuzz`: others each time
settings.load_profile("weir")


def pytest_report_header():
    return f"the data path is {'compiled' if IS_COMPILED else 'Python'}"
