"""A policy file as people, editors and Kubernetes change it, on a real disk; an etcd key, on a source in memory."""

import asyncio
import contextlib
import itertools
import os
import shutil
import threading
from pathlib import Path
from random import Random

import pytest

from discovery.source import Unavailable
from gateway import reload
from gateway.last_good import LastGood, unnamed_file
from gateway.reload import EtcdPolicy, FilePolicy, PolicySource
from policies import document
from policies.problems import InvalidDocument
from policies.yaml_tree import MAX_BYTES
from tests.support.policy_text import VALID
from tests.support.scripted_source import ScriptedSource

WALL = 1_800_000_000.0
BAD = VALID + "rutes: []\n"
FAST = {"poll": 0.002, "settle": 0.002}


def text(name: str) -> str:
    """A policy whose plan and route have one name: a reader can see whether it is whole."""
    return f"version: 1\nanonymous: true\nplans: {{{name}: {{}}}}\nroutes: [{{name: {name}, to: [{{service: x}}]}}]\n"


def name_of(source: PolicySource) -> str:
    policy = source.policy
    [plan] = policy.plans
    assert policy.routes[0].name == plan
    return plan


async def until(condition) -> None:
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.002)


def put(path: Path, content: str) -> None:
    """As careful writers do: beside it, then renamed over it."""
    beside = path.with_name(f".{path.name}.new")
    beside.write_text(content)
    beside.replace(path)


@contextlib.asynccontextmanager
async def running(source: PolicySource):
    await source.start()
    task = asyncio.create_task(source.run())
    try:
        yield source
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


class Story:
    """A file, the source that follows it, and what was told."""

    def __init__(self, path: Path, **pace: float) -> None:
        self.events = []
        self.told = []
        self.source = FilePolicy(path, self.events.append, lambda: WALL, **(FAST | pace))
        self.source.subscribe(lambda policy: self.told.append(policy.routes[0].name))

    @property
    def results(self) -> list[str]:
        return [event.result for event in self.events]


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "policy.yaml"
    path.write_text(text("a"))
    return path


# The first load


async def test_start_loads(path):
    story = Story(path)
    with pytest.raises(RuntimeError, match="start"):
        _ = story.source.policy
    await story.source.start()
    assert name_of(story.source) == "a"
    assert (story.source.loaded_at, story.source.last_error, story.source.name) == (WALL, None, str(path))
    assert [(event.result, event.version) for event in story.events] == [("ok", story.source.policy.version)]


async def test_start_says_everything_that_is_wrong(path):
    path.write_text(BAD + "plns: {}\n")
    with pytest.raises(InvalidDocument) as caught:
        await Story(path).source.start()
    assert [problem.path for problem in caught.value.problems] == ["rutes", "plns"]


@pytest.mark.parametrize(("name", "why"), [("gone.yaml", "No such file or directory"), (".", "Is a directory")])
async def test_start_without_a_text(tmp_path, name, why):
    with pytest.raises(InvalidDocument, match=f"cannot be read: {why}"):
        await Story(tmp_path / name).source.start()


async def test_a_pipe_is_no_text_at_the_start(tmp_path):
    os.mkfifo(tmp_path / "policy.yaml")
    with pytest.raises(InvalidDocument, match="cannot be read: not a regular file"):
        await Story(tmp_path / "policy.yaml").source.start()


async def test_a_pipe_in_the_place_of_the_file_is_told_and_the_next_file_is_read(path):
    story = Story(path)
    async with running(story.source) as source:
        path.unlink()
        os.mkfifo(path)
        await until(lambda: source.last_error is not None and "not a regular file" in source.last_error.errors[0])
        assert name_of(source) == "a"
        put(path, text("b"))
        await until(lambda: name_of(source) == "b")


