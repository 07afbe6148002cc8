"""Seconds as the text of milliseconds with three digits, as headers and log lines have them: many in each request.

Most are below 4 ms, and formatting a float costs ten times what looking one of so many texts up does.
"""

from __future__ import annotations

from typing import Final

THREE_DIGITS: Final = [b"%03d" % number for number in range(1000)]
_TEXTS: Final = [b"%d.%03d" % divmod(micros, 1000) for micros in range(4096)]


def millis(seconds: float) -> bytes:
    """`seconds` are not negative."""
    micros = int(seconds * 1e6 + 0.5)
    if micros < 4096:
        return _TEXTS[micros]
    return b"%d.%b" % (micros // 1000, THREE_DIGITS[micros % 1000])
