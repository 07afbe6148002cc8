"""The gateway runs on uvloop, so a module of tests that says `LOOP = "uvloop"` does too."""

import asyncio

import uvloop


def pytest_asyncio_loop_factories(config, item):
    wanted = getattr(item.module, "LOOP", "asyncio")
    return {"uvloop": uvloop.new_event_loop} if wanted == "uvloop" else {"asyncio": asyncio.new_event_loop}