async def test_files_in_the_policy_are_beside_the_path_and_not_beside_what_it_links_to(tmp_path):
    (tmp_path / "deep").mkdir()
    issuer = "issuers: [{issuer: a, audience: b, algorithms: [ES256], jwks: jwks.json}]\n"
    (tmp_path / "deep" / "policy.yaml").write_text(VALID + issuer)
    (tmp_path / "policy.yaml").symlink_to("deep/policy.yaml")
    story = Story(tmp_path / "policy.yaml")
    await story.source.start()
    assert story.source.policy.issuers[0].jwks == str(tmp_path / "jwks.json")


# Ways to change a file


def write_in_place(path: Path) -> None:
    path.write_text(text("b"))


def rename_over(path: Path) -> None:
    put(path, text("b"))


def delete_and_write(path: Path) -> None:
    path.unlink()
    path.write_text(text("b"))


def same_size_same_time(path: Path) -> None:
    stat = path.stat()
    path.write_text(text("b"))
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


@pytest.mark.parametrize("change", [write_in_place, rename_over, delete_and_write, same_size_same_time])
async def test_a_change_comes_into_force(path, change):
    story = Story(path)
    async with running(story.source) as source:
        before = source.policy
        change(path)
        await until(lambda: name_of(source) == "b")
        assert before.routes[0].name == "a"  # who holds the old one keeps it
    assert story.told == ["a", "b"]
    assert story.results[-1] == "ok"


async def test_a_symlink_swap_as_kubernetes_does_it(tmp_path):
    """policy.yaml -> ..data/policy.yaml, ..data -> a folder with a date, and only ..data is ever replaced."""

    def mount(folder: str) -> None:
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "policy.yaml").write_text(text(folder.strip(".")))
        (tmp_path / "..data_tmp").symlink_to(folder)
        (tmp_path / "..data_tmp").replace(tmp_path / "..data")

    mount("..first")
    (tmp_path / "policy.yaml").symlink_to("..data/policy.yaml")
    async with running(Story(tmp_path / "policy.yaml").source) as source:
        mount("..second")
        shutil.rmtree(tmp_path / "..first")
        await until(lambda: name_of(source) == "second")


@pytest.mark.slow
async def test_a_hundred_flips(path):
    """Each is seen, whole, and what is bad between them changes nothing."""
    story = Story(path)
    async with running(story.source) as source:
        for flip in range(100):
            put(path, BAD + f"# {flip}\n")
            put(path, text(f"flip-{flip}"))
            await until(lambda flip=flip: name_of(source) == f"flip-{flip}")
    assert story.told == ["a", *(f"flip-{flip}" for flip in range(100))]


async def test_a_hundred_flips_faster_than_anybody_reads(path):
    story = Story(path)
    async with running(story.source) as source:
        writer = asyncio.to_thread(lambda: [put(path, text(f"flip-{flip}")) for flip in range(100)])
        writing = asyncio.create_task(writer)
        while not writing.done():
            name_of(source)
            await asyncio.sleep(0)
        await until(lambda: name_of(source) == "flip-99")
    assert set(story.results) == {"ok"}


def test_a_change_is_in_force_within_a_second():
    assert reload.POLL_SECONDS + reload.SETTLE_SECONDS <= 0.5  # the rest is for parsing


# What cannot be used


async def test_a_bad_text_changes_nothing_and_is_told(path):
    story = Story(path)
    async with running(story.source) as source:
        before = source.policy
        put(path, BAD)
        await until(lambda: source.last_error)
        line = f"{path}:5:1 rutes: unknown key `rutes`: did you mean `routes`?"
        assert (source.last_error.errors, source.last_error.at) == ((line,), WALL)
        assert source.policy is before
        event = story.events[-1]
        assert (event.result, event.version, event.errors) == ("invalid", before.version, (line,))
        put(path, text("b"))
        await until(lambda: name_of(source) == "b")
        assert source.last_error is None
    assert story.results == ["ok", "invalid", "ok"]


