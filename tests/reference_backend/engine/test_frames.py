"""Messages over the socket, cut in any way."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from reference_backend.engine.frames import (
    Abort,
    Ask,
    Lockstep,
    Ready,
    Refused,
    Start,
    Turn,
    Unframed,
    decode_for_server,
    decode_for_worker,
    framed,
)
from reference_backend.engine.request import Delta, Load, Logprobs, Sampling

TO_WORKER = [
    Start("/models/a", [1, 2], 16, None, 5000),
    Ask(7, [1, 2, 3], Sampling(max_tokens=5, top_k=3, seed=-1, logprobs=2), 12.5, 1, "team", b"\x00"),
    Ask(8, [], Sampling(max_tokens=1), None, 0, "", b""),
    Abort(7),
    Start("/models/a", [], 16, None, None, "int8", 2, dummy=True, rank=1, meeting="/tmp/meeting", seed=1 << 63),
    Lockstep([Abort(7), Ask(8, [], Sampling(max_tokens=1), None, 0, "", b"")], 1.5, None),
]
TO_SERVER = [
    Ready(4096),
    Refused("no"),
    Turn([], Load(1, 2, 0.5)),
    Turn([(7, Delta(5, None)), (8, Delta(None, "stop", None, 3))], Load(0, 0, 0.0)),
    Turn([(7, Delta(5, "length", Logprobs(-0.5, ((5, -0.5), (6, -1.0)))))], Load(0, 0, 0.0)),
]


@pytest.mark.parametrize(
    ("message", "decode"),
    [*((each, decode_for_worker) for each in TO_WORKER), *((each, decode_for_server) for each in TO_SERVER)],
)
def test_what_is_said_is_heard(message, decode):
    [body] = Unframed().feed(framed(message))
    assert decode(body) == message


@given(cuts=st.lists(st.integers(1, 40), max_size=30))
def test_messages_arrive_whole_however_they_are_cut(cuts):
    stream, unframed, heard = b"".join(map(framed, TO_WORKER)), Unframed(), []
    for cut in (*cuts, len(stream)):
        heard += unframed.feed(stream[:cut])
        stream = stream[cut:]
    assert [decode_for_worker(body) for body in heard] == TO_WORKER
