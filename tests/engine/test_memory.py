"""How much memory there is to grant: the machine's, or less where a control group says so."""

from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest

from chorus.config import ServerConfig
from chorus.engine import memory
from chorus.engine.cgroup import memory_limit
from chorus.engine.memory import plan_memory
from chorus.errors import FailedPrecondition
from chorus.models.base import Base

GIB = 2**30


def tree(root: Path, groups: str, limits: dict[str, str]) -> Path:
    """A machine's `proc` and `sys`, with a file for each limit."""
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/self/cgroup").write_text(groups)
    for name, limit in limits.items():
        file = root / "sys/fs/cgroup" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"{limit}\n")
    return root


def test_a_limit_of_version_2_is_found_in_our_group(tmp_path: Path) -> None:
    root = tree(tmp_path, "0::/pod/app\n", {"pod/app/memory.max": f"{2 * GIB}"})
    assert memory_limit(root) == 2 * GIB


def test_the_smallest_limit_of_all_groups_around_us_holds(tmp_path: Path) -> None:
    limits = {"memory.max": "max", "pod/memory.max": f"{GIB}", "pod/app/memory.max": f"{2 * GIB}"}
    assert memory_limit(tree(tmp_path, "0::/pod/app\n", limits)) == GIB


def test_a_limit_of_version_1_is_found_beside_other_controllers(tmp_path: Path) -> None:
    groups = "9:name=systemd:/x\n7:cpu,cpuacct:/\n4:memory:/app\n0::/\n"
    root = tree(tmp_path, groups, {"memory/app/memory.limit_in_bytes": f"{3 * GIB}"})
    assert memory_limit(root) == 3 * GIB


def test_a_container_that_sees_the_hosts_path_finds_its_limit_at_the_top(tmp_path: Path) -> None:
    root = tree(tmp_path, "4:memory:/docker/1f2e\n", {"memory/memory.limit_in_bytes": f"{GIB}"})
    assert memory_limit(root) == GIB


@pytest.mark.parametrize("groups", ["0::/\n", "0::/app\n", ""], ids=["unlimited", "no such file", "no groups"])
def test_without_a_limit_there_is_none(tmp_path: Path, groups: str) -> None:
    assert memory_limit(tree(tmp_path, groups, {"memory.max": "max"})) is None


def test_on_a_machine_without_control_groups_there_is_none(tmp_path: Path) -> None:
    assert memory_limit(tmp_path) is None


def test_a_server_that_is_granted_more_than_its_container_has_does_not_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "memory_limit", lambda: GIB // 4)
    base = cast(Base, SimpleNamespace(device=SimpleNamespace(type="cpu")))
    with pytest.raises(FailedPrecondition, match="more than the 256 MiB of this container; grant less"):
        plan_memory(base, ServerConfig(kv_cache_mb=200, adapter_memory_mb=57))