async def test_each_bad_text_is_told_once(path):
    story = Story(path)
    async with running(story.source) as source:
        put(path, BAD)
        await until(lambda: source.last_error)
        path.touch()
        put(path, BAD)
        put(path, text("b"))
        await until(lambda: name_of(source) == "b")
    assert story.results == ["ok", "invalid", "ok"]


async def test_a_deleted_file_leaves_the_policy_in_force(path):
    story = Story(path)
    async with running(story.source) as source:
        before = source.policy
        path.unlink()
        await until(lambda: source.last_error)
        assert source.last_error.errors == (f"{path}:1:1 cannot be read: No such file or directory",)
        path.write_text(text("a"))
        await until(lambda: source.last_error is None)
        assert source.policy is before
    assert story.results == ["ok", "unreadable", "ok"]
    assert story.told == ["a"]


async def test_a_file_that_is_too_large(path):
    async with running(Story(path).source) as source:
        put(path, "#" * (2 * MAX_BYTES))
        await until(lambda: source.last_error)
        assert "larger than 1 MiB" in source.last_error.errors[0]


async def test_a_file_that_is_being_written_is_left_to_its_writer(path, monkeypatch):
    """The first half of a policy may well be a policy: without the settling, routes would be gone for a moment."""
    whole = (text("b") + "# the rest\n").encode()
    half = text("b").encode()
    readings = itertools.chain([text("a").encode()] * 3, [b"", half, whole], itertools.repeat(whole))
    monkeypatch.setattr(reload, "_read_file", lambda _: next(readings))
    story = Story(path)
    async with running(story.source) as source:
        await until(lambda: name_of(source) == "b")
        assert source.policy == document.parse(whole, base=path.parent)
    assert story.results == ["ok", "ok"]


async def test_a_text_that_comes_back_before_it_settled_was_never_there(path, monkeypatch):
    good = text("a").encode()
    readings = itertools.chain([good] * 3, [b"", good], itertools.repeat(good))
    monkeypatch.setattr(reload, "_read_file", lambda _: next(readings))
    story = Story(path)
    async with running(story.source):
        await until(lambda: next(readings) is good)
    assert story.results == ["ok"]


# Reading on request, and those who listen


async def test_reload_reads_at_once_and_tells_even_if_nothing_changed(path):
    story = Story(path, poll=3600.0)
    async with running(story.source) as source:
        before = source.policy
        source.reload()
        await until(lambda: story.results == ["ok", "ok"])
        assert source.policy is before
        put(path, text("b"))
        source.reload()
        await until(lambda: name_of(source) == "b")
    assert story.told == ["a", "b"]


async def test_one_reader_s_bug_stops_neither_the_others_nor_the_next_policy(path, caplog):
    story = Story(path)
    seen = []

    def broken(policy) -> None:
        raise ZeroDivisionError

    story.source.subscribe(broken)
    story.source.subscribe(seen.append)
    async with running(story.source) as source:
        for name in ("b", "c"):
            put(path, text(name))
            await until(lambda name=name: name_of(source) == name)
    assert [policy.routes[0].name for policy in seen] == story.told == ["a", "b", "c"]
    assert [record.exc_info[0] for record in caplog.records] == [ZeroDivisionError] * 3


async def test_reading_and_parsing_stay_off_the_loop(path, monkeypatch):
    threads = []

    def noted(function):
        def call(*args, **kwargs):
            threads.append(threading.current_thread())
            return function(*args, **kwargs)

        return call

    monkeypatch.setattr(reload, "_read_file", noted(reload._read_file))
    monkeypatch.setattr(document, "parse", noted(document.parse))
    await Story(path).source.start()
    assert len(threads) == 3
    assert threading.main_thread() not in threads


# A worker that starts later


@pytest.fixture
def kept():
    with unnamed_file() as descriptor:
        yield LastGood(descriptor)


