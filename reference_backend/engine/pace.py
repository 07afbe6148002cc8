"""How much of a prompt a step may read without holding up those who generate, and how many may generate beside one.

A step costs so much for those who generate, and so much more for each token of a prompt. Both are learnt from the
steps that were taken, as averages in which a new step counts a fifth. While somebody generates, a step reads as many
tokens of prompts as keep it under the target; never fewer than LEAST, so that prompts end. And it begins no other
prompt when what it reads takes as long as the rest of it: then little is won by taking prompts together.

What each more who generates costs is the difference between the smallest and the largest of the steps that read
nothing, spread over the difference in their numbers. There the shortest of late counts, not the average: what makes
steps longer that are alike is other work on the machine.
"""

from __future__ import annotations

from typing import NamedTuple

LEAST = 16  # tokens: below, a step is hardly cheaper
NEW = 0.2  # what a new step counts in the average
FADE = 0.001  # by which a shortest step is forgotten with each one like it
STRETCH = 0.15  # of a step: what those who are in a hurry hardly feel


class Readable(NamedTuple):
    """How much a step reads of prompts: tokens at most, and tokens after which no other prompt is begun."""

    most: int
    enough: int


class Beside(NamedTuple):
    """What there is room for in a step beside those who are not to be held up.

    So many may generate (None: any number), and so many tokens of prompts may be read.
    """

    generating: int | None
    reading: int


NOTHING_KNOWN = Beside(1, 0)


class Pace:
    """Seconds of steps, and what follows for the next one."""

    def __init__(self, target_seconds: float) -> None:
        self.target_seconds = target_seconds
        self._generating: float | None = None  # seconds of a step that reads nothing
        self._each_read: float | None = None  # seconds for each token read beside that
        self.slot_seconds = 0.0  # between two requests that get a slot while others wait; 0.0 while nobody had to wait
        self._given_at: float | None = None  # when one did, if somebody has been waiting since then
        self._shortest: dict[int, float] = {}  # seconds of a step that reads nothing, by how many generate in it

    def __repr__(self) -> str:
        return f"<Pace {self._generating} s a step, {self._each_read} s for each token read>"

    @property
    def step_seconds(self) -> float:
        """A step that reads nothing; 0.0 while there was none."""
        return self._generating or 0.0

    @property
    def reading_rate(self) -> float:
        """Tokens of prompts a second; 0.0 while none were read."""
        return 1.0 / self._each_read if self._each_read else 0.0

    def gave_slots(self, now: float, count: int, waiting: int) -> None:
        """So many requests got a slot, and so many more wait for one."""
        if count and self._given_at is not None:
            seconds = (now - self._given_at) / count
            self.slot_seconds = _mixed(self.slot_seconds or None, seconds)
        if not waiting:
            self._given_at = None
        elif count:
            self._given_at = now

    def longest_step_seconds(self, tokens: int) -> float:
        """A step that reads so many tokens; 0.0 while none was read."""
        return self.step_seconds + tokens * self._each_read if self._each_read else 0.0

    def took(self, seconds: float, read: int, generating: int) -> None:
        """A step is over that read so many tokens of prompts, and in which so many generated."""
        if read:
            self._each_read = _mixed(self._each_read, max(0.0, seconds - (self._generating or 0.0)) / read)
        elif generating:
            self._generating = _mixed(self._generating, seconds)
            self._shortest[generating] = min(seconds, (1 + FADE) * self._shortest.get(generating, seconds))

    def readable(self) -> Readable | None:
        """What fits the next step beside those who generate; None while nothing is known."""
        if not self._each_read:
            return None
        left = self.target_seconds - self.step_seconds
        return Readable(max(LEAST, int(left / self._each_read)), max(LEAST, int(self.step_seconds / self._each_read)))

    def beside(self) -> Beside:
        """What makes a step of few longer by STRETCH at most, generating and reading each."""
        if len(self._shortest) < 2:
            return NOTHING_KNOWN
        few, many = min(self._shortest), max(self._shortest)
        room = STRETCH * self._shortest[few]
        each = (self._shortest[many] - self._shortest[few]) / (many - few)
        reading = int(room / self._each_read) if self._each_read else 0
        return Beside(max(1, int(room / each)) if each > 0 else None, reading if reading >= LEAST else 0)


class Ahead(NamedTuple):
    """What goes before a request that comes now, whoever else waits."""

    requests: int  # that must get a slot, it included; 0 when there is one for it
    tokens: int  # of prompts to be read, without its own
    own_tokens: int


def predicted_reading_end(now: float, ahead: Ahead, reading_rate: float, slot_seconds: float) -> float:
    """When the prompt of a request will have been read, at the earliest that can be expected.

    Prompts are read with so many tokens a second, and there is a slot for another request each so many seconds; what
    is not known yet is 0.0, and takes no time.
    """
    if not reading_rate:
        return now + ahead.requests * slot_seconds
    return now + max(ahead.requests * slot_seconds, ahead.tokens / reading_rate) + ahead.own_tokens / reading_rate


def _mixed(average: float | None, new: float) -> float:
    return new if average is None else average + NEW * (new - average)
