"""What is written in a turn of the event loop leaves at its end, in order; what is large or many does not wait."""

from __future__ import annotations

import asyncio

from gateway.outbox import DIRECT, FEW, HELD_BYTES, MOST_HELD, Outbox, outbox_of


class Transport:
    """Notes what it is given, in one list that several share."""

    def __init__(self, name: str, sent: list[tuple[str, bytes]]) -> None:
        self.name = name
        self.sent = sent
        self.is_closed = False

    def is_closing(self) -> bool:
        return self.is_closed

    def write(self, data: bytes) -> None:
        self.sent.append((self.name, data))


class Turn:
    """The end of a turn of the event loop, when the test says so."""

    def __init__(self) -> None:
        self.callbacks = []

    def call_soon(self, callback) -> None:
        self.callbacks.append(callback)

    def end(self) -> None:
        callbacks, self.callbacks = self.callbacks, []
        for callback in callbacks:
            callback()


def outbox_and_transports():
    turn, sent = Turn(), []
    return Outbox(turn), turn, sent, Transport("a", sent), Transport("b", sent)


def test_writes_leave_together_and_in_order_when_the_turn_ends():
    outbox, turn, sent, a, b = outbox_and_transports()
    outbox.write(a, b"1")
    outbox.write(b, b"2")
    outbox.write(a, b"3")
    assert sent == []
    assert len(turn.callbacks) == 1
    turn.end()
    assert sent == [("a", b"1"), ("b", b"2"), ("a", b"3")]


def test_each_busy_turn_has_an_end_of_its_own():
    outbox, turn, sent, a, _ = outbox_and_transports()
    for number in range(1, 4):
        for _ in range(FEW + 1):
            outbox.write(a, b"x")
        assert len(sent) == (number - 1) * (FEW + 1)
        turn.end()
        assert len(sent) == number * (FEW + 1)


def test_after_a_turn_with_little_to_write_nothing_is_held_for_a_while():
    outbox, turn, sent, a, b = outbox_and_transports()
    for _ in range(FEW):
        outbox.write(a, b"x")
    turn.end()
    sent.clear()
    for number in range(1, DIRECT + 1):
        outbox.write(b, b"y")
        assert len(sent) == number
    outbox.write(b, b"z")  # and then it is looked at anew
    assert len(sent) == DIRECT
    turn.end()
    assert sent[-1] == ("b", b"z")


def test_many_writes_do_not_wait_for_the_end():
    outbox, turn, sent, a, _ = outbox_and_transports()
    for _ in range(MOST_HELD + 1):
        outbox.write(a, b"x")
    assert len(sent) == MOST_HELD
    turn.end()
    assert len(sent) == MOST_HELD + 1


def test_a_large_write_leaves_at_once_behind_what_was_held():
    outbox, _, sent, a, _ = outbox_and_transports()
    outbox.write(a, b"small")
    outbox.write(a, large := b"x" * (HELD_BYTES + 1))
    assert sent == [("a", b"small"), ("a", large)]


def test_what_closes_meanwhile_gets_nothing():
    outbox, turn, sent, a, b = outbox_and_transports()
    outbox.write(a, b"1")
    outbox.write(b, b"2")
    a.is_closed = True
    turn.end()
    assert sent == [("b", b"2")]


def test_what_is_closing_gets_nothing_where_nothing_is_held_either():
    outbox, turn, sent, a, b = outbox_and_transports()
    outbox.write(a, b"1")
    turn.end()
    sent.clear()
    b.is_closed = True  # reset by its peer, and not yet told: uvloop would raise
    outbox.write(b, b"2")
    outbox.write(b, b"x" * (HELD_BYTES + 1))
    assert sent == []


async def test_an_event_loop_has_one():
    loop = asyncio.get_running_loop()
    assert outbox_of(loop) is outbox_of(loop)
    assert outbox_of(Turn()) is not outbox_of(loop)
