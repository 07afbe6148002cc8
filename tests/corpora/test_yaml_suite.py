"""The YAML test suite (https://github.com/yaml/yaml-test-suite) as policies of a running gateway, which serves on under the
last good one. As policy files they are in tests/integration/test_policy_sources.py; how they are read, in
tests/policies/test_yaml_tree.py.
"""

import re

import pytest
import yaml

from discovery.etcd import EtcdClient, EtcdSettings
from policies import document
from policies.problems import InvalidDocument, Problem
from tests.support.admin_client import api, scrape
from tests.support.corpora import yaml_documents
from tests.support.etcd_server import EtcdServer
from tests.support.policy_text import BASE, VALID
from tests.support.raw_client import RawClient
from tests.support.running_gateway import OPEN_POLICY, etcd_gateway, until
from tests.support.scripted_backend import ScriptedBackend

pytestmark = pytest.mark.integration

LOOP = "uvloop"


@pytest.mark.parametrize("before", ["", VALID], ids=["alone", "behind a good policy"])
def test_each_problem_stands_where_the_document_has_a_place(before) -> None:
    """Line and column are those of a character, or of the end of a line. What is taken says no more than what is before."""
    taken = set()
    for name, text in yaml_documents().items():
        whole = before.encode() + text
        try:
            document.parse(whole, base=BASE)
        except InvalidDocument as refused:
            check_places(refused.problems, whole.decode(), name)
        else:
            taken.add(name)
            assert yaml.safe_load(whole) == yaml.safe_load(before), name
    assert (len(taken) > 0) is bool(before)


def check_places(problems: tuple[Problem, ...], text: str, name: str) -> None:
    lines = re.split(r"\r\n|[\n\r\x85\u2028\u2029]", text)  # as YAML 1.1 has them
    assert problems
    for problem in problems:
        assert 1 <= problem.line <= len(lines), name
        assert 1 <= problem.column <= len(lines[problem.line - 1]) + 1, (name, problem)
        assert problem.text("policy.yaml").isprintable(), name


async def test_a_gateway_serves_on_under_the_last_good_policy(tmp_path, capfd) -> None:
    """Each document is put into etcd in the place of the policy, one after the other, with a request after each."""
    documents = sorted(set(yaml_documents().values()))
    key = "/weir/v1/policies/default"
    with EtcdServer(tmp_path) as etcd:
        async with EtcdClient(EtcdSettings((etcd.url,))) as writer, ScriptedBackend() as backend:
            await writer.put(key, OPEN_POLICY.encode())
            await writer.put("/weir/v1/backends/tiny/a", b'{"url": "%b"}' % backend.url.encode())
            async with (
                etcd_gateway(tmp_path, etcd.url, policy=None, place="{etcd: default}") as gateway,
                RawClient(gateway.data_address) as client,
            ):
                await until(lambda: [each.healthy for each in gateway.fleet.backends.values()] == [True])
                source, good = gateway.policy, gateway.policy.policy
                error = None
                for text in documents:
                    await writer.put(key, text)
                    await until(lambda error=error: source.last_error is not error)
                    error = source.last_error
                    assert all(re.match(r"etcd:policies/default:[1-9]\d*:[1-9]\d* ", line) for line in error.errors)
                    answer = await client.ask()
                    assert (answer.status, answer.headers["x-weir-policy"]) == (200, good.version)
                    assert source.policy is good
                told, shown = await scrape(gateway), await api(gateway, "policy")
                await writer.put(key, OPEN_POLICY.replace("name: chat", "name: after").encode())
                await until(lambda: source.policy is not good)
                assert (await client.ask()).headers["x-weir-policy"] == source.policy.version
    assert told.value("weir_policy_reload_total", result="invalid") == len(documents)
    assert told.value("weir_policy_reload_total", result="ok") == 1
    assert told.value("weir_policy_info", version=good.version) == 1
    assert shown["last_error"]["errors"] == list(error.errors)
    assert all(line.isprintable() for line in capfd.readouterr().out.split("\n"))
