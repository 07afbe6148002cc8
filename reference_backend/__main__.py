"""`python -m reference_backend`: the process of process.py, or one line that says what is missing."""

from __future__ import annotations

import importlib.util
import sys
import time

NEEDED = ("torch", "safetensors", "tokenizers", "jinja2", "llguidance", "numpy")


def main() -> int:
    """Run the backend. Returns its exit code, or 3 when its libraries are not installed."""
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        names = ", ".join(missing)
        print(f"reference_backend: {names} not installed; try `pip install 'weir[backend]'`", file=sys.stderr)  # noqa: T201
        return 3
    from reference_backend import process  # noqa: PLC0415  only now is it known that it can be imported

    return process.main(sys.argv[1:], clock=time.monotonic, wall=time.time)


if __name__ == "__main__":
    sys.exit(main())