@pytest.mark.parametrize(
    ("now", "result"), [(BAD, "invalid"), (None, "unreadable"), (text("a"), "ok"), (text("b"), "ok")]
)
async def test_it_begins_with_the_policy_that_others_have_in_force(path, kept, now, result):
    await Story(path, kept=kept).source.start()
    if now is None:
        path.unlink()
    else:
        put(path, now)
    late = Story(path, kept=kept)
    async with running(late.source) as source:
        assert name_of(source) == ("b" if now == text("b") else "a")
        assert late.results == ["ok", result]
        assert bool(source.last_error) == (result != "ok")
        put(path, text("c"))
        await until(lambda: name_of(source) == "c")
        assert source.last_error is None
    last = Story(path, kept=kept)
    put(path, BAD)
    await last.source.start()
    assert name_of(last.source) == "c"


async def test_what_others_have_kept_may_be_bad_by_now(path, kept):
    kept.write(BAD.encode())
    story = Story(path, kept=kept)
    await story.source.start()
    assert (name_of(story.source), story.results) == ("a", ["ok"])
    kept.write(BAD.encode())
    put(path, BAD)
    with pytest.raises(InvalidDocument):
        await Story(path, kept=kept).source.start()


async def test_a_text_that_cannot_be_kept_is_in_force_all_the_same(path, caplog):
    with open("/dev/full", "r+b", buffering=0) as full:
        story = Story(path, kept=LastGood(full.fileno()))
        await story.source.start()
    assert name_of(story.source) == "a"
    assert "a worker that starts while the policy is bad" in caplog.text


# etcd


def etcd_policy(source: ScriptedSource, kept: LastGood | None = None) -> tuple[EtcdPolicy, list]:
    events = []
    followed = EtcdPolicy(
        source,
        "default",
        Path("/etc/weir"),
        events.append,
        lambda: WALL,
        rng=Random(1),
        observe_discovery=lambda _: None,
        kept=kept,
    )
    return followed, events


async def test_a_key_is_followed():
    source = ScriptedSource()
    await source.put("default", text("a").encode())
    await source.put("default-2", text("z").encode())
    policy, events = etcd_policy(source)
    async with running(policy):
        assert (name_of(policy), policy.name) == ("a", "etcd:policies/default")
        await source.put("default", text("b").encode())
        await source.put("other", text("z").encode())
        await until(lambda: name_of(policy) == "b")
        await source.put("default", BAD.encode())
        await until(lambda: policy.last_error)
        assert "rutes" in policy.last_error.errors[0]
        await source.delete("default")
        await until(lambda: "no such key" in policy.last_error.errors[0])
        assert name_of(policy) == "b"
        await source.put("default", text("c").encode())
        await until(lambda: name_of(policy) == "c")
    assert [event.result for event in events] == ["ok", "ok", "invalid", "unreadable", "ok"]


async def test_reload_judges_the_key_anew():
    source = ScriptedSource()
    await source.put("default", text("a").encode())
    policy, events = etcd_policy(source)
    async with running(policy):
        await until(lambda: source.open_watches)
        policy.reload()
        await until(lambda: len(events) == 2)
    assert [event.result for event in events] == ["ok", "ok"]


async def test_a_key_that_is_not_there():
    with pytest.raises(InvalidDocument, match="there is no such key: put the text of a policy.yaml there"):
        await etcd_policy(ScriptedSource())[0].start()


async def test_etcd_that_is_away_at_the_start():
    source = ScriptedSource()
    source.is_away = True
    with pytest.raises(Unavailable):
        await etcd_policy(source)[0].start()


async def test_a_worker_starts_while_etcd_is_away_and_follows_it_later(kept):
    source = ScriptedSource()
    source.is_away = True
    kept.write(text("a").encode())
    policy, _ = etcd_policy(source, kept)
    async with running(policy):
        assert name_of(policy) == "a"
        assert "cannot be read" in policy.last_error.errors[0]
        source.is_away = False
        await source.put("default", text("b").encode())
        await until(lambda: name_of(policy) == "b")
