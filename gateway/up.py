"""`weir up`: etcd, Redis, reference backends and the gateway on this machine, until Ctrl-C.

The stores start first, then backends and gateway. The start is over when the gateway lists a model to a caller
with a token. What the box then prints works as pasted: which request the model takes has been tried.
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
from gateway.home import AUDIENCE, ISSUER, SERVICE, Home
from gateway.stack import HOST, PROBE_TIMEOUT, Options, Ports, Probe, plan
from policies import identity

TOKEN_TTL = 24 * 3600.0
QUESTION = "What is a KV cache?"
# What a model may be asked first, whichever kind it is of: path, and the body beside `model`.
REQUESTS: tuple[tuple[str, dict[str, object]], ...] = (
    ("/v1/chat/completions", {"stream": True, "messages": [{"role": "user", "content": QUESTION}]}),
    ("/v1/embeddings", {"input": QUESTION}),
    ("/v1/images/generations", {"prompt": "a red circle"}),
)


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
    ports = Ports.choose(options.backends)
    status = console.status("starting")

    async def show_box() -> None:
        curl = await first_request(options.port, token, probe)
        status.stop()
        print_box(console, options, ports, token, curl)

    def say(sentence: str) -> None:
        console.print(sentence, markup=False, highlight=False, soft_wrap=True)

    supervisor = children.Supervisor(plan(options, home, ports, probe, token), say)
    with status:
        await children.run_until_signalled(supervisor, show_box)


def check_needs(options: Options) -> None:
    """Raises CannotRun for what can be known before anything is started."""
    if options.port == options.admin_port:
        raise CannotRun(f"--port and --admin-port are both {options.port}; they must differ")
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


async def first_request(port: int, token: str, probe: Probe) -> list[str]:
    """The words of a curl line that works: one of REQUESTS, or what there is while no model takes any."""
    for model in (await probe.models(port, token))[:1]:
        for path, body in REQUESTS:
            if not await probe.refuses(port, token, path, {"model": model, **body, "max_tokens": 1}):
                data = json.dumps({"model": model, **body})
                return _curl(port, path, token, "-H", "content-type: application/json", "-d", data)
    return _curl(port, "/v1/models", token)


def _curl(port: int, path: str, token: str, *more: str) -> list[str]:
    return ["curl", "-N", f"http://{HOST}:{port}{path}", "-H", f"authorization: Bearer {token}", *more]


def print_box(console: Console, options: Options, ports: Ports, token: str, curl: list[str]) -> None:
    """Where everything is. No side borders and no wrapping of ours: a line copied is the line as it was meant."""
    lines = (
        f"API      http://{HOST}:{options.port}/v1",
        f"console  http://{HOST}:{options.admin_port}/",
        f"policy   {options.directory / 'policy.yaml'} (edit it: in force within a second)",
        f"etcd     {ports.etcd_url} (`weir backends --etcd`; what registers there as `{SERVICE}` is used)",
        f"token    {token}",
        "",
        shlex.join(curl),
    )
    console.print(Rule("Weir is up"))
    console.print("\n".join(lines), markup=False, highlight=False, soft_wrap=True)
    console.print(Rule("Ctrl-C stops all of it"))
