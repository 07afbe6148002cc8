"""The worker process: an engine at the end of a socket. `python -m reference_backend.engine.service FD`.

LOADING (one `Start` comes, `Ready` or `Refused` goes) => IDLE (waits for a request) <=> BUSY (takes turns, and looks
for news between them); IDLE <=> ASLEEP when it is told. It is gone when the server closes the socket or is gone itself.
A failure of the engine ends the process: the server sees that, tells whoever was waiting, and starts another one.

A model that is shared by several ranks has as many such processes. The server talks to the first one, which talks to
the others (`crew.py`): those get a `Join` instead of a `Start`, and then a `Lockstep` for each turn.
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

from reference_backend.engine.config import ModelError
from reference_backend.engine.crew import Crew, RankGone, crew_of
from reference_backend.engine.engine import Engine, Settings
from reference_backend.engine.frames import (
    Abort,
    Ask,
    Join,
    Lockstep,
    Ping,
    Ready,
    Refused,
    Sleep,
    Start,
    Turn,
    Unframed,
    Wake,
    decode_for_worker,
    framed,
)
from reference_backend.engine.grammar import Grammars
from reference_backend.engine.graphs import Prepare, recording
from reference_backend.engine.model import Llama, load_model
from reference_backend.engine.operations import Fused
from reference_backend.engine.ranks import ALONE, Ranks, joined
from reference_backend.engine.request import Delta, Published, Sampling, Sequence

SMALL_PARAMETERS = 50_000_000  # below, a second thread costs more in waiting than it gives in arithmetic
LONGEST_CONTEXT = 8192  # tokens, unless asked for: at least one such request must fit the cache
CACHE_SHARE = 0.25  # of the memory that is free: enough for many, and others live here too
GPU_CACHE_SHARE = 0.9  # of a GPU's: what is recorded takes some, too
CPU_STEP_TOKENS = 256
GPU_STEP_TOKENS = 2048  # of which a GPU has computed about a tenth of a second, with 8 billion parameters
TIMED_CALLS = 20
READ_BYTES = 1 << 20
log = logging.getLogger(__name__)


class Line:
    """The worker's end of the socket."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._unframed = Unframed()
        self._poll = select.poll()
        self.watch(connection)

    def watch(self, connection: socket.socket) -> None:
        """Wake up for that one, too."""
        self._poll.register(connection, select.POLLIN)

    def read(self, *, wait: bool) -> list[Start | Ask | Abort | Sleep | Wake | Ping | Join | Lockstep] | None:
        """The messages that have come; None when the other end is gone. Raises RankGone."""
        ready = [descriptor for descriptor, _ in self._poll.poll(None if wait else 0)]
        if set(ready) - {self._connection.fileno()}:
            raise RankGone  # other ranks never say anything
        if not ready:
            return []
        try:
            data = self._connection.recv(READ_BYTES)
        except ConnectionError:
            data = b""
        return [decode_for_worker(body) for body in self._unframed.feed(data)] if data else None

    def send(self, message: Ready | Refused | Turn | Ping) -> bool:
        """Whether the server is still there to hear it. Waits while it does not read."""
        try:
            self._connection.sendall(framed(message))
        except ConnectionError:
            return False
        return True


