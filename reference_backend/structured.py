"""Structured output: what a request's `response_format` asks for, and the trial of schemas that strangers send.

A schema may be harmless to read and take minutes and gigabytes to compile (a few patterns that must all hold, thousands
of names). Each new grammar is therefore tried by a process of its own that has a bound on its time and memory, and is
looked at in parts when something is wrong, so that the answer can name the place.
"""

from __future__ import annotations

import asyncio
import contextlib
import resource
import signal
import sys
from collections.abc import Iterator
from random import Random
from typing import Annotated, Any

import msgspec

from reference_backend.engine.grammar import TOO_DEEP, fault, json_grammar
from reference_backend.refusals import unfit

TRIAL_SECONDS = 0.25  # of the processor: as long as the engine may have to wait for the same grammar
TRIAL_BYTES = 1 << 30  # of address space
TRIALS_AT_ONCE = 2
LARGEST_GRAMMAR = 128 * 1024  # characters
REMEMBERED = 256  # grammars that are known to be good
DEFINITIONS = ("$defs", "definitions")
CHILDREN = ("properties", "patternProperties", *DEFINITIONS)  # objects of schemas
CHOICES = ("anyOf", "allOf", "oneOf", "prefixItems")  # lists of schemas
TOO_MUCH = "it takes more time or memory to prepare than this server gives to one schema"


class TextFormat(msgspec.Struct, tag_field="type", tag="text"):
    pass


class JsonObject(msgspec.Struct, tag_field="type", tag="json_object"):
    pass


class NamedSchema(msgspec.Struct, forbid_unknown_fields=True):
    name: Annotated[str, msgspec.Meta(pattern="^[a-zA-Z0-9_-]{1,64}$")]
    schema: dict[str, Any] = {}
    strict: bool | None = None
    description: str | None = None


class JsonSchema(msgspec.Struct, tag_field="type", tag="json_schema"):
    json_schema: NamedSchema


ResponseFormat = TextFormat | JsonObject | JsonSchema


class Clause(msgspec.Struct, frozen=True):
    """A schema that a client sent, and where in the request."""

    place: str
    schema: dict[str, Any]
    is_strict: bool

    @property
    def grammar(self) -> str:
        """An expression of the notation. Raises ApiError 400 for what nobody would write."""
        try:
            return json_grammar(self.schema, is_strict=self.is_strict)
        except RecursionError as error:
            raise unfit(self.place, TOO_DEEP) from error


def clause_of(wanted: ResponseFormat | None) -> Clause | None:
    """The schema that an answer is to keep to; None where any text will do."""
    if isinstance(wanted, JsonObject):
        return Clause("response_format", {"type": "object"}, is_strict=True)
    if isinstance(wanted, JsonSchema):
        named = wanted.json_schema
        return Clause("response_format.json_schema.schema", named.schema, is_strict=bool(named.strict))
    return None


class _Task(msgspec.Struct):
    grammar: str
    clauses: list[Clause]


class Trials:
    """Tries grammars, and remembers the good ones."""

    def __init__(self) -> None:
        self._good: dict[str, None] = {}
        self._room = asyncio.Semaphore(TRIALS_AT_ONCE)

    async def check(self, grammar: str, clauses: list[Clause]) -> None:
        """Raises ApiError 400 for a grammar, made of these clauses, that is wrong or would cost too much."""
        if len(grammar) > LARGEST_GRAMMAR:
            largest = max(clauses, key=lambda clause: len(clause.grammar))
            raise unfit(largest.place, f"schemas may have {LARGEST_GRAMMAR} characters in all")
        if grammar not in self._good:
            async with self._room:
                await self._try(msgspec.json.encode(_Task(grammar, clauses)), clauses[0].place)
        self._good.pop(grammar, None)
        self._good[grammar] = None
        if len(self._good) > REMEMBERED:
            del self._good[next(iter(self._good))]

    async def _try(self, task: bytes, place: str) -> None:
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "reference_backend.structured",
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.DEVNULL,
        )
        try:
            told, _ = await process.communicate(task)
        finally:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await process.wait()
        if told.endswith(b"good\n"):
            return
        *_, last = [msgspec.json.decode(line, type=tuple[str, str]) for line in told.splitlines()] or [
            (place, TOO_MUCH)
        ]
        raise unfit(*last)


def faults(task: _Task, rng: Random) -> Iterator[tuple[str, str]]:
    """What is wrong with a grammar: the place as far as it is known, then closer. May take any time and memory."""
    if (reason := fault(task.grammar, rng)) is None:
        return
    yield task.clauses[0].place, reason
    for clause in task.clauses:
        if (reason := fault(f"start: {clause.grammar}", rng)) is not None:
            yield clause.place, reason
            if reason == TOO_DEEP:
                return  # the place that is too deep would be a long one
            definitions = {key: clause.schema[key] for key in DEFINITIONS if key in clause.schema}
            yield from _closer(clause, definitions, reason, rng)
            return


def _closer(outer: Clause, definitions: dict[str, Any], reason: str, rng: Random) -> Iterator[tuple[str, str]]:
    """The place inside: that of the first schema inside that is wrong for the same reason, and so on."""
    for step, child in _inside(outer.schema):
        inner = Clause(outer.place + step, child, outer.is_strict)
        if fault(f"start: {json_grammar(definitions | child, is_strict=outer.is_strict)}", rng) == reason:
            yield inner.place, reason
            yield from _closer(inner, definitions, reason, rng)
            return


def _inside(schema: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Definitions come first: what refers to a wrong one is wrong for the same reason."""
    for key, value in sorted(schema.items(), key=lambda item: item[0] not in DEFINITIONS):
        if key in CHILDREN and isinstance(value, dict):
            found = [(f".{key}.{name}", child) for name, child in value.items()]
        elif key in CHOICES and isinstance(value, list):
            found = [(f".{key}[{index}]", child) for index, child in enumerate(value)]
        else:
            found = [(f".{key}", value)] if key in ("items", "additionalProperties") else []
        yield from ((step, child) for step, child in found if isinstance(child, dict))


def main() -> None:
    """The process of a trial: a task comes in; a line for each thing that is known to be wrong, or `good`, goes out."""
    task = msgspec.json.decode(sys.stdin.buffer.read(), type=_Task)
    resource.setrlimit(resource.RLIMIT_AS, (TRIAL_BYTES, TRIAL_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.setitimer(signal.ITIMER_PROF, TRIAL_SECONDS)  # ends the process: nobody handles its signal
    found = False
    for each in faults(task, Random(0)):  # noqa: S311  no secret: it makes up an answer
        if not found:  # it will be refused, and the place may take as long again to find
            signal.setitimer(signal.ITIMER_PROF, TRIAL_SECONDS)
        found = True
        sys.stdout.buffer.write(msgspec.json.encode(each) + b"\n")
        sys.stdout.flush()
    if not found:
        sys.stdout.write("good\n")


if __name__ == "__main__":
    main()
