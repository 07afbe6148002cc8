"""The worker process: an engine at the end of a socket. `python -m reference_backend.engine.service FD`.

LOADING (one `Start` comes, `Ready` or `Refused` goes) => IDLE (waits for a request) <=> BUSY (takes turns, and looks
for news between them) => gone, when the server closes the socket or is gone itself. A failure of the engine ends the
process: the server sees that, tells whoever was waiting, and starts another one.
"""

from __future__ import annotations

import logging
import os
import random
import select
import signal
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from reference_backend.engine.config import ModelConfig, ModelError
from reference_backend.engine.engine import Engine, Settings
from reference_backend.engine.flow import is_flow, load_flow
from reference_backend.engine.frames import Abort, Ask, Ready, Refused, Start, Turn, Unframed, decode_for_worker, framed
from reference_backend.engine.grammar import Grammars
from reference_backend.engine.model import Llama, load_model
from reference_backend.engine.painting import Studio
from reference_backend.engine.request import Sampling, Sequence

SMALL_PARAMETERS = 50_000_000  # below, a second thread costs more in waiting than it gives in arithmetic
LONGEST_CONTEXT = 8192  # tokens, unless asked for: at least one such request must fit the cache
CACHE_SHARE = 0.25  # of the memory that is free: enough for many, and others live here too
READ_BYTES = 1 << 20
log = logging.getLogger(__name__)


class Line:
    """The worker's end of the socket."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._unframed = Unframed()
        self._poll = select.poll()
        self._poll.register(connection, select.POLLIN)

    def read(self, *, wait: bool) -> list[Start | Ask | Abort] | None:
        """The messages that have come; None when the server is gone."""
        if not wait and not self._poll.poll(0):
            return []
        try:
            data = self._connection.recv(READ_BYTES)
        except ConnectionError:
            data = b""
        return [decode_for_worker(body) for body in self._unframed.feed(data)] if data else None

    def send(self, message: Ready | Refused | Turn) -> bool:
        """Whether the server is still there to hear it. Waits while it does not read."""
        try:
            self._connection.sendall(framed(message))
        except ConnectionError:
            return False
        return True


def serve(engine: Engine | Studio, line: Line, clock: Callable[[], float]) -> int:
    """Take turns until the server is gone. Returns the exit code: 0, or 1 when the engine failed."""
    asked: dict[int, Sequence] = {}
    tickets: dict[Sequence, int] = {}
    while True:
        messages = line.read(wait=not engine.is_busy)
        if messages is None:
            return 0
        for message in messages:
            if isinstance(message, Ask):
                sequence = _sequence(message)
                asked[message.ticket], tickets[sequence] = sequence, message.ticket
                engine.submit(sequence)
            elif isinstance(message, Abort) and (given_up := asked.pop(message.ticket, None)) is not None:
                del tickets[given_up]
                engine.abort(given_up)
        if not engine.is_busy:
            continue
        try:
            began = clock()
            published = engine.turn(began)
            engine.took(clock() - began)
        except Exception:  # whatever it is, nobody must wait for it any longer
            log.exception("the engine failed")
            return 1
        deltas = [(tickets[sequence], delta) for sequence, delta in published if sequence in tickets]
        for sequence, delta in published:
            if delta.finish is not None and sequence in tickets:
                del asked[tickets.pop(sequence)]
        if not line.send(Turn(deltas, engine.load())):
            return 0


def _sequence(ask: Ask) -> Sequence:
    return Sequence(ask.prompt, ask.sampling, ask.deadline, ask.priority, ask.tenant, ask.salt, ask.pictures)


def load(start: Start, clock: Callable[[], float]) -> Engine | Studio:
    """Read the model and have it produce one token, or picture. Raises ModelError when it cannot be served."""
    if is_flow(Path(start.model)):
        torch.set_num_threads(1)
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        studio = Studio(load_flow(Path(start.model), device), slots=start.slots, rng=random.SystemRandom())
        warm(studio, clock())
        return studio
    try:
        if torch.cuda.is_available():
            model = load_model(Path(start.model), torch.device("cuda"), torch.bfloat16)
        else:
            model = load_model(Path(start.model), torch.device("cpu"))
        tokenizer = Path(start.model) / "tokenizer.json"
        engine = Engine(
            model,
            sizes(start, model),
            end_tokens=frozenset(start.end_tokens),
            rng=random.SystemRandom(),
            overlap=model.device.type != "cpu",
            grammars=Grammars(tokenizer, model.config.vocab_size, start.end_tokens, clock)
            if tokenizer.exists()
            else None,
        )
    except (RuntimeError, MemoryError) as error:  # torch says the former when memory is not enough
        reason = str(error).partition("\n")[0]
        raise ModelError(f"the model does not fit: {reason}; try a smaller --context or --max-running") from error
    if model.parameters < SMALL_PARAMETERS:
        torch.set_num_threads(1)
    warm(engine, clock())
    return engine


def sizes(start: Start, model: Llama) -> Settings:
    """What was asked for, within the model's context and the memory that is there."""
    context = min(start.context or LONGEST_CONTEXT, model.config.context)
    fitting = int(CACHE_SHARE * free_memory(model.device)) // bytes_per_token(model.config, model.dtype)
    cache_tokens = start.cache_tokens or min(start.slots * context, fitting)
    return Settings(slots=start.slots, context=context, cache_tokens=cache_tokens)


def free_memory(device: torch.device) -> int:
    """Bytes that are free where the cache will be."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def bytes_per_token(config: ModelConfig, dtype: torch.dtype) -> int:
    """What the keys and values of one token take in all layers."""
    return 2 * config.layers * config.kv_heads * config.head_dim * dtype.itemsize


def warm(engine: Engine | Studio, now: float) -> None:
    """Have one token produced. Raises ModelError when the model does not compute with numbers."""
    engine.submit(Sequence([0], Sampling(max_tokens=1)))
    while engine.is_busy:
        if any(delta.finish == "failed" for _, delta in engine.turn(now)):
            raise ModelError("the model's scores are not finite: its weights are broken")


def main(descriptor: int, clock: Callable[[], float]) -> int:
    """The process. Returns its exit code."""
    for number in (signal.SIGINT, signal.SIGTERM):  # the server decides when it is over
        signal.signal(number, signal.SIG_IGN)
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    with socket.socket(fileno=descriptor) as connection:
        line = Line(connection)
        messages = line.read(wait=True)
        while messages == []:
            messages = line.read(wait=True)
        if not messages or not isinstance(messages[0], Start):
            return 0
        try:
            engine = load(messages[0], clock)
        except ModelError as error:
            line.send(Refused(str(error)))
            return 3
        line.send(Ready(engine.context, engine.load()))
        return serve(engine, line, clock)


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), time.monotonic))
