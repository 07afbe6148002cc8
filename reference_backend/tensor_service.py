"""The process of a tensor model: `python -m reference_backend.tensor_service FD`.

It opens the model with its executor and answers requests as they are done, many at a time: what goes into one batch is
the executor's business. It ends when its socket does. A failure in a run is told and logged, and ends only that run.
"""

from __future__ import annotations

import asyncio
import functools
import gc
import logging
import signal
import socket
import sys
from pathlib import Path
from typing import Any

import uvloop

from reference_backend.engine.config import ModelError
from reference_backend.engine.frames import Ping, Refused
from reference_backend.link import Framed
from reference_backend.tensor_frames import Answer, Cancel, Infer, Open, Opened, decode_for_model, pack, unpack
from reference_backend.tensors import BadTensor, TensorModel, executor

log = logging.getLogger(__name__)


class Desk(Framed):
    """The model's end of the socket: `asked` is what to open, or None when nobody is there any more."""

    def __init__(self) -> None:
        super().__init__(decode_for_model)
        self.asked: asyncio.Future[Open | None] = self.loop.create_future()
        self.model: TensorModel | None = None
        self._under_way: dict[int, asyncio.Task[None]] = {}

    def take(self, message: Any) -> None:
        if isinstance(message, Infer):
            task = self._under_way[message.ticket] = self.loop.create_task(self._answer(message))
            task.add_done_callback(functools.partial(self._under_way.pop, message.ticket))
        elif isinstance(message, Cancel) and (unwanted := self._under_way.get(message.ticket)) is not None:
            unwanted.cancel()
        elif isinstance(message, Ping):
            self.send(message)
        elif isinstance(message, Open):
            self.asked.set_result(message)

    async def _answer(self, asked: Infer) -> None:
        assert self.model is not None  # noqa: S101  nobody asks before it is told to be there
        try:
            outputs = await self.model.infer(unpack(asked.inputs), asked.terms)
            answer = Answer(asked.ticket, pack(outputs))
        except BadTensor as error:
            answer = Answer(asked.ticket, {}, "BadTensor", str(error))
        except Exception:  # whatever it is, nobody must wait for it any longer
            log.exception("the model failed")
            answer = Answer(asked.ticket, {}, "Failed")
        self.send(answer)

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        if not self.asked.done():
            self.asked.set_result(None)
        for task in self._under_way.values():
            task.cancel()


async def serve(connection: socket.socket) -> int:
    """The life of the process. Returns its exit code."""
    _, desk = await asyncio.get_running_loop().create_connection(Desk, sock=connection)
    asked = await desk.asked
    if asked is None:
        return 0
    try:
        async with executor(asked.card.executor)(Path(asked.directory), asked.card) as desk.model:
            gc.freeze()  # what is there now stays: to look through torch for garbage again takes 85 ms
            desk.send(Opened(tuple(desk.model.inputs), tuple(desk.model.outputs)))
            await desk.lost.wait()
    except ModelError as error:
        desk.send(Refused(str(error)))
        desk.close()
        await desk.lost.wait()
        return 3
    return 0


def main(descriptor: int) -> int:
    for number in (signal.SIGINT, signal.SIGTERM):  # the server decides when it is over
        signal.signal(number, signal.SIG_IGN)
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    return uvloop.run(serve(socket.socket(fileno=descriptor)))


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1])))
