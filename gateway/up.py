"""`weir up`: etcd, Redis, reference backends and the gateway on this machine, until Ctrl-C.

The stores start first, then backends and gateway. The start is over when the gateway lists a model to a caller
with a token, so that what the box then prints works as pasted.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shlex
import socket
from collections.abc import Callable

import aiohttp
from rich.console import Console
from rich.rule import Rule

from gateway import children
from gateway.children import CannotRun
from gateway.home import AUDIENCE, ISSUER, Home
from gateway.stack import HOST, PROBE_TIMEOUT, Options, Probe, plan
from policies import identity

TOKEN_TTL = 24 * 3600.0


async def up(options: Options, console: Console, wall: Callable[[], float]) -> None:
    """Runs until a signal. Raises CannotRun; leaves nothing running either way."""
    home = Home(options.directory)
    with home.locked():
        check_needs(options)
        home.prepare()
        token = mint_token(home, wall())
        async with aiohttp.ClientSession(timeout=PROBE_TIMEOUT) as session:
            await _run(options, home, Probe(session), token, console)
    console.print("stopped; nothing is left running")


async def _run(options: Options, home: Home, probe: Probe, token: str, console: Console) -> None:
    status = console.status("starting")

    async def show_box() -> None:
        status.stop()
        models = await probe.models(options.port, token)
        print_box(console, options, token, models[0])

    def say(sentence: str) -> None:
        console.print(sentence, markup=False, highlight=False, soft_wrap=True)

    supervisor = children.Supervisor(plan(options, home, probe, token), say)
    with status:
        await children.run_until_signalled(supervisor, show_box)


def check_needs(options: Options) -> None:
    """Raises CannotRun for what can be known before anything is started."""
    for port, option in ((options.port, "--port"), (options.admin_port, "--admin-port")):
        try:
            socket.create_server((HOST, port)).close()
        except OSError as error:
            raise CannotRun(
                f"port {port}: {os.strerror(error.errno or 0)}; stop what uses it, or choose another with {option}"
            ) from error
    if options.backends and importlib.util.find_spec("torch") is None:
        raise CannotRun(
            "the reference backends need torch; install it with `pip install weir[backend]` (or `make setup`)"
        )


def mint_token(home: Home, wall: float) -> str:
    """A token of the plan `team` for the person at the keyboard."""
    return identity.mint(
        home.key.read_bytes(), sub="you", groups=["team"], issuer=ISSUER, audience=AUDIENCE, ttl=TOKEN_TTL, wall=wall
    )


def print_box(console: Console, options: Options, token: str, model: str) -> None:
    """Where everything is. No side borders and no wrapping of ours: a line copied is the line as it was meant."""
    api = f"http://{HOST}:{options.port}/v1"
    body = {"model": model, "stream": True, "messages": [{"role": "user", "content": "What is a KV cache?"}]}
    headers = (f"authorization: Bearer {token}", "content-type: application/json")
    curl = ["curl", "-N", f"{api}/chat/completions", "-H", headers[0], "-H", headers[1], "-d", json.dumps(body)]
    lines = (
        f"API      {api}",
        f"console  http://{HOST}:{options.admin_port}/",
        f"policy   {options.directory / 'policy.yaml'} (edit it: in force within a second)",
        f"token    {token}",
        "",
        shlex.join(curl),
    )
    console.print(Rule("Weir is up"))
    console.print("\n".join(lines), markup=False, highlight=False, soft_wrap=True)
    console.print(Rule("Ctrl-C stops all of it"))
