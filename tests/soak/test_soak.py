"""Two minutes of `make soak`, with the same faults each time."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent


@pytest.mark.integration
@pytest.mark.timeout(400)
def test_nothing_is_lost_and_nothing_grows_while_everything_breaks(tmp_path):
    ran = subprocess.run(
        [sys.executable, "-m", "tests.soak", "--seconds", "120", "--seed", "1", "--keep", str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=380,
        check=False,
    )
    assert ran.returncode == 0, ran.stdout[-8000:] + ran.stderr[-2000:]
