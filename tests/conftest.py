"""What all tests share: Hypothesis tries the same examples each time, and a loaded machine is no failure."""

import os

from hypothesis import settings

import gateway.pipeline

settings.register_profile("weir", deadline=None, derandomize=True)
settings.register_profile("fuzz", deadline=None, max_examples=500)  # `make fuzz`: others each time
settings.load_profile("weir")


def pytest_report_header():
    """Which build is tested: `make test-compiled` puts the compiled one first on the path."""
    is_compiled = not gateway.pipeline.__file__.endswith(".py")
    assert is_compiled or "compiled" not in os.environ.get("PYTHONPATH", ""), "the compiled build is not first"
    return "the data path is compiled" if is_compiled else "the data path is Python"
