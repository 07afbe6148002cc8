"""Asks a vulnerability service about every pinned dependency, by pip-audit; run by `make check`.

    findings             -> each with the version that mends it; exit code 1
    nothing known        -> one line that says how many pins were looked up; 0
    could not be asked   -> NOT AUDITED, and why; 0, because a machine without a network must be able to check its code
    anything else        -> what pip-audit said; 1

The service is PyPI's (its JSON API). A mirror that has packages but no such answers makes pip-audit skip each pin and
then say that no vulnerability is known: here that is NOT AUDITED, too. WEIR_AUDIT=required makes that an error: for
whoever releases.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PINS = Path(__file__).parent.parent / "constraints.txt"
SECONDS = 120
# The last line of a traceback that ends in the network: requests' own errors, or pip-audit's about its service.
_UNREACHABLE = re.compile(r"^(?:requests\.exceptions|pip_audit\._service[\w.]*)\.(\w+)", re.MULTILINE)
_NO_FEED = "Could not connect to"


@dataclass(frozen=True)
class Verdict:
    """`code` is 1 for findings and for what went wrong, 2 for pins that nobody could be asked about, else 0."""

    code: int
    lines: tuple[str, ...]


def judge(report: str, errors: str) -> Verdict:
    """What a run of pip-audit means: `report` is its JSON, "" when it wrote none, `errors` its standard error."""
    if not report:
        reason = _UNREACHABLE.findall(errors)
        if reason or _NO_FEED in errors:
            return not_audited(f"the vulnerability service cannot be reached ({reason[-1] if reason else 'no answer'})")
        return Verdict(1, ("pip-audit failed:", *errors.splitlines()[-5:]))
    pins: list[dict[str, Any]] = json.loads(report)["dependencies"]
    skipped = [pin["name"] for pin in pins if "skip_reason" in pin]
    found = tuple(_told(pin, flaw) for pin in pins for flaw in pin.get("vulns", ()))
    if found:
        return Verdict(1, (f"{len(found)} known vulnerabilities in what constraints.txt pins:", *found))
    if len(skipped) == len(pins):
        return not_audited(f"the index that is asked has no answer for any of the {len(pins)} pins")
    if skipped:
        return not_audited(f"the index has no answer for {len(skipped)} of {len(pins)} pins: {', '.join(skipped)}")
    return Verdict(0, (f"audited: no known vulnerability in {len(pins)} pins",))


def not_audited(why: str) -> Verdict:
    return Verdict(2, (f"NOT AUDITED: {why}; nothing is known about these dependencies",))


def _told(pin: dict[str, Any], flaw: dict[str, Any]) -> str:
    mended = ", ".join(flaw.get("fix_versions", ())) or "no version yet"
    return f"  {pin['name']} {pin['version']}: {flaw['id']}, mended in {mended}"


def run() -> Verdict:
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        command = [
            sys.executable, "-m", "pip_audit", "--requirement", str(PINS), "--no-deps", "--disable-pip",
            "--progress-spinner", "off", "--timeout", "10", "--format", "json", "--output", str(report),
        ]  # fmt: skip
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, check=False)  # noqa: S603  ours
        except subprocess.TimeoutExpired:
            return not_audited(f"the vulnerability service took more than {SECONDS} s")
        return judge(report.read_text() if report.exists() else "", done.stderr)


if __name__ == "__main__":
    verdict = run()
    print("\n".join(verdict.lines))
    sys.exit(verdict.code if verdict.code != 2 or os.environ.get("WEIR_AUDIT") == "required" else 0)
