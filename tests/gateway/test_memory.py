from pathlib import Path

import pytest

from gateway.memory import Memory

V1_UNLIMITED = 9223372036854771712


def v2(mount: Path, path: str, limit: str, current: int, inactive: int = 0, active: int = 0) -> None:
    group = mount / path
    group.mkdir(parents=True, exist_ok=True)
    (group / "memory.max").write_text(f"{limit}\n")
    (group / "memory.current").write_text(f"{current}\n")
    (group / "memory.stat").write_text(f"anon 5\nfile 9\ninactive_file {inactive}\nactive_file {active}\n")


def v1(mount: Path, path: str, limit: int, usage: int, inactive: int = 0) -> None:
    group = mount / "memory" / path
    group.mkdir(parents=True, exist_ok=True)
    (group / "memory.limit_in_bytes").write_text(f"{limit}\n")
    (group / "memory.usage_in_bytes").write_text(f"{usage}\n")
    (group / "memory.stat").write_text(f"inactive_file 1\ntotal_inactive_file {inactive}\ntotal_active_file 0\n")


def memory(mount: Path, own: str) -> Memory:
    (mount / "own").write_text(own)
    return Memory(mount, mount / "own")


@pytest.mark.parametrize(
    ("limit", "current", "inactive", "active", "share"),
    [
        ("1000", 930, 0, 0, 0.93),
        ("1000", 930, 400, 30, 0.5),  # the cache of files is not what kills
        ("1000", 100, 200, 0, 0.0),
        ("max", 930, 0, 0, None),
        ("what", 930, 0, 0, None),
        ("0", 930, 0, 0, None),
    ],
)
def test_version_2(tmp_path, limit, current, inactive, active, share) -> None:
    v2(tmp_path, "a/b", limit, current, inactive, active)
    assert memory(tmp_path, "0::/a/b\n").share() == share


@pytest.mark.parametrize(("limit", "share"), [(1000, 0.75), (V1_UNLIMITED, None)])
def test_version_1(tmp_path, limit, share) -> None:
    v1(tmp_path, "a", limit, 800, 50)
    assert memory(tmp_path, "9:cpu:/a\n4:memory:/a\n1:name=systemd:/a\n0::/\n").share() == share


def test_the_fullest_of_the_groups_around_it_decides(tmp_path) -> None:
    v2(tmp_path, "pod/app", "1000", 100)
    v2(tmp_path, "pod", "1000", 960)
    v2(tmp_path, "elsewhere", "1000", 1000)
    found = memory(tmp_path, "0::/pod/app\n")
    assert found.share() == 0.96
    v2(tmp_path, "pod", "2000", 960)  # limits may be raised while it runs
    assert found.share() == 0.48


def test_in_a_container_the_path_of_the_host_leads_nowhere_and_the_mount_is_its_own(tmp_path) -> None:
    v2(tmp_path, "", "1000", 940)
    assert memory(tmp_path, "0::/host/kubepods/x\n").share() == 0.94


def test_a_group_that_goes_away_tells_nothing(tmp_path) -> None:
    v2(tmp_path, "a", "1000", 940)
    found = memory(tmp_path, "0::/a\n")
    (tmp_path / "a" / "memory.current").unlink()
    assert found.share() is None


def test_a_machine_without_groups_has_no_limit(tmp_path) -> None:
    assert Memory(tmp_path, tmp_path / "own").share() is None


def test_the_real_one_is_a_share_or_nothing() -> None:
    share = Memory().share()
    assert share is None or 0 <= share < 1.5