class Desk:
    """The requests of an engine that are not over, by the server's tickets."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._asked: dict[int, Sequence] = {}
        self._tickets: dict[Sequence, int] = {}

    def take(self, messages: list[Ask | Abort | Sleep | Wake], now: float) -> None:
        """Hand them in, or take them back."""
        for message in messages:
            if isinstance(message, Sleep):
                while self._engine.is_busy:  # with what was just taken back
                    self._engine.turn(now)
                self._engine.sleep()
            elif isinstance(message, Wake):
                self._engine.wake()
                warm(self._engine, now)
            elif isinstance(message, Ask):
                sequence = _sequence(message)
                self._asked[message.ticket], self._tickets[sequence] = sequence, message.ticket
                self._engine.submit(sequence)
            elif (given_up := self._asked.pop(message.ticket, None)) is not None:
                del self._tickets[given_up]
                self._engine.abort(given_up)

    def told(self, published: Published) -> list[tuple[int, Delta]]:
        """What goes out, under its tickets."""
        deltas = [(self._tickets[sequence], delta) for sequence, delta in published if sequence in self._tickets]
        for sequence, delta in published:
            if delta.finish is not None and sequence in self._tickets:
                del self._asked[self._tickets.pop(sequence)]
        return deltas


def serve(engine: Engine, line: Line, clock: Callable[[], float], crew: Crew | None = None) -> int:
    """Take turns until the server is gone. Returns the exit code: 0, or 1 when the engine failed."""
    desk, took = Desk(engine), None
    try:
        while True:
            messages = line.read(wait=not engine.is_busy)
            if messages is None:
                return 0
            if Ping() in messages and not line.send(Ping()):
                return 0
            heard = [message for message in messages if isinstance(message, Ask | Abort | Sleep | Wake)]
            began = clock()
            if crew is not None:
                crew.step(heard, began, took)
            desk.take(heard, began)
            if (Sleep() in heard or Wake() in heard) and not line.send(Ready(engine.context, engine.load())):
                return 0
            took = None
            if not engine.is_busy:
                continue
            deltas = desk.told(engine.turn(began))
            took = clock() - began
            engine.took(took)
            if not line.send(Turn(deltas, engine.load())):
                return 0
    except RankGone:
        log.error("another rank is gone")  # noqa: TRY400  which one has said why
        return 1
    except Exception:  # whatever it is, nobody must wait for it any longer
        log.exception("the engine failed")
        return 1


def follow(engine: Engine, line: Line) -> int:
    """Take the turns that the first rank takes, until it is gone. Returns the exit code."""
    desk = Desk(engine)
    while (messages := line.read(wait=True)) is not None:
        for message in messages:
            assert isinstance(message, Lockstep)  # noqa: S101  nothing else is said here
            if message.took is not None:
                engine.took(message.took)
            desk.take(message.messages, message.now)
            if engine.is_busy:
                desk.told(engine.turn(message.now))
    return 0


def _sequence(ask: Ask) -> Sequence:
    return Sequence(ask.prompt, ask.sampling, ask.deadline, ask.priority, ask.tenant, ask.salt, ask.pictures)


def load(start: Start, clock: Callable[[], float], ranks: Ranks = ALONE, rng: random.Random | None = None) -> Engine:
    """Read the model and have it produce one token. Raises ModelError when it cannot be served."""
    rng = rng or random.SystemRandom()
    device = device_of(ranks.rank)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    try:
        model = load_model(Path(start.model), device, dtype, quantize=start.quantize, ranks=ranks, dummy=start.dummy)
        tokenizer = Path(start.model) / "tokenizer.json"
        engine = Engine(
            model,
            sizes(start, model, ranks),
            end_tokens=frozenset(start.end_tokens),
            rng=rng,
            overlap=device.type != "cpu",
            prepare=quickened(model),
            # Several ranks must find the same: there a grammar has bounds, but none of time.
            grammars=Grammars(
                tokenizer,
                model.config.vocab_size,
                start.end_tokens,
                time.thread_time if ranks.size == 1 else lambda: 0.0,
            )
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


def device_of(rank: int) -> torch.device:
    """Where a rank computes: a GPU of its own, if there are GPUs."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    device = torch.device("cuda", rank)
    torch.cuda.set_device(device)
    return device


def quickened(model: Llama) -> Prepare | None:
    """Choose the faster products where there is a choice, and say how steps are prepared, where they are."""
    if model.device.type != "cuda" or not isinstance(model.operations, Fused):
        return None
    with torch.inference_mode():
        model.operations.choose(model.linears, device_seconds)
    return recording()


def device_seconds(call: Callable[[], torch.Tensor]) -> float:
    """How long a call takes on the GPU: the mean of some, after some that do not count."""
    began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    for number in range(3 + TIMED_CALLS):
        if number == 3:
            began.record()
        call()
    ended.record()
    ended.synchronize()
    return began.elapsed_time(ended) / 1000 / TIMED_CALLS


