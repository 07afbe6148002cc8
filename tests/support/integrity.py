"""What is wrong with slots, blocks and tables of an engine; empty when all is well, between any two steps."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from reference_backend.engine.kv_cache import BlockPool
from reference_backend.engine.scheduler import Scheduler


def faults(scheduler: Scheduler) -> list[str]:
    pool, running = scheduler.pool, scheduler.running
    found = pool_faults(pool, (sequence.blocks for sequence in running))
    slots = [*scheduler._free_slots, *(s.slot for s in running if s.slot is not None)]
    if sorted(slots) != list(range(scheduler.slots)):
        found.append(f"slots are {sorted(slots)}")
    if scheduler._standing.running != Counter(sequence.tenant for sequence in running):
        found.append(f"tenants have {scheduler._standing.running}")
    for s in running:
        if s.computed > len(s.blocks) * pool.block_size or len(set(s.blocks)) != len(s.blocks):
            found.append(f"{s.computed} tokens in blocks {s.blocks}")
    found += [f"{s.blocks} held by one who waits" for s in scheduler.queue if s.blocks or s.slot is not None]
    return found


def pool_faults(pool: BlockPool, holders: Iterable[list[int]]) -> list[str]:
    """The same of blocks alone, given those of everybody who should hold any."""
    expected = Counter(block for blocks in holders for block in blocks)
    found = [
        f"block {block} has {pool._holders[block]} holders, not {expected[block]}"
        for block in range(pool.blocks)
        if pool._holders[block] != expected[block]
    ]
    found += [f"block {block} is free and held" for block in pool._free if expected[block]]
    found += [
        f"block {block} is lost" for block in range(1, pool.blocks) if block not in pool._free and not expected[block]
    ]
    if 0 in pool._free or expected[0]:
        found.append("block 0 is somebody's")
    if {block: name for name, block in pool._block_of.items()} != pool._name_of:
        found.append("names and blocks do not belong together")
    return found
