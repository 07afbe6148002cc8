"""The console: it names no place but its own, and a real browser shows in it what the admin API says."""

import asyncio
import re
import shutil
import time
from pathlib import Path

import pytest
from aiohttp import web

from gateway.admin import CONSOLE, admin_app
from observability.metrics import Metrics
from observability.recent import Recent
from tests.support.ended import ended, refused

CHROMIUM = shutil.which("chromium")
FILES = {"index.html", "console.js", "console.css", "icon.svg"}
NAMESPACE = 'xmlns="http://www.w3.org/2000/svg"'  # a name, not a place: nothing is fetched from it

VIEWS = {
    "backends": lambda: {
        "backends": [
            {
                "service": "tiny", "id": "b-1", "models": [{"name": "tiny-1", "version": "1"}], "state": "serving",
                "healthy": True, "breaker": "half_open", "inflight": 3, "weight": 1, "reported_load": None,
            }
        ],
        "discovery": {"state": "watching", "revision": 42, "stale_seconds": 0.1},
    },
    "routes": lambda: {
        "routes": [
            {
                "name": "chat", "match": {"path": "/v1/chat/completions", "model": "tiny*", "header": {}},
                "to": [{"service": "tiny", "version": None, "weight": 1}], "balance": "least_load", "allow": [],
            }
        ]
    },
    "policy": lambda: {
        "version": "0123456789ab", "loaded_at": 1_700_000_000.0, "source": "policy.yaml",
        "last_error": {"errors": ["policy.yaml:3:5 routes[0].ot: unknown key"], "at": 1_700_000_000.0},
    },
}  # fmt: skip


def text(name):
    return (CONSOLE / name).read_text().replace(NAMESPACE, "")


@pytest.mark.parametrize("name", sorted(FILES))
def test_nothing_is_fetched_from_elsewhere(name):
    assert not re.findall(r"(?:https?:)?//[\w.-]+\.\w+|@import|data:|url\(", text(name))


def test_nothing_is_inline_and_nothing_from_outside_becomes_markup():
    page, script = text("index.html"), text("console.js")
    assert not re.search(r"<script(?![^>]*\bsrc=)|<style|\sstyle=|\son\w+=", page)
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\b|new Function", script)


def test_every_file_is_used_and_every_used_one_is_there():
    assert {file.name for file in CONSOLE.iterdir()} == FILES
    assert set(re.findall(r'(?:src|href)="([^"]+)"', text("index.html"))) == FILES - {"index.html"}


@pytest.mark.parametrize(
    "id_", sorted(set(re.findall(r'(?:at|replace)\("(\w+)"', (CONSOLE / "console.js").read_text())))
)
def test_what_the_script_looks_for_is_on_the_page(id_):
    assert f'id="{id_}"' in text("index.html")


@pytest.mark.integration
@pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")
async def test_a_browser_shows_what_the_api_says(tmp_path: Path):
    recent = Recent()
    recent(
        refused(
            429, "rate_limited", "rate_limited", rule="plans.free.requests", consumer="<img src=x onerror=alert(1)>"
        )
    )
    recent(ended(stream=True))
    views = {**VIEWS, "requests": lambda: {"requests": recent.requests()}}
    runner = web.AppRunner(admin_app(Metrics(), lambda: (), views, None, time.perf_counter), access_log=None)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    try:
        page, complaints = await browse(f"http://127.0.0.1:{runner.addresses[0][1]}/", tmp_path)
    finally:
        await runner.cleanup()
    assert complaints == []  # of the content security policy, say
    for shown in ("policy 0123456789ab", "policy.yaml:3:5", "half open", "429 rate_limited", "12 → 30", "everybody"):
        assert shown in page
    assert "<img src=x" not in page
    assert "&lt;img src=x onerror=alert(1)&gt;" in page


async def browse(url, profile):
    """The page as it stands after some seconds of its own time, and what the browser said against it."""
    browser = await asyncio.create_subprocess_exec(
        CHROMIUM, "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
        "--disable-background-networking", "--disable-component-update", "--disable-sync",
        "--enable-logging=stderr", f"--user-data-dir={profile}", "--virtual-time-budget=3000", "--dump-dom", url,
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip
    try:
        async with asyncio.timeout(60):
            page, log = await browser.communicate()
    finally:
        if browser.returncode is None:
            browser.kill()
            await browser.wait()
    return page.decode(), [line for line in log.decode(errors="replace").splitlines() if ":CONSOLE" in line]