def sizes(start: Start, model: Llama, ranks: Ranks) -> Settings:
    """What was asked for, within the model's context and the memory that is there, the same on all ranks."""
    context = min(start.context or LONGEST_CONTEXT, model.config.context)
    step_tokens = GPU_STEP_TOKENS if model.device.type == "cuda" else CPU_STEP_TOKENS
    fitting = cache_bytes(model, step_tokens, start.slots) // bytes_per_token(model)
    cache_tokens = start.cache_tokens or min(start.slots * context, ranks.least(fitting, model.device))
    return Settings(slots=start.slots, context=context, cache_tokens=cache_tokens, step_tokens=step_tokens)


def cache_bytes(model: Llama, step_tokens: int, slots: int) -> int:
    """What keys and values may take. On a GPU, which is ours alone: nearly all that the largest step leaves."""
    if model.device.type == "cpu":
        return int(CACHE_SHARE * free_memory(model.device))
    before = torch.cuda.memory_allocated(model.device)
    torch.cuda.reset_peak_memory_stats(model.device)
    take_largest_step(model, step_tokens, slots)
    working = torch.cuda.max_memory_allocated(model.device) - before
    torch.cuda.empty_cache()
    return int(GPU_CACHE_SHARE * free_memory(model.device)) - working


@torch.inference_mode()
def take_largest_step(model: Llama, tokens: int, slots: int) -> None:
    """All that a step computes, but for attention, which takes no more memory than what is beside it."""
    ids = torch.zeros(tokens, dtype=torch.int64, device=model.device)
    hidden = model.hidden(ids, ids, lambda _layer, qkv, _gains, rotary: qkv[:, : rotary.heads].flatten(1))
    model.logits(hidden[:slots])


def free_memory(device: torch.device) -> int:
    """Bytes that are free where the cache will be."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def bytes_per_token(model: Llama) -> int:
    """What the keys and values of one token take in all layers of this rank."""
    return 2 * model.config.layers * model.kv_heads * model.config.head_dim * model.dtype.itemsize


def warm(engine: Engine, now: float) -> None:
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
        if messages and isinstance(messages[0], Join):
            return join(messages[0], line, clock)
        if messages and isinstance(messages[0], Start):
            return lead(messages[0], line, clock)
        return 0


def lead(start: Start, line: Line, clock: Callable[[], float]) -> int:
    """The process that the server talks to."""
    with crew_of(start.ranks) as crew:
        try:
            engine = load(start, clock) if crew.meeting is None else load_shared(start, crew, line, clock)
        except ModelError as error:
            line.send(Refused(str(error)))
            return 3
        line.send(Ready(engine.context, engine.load()))
        return serve(engine, line, clock, crew)


def load_shared(start: Start, crew: Crew, line: Line, clock: Callable[[], float]) -> Engine:
    """Have all ranks load, and this one, too. Raises ModelError."""
    assert crew.meeting is not None  # noqa: S101  for the type checker
    seed = random.SystemRandom().getrandbits(64)
    try:
        crew.join(start, seed)
        ranks = joined(0, crew.size, crew.meeting, device_of(0))
        engine = load(start, clock, ranks, random.Random(seed))  # noqa: S311  not for secrets
    except (RankGone, RuntimeError) as error:
        raise ModelError(f"not all ranks came up: {error}") from error
    for each in crew.sockets:
        line.watch(each)
    return engine


def join(message: Join, line: Line, clock: Callable[[], float]) -> int:
    """The process of another rank than the first."""
    try:
        ranks = joined(message.rank, message.start.ranks, Path(message.meeting), device_of(message.rank))
        engine = load(message.start, clock, ranks, random.Random(message.seed))  # noqa: S311  not for secrets
    except ModelError as error:
        log.error("rank %d cannot load the model: %s", message.rank, error)  # noqa: TRY400  the message says it
        return 3
    return follow(engine, line)


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), time.monotonic))
