"""The worker's end of the socket, in a thread; and what it refuses to load."""

import contextlib
import json
import re
import socket
import threading
import time
from multiprocessing.connection import Connection, Pipe
from pathlib import Path

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed (pip install 'weir[backend]')")
from safetensors.torch import load_file, save_file  # noqa: E402

from reference_backend.engine import service  # noqa: E402
from reference_backend.engine.config import ModelError  # noqa: E402
from reference_backend.engine.frames import (  # noqa: E402
    Abort,
    Ask,
    Ping,
    Ready,
    Sleep,
    Start,
    Unframed,
    Wake,
    decode_for_server,
    encode,
    framed,
)
from reference_backend.engine.model import Llama  # noqa: E402
from reference_backend.engine.operations import Plain  # noqa: E402
from reference_backend.engine.ranks import ALONE  # noqa: E402
from reference_backend.engine.request import Sampling  # noqa: E402
from reference_backend.engine.service import Line, load, serve  # noqa: E402
from tests.support.integrity import faults  # noqa: E402
from tests.support.tiny_model import DIRECTORY, tiny, tiny_engine  # noqa: E402

GOLDEN = Path(__file__).parent.parent / "golden"


def ask(ticket, *, max_tokens=3, deadline=None):
    return Ask(
        ticket, [5, 9, 2], Sampling(max_tokens=max_tokens, temperature=0.0, ignore_eos=True), deadline, 1, "", b""
    )


class Server:
    """The other end: says and hears messages one by one."""

    def __init__(self, connection):
        self.connection = connection
        self.unframed = Unframed()
        self.heard = []

    def say(self, *messages):
        self.connection.sendall(b"".join(map(framed, messages)))

    def turn(self):
        while not self.heard:
            self.heard = [decode_for_server(body) for body in self.unframed.feed(self.connection.recv(1 << 16))]
        return self.heard.pop(0)

    def deltas_until(self, ticket):
        """All deltas up to the end of this one."""
        deltas = []
        while not any(each == ticket and delta.finish for each, delta in deltas):
            deltas += self.turn().deltas
        return deltas


@contextlib.contextmanager
def serving(expected=0, **sizes):
    engine, codes = tiny_engine(**sizes), []
    ours, theirs = socket.socketpair()
    ours.settimeout(20)
    thread = threading.Thread(target=lambda: codes.append(run(engine, theirs)))
    thread.start()
    with ours:
        yield Server(ours), engine
    thread.join()
    assert codes == [expected]
    assert faults(engine.scheduler) == []


def run(engine, connection):
    with Connection(connection.detach()) as end:
        return serve(engine, Line(end), time.monotonic)


def test_requests_are_answered_turn_by_turn():
    with serving() as (server, _):
        server.say(ask(1), ask(2, max_tokens=5))
        deltas = server.deltas_until(2)
        assert [delta.finish for ticket, delta in deltas if ticket == 1] == [None, None, "length"]
        assert [delta.finish for ticket, delta in deltas if ticket == 2] == [None, None, None, None, "length"]
        server.say(ask(3, max_tokens=1))
        assert [ticket for ticket, _ in server.deltas_until(3)] == [3]


def test_an_answer_keeps_to_the_grammar_that_is_asked_for():
    wanted = 'start: "A" ("x"|"yz")* "!"'
    with serving() as (server, _):
        server.say(Ask(1, [5, 9, 2], Sampling(max_tokens=64, seed=4, grammar=wanted), None, 1, "", b""))
        deltas = server.deltas_until(1)
    text = tiny()[1].decode([delta.token for _, delta in deltas if delta.token is not None])
    assert re.fullmatch("A(x|yz)*!", text)
    assert deltas[-1][1].finish == "stop"


def test_what_was_given_up_is_not_heard_of_again():
    with serving() as (server, engine):
        server.say(ask(1, max_tokens=500))
        while not server.turn().deltas:
            pass
        server.say(Abort(1), Abort(1), Abort(77), ask(2))
        deltas = server.deltas_until(2)
        assert [delta.finish for ticket, delta in deltas if ticket == 2] == [None, None, "length"]
        told = [ticket for ticket, _ in deltas]
        assert 1 not in told[told.index(2) :]  # whoever answers the second has heard of the end of the first
        assert engine.scheduler.pool.held == 0


def test_what_is_too_late_is_told():
    with serving() as (server, _):
        server.say(ask(1, deadline=time.monotonic() - 1))
        [(ticket, delta)] = server.deltas_until(1)
        assert (ticket, delta.token, delta.finish) == (1, None, "deadline")


def test_it_gives_a_sign_when_it_is_asked_busy_or_not():
    with serving() as (server, _):
        server.say(Ping())
        assert server.turn() == Ping()
        server.say(ask(1, max_tokens=400), Ping())
        assert server.turn() == Ping()
        assert server.turn().deltas


