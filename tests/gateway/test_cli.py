"""Each command's answer, one-line errors and exit codes. What runs long is tested with the module that does it."""

from __future__ import annotations

import base64
import json
import os
import subprocess
import sys

import pytest

from gateway import cli
from gateway.home import AUDIENCE, ISSUER
from policies import identity

POLICY = """\
version: 1
anonymous: true
routes:
  - name: all
    to: [{service: tiny}]
"""


@pytest.fixture
def run(capsys):
    """Runs `weir ARGUMENTS`; returns the exit code, stdout and stderr."""

    def run(*arguments):
        with pytest.raises(SystemExit) as ended:
            cli.main([str(argument) for argument in arguments])
        said = capsys.readouterr()
        return ended.value.code, said.out, said.err

    return run


@pytest.fixture
def key(tmp_path):
    path = tmp_path / "key.pem"
    path.write_bytes(identity.generate_signing_key())
    return path


TELL_THEIR_OWN_HELP = ("backend", "bench")  # the programs that they turn into


def commands(group=cli.weir, path=()):
    for name, command in group.commands.items():
        if name not in TELL_THEIR_OWN_HELP:
            yield (*path, name)
        if hasattr(command, "commands"):
            yield from commands(command, (*path, name))


@pytest.mark.parametrize("command", [(), *commands()], ids=" ".join)
def test_every_command_has_help_with_an_example(command, run):
    code, out, err = run(*command, "--help")
    assert (code, err) == (0, "")
    assert "Example: weir" in out


def test_help_is_instant():
    """What makes a start slow is not imported for it."""
    heavy = ("aiohttp", "pydantic", "grpc", "jwt", "rich", "torch", "uvloop", "opentelemetry", "redis")
    code = f"import sys, gateway.cli; print([name for name in {heavy} if name in sys.modules])"
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert answer.stdout == "[]\n"


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (("nonsense",), "weir: No such command 'nonsense'; see `weir --help`"),
        (
            ("up", "--port", "0"),
            "weir: Invalid value for '--port': 0 is not in the range 1<=x<=65535; see `weir up --help`",
        ),
        (("token", "--sub", "ada"), "weir: Missing option '--key'; see `weir token --help`"),
        (
            ("token", "--sub", "a", "--key", "{key}", "--ttl", "soon"),
            "weir: --ttl: `soon` is not a duration: expected one",
        ),
        (("token", "--sub", "a", "--key", "{policy}"), "weir: --key {policy}: "),
        (("serve", "--config", "{policy}"), "weir: {policy}:"),
        (("backends", "--etcd", "localhost:2379"), "weir: --etcd: `localhost:2379` is not an http(s) URL"),
    ],
)
def test_wrong_use_is_one_line_and_2(arguments, line, run, key, tmp_path):
    policy = tmp_path / "policy.yaml"
    policy.write_text("a: [")
    code, out, err = run(*(argument.format(key=key, policy=policy) for argument in arguments))
    assert (code, out) == (2, "")
    assert err.startswith(line.format(key=key, policy=policy))
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    "arguments",
    [
        ("token", "--sub", "ada", "--key"),
        ("serve", "--config"),
        ("policy", "check"),
    ],
    ids=lambda arguments: arguments[0],
)
def test_a_missing_file_is_one_line_and_3(arguments, run, tmp_path):
    missing = tmp_path / "missing"
    assert run(*arguments, missing) == (3, "", f"weir: cannot read {missing}: No such file or directory\n")


def test_a_missing_part_is_one_line_and_3(run, monkeypatch):
    monkeypatch.setattr(cli.importlib.util, "find_spec", lambda name: None)
    code, _, err = run("bench")
    assert (code, err) == (
        3,
        "weir: the benchmarks are not part of this installation; run it in a clone of the repository\n",
    )


@pytest.mark.parametrize(
    ("command", "module"), [("backend", "reference_backend"), ("bench", "benchmarks")]
)  # fmt: skip
def test_what_has_its_own_program_becomes_it(command, module, run, monkeypatch):
    became = []
    monkeypatch.setattr(cli.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(os, "execv", lambda program, argv: became.append((program, argv)))
    assert run(command, "--model", "tiny", "--help")[0] == 0
    assert became == [(sys.executable, [sys.executable, "-m", module, "--model", "tiny", "--help"])]


def test_token_is_what_the_policy_of_up_takes(run, key):
    code, out, _ = run("token", "--sub", "ada", "--group", "team", "--group", "ops", "--ttl", "5m", "--key", key)
    assert code == 0
    payload = out.split(".")[1]
    claims = json.loads(base64.urlsafe_b64decode(payload + "=" * (-len(payload) % 4)))
    assert (claims["sub"], claims["iss"], claims["aud"]) == ("ada", ISSUER, AUDIENCE)
    assert set(claims["groups"]) == {"team", "ops"}
    assert claims["exp"] - claims["iat"] == 300


def test_policy_check(run, tmp_path):
    policy = tmp_path / "policy.yaml"
    policy.write_text(POLICY)
    assert run("policy", "check", policy) == (0, f"{policy}: ok\n", "")
    policy.write_text(POLICY.replace("service", "servise").replace("version: 1", "version: 9"))
    code, out, _ = run("policy", "check", policy)
    assert code == 1
    assert [line.split(" ")[0] for line in out.splitlines()] == [f"{policy}:1:10", f"{policy}:5:10", f"{policy}:5:11"]


@pytest.mark.parametrize(
    ("keys", "why"),
    [
        (None, "No such file or directory"),
        (b"{}", "no keys: a set is"),
        (b"[", "not a JSON object"),
    ],
)
def test_policy_check_says_whose_keys_are_not_there_and_that_is_no_mistake(keys, why, run, tmp_path):
    issuer = "issuers: [{issuer: https://idp, audience: a, algorithms: [ES256], jwks: keys.json}]\n"
    (tmp_path / "policy.yaml").write_text(POLICY + issuer)
    if keys is not None:
        (tmp_path / "keys.json").write_bytes(keys)
    code, out, err = run("policy", "check", tmp_path / "policy.yaml")
    assert (code, out) == (0, f"{tmp_path / 'policy.yaml'}: ok\n")
    assert err.startswith(f"weir: {tmp_path / 'keys.json'}: {why}")
    assert err.endswith("; until then nobody gets in with a token of https://idp\n")


def test_policy_check_is_quiet_about_keys_that_are_there(run, key, tmp_path):
    issuer = "issuers: [{issuer: https://idp, audience: a, algorithms: [ES256], jwks: keys.json}]\n"
    (tmp_path / "policy.yaml").write_text(POLICY + issuer)
    (tmp_path / "keys.json").write_bytes(identity.jwks_of(key.read_bytes()))
    assert run("policy", "check", tmp_path / "policy.yaml") == (0, f"{tmp_path / 'policy.yaml'}: ok\n", "")


def test_policy_schema_is_json(run):
    code, out, _ = run("policy", "schema")
    assert code == 0
    assert json.loads(out)["title"] == "PolicyFile"
