"""nginx and HAProxy, as Debian has them, before a backend of the test's: what others make of the same bytes.

Both are told to wait as little for the rest of a request as the tests' gateway, to wait for a body before they pass its
head on, and to tell the backend the client's address in `x-forwarded-for`.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import shutil
import subprocess
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from gateway.config_fields import Address
from tests.support.ports import free_port

_NGINX = """
daemon off;
master_process off;
error_log {home}/nginx.log;
pid {home}/nginx.pid;
events {{ worker_connections 512; }}
http {{
    access_log off;
    client_body_temp_path {home}/body; proxy_temp_path {home}/proxy; fastcgi_temp_path {home}/fastcgi;
    uwsgi_temp_path {home}/uwsgi; scgi_temp_path {home}/scgi;
    client_header_timeout {patience}ms; client_body_timeout {patience}ms; keepalive_timeout {patience}ms;
    client_max_body_size 0;
    server {{
        listen 127.0.0.1:{port};
        location / {{
            proxy_pass http://127.0.0.1:{backend};
            proxy_http_version 1.1;
            proxy_set_header X-Forwarded-For $remote_addr;
        }}
    }}
}}
"""

_HAPROXY = """
global
    nbthread 1
defaults
    mode http
    timeout connect 5s
    timeout server 20s
    timeout client 5s
    timeout http-request {patience}ms
    timeout http-keep-alive {patience}ms
frontend in
    bind 127.0.0.1:{port}
    option http-buffer-request
    http-request set-header X-Forwarded-For %[src]
    default_backend out
backend out
    server one 127.0.0.1:{backend}
"""

# Which versions the expectations in tests/corpora were taken with: others may read the same bytes otherwise.
VERSIONS = {"nginx": "1.22", "haproxy": "2.6"}


def need(name: str) -> str:
    """The program's path. Skips the test where it is not there, or is of another version than what is expected of it."""
    program = shutil.which(name) or shutil.which(name, path="/usr/sbin:/usr/local/sbin")
    if program is None:
        pytest.skip(f"{name} is not installed (Debian: apt install {name})")
    said = subprocess.run([program, "-v"], capture_output=True, text=True, check=True)
    version = re.search(r"\d+\.\d+", said.stderr + said.stdout)
    if version is None or version[0] != VERSIONS[name]:
        pytest.skip(f"{name} is {version and version[0]}; its answers are known for {VERSIONS[name]}")
    return program


@contextlib.asynccontextmanager
async def nginx(home: Path, backend: int, patience_ms: int) -> AsyncIterator[Address]:
    """nginx before this port of loopback. Skips as `need` does."""
    program = need("nginx")
    port, file = free_port(), home / "nginx.conf"
    file.write_text(_NGINX.format(home=home, port=port, backend=backend, patience=patience_ms))
    async with _running([program, "-p", str(home), "-e", str(home / "nginx.log"), "-c", str(file)], port):
        yield Address("127.0.0.1", port)


@contextlib.asynccontextmanager
async def haproxy(home: Path, backend: int, patience_ms: int) -> AsyncIterator[Address]:
    """HAProxy before this port of loopback. Skips as `need` does."""
    program = need("haproxy")
    port, file = free_port(), home / "haproxy.cfg"
    file.write_text(_HAPROXY.format(port=port, backend=backend, patience=patience_ms))
    async with _running([program, "-q", "-db", "-f", str(file)], port):
        yield Address("127.0.0.1", port)


@contextlib.asynccontextmanager
async def _running(command: list[str], port: int) -> AsyncIterator[None]:
    process = await asyncio.create_subprocess_exec(*command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    try:
        async with asyncio.timeout(20):
            while not await _listens(port):
                if process.returncode is not None:
                    assert process.stderr is not None
                    raise AssertionError((await process.stderr.read()).decode())
                await asyncio.sleep(0.02)
        yield
    finally:
        if process.returncode is None:
            process.terminate()
        await process.communicate()


async def _listens(port: int) -> bool:
    try:
        _, writer = await asyncio.open_connection("127.0.0.1", port)
    except ConnectionRefusedError:
        return False
    writer.close()
    return True
