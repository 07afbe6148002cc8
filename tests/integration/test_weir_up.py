"""The newcomer's first minute: `weir up` with everything real, the curl line as pasted, the openai client, Ctrl-C.

Whatever belongs to one `weir up` works in its folder, so that nothing of it can hide from the tests.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import openai
import pytest

from tests.support.ports import free_ports

pytestmark = [
    pytest.mark.integration,
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="the reference backends need torch"),
]

WEIR = (sys.executable, "-m", "gateway.cli")


def until(condition, seconds=60.0):
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline, f"{condition} did not come true within {seconds} s"
        time.sleep(0.02)
    return value


class Up:
    """One `weir up` in its own folder."""

    def __init__(self, folder, *arguments):
        self.folder = folder
        self.port, self.admin_port = free_ports(2)
        self.output = folder / "output"
        ports = ("--port", str(self.port), "--admin-port", str(self.admin_port))
        with self.output.open("wb") as output:
            self.process = subprocess.Popen(
                [*WEIR, "up", *ports, *arguments],
                cwd=folder,
                stdout=output,
                stderr=subprocess.STDOUT,
            )

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.kill()
        self.process.wait()
        until(lambda: not self.running())

    def said(self):
        return self.output.read_text()

    def wait_ready(self):
        until(lambda: "Ctrl-C stops" in self.said() or self.process.poll() is not None)
        assert self.process.poll() is None, self.said()
        return self

    def running(self):
        """Command lines by pid of everything that works in the folder."""
        found = {}
        for entry in Path("/proc").glob("[0-9]*"):
            try:
                if (entry / "cwd").readlink().is_relative_to(self.folder):
                    found[int(entry.name)] = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode()
            except OSError:
                continue
        return found

    def line(self, start):
        return next(line for line in self.said().splitlines() if line.startswith(start))

    def pids(self, word):
        return [pid for pid, command in self.running().items() if word in command]

    def client(self, token=None, **options):
        key = token or self.line("token").split()[1]
        return openai.OpenAI(base_url=self.line("API").split()[1], api_key=key, **options)

    def mint(self, *arguments):
        key = self.folder / ".weir" / "signing-key.pem"
        answer = subprocess.run(
            [*WEIR, "token", "--key", str(key), *arguments], capture_output=True, text=True, check=True
        )
        return answer.stdout.strip()


@pytest.fixture(scope="module")
def up(tmp_path_factory):
    with Up(tmp_path_factory.mktemp("up")) as up:
        yield up.wait_ready()


MESSAGES = [{"role": "user", "content": "What is a KV cache?"}]


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
def test_the_curl_line_works_as_pasted(up):
    answer = subprocess.run(["/bin/sh", "-c", up.line("curl")], capture_output=True, text=True, check=True)
    assert answer.stdout.count("data: {") > 5
    assert answer.stdout.rstrip().endswith("data: [DONE]")


def test_openai_chat_streaming_and_models(up):
    with up.client() as client:
        assert [model.id for model in client.models.list()] == ["tiny"]
        whole = client.chat.completions.create(model="tiny", messages=MESSAGES, temperature=0)
        parts = client.chat.completions.create(model="tiny", messages=MESSAGES, temperature=0, stream=True)
        assert "".join(part.choices[0].delta.content or "" for part in parts) == whole.choices[0].message.content
        assert whole.usage.completion_tokens > 0


def test_openai_errors(up):
    with up.client("nonsense", max_retries=0) as client, pytest.raises(openai.AuthenticationError) as refused:
        client.chat.completions.create(model="tiny", messages=MESSAGES)
    assert refused.value.code == "unauthenticated"
    with up.client(max_retries=0) as client, pytest.raises(openai.NotFoundError):
        client.chat.completions.create(model="no-such-model", messages=MESSAGES)


def test_openai_waits_out_a_limit_as_it_is_told(up):
    """The plan `free` lets 10 at once and then one each second; the client comes back when `retry-after` says."""
    token = up.mint("--sub", "passer-by")
    with up.client(token, max_retries=0) as client:
        asks = (client.chat.completions.create(model="tiny", messages=MESSAGES, max_tokens=1) for _ in range(30))
        with pytest.raises(openai.RateLimitError) as refused:
            list(asks)
    assert refused.value.code == "rate_limited"
    assert float(refused.value.response.headers["retry-after"]) > 0
    with up.client(token, max_retries=5) as client:
        assert client.chat.completions.create(model="tiny", messages=MESSAGES, max_tokens=1).choices


def test_an_edited_policy_is_in_force_within_a_second(up):
    policy = up.folder / ".weir" / "policy.yaml"
    before = policy.read_text()
    with up.client(max_retries=0) as client:
        policy.write_text(before.replace('/*"}', '/*", model: "other"}'))  # each route
        until(lambda: [model.id for model in client.models.list()] == [], 2.0)
        policy.write_text(before)
        until(lambda: [model.id for model in client.models.list()] == ["tiny"], 2.0)


def test_weir_backends_shows_both(up):
    [etcd] = up.pids("--listen-client-urls")
    url = next(word for word in up.running()[etcd].split() if "--listen-client-urls" in word).partition("=")[2]

    def passing():
        seen = subprocess.run([*WEIR, "backends", "--etcd", url], capture_output=True, text=True, check=True).stdout
        return [line for line in seen.splitlines() if line.split()[0] == "local" and "passing" in line]

    until(lambda: len(passing()) == 2)


@pytest.mark.parametrize("word", ["reference_backend", "gateway.cli serve", "redis-server", "--listen-client-urls"])
def test_what_dies_comes_back_and_answers_go_on(up, word):
    victims = up.pids(word)
    os.kill(victims[0], signal.SIGKILL)
    until(lambda: len(up.pids(word)) == len(victims) and victims[0] not in up.pids(word))
    assert "was ended by SIGKILL; starting it again" in up.said()
    with up.client(max_retries=10) as client:
        assert client.chat.completions.create(model="tiny", messages=MESSAGES, max_tokens=1).choices


def test_a_second_one_in_the_same_folder_is_refused(up):
    second = subprocess.run([*WEIR, "up", "--port", "1"], cwd=up.folder, capture_output=True, text=True, check=False)
    assert second.returncode == 3
    assert second.stderr.startswith("weir: another `weir up` runs in ")


def test_ctrl_c_stops_all_of_it(up):
    up.process.send_signal(signal.SIGINT)
    assert up.process.wait(timeout=30) == 0
    assert up.running() == {}
    assert up.said().endswith("stopped; nothing is left running\n")


def test_a_start_that_fails_half_way_says_why_and_leaves_nothing(tmp_path):
    with Up(tmp_path, "--model", "/no/such/model", "--backends", "1") as up:
        assert up.process.wait(timeout=60) == 3
        assert up.running() == {}
        last = up.said().splitlines()[-1]
        assert last.startswith("weir: backend-1 ended with exit code 3 (")
        assert "/no/such/model" in last


def test_not_even_sigkill_leaves_anything(tmp_path):
    with Up(tmp_path, "--backends", "1", "--no-redis") as up:
        up.wait_ready()
        assert not up.pids("redis-server")
        assert len(up.running()) == 5  # itself, etcd, the gateway, the backend and the process of its model
        up.process.kill()
        up.process.wait()
        until(lambda: not up.running(), 5.0)
