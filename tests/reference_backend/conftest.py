"""Has Triton interpreted, where torch sees no GPU, before any test's imports load it: later is too late for its own."""

import contextlib

import pytest

with contextlib.suppress(pytest.skip.Exception):  # the tests of kernels say that themselves
    import tests.support.kernels  # noqa: F401
