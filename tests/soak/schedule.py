"""What goes wrong and when: a plan drawn from a seed. Pure: the same dice give the same plan.

Things that can break stand in lanes. In one lane one fault follows the other, with a pause between them; lanes know
nothing of each other, so that faults of different lanes meet in every way. A lane deals its kinds of faults, and its
targets, like cards from a shuffled pack: each comes as often as the others, and none twice in a row.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from random import Random
from typing import TypeVar

Card = TypeVar("Card")


class Kind(Enum):
    """One kind of fault."""

    # of a backend
    CRASH = "crash"  # connections are reset, new ones refused, until it is started again
    STALL = "stall"  # it takes requests, passes its health check, and says nothing more
    RESET = "reset"  # it reads a request and resets the connection
    ERROR = "error"  # it answers 500
    NOT_STARTED = "not_started"  # it answers 503 and says that it did not begin
    BUSY = "busy"  # it answers 429
    DRIP = "drip"  # its answers come in pieces of a few bytes
    CUT = "cut"  # its answers end in the middle
    FLAP = "flap"  # its registration comes and goes
    WITHDRAW = "withdraw"  # its registration is gone for a while
    # of etcd
    ETCD_KILL = "etcd_kill"
    ETCD_FREEZE = "etcd_freeze"
    ETCD_HOLE = "etcd_hole"  # nothing that is sent to it arrives
    ETCD_RESET = "etcd_reset"  # connections to it are reset, and new ones refused
    ETCD_COMPACT = "etcd_compact"  # the history that the gateways did not hear of is gone when they come back
    ETCD_WIPE = "etcd_wipe"  # it comes back empty, as another cluster
    # of Redis
    REDIS_KILL = "redis_kill"
    REDIS_FREEZE = "redis_freeze"
    REDIS_FLUSH = "redis_flush"
    REDIS_SLOW = "redis_slow"
    REDIS_RESET = "redis_reset"
    # of the policy
    POLICY_SWAP = "policy_swap"  # a good one, by rename
    POLICY_BAD = "policy_bad"  # one with a mistake
    POLICY_HALF = "policy_half"  # written in place, in two halves
    POLICY_GONE = "policy_gone"
    # of the identity provider
    KEYS_ERROR = "keys_error"  # it answers 500, and somebody comes with a token of a new key
    KEYS_SILENT = "keys_silent"  # it answers nothing, and somebody comes with a token of a new key
    KEYS_ROTATE = "keys_rotate"  # there is a new key, and somebody comes with a token of it
    # of the gateways
    WORKER_KILL = "worker_kill"  # SIGKILL
    DRAIN = "drain"  # SIGTERM, and a start when it has ended


@dataclass(frozen=True, slots=True)
class Fault:
    """One fault. `at` is seconds from the start of its phase, `lasts` how long it stays before it is undone."""

    at: float
    lasts: float
    kind: Kind
    target: str


@dataclass(frozen=True, slots=True)
class Lane:
    """What may break in turn. `lasts` and `pause` are the least and the most seconds of a fault, and between two."""

    targets: tuple[str, ...]
    kinds: tuple[Kind, ...]
    lasts: tuple[float, float]
    pause: tuple[float, float]


_OF_BACKENDS = (
    Kind.CRASH, Kind.STALL, Kind.RESET, Kind.ERROR, Kind.NOT_STARTED, Kind.BUSY, Kind.DRIP, Kind.CUT, Kind.FLAP,
    Kind.WITHDRAW,
)  # fmt: skip
SERVICES = {service: tuple(f"{service}-{number}" for number in range(3)) for service in ("chat", "embed")}
"""Three backends each: while one has a fault, two are there to save its requests."""

LANES: Mapping[str, Lane] = {
    **{service: Lane(names, _OF_BACKENDS, (3.0, 6.0), (2.0, 4.0)) for service, names in SERVICES.items()},
    "etcd": Lane(
        ("etcd",),
        (Kind.ETCD_KILL, Kind.ETCD_FREEZE, Kind.ETCD_HOLE, Kind.ETCD_RESET, Kind.ETCD_COMPACT, Kind.ETCD_WIPE),
        (3.0, 12.0),
        (3.0, 6.0),
    ),
    "redis": Lane(
        ("redis",),
        (Kind.REDIS_KILL, Kind.REDIS_FREEZE, Kind.REDIS_FLUSH, Kind.REDIS_SLOW, Kind.REDIS_RESET),
        (2.0, 6.0),
        (2.0, 5.0),
    ),
    "policy": Lane(
        ("policy",), (Kind.POLICY_SWAP, Kind.POLICY_BAD, Kind.POLICY_HALF, Kind.POLICY_GONE), (1.0, 3.0), (1.0, 4.0)
    ),
    # An unknown key may be asked for once in ten seconds: not another one before the gateways may ask again.
    "keys": Lane(("keys",), (Kind.KEYS_ERROR, Kind.KEYS_SILENT, Kind.KEYS_ROTATE), (3.0, 6.0), (22.0, 28.0)),
    "workers": Lane(("a",), (Kind.WORKER_KILL,), (1.0, 1.0), (12.0, 20.0)),
    "replica": Lane(("b",), (Kind.DRAIN,), (0.0, 0.0), (12.0, 20.0)),
}

Phase = Mapping[str, tuple[Fault, ...]]
"""The faults of each lane, in order."""


def plan(lanes: Mapping[str, Lane], rng: Random, *phases: float) -> list[Phase]:
    """The faults of phases that last so many seconds. All are over before their phase is; the packs go on."""
    packs = {name: (_dealt(lane.kinds, rng), _dealt(lane.targets, rng)) for name, lane in lanes.items()}
    return [
        {name: tuple(_faults(lane, *packs[name], rng, seconds)) for name, lane in lanes.items()} for seconds in phases
    ]


def _faults(lane: Lane, kinds: Iterator[Kind], targets: Iterator[str], rng: Random, seconds: float) -> Iterator[Fault]:
    at = rng.uniform(0.0, lane.pause[1])
    while True:
        lasts = rng.uniform(*lane.lasts)
        if at + lasts > seconds:
            return
        yield Fault(at, lasts, next(kinds), next(targets))
        at += lasts + rng.uniform(*lane.pause)


def _dealt(cards: Sequence[Card], rng: Random) -> Iterator[Card]:
    """One pack after another, each shuffled, none beginning with the last card of the one before."""
    last: Card | None = None
    while True:
        pack = list(cards)
        rng.shuffle(pack)
        if len(pack) > 1 and pack[0] == last:
            pack.append(pack.pop(0))
        yield from pack
        last = pack[-1]
