"""Decides: pure, synchronous, table-tested. No I/O, no clock, no dice, no log: `now` and `rng` are arguments."""
