"""The worker process: an engine at the end of a socket. `python -m reference_backend.engine.service FD`.

LOADING (one `Start` comes, `Ready` or `Refused` goes) => IDLE (waits for a request) <=> BUSY (takes turns, and looks
for news between them); IDLE <=> ASLEEP when it is told. It is gone when the server closes the socket or is gone itself.
A failure of the engine ends the process: the server sees that, tells whoever was waiting, and starts another one.

A model that is shared by several ranks has as many such processes. The server talks to the first one, which talks to
the others (`crew.py`): those hear a `Start` of their own, and then a `Lockstep` for each turn.
"""

from __future__ import annotations

import contextlib
import logging
import os
import random
import select
import signal
import sys
import time
from collections.abc import Callable, Iterable
from multiprocessing.connection import Connection
from pathlib import Path

import torch

from reference_backend.engine import frames
from reference_backend.engine.config import ModelError, read_config
from reference_backend.engine.crew import crew_of
from reference_backend.engine.engine import Engine, Settings
from reference_backend.engine.frames import Lockstep, Ready, Start, Told
from reference_backend.engine.grammar import Grammars
from reference_backend.engine.graphs import Prepare, recording
from reference_backend.engine.model import Llama, load_model, parameters
from reference_backend.engine.operations import Fused
from reference_backend.engine.ranks import ALONE, Ranks, joined
from reference_backend.engine.request import Delta, Sampling, Sequence

SMALL_PARAMETERS = 50_000_000  # below, a second thread costs more in waiting than it gives in arithmetic
LONGEST_CONTEXT = 8192  # tokens, unless asked for: at least one such request must fit the cache
CACHE_SHARE = 0.25  # of the memory that is free: enough for many, and others live here too
GPU_CACHE_SHARE = 0.9  # of a GPU's: what is recorded takes some, too
CPU_STEP_TOKENS = 256
GPU_STEP_TOKENS = 2048  # of which a GPU has computed about a tenth of a second, with 8 billion parameters
TIMED_CALLS = 20
log = logging.getLogger(__name__)


class RankGone(Exception):  # noqa: N818  what has happened, in a word
    """Another rank of this worker has ended."""


class Line:
    """The worker's end of the socket. `others` lead to other ranks, who never say anything, but may end."""

    def __init__(self, connection: Connection, others: Iterable[Connection] = ()) -> None:
        self._connection, self._others = connection, others
        self._poll = select.poll()
        for each in (connection, *others):
            self._poll.register(each, select.POLLIN)

    def read(self, *, wait: bool) -> list[Start | Told | frames.Ping | Lockstep] | None:
        """The messages that have come; None when the other end is gone. Raises RankGone."""
        messages: list[Start | Told | frames.Ping | Lockstep] = []
        while ready := self._poll.poll(None if wait and not messages else 0):
            if any(descriptor != self._connection.fileno() for descriptor, _ in ready):
                raise RankGone
            try:
                messages.append(frames.decode_for_worker(self._connection.recv_bytes()))
            except (EOFError, OSError):
                return messages or None  # what was said before counts
        return messages

    def send(self, message: Ready | frames.Refused | frames.Turn | frames.Ping) -> None:
        """Say something. Harmless when the server is gone; waits while it does not read."""
        with contextlib.suppress(ConnectionError):
            self._connection.send_bytes(frames.encode(message))

    def pass_on(self, step: Lockstep) -> None:
        """Have the other ranks take the turn that this one takes. Raises RankGone."""
        for each in self._others:
            try:
                each.send_bytes(frames.encode(step))
            except ConnectionError as error:
                raise RankGone from error


