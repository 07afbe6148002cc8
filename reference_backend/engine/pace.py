"""How much of a prompt a step may read without holding up those who generate.

A step costs so much for those who generate, and so much more for each token of a prompt. Both are learnt from the
steps that were taken, as averages in which a new step counts a fifth. While somebody generates, a step reads as many
tokens of prompts as keep it under the target; never fewer than LEAST, so that prompts end.
"""

from __future__ import annotations

LEAST = 16  # tokens: below, a step is hardly cheaper
NEW = 0.2  # what a new step counts in the average


class Pace:
    """Seconds of steps, and what follows for the next one."""

    def __init__(self, target_seconds: float) -> None:
        self.target_seconds = target_seconds
        self._generating: float | None = None  # seconds of a step that reads nothing
        self._each_read: float | None = None  # seconds for each token read beside that

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

    def took(self, seconds: float, read: int) -> None:
        """A step is over that read so many tokens of prompts."""
        if not read:
            self._generating = _mixed(self._generating, seconds)
        else:
            self._each_read = _mixed(self._each_read, max(0.0, seconds - (self._generating or 0.0)) / read)

    def readable(self) -> int | None:
        """Tokens of prompts that fit the next step beside those who generate; None while nothing is known."""
        if not self._each_read:
            return None
        left = self.target_seconds - (self._generating or 0.0)
        return max(LEAST, int(left / self._each_read))


def _mixed(average: float | None, new: float) -> float:
    return new if average is None else average + NEW * (new - average)
