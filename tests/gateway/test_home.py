from __future__ import annotations

import stat
import subprocess
import sys

import pytest

from gateway.children import CannotRun
from gateway.home import AUDIENCE, ISSUER, POLICY, Home
from policies import document, identity


@pytest.fixture
def home(tmp_path):
    return Home(tmp_path / ".weir")


def prepared(home):
    with home.locked():
        home.prepare()
    return home


def test_the_policy_it_writes_is_valid_and_finds_its_keys(home):
    prepared(home)
    policy = document.parse(home.policy.read_bytes(), base=home.directory)
    assert [(issuer.issuer, issuer.audience, issuer.jwks) for issuer in policy.issuers] == [
        (ISSUER, (AUDIENCE,), str(home.jwks))
    ]


def test_a_token_of_its_key_is_verified_by_its_policy(home):
    prepared(home)
    [issuer] = document.parse(home.policy.read_bytes(), base=home.directory).issuers
    keys = identity.parse_jwks(home.jwks.read_bytes(), issuer.algorithms)
    token = identity.mint(
        home.key.read_bytes(), sub="ada", groups=["team"], issuer=ISSUER, audience=AUDIENCE, ttl=60, wall=1000.0
    )
    principal = identity.verify(token, {ISSUER: (issuer, keys)}, 1001.0)
    assert (principal.consumer, principal.groups) == ("ada", {"team"})


def test_secrets_are_the_owners_alone(home):
    prepared(home)
    assert stat.S_IMODE(home.key.stat().st_mode) == 0o600
    assert stat.S_IMODE(home.directory.stat().st_mode) == 0o700


def test_what_the_user_edited_stays_and_logs_of_the_last_time_are_kept(home):
    prepared(home)
    key = home.key.read_text()
    home.policy.write_text(POLICY + "# mine\n")
    (home.logs / "etcd.log").write_text("before")
    prepared(home)
    assert home.policy.read_text().endswith("# mine\n")
    assert home.key.read_text() == key
    assert (home.logs / "etcd.log.old").read_text() == "before"
    assert not (home.logs / "etcd.log").exists()


def test_redis_is_named_only_in_the_config_that_has_it(home):
    prepared(home)
    assert "redis:" in home.config(redis=True).read_text()
    assert "redis:" not in home.config(redis=False).read_text()


def test_a_key_that_is_no_key_is_named(home):
    prepared(home)
    home.key.write_text("nonsense")
    with pytest.raises(CannotRun, match=r"signing-key\.pem: .*; delete it to get a new one"):
        prepared(home)


def test_one_at_a_time_and_the_lock_ends_with_its_process(home):
    home.directory.mkdir()
    code = (
        "import fcntl, sys, time; file = open(sys.argv[1], 'w'); fcntl.flock(file, fcntl.LOCK_EX);"
        "print('held', flush=True); time.sleep(60)"
    )
    lock = str(home.directory / "lock")
    holder = subprocess.Popen([sys.executable, "-I", "-S", "-c", code, lock], stdout=subprocess.PIPE)
    try:
        assert holder.stdout.readline() == b"held\n"
        with pytest.raises(CannotRun, match="another `weir up` runs in"), home.locked():
            pass
    finally:
        holder.kill()
        holder.communicate()
    with home.locked():
        pass


def test_a_place_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    home = Home(tmp_path / "file" / ".weir")
    with pytest.raises(CannotRun, match=r"cannot write .*; start it in a folder of yours"), home.locked():
        pass
