"""Threads that serve the observers and not the requests."""

from __future__ import annotations

import contextlib
import os
import sys
import threading

_NICE = 10  # as `nice` adds by default


def give_way() -> None:
    """Let the event loop go first where the two share a processor. Called by the thread itself.

    Else Linux lets a thread that has begun finish its slice, some 3 ms, before one that has just been woken: that was
    the latency of one request in a hundred. A priority of a thread's own exists on Linux only.
    """
    if sys.platform == "linux":
        with contextlib.suppress(OSError):  # it is a courtesy
            thread = threading.get_native_id()
            os.setpriority(os.PRIO_PROCESS, thread, os.getpriority(os.PRIO_PROCESS, thread) + _NICE)