class Desk:
    """What an engine is told and tells, by the server's tickets."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._asked: dict[int, Sequence] = {}  # those that are not over

    def step(self, step: Lockstep) -> list[tuple[int, Delta]] | None:
        """Hand in what has come, and take a turn. What came of it; None when there was none to take."""
        for message in step.messages:
            self._take(message, step.now)
        if not self._engine.is_busy:
            return None
        published = self._engine.turn(step.now)
        for sequence, delta in published:
            if delta.finish is not None:
                del self._asked[sequence.ticket]
        return [(sequence.ticket, delta) for sequence, delta in published]

    def _take(self, message: Told, now: float) -> None:
        if isinstance(message, frames.Ask):
            ask = message
            sequence = Sequence(
                ask.prompt, ask.sampling, ask.deadline, ask.priority, ask.tenant, ask.salt, ask.pictures, ask.ticket
            )
            self._asked[ask.ticket] = sequence
            self._engine.submit(sequence)
        elif isinstance(message, frames.Abort):
            if (given_up := self._asked.pop(message.ticket, None)) is not None:
                self._engine.abort(given_up)
        elif isinstance(message, frames.Sleep):
            self._engine.sleep()
        else:
            self._engine.wake()
            warm(self._engine, now)


def serve(engine: Engine, line: Line, clock: Callable[[], float]) -> int:
    """Take turns until the server is gone. Returns the exit code: 0, or 1 when the engine failed."""
    desk, took = Desk(engine), None
    try:
        while (messages := line.read(wait=not engine.is_busy)) is not None:
            if frames.Ping() in messages:
                line.send(frames.Ping())
            step = Lockstep([each for each in messages if isinstance(each, Told)], clock(), took)
            line.pass_on(step)
            deltas = desk.step(step)
            if frames.Sleep() in messages or frames.Wake() in messages:
                line.send(Ready(engine.settings.context, engine.load()))
            took = None
            if deltas is not None:
                took = clock() - step.now
                engine.took(took)
                line.send(frames.Turn(deltas, engine.load()))
    except RankGone:
        log.error("another rank is gone")  # noqa: TRY400  which one has said why
        return 1
    except Exception:  # whatever it is, nobody must wait for it any longer
        log.exception("the engine failed")
        return 1
    return 0


def follow(engine: Engine, line: Line) -> int:
    """Take the turns that the first rank takes, until it is gone. Returns the exit code."""
    desk = Desk(engine)
    while (steps := line.read(wait=True)) is not None:
        for step in steps:
            assert isinstance(step, Lockstep)  # noqa: S101  nothing else is said here
            if step.took is not None:
                engine.took(step.took)
            desk.step(step)
    return 0


def load(start: Start, clock: Callable[[], float]) -> Engine:
    """Read the model and have it produce one token. Raises ModelError when it cannot be served."""
    device = device_of(start.rank)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    tokenizer = Path(start.model) / "tokenizer.json"
    if parameters(read_config(Path(start.model))) < SMALL_PARAMETERS:
        torch.set_num_threads(1)
    try:
        ranks = ALONE if start.ranks == 1 else joined(start.rank, start.ranks, Path(start.meeting), device)
        model = load_model(Path(start.model), device, dtype, quantize=start.quantize, ranks=ranks, dummy=start.dummy)
        # Several ranks must find the same: there a grammar has bounds, but none of time.
        grammar_clock = time.thread_time if ranks.size == 1 else lambda: 0.0
        engine = Engine(
            model,
            sizes(start, model, ranks),
            end_tokens=frozenset(start.end_tokens),
            rng=random.Random(start.seed),  # noqa: S311  not for secrets
            overlap=device.type != "cpu",
            prepare=quickened(model),
            grammars=Grammars(tokenizer, model.config.vocab_size, start.end_tokens, grammar_clock)
            if tokenizer.exists()
            else None,
        )
        warm(engine, clock())
    except (RuntimeError, MemoryError) as error:  # torch says the former when memory is not enough
        reason = str(error).partition("\n")[0]
        if start.ranks > 1:
            raise ModelError(f"not all ranks came up, or the model does not fit: {reason}") from error
        raise ModelError(f"the model does not fit: {reason}; try a smaller --context or --max-running") from error
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
    with Connection(descriptor) as connection:
        try:
            start = frames.decode_for_worker(connection.recv_bytes())
        except EOFError:
            return 0
        assert isinstance(start, Start)  # noqa: S101  nothing else is said first
        with crew_of(start) as (start, others):
            line = Line(connection, others)
            try:
                engine = load(start, clock)
            except ModelError as error:
                if start.rank:
                    log.error("rank %d cannot load the model: %s", start.rank, error)  # noqa: TRY400  the message says it
                else:
                    line.send(frames.Refused(str(error)))
                return 3
            if start.rank:
                return follow(engine, line)
            line.send(Ready(engine.settings.context, engine.load()))
            return serve(engine, line, clock)


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), time.monotonic))
