"""Who holds which block of the key-value cache, and which blocks can be shared because they begin alike.

A block is room for the keys and values of `block_size` consecutive tokens. A full one is named by a chained hash: the
name of the block before it and its own tokens, so that equal names mean equal text from the beginning on. Whoever
comes with the same beginning holds the same blocks.

Invariants:
- Block 0 is nobody's: tables are padded with it, and it stays zero.
- Every other block is either held (by at least one sequence) or free, and is handed out in order of how long it has
  been free. A free block keeps its name, and can be held again, until it is handed out.
- Only full blocks have names, and nobody writes into a full block.

`tests/support/integrity.py` says what is wrong where they do not hold.

Source: automatic prefix caching as in vLLM. Names are 128 bits of BLAKE2b: nobody can make two texts meet.
"""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Iterable
from hashlib import blake2b
from itertools import takewhile

from reference_backend.engine.request import Sequence


def block_name(parent: bytes, tokens: list[int], shown: bytes = b"") -> bytes:
    """The name of a full block behind the block named `parent` (for the first: the request's salt).

    `shown`: what distinguishes it beside its tokens.
    """
    return blake2b(len(parent).to_bytes(2) + parent + array("q", tokens).tobytes() + shown, digest_size=16).digest()


class BlockPool:
    """Blocks 1 to `blocks - 1`, taken and released by number."""

    def __init__(self, blocks: int, block_size: int) -> None:
        self.blocks = blocks
        self.block_size = block_size
        self.asked_tokens = 0  # of prompts, since the start
        self.found_tokens = 0  # of those: cached
        self._holders = [0] * blocks
        self._free = dict.fromkeys(range(1, blocks))  # in order of release
        self._block_of: dict[bytes, int] = {}
        self._name_of: dict[int, bytes] = {}

    def __repr__(self) -> str:
        return f"<BlockPool {self.held} of {self.blocks - 1} held, {len(self._name_of)} named>"

    @property
    def held(self) -> int:
        return self.blocks - 1 - len(self._free)

    @property
    def named(self) -> int:
        """Blocks that a request may find, held or free."""
        return len(self._name_of)

    def free_without(self, holders: Iterable[list[int]]) -> int:
        """How many would be free if these gave theirs back."""
        given_back = Counter(block for blocks in holders for block in blocks)
        return len(self._free) + sum(self._holders[block] == count for block, count in given_back.items())

    def blocks_for(self, tokens: int) -> int:
        return -(-tokens // self.block_size)

    def unknown_tokens(self, sequence: Sequence) -> int:
        """How much of a sequence would have to be computed if it came in now."""
        return len(sequence.tokens) - self.block_size * len(self._known(sequence))

    def match(self, sequence: Sequence) -> list[int]:
        """Hold the cached blocks that the sequence begins with. Its last token is always left to be computed."""
        found = self._known(sequence)
        for block in found:
            self._free.pop(block, None)
            self._holders[block] += 1
        return found

    def take(self, count: int) -> list[int] | None:
        """Hold `count` fresh blocks, or none at all if there are not so many."""
        if count > len(self._free):
            return None
        taken = []
        for _ in range(count):
            block = next(iter(self._free))
            del self._free[block]
            self._unname(block)
            self._holders[block] = 1
            taken.append(block)
        return taken

    def release(self, blocks: list[int]) -> None:
        """Give back, in the order of the text. Its end becomes free first, because fewer can share it."""
        for block in reversed(blocks):
            self._holders[block] -= 1
            if not self._holders[block]:
                self._free[block] = None

    def index(self, sequence: Sequence) -> None:
        """Name the blocks of a sequence that are full by now. One that is cached already stays as it is."""
        full = min(sequence.computed, len(sequence.tokens)) // self.block_size
        if full <= sequence.indexed:
            return
        names = self._names(sequence, full)
        for place in range(sequence.indexed, full):
            if names[place] not in self._block_of:
                block = sequence.blocks[place]
                self._block_of[names[place]] = block
                self._name_of[block] = names[place]
        sequence.indexed = full

    def forget(self, blocks: list[int]) -> list[int]:
        """Take names away: what is in these blocks is no good. Returns those that nobody else holds."""
        for block in blocks:
            self._unname(block)
        return [block for block in blocks if self._holders[block] == 1]

    def _known(self, sequence: Sequence) -> list[int]:
        names = self._names(sequence, (len(sequence.tokens) - 1) // self.block_size)
        return [self._block_of[name] for name in takewhile(self._block_of.__contains__, names)]

    def _names(self, sequence: Sequence, count: int) -> list[bytes]:
        size = self.block_size
        while len(sequence.keys) < count:
            start, end = len(sequence.keys) * size, (len(sequence.keys) + 1) * size
            parent = sequence.keys[-1] if sequence.keys else sequence.salt
            sequence.keys.append(block_name(parent, sequence.tokens[start:end], sequence.shown(start, end)))
        return sequence.keys[:count]

    def _unname(self, block: int) -> None:
        name = self._name_of.pop(block, None)
        if name is not None:
            del self._block_of[name]
