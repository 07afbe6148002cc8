"""Numbers as operators write them: `250ms`, `32KiB`, `60/minute`, `40k`, `5%`.

Text in, number out; what is not exactly of the form raises ValueError with the whole sentence. Nothing is guessed:
`010`, `1e3`, `1_000` and `1:30` are refused, because readers of YAML do not agree on what number they are.
"""

from __future__ import annotations

import re
from decimal import Decimal

from policies.policy import Rate
from policies.problems import did_you_mean, shown

# At most 12 digits: what is larger is a slip, and every result is exact as a float.
NUMBER = r"(?:0|[1-9][0-9]{0,11})(?:\.[0-9]{1,6})?"

PERIODS = {"second": 1.0, "minute": 60.0, "hour": 3600.0, "day": 86_400.0, "month": 30 * 86_400.0}  # a month: 30 days
LONGEST_SECONDS = 366 * 86_400.0

_TIMES = {"ms": Decimal("0.001"), "s": Decimal(1), "m": Decimal(60), "h": Decimal(3600)}
_SIZES = {
    "": 1, "B": 1,
    "KB": 10**3, "kB": 10**3, "MB": 10**6, "GB": 10**9,
    "KiB": 2**10, "MiB": 2**20, "GiB": 2**30,
}  # fmt: skip
_MULTIPLES = {"": 1, "k": 10**3, "M": 10**6}

_DURATION = re.compile(rf"({NUMBER})(ms|s|m|h)")
_SIZE = re.compile(rf"({NUMBER})({'|'.join(_SIZES)})")
_RATE = re.compile(rf"({NUMBER})([kM]?)/([a-z]+)")
_COUNT = re.compile(rf"({NUMBER})([kM]?)")
_SHARE = re.compile(rf"({NUMBER})(%?)")


def parse_duration(text: str) -> float:
    """Return seconds, more than none."""
    match = _DURATION.fullmatch(text)
    if match is None:
        raise ValueError(f"{shown(text)} is not a duration: expected one such as `250ms`, `10s`, `5m` or `1h`")
    seconds = float(Decimal(match[1]) * _TIMES[match[2]])
    if not 0 < seconds <= LONGEST_SECONDS:
        raise ValueError(f"{shown(text)} must be more than 0 and at most a year")
    return seconds


def parse_size(text: str) -> int:
    """Return bytes."""
    match = _SIZE.fullmatch(text)
    if match is None:
        raise ValueError(f"{shown(text)} is not a size: expected one such as `32KiB`, `1MB` or a number of bytes")
    return _whole(Decimal(match[1]) * _SIZES[match[2]], text)


def parse_rate(text: str) -> Rate:
    """Return `N/second|minute|hour|day|month`, more than none."""
    match = _RATE.fullmatch(text)
    if match is None:
        raise ValueError(f"{shown(text)} is not a rate: expected one such as `60/minute` or `40k/hour`")
    if match[3] not in PERIODS:
        hint = did_you_mean(match[3], PERIODS) or f": expected {', '.join(PERIODS)}"
        raise ValueError(f"{shown(text)} has the unknown period {shown(match[3])}{hint}")
    count = Decimal(match[1]) * _MULTIPLES[match[2]]
    if not count:
        raise ValueError(f"{shown(text)} allows nothing: a rate must be more than 0")
    return Rate(float(count), PERIODS[match[3]])


def parse_count(text: str) -> int:
    """Return a whole number, 0 or more."""
    match = _COUNT.fullmatch(text)
    if match is None:
        raise ValueError(f"{shown(text)} is not a number: expected one such as `100`, `40k` or `2M`")
    return _whole(Decimal(match[1]) * _MULTIPLES[match[2]], text)


def parse_share(text: str) -> float:
    """Return a fraction from 0 to 1 of `5%` or `0.05`. A bare `1` could mean either end, and is refused."""
    match = _SHARE.fullmatch(text)
    if match is None:
        raise ValueError(f"{shown(text)} is not a share: expected one such as `5%`")
    number = Decimal(match[1])
    if not match[2] and number and "." not in match[1]:
        choice = "`1%` or `100%`" if number == 1 else shown(text + "%")
        raise ValueError(f"{shown(text)} is not a share: write {choice} if that is meant")
    share = float(number / 100 if match[2] else number)
    if share > 1:
        raise ValueError(f"{shown(text)} is more than 100%")
    return share


def parse_flag(text: str) -> bool:
    """Return what `true` or `false` says."""
    if text not in ("true", "false"):
        raise ValueError(f"{shown(text)} is neither `true` nor `false`")
    return text == "true"


def _whole(number: Decimal, text: str) -> int:
    if number != int(number):
        raise ValueError(f"{shown(text)} is not a whole number")
    return int(number)
