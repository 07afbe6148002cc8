"""What may be shown of a string that came from outside: short, printable, and encodable everywhere.

One lone surrogate breaks a scrape, a span batch and a log line alike; an escape sequence in a log owns the terminal
that shows it. So whatever leaves the process as telemetry has passed through here once.
"""

from __future__ import annotations

LONGEST = 256


def printable(text: str, limit: int = LONGEST) -> str:
    r"""Cut `text` to `limit` characters; what is not printable (controls, lone surrogates, U+202E) reads as `\x1b`."""
    text = text[:limit]
    if text.isprintable():
        return text
    return "".join(char if char.isprintable() else ascii(char)[1:-1] for char in text)


def bounded(value: object) -> object:
    """A value that may stand in a line: strings cut and made printable, lists cut."""
    if isinstance(value, str):
        return printable(value)
    if isinstance(value, (list, tuple)):
        return [bounded(item) for item in value[:64]]
    return value
