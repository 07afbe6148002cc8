"""Machines on a network that can be cut, made of network namespaces of Linux. It takes root.

    with Hub() as hub:                       # the thread that enters is in a network of its own until it leaves
        node = hub.node("g1", "etcd", "data")            # another one, with a line to the hub for each name
        node.command(["weir", "serve", ...])             # what starts a program there
        node.addresses["etcd"]                           # the hub's end of that line, as the node calls it
        hub.join(node, other, "peer")                    # a line between two nodes
    hub.everywhere                                   # an address of the hub that every node reaches, by "data"
        node.cut("etcd"); node.mend("etcd")              # packets vanish, both ways; connections stand and are not told

Whatever the thread starts from then on (child processes, new threads) is in the hub's network; threads that were there
before are not. Nothing of this is seen outside, and all of it ends with the last process in it.
"""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import os
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

CLONE_NEWNET = 0x40000000
EVERYWHERE = "198.18.255.1"  # 198.18.0.0/15 is for tests of networks (RFC 2544)


class NotPermittedError(OSError):
    """This machine does not let us; the message says what it said."""


class Hub:
    """The middle of a star. Raises NotPermittedError on entering."""

    def __init__(self) -> None:
        self.everywhere = EVERYWHERE
        self._numbers = itertools.count(1)
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> Self:
        missing = [program for program in ("ip", "nsenter", "unshare") if shutil.which(program) is None]
        if missing:
            raise NotPermittedError(f"not installed: {', '.join(missing)}")
        with contextlib.ExitStack() as stack:
            self._space = stack.enter_context(namespace())
            run_in(self._space, "link", "set", "lo", "up")
            run_in(self._space, "address", "add", f"{EVERYWHERE}/32", "dev", "lo")
            stack.enter_context(entered(self._space))
            self._stack = stack.pop_all()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._stack.close()

    def node(self, name: str, *lines: str) -> Node:
        """Another machine, with these lines to the hub. The way to `everywhere` is that of the line called "data"."""
        space = self._stack.enter_context(namespace())
        node = Node(name, space)
        run_in(space, "link", "set", "lo", "up")
        for line in lines:
            self._connect(node, line)
        if "data" in node.addresses:
            run_in(space, "route", "add", f"{EVERYWHERE}/32", "via", node.addresses["data"])
        return node

    def join(self, one: Node, other: Node, line: str) -> None:
        """A line between two nodes, which either can cut."""
        number = self._lay(other.space, line, one.space, line)
        one.addresses[line] = other.own[line] = f"198.18.{number}.1"
        one.own[line] = other.addresses[line] = f"198.18.{number}.2"
        one.ends[line], other.ends[line] = (other.space, line), (one.space, line)

    def _connect(self, node: Node, line: str) -> None:
        end = f"{node.name}-{line}"
        number = self._lay(self._space, end, node.space, line)
        node.addresses[line], node.own[line] = f"198.18.{number}.1", f"198.18.{number}.2"
        node.ends[line] = self._space, end

    def _lay(self, one: int, name: str, other: int, other_name: str) -> int:
        """A cable between two namespaces; its network is 198.18.(what is returned).0/30."""
        number = next(self._numbers)
        run_in(one, "link", "add", name, "type", "veth", "peer", "name", other_name, "netns", str(other))
        for host, space, end in ((1, one, name), (2, other, other_name)):
            run_in(space, "address", "add", f"198.18.{number}.{host}/30", "dev", end)
            run_in(space, "link", "set", end, "up")
        return number


class Node:
    """One machine beside the hub."""

    def __init__(self, name: str, space: int) -> None:
        self.name = name
        self.space = space  # a process in its namespace
        self.addresses: dict[str, str] = {}  # line -> the address at its other end
        self.own: dict[str, str] = {}  # line -> the address at this end
        self.ends: dict[str, tuple[int, str]] = {}  # line -> namespace and interface of its other end

    def command(self, words: Sequence[str]) -> list[str]:
        return ["nsenter", f"--net=/proc/{self.space}/ns/net", "--", *words]

    def cut(self, line: str) -> None:
        """The other end goes down: here nobody is told, packets just vanish."""
        space, end = self.ends[line]
        run_in(space, "link", "set", end, "down")

    def mend(self, line: str) -> None:
        space, end = self.ends[line]
        run_in(space, "link", "set", end, "up")


@contextlib.contextmanager
def namespace() -> Iterator[int]:
    """A network namespace, and the process that keeps it."""
    keeper = subprocess.Popen(
        ["unshare", "--net", "cat"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert keeper.stdin is not None
    assert keeper.stdout is not None
    assert keeper.stderr is not None
    try:
        with contextlib.suppress(BrokenPipeError):
            keeper.stdin.write(b"there\n")
            keeper.stdin.flush()
        if keeper.stdout.readline() != b"there\n":  # only then is it in its namespace
            raise NotPermittedError(keeper.stderr.read().decode().strip())
        yield keeper.pid
    finally:
        for pipe in (keeper.stdin, keeper.stdout, keeper.stderr):
            with contextlib.suppress(BrokenPipeError):
                pipe.close()
        keeper.kill()
        keeper.wait()


@contextlib.contextmanager
def entered(pid: int) -> Iterator[None]:
    """This thread is in the network of that process meanwhile."""
    with Path("/proc/thread-self/ns/net").open("rb") as before, Path(f"/proc/{pid}/ns/net").open("rb") as there:
        set_namespace(there.fileno())
        try:
            yield
        finally:
            set_namespace(before.fileno())


def set_namespace(descriptor: int) -> None:
    if ctypes.CDLL(None, use_errno=True).setns(descriptor, CLONE_NEWNET):
        raise NotPermittedError(f"setns: {os.strerror(ctypes.get_errno())}")


def run_in(pid: int, *words: str) -> None:
    """`ip` in the namespace of that process."""
    command = ["nsenter", f"--net=/proc/{pid}/ns/net", "--", "ip", *words]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise NotPermittedError(f"ip {' '.join(words)}: {done.stderr.strip()}")
