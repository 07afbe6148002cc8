"""Threads that serve the observers let the event loop go first."""

from __future__ import annotations

import os
import sys
import threading

import pytest

from observability.background import give_way


@pytest.mark.skipif(sys.platform != "linux", reason="a thread has a priority of its own on Linux only")
def test_a_thread_gives_way_and_others_do_not():
    before = os.getpriority(os.PRIO_PROCESS, 0)
    within = []

    def run():
        give_way()
        within.append(os.getpriority(os.PRIO_PROCESS, threading.get_native_id()))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert within == [min(before + 10, 19)]
    assert os.getpriority(os.PRIO_PROCESS, 0) == before
