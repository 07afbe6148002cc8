"""Server-sent events as a browser reads them (WHATWG HTML, 9.2.6), from a whole stream: plain and slow, for comparison."""

import re
from typing import NamedTuple


class Event(NamedTuple):
    """What a reader is handed."""

    type: str
    data: str
    id: str = ""


def events_of(stream: bytes) -> list[Event]:
    """The events that have ended in this stream; what has not is none."""
    events: list[Event] = []
    kind = data = last_id = ""
    for line in re.split(r"\r\n|\n|\r", stream.decode("utf-8", "replace").removeprefix("\ufeff"))[:-1]:
        name, _, value = line.partition(":")
        value = value.removeprefix(" ")
        if not line:
            if data:
                events.append(Event(kind or "message", data.removesuffix("\n"), last_id))
            kind = data = ""
        elif name == "event":
            kind = value
        elif name == "data":
            data += value + "\n"
        elif name == "id" and "\0" not in value:
            last_id = value
    return events
