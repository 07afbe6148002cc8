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

import uvloop

from reference_backend.engine.config import ModelError
from reference_backend.engine.frames import Unframed, framed
from reference_backend.tensor_frames import (
    Answer,
    Cancel,
    Infer,
    Open,
    Opened,
    Refusal,
    decode_for_model,
    pack,
    unpack,
)
from reference_backend.tensors import BadTensor, Full, Late, TensorModel, executor

READ_BYTES = 1 << 20
log = logging.getLogger(__name__)


async def serve(connection: socket.socket) -> int:
    """The life of the process. Returns its exit code."""
    reader, writer = await asyncio.open_connection(sock=connection, limit=READ_BYTES)
    unframed = Unframed()
    while not (bodies := unframed.feed(data := await reader.read(READ_BYTES))):
        if not data:
            return 0
    first = decode_for_model(bodies[0])
    if not isinstance(first, Open):
        return 0
    try:
        async with executor(first.card.executor)(Path(first.directory), first.card) as model:
            gc.freeze()  # what is there now stays: to look through torch for garbage again takes 85 ms
            writer.write(framed(Opened(tuple(model.inputs), tuple(model.outputs))))
            await _answer_all(model, reader, writer, unframed)
    except ModelError as error:
        writer.write(framed(Refusal(str(error))))
        await writer.drain()
        return 3
    return 0


async def _answer_all(
    model: TensorModel, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, unframed: Unframed
) -> None:
    """Until the server is gone."""
    under_way: dict[int, asyncio.Task[None]] = {}
    while data := await reader.read(READ_BYTES):
        for body in unframed.feed(data):
            message = decode_for_model(body)
            if isinstance(message, Infer):
                task = under_way[message.ticket] = asyncio.create_task(_answer(model, message, writer))
                task.add_done_callback(functools.partial(under_way.pop, message.ticket))
            elif isinstance(message, Cancel) and (unwanted := under_way.get(message.ticket)) is not None:
                unwanted.cancel()
    for task in list(under_way.values()):
        task.cancel()


async def _answer(model: TensorModel, asked: Infer, writer: asyncio.StreamWriter) -> None:
    try:
        outputs = await model.infer(unpack(asked.inputs), asked.terms)
        answer = Answer(asked.ticket, pack(outputs))
    except BadTensor as error:
        answer = Answer(asked.ticket, {}, "bad", str(error))
    except Full:
        answer = Answer(asked.ticket, {}, "full")
    except Late:
        answer = Answer(asked.ticket, {}, "late")
    except Exception:  # whatever it is, nobody must wait for it any longer
        log.exception("the model failed")
        answer = Answer(asked.ticket, {}, "failed")
    writer.write(framed(answer))


def main(descriptor: int) -> int:
    for number in (signal.SIGINT, signal.SIGTERM):  # the server decides when it is over
        signal.signal(number, signal.SIG_IGN)
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    return uvloop.run(serve(socket.socket(fileno=descriptor)))


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1])))
