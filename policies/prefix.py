"""Which backend has seen the beginning of a prompt: what is probably in its cache, as far as one can tell from outside.

A prompt is cut into chunks, each named by a hash over everything up to its end, so that equal names mean equal
beginnings: its chain. A backend's index holds the names of what was sent there, those used last at the end, and as many
as its cache may hold. It is only probable: others send there too, and evictions are not told. So each answer that says
how much of its prompt was cached corrects it: where much less was there than was thought, the index was too large.

Source: the prefix-cache scorer of the Gateway API inference extension, of which the numbers of bytes and chunks are.

Names are Python's hashes of bytes: fast, and keyed anew in each process, so that nobody can make two prompts meet.
"""

from __future__ import annotations

import re
from collections import OrderedDict
from typing import Final

CHUNK_BYTES: Final = 64  # about 16 tokens
MOST_CHUNKS: Final = 256
_BYTES_PER_TOKEN: Final = 4
_CAPACITY_UNTOLD: Final = 8192  # chunks
_LEAST_CAPACITY: Final = 64
_MOST_CAPACITY: Final = 65_536
_MUCH_LESS: Final = 0.5
_PROMPT: Final = re.compile(rb'"(?:messages|prompt|system|input)" *:').search

Chain = tuple[int, ...]


def chain_of(body: bytes, model: str) -> Chain:
    """The chain of a request's prompt, from its text as JSON. Chunks that are not full have no name."""
    found = _PROMPT(body)
    start = found.start() if found is not None else 0
    chunks = min((len(body) - start) // CHUNK_BYTES, MOST_CHUNKS)
    name = hash(model)
    names = []
    for at in range(start, start + chunks * CHUNK_BYTES, CHUNK_BYTES):
        name = hash((name, body[at : at + CHUNK_BYTES]))
        names.append(name)
    return tuple(names)


class PrefixIndex:
    """What one backend has probably cached.

    A name is known from when its prompt is sent, because the next one like it should follow, and confirmed when that
    was answered: only then is it in the cache for sure. Invariant: whoever knows a name, or has it confirmed, has so
    those before it in its chain, because they are as new and forgotten later.
    """

    __slots__ = ("_capacity", "_known", "_most")

    def __init__(self, cache_tokens: int = 0) -> None:
        self._known: OrderedDict[int, bool] = OrderedDict()  # whether it is confirmed
        self._most = self._capacity = _CAPACITY_UNTOLD
        self.fit(cache_tokens)

    def fit(self, cache_tokens: int) -> None:
        """The backend's cache has room for so many tokens; 0 is not told. What it taught about that is forgotten."""
        chunks = cache_tokens * _BYTES_PER_TOKEN // CHUNK_BYTES if cache_tokens else _CAPACITY_UNTOLD
        self._most = self._capacity = min(max(chunks, _LEAST_CAPACITY), _MOST_CAPACITY)
        self._evict()

    def matched(self, chain: Chain) -> int:
        """How many chunks of a chain are known. Does not modify."""
        known, low, high = self._known, 0, len(chain)
        while low < high:
            middle = (low + high) // 2
            if chain[middle] in known:
                low = middle + 1
            else:
                high = middle
        return low

    def note(self, chain: Chain) -> int:
        """A request is sent there. Returns how many of its chunks were confirmed before."""
        known, confirmed = self._known, 0
        for name in chain:
            if not known.get(name, False):
                break
            confirmed += 1
        for name in reversed(chain):
            known.setdefault(name, False)
            known.move_to_end(name)
        self._evict()
        return confirmed

    def learn(self, chain: Chain, expected: float, found: float) -> None:
        """An answer has told which share of its prompt was cached, and which was expected (0 to 1)."""
        known = self._known
        for name in chain:
            if name in known:
                known[name] = True
        if found < _MUCH_LESS * expected:
            self._capacity = max(_LEAST_CAPACITY, self._capacity - self._capacity // 8)
            self._evict()
        elif expected and self._capacity < self._most:
            self._capacity = min(self._most, self._capacity + 1 + self._capacity // 64)

    def _evict(self) -> None:
        known = self._known
        while len(known) > self._capacity:
            known.popitem(last=False)

    def __len__(self) -> int:
        return len(self._known)

    def __repr__(self) -> str:
        return f"<PrefixIndex {len(self._known)} of {self._capacity} chunks, at most {self._most}>"
