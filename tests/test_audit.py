"""What `make check` says of the dependencies' audit, from what pip-audit says."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent.parent / ".ci" / "audit.py"


def load():
    spec = importlib.util.spec_from_file_location("audit", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules["audit"] = module
    spec.loader.exec_module(module)
    return module


audit = load()

SOUND = {"name": "click", "version": "8.5.1", "vulns": []}
SKIPPED = {"name": "yarl", "skip_reason": "Dependency not found on PyPI and could not be audited: yarl (1.0)"}
FLAWED = {
    "name": "jinja2",
    "version": "3.1.2",
    "vulns": [{"id": "PYSEC-1", "fix_versions": ["3.1.3"]}, {"id": "PYSEC-2", "fix_versions": []}],
}
NO_ROUTE = """Traceback (most recent call last):
socket.gaierror: [Errno -2] Name or service not known
The above exception was the direct cause of the following exception:
requests.exceptions.ConnectionError: HTTPSConnectionPool(host='pypi.org', port=443): Max retries exceeded
"""


def report(*pins):
    return json.dumps({"dependencies": pins, "fixes": []})


@pytest.mark.parametrize(
    ("written", "errors", "code", "says"),
    [
        (report(SOUND), "", 0, "audited: no known vulnerability in 1 pins"),
        (report(SOUND, FLAWED), "", 1, "jinja2 3.1.2: PYSEC-1, mended in 3.1.3"),
        (report(SKIPPED, FLAWED), "", 1, "jinja2 3.1.2: PYSEC-2, mended in no version yet"),
        (report(SKIPPED), "No known vulnerabilities found", 2, "NOT AUDITED: the index that is asked has no answer"),
        (report(SOUND, SKIPPED), "", 2, "NOT AUDITED: the index has no answer for 1 of 2 pins: yarl"),
        ("", NO_ROUTE, 2, "NOT AUDITED: the vulnerability service cannot be reached (ConnectionError)"),
        ("", "ERROR:pip_audit._cli:Could not connect to PyPI's vulnerability feed", 2, "cannot be reached (no answer)"),
        ("", "pip_audit._service.interface.ServiceError", 2, "cannot be reached (ServiceError)"),
        ("", "ERROR:pip_audit._cli:constraints.txt: invalid requirement", 1, "invalid requirement"),
        ("", "Traceback:\nKeyError: 'vulns'", 1, "KeyError"),
    ],
)
def test_only_pins_that_were_looked_up_count_as_audited(written, errors, code, says) -> None:
    verdict = audit.judge(written, errors)
    assert verdict.code == code
    assert says in "\n".join(verdict.lines)


@pytest.mark.parametrize(("required", "code"), [("", 0), ("required", 2)])
def test_without_a_network_it_says_so_and_passes_unless_an_audit_is_required(required, code, tmp_path) -> None:
    nowhere = "http://127.0.0.1:9"  # the discard port: nobody listens
    done = subprocess.run(
        [sys.executable, str(SCRIPT)],
        check=False,
        env={"https_proxy": nowhere, "HTTPS_PROXY": nowhere, "WEIR_AUDIT": required, "HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == code, done.stderr
    assert done.stdout.startswith("NOT AUDITED: the vulnerability service cannot be reached (ProxyError)")