def test_it_sleeps_and_wakes_and_says_the_same():
    with serving() as (server, engine):
        server.say(ask(1), ask(2, max_tokens=400))
        first = [delta for ticket, delta in server.deltas_until(1) if ticket == 1]
        size = engine.runner.cache_bytes
        server.say(Abort(2), Sleep())
        while not isinstance(told := server.turn(), Ready):
            pass
        assert (engine.runner.cache_bytes, told.load.running, told.load.cached_blocks) == (0, 0, 0)
        server.say(Ping())
        assert server.turn() == Ping()
        generated = told.load.generated_tokens
        server.say(Wake())
        told = server.turn()
        assert (engine.runner.cache_bytes, told.load.generated_tokens) == (size, generated + 1)  # a real token
        server.say(ask(3))
        assert [delta for _, delta in server.deltas_until(3)] == first


def test_it_ends_when_the_server_is_gone_busy_or_not():
    with serving():
        pass
    with serving() as (server, _):
        server.say(ask(1, max_tokens=400))
        server.turn()


def test_an_engine_that_fails_ends_it(monkeypatch):
    with serving(expected=1) as (server, engine):
        monkeypatch.setattr(engine.runner, "model", None)
        server.say(ask(1))
        assert server.connection.recv(1) == b""


def start(model, **sizes):
    return Start(str(model), [], **({"slots": 2, "context": None, "cache_tokens": None} | sizes))


def test_a_model_is_loaded_and_has_spoken():
    engine = load(start(DIRECTORY, context=100_000), time.monotonic)
    assert engine.settings.context == engine.runner.model.config.context == 2048
    assert engine.settings.cache_tokens == 2 * 2048
    assert not engine.is_busy
    assert load(start(DIRECTORY, context=64, cache_tokens=640), time.monotonic).settings.cache_tokens == 640


def test_the_cache_takes_its_share_of_a_small_memory(monkeypatch):
    monkeypatch.setattr(service, "free_memory", lambda _device: 1 << 20)
    engine = load(start(DIRECTORY, slots=16), time.monotonic)
    assert engine.settings.cache_tokens == (1 << 18) // (2 * 4 * 2 * 32 * 4)
    assert engine.settings.blocks * 16 > engine.settings.context  # one request fits whatever the memory


def test_the_largest_step_is_a_whole_one():
    """What a GPU's memory is measured with before the cache gets the rest; there is none to measure here."""
    model, _ = tiny()
    asked = []

    class Counting(Plain):
        def linear(self, x, linear):
            asked.append(tuple(x.shape))
            return super().linear(x, linear)

    weights, counting = load_file(DIRECTORY / "model.safetensors"), Counting(model.config, model.device, ALONE)
    service.take_largest_step(Llama(model.config, weights, model.device, model.dtype, operations=counting), 50, 3)
    width = model.config.hidden_size
    assert asked == [*[(50, width)] * 2 * model.config.layers, (3, width)]


def test_nothing_is_prepared_without_a_gpu():
    assert service.quickened(tiny()[0]) is None


def broken(tmp_path, change):
    weights = load_file(GOLDEN / "llama" / "model.safetensors")
    change(weights)
    save_file(weights, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_bytes((GOLDEN / "llama" / "config.json").read_bytes())
    return tmp_path


def test_weights_that_are_no_numbers_are_refused(tmp_path):
    directory = broken(tmp_path, lambda weights: weights["model.norm.weight"].fill_(torch.nan))
    with pytest.raises(ModelError, match="scores are not finite: its weights are broken"):
        load(start(directory), time.monotonic)


@pytest.mark.parametrize(
    ("sizes", "config"),
    [({"slots": 10**12}, {}), ({"cache_tokens": 10**15}, {}), ({}, {"max_position_embeddings": 10**15})],
)
def test_what_does_not_fit_the_memory_is_refused_in_one_line(tmp_path, sizes, config):
    directory = broken(tmp_path, lambda _weights: None)
    settings = json.loads((directory / "config.json").read_text()) | config
    (directory / "config.json").write_text(json.dumps(settings))
    with pytest.raises(ModelError) as refusal:
        load(start(directory, **sizes), time.monotonic)
    assert str(refusal.value).startswith("the model does not fit: ")
    assert "\n" not in str(refusal.value)


def test_what_was_said_before_the_end_is_heard():
    theirs, ours = Pipe()
    for message in (ask(1), Abort(1)):
        theirs.send_bytes(encode(message))
    theirs.close()
    line = Line(ours)
    assert line.read(wait=True) == [ask(1), Abort(1)]
    assert line.read(wait=True) is None
