"""How much memory there is to grant: the machine's, or less where a control group says so."""

from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest
import torch

from chorus.config import ServerConfig
from chorus.engine import memory
from chorus.engine.cgroup import memory_limit
from chorus.engine.memory import plan_memory
from chorus.errors import FailedPrecondition
from chorus.models.base import Base
from chorus.models.sites import Site

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


def test_a_device_has_to_hold_the_budgets_and_a_step_beside_the_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """Llama-3-8B's sites: a step of 8,192 tokens has 800 MiB of MLP, and 2,254 of its vocabulary's logits."""
    sites = [
        Site("model.embed_tokens", 128256, 4096, is_embedding=True),
        Site("model.layers.0.mlp.gate_proj", 4096, 14336),
        Site("model.layers.0.mlp.down_proj", 14336, 4096),
        Site("lm_head", 4096, 128256, is_lm_head=True),
    ]
    llama = SimpleNamespace(
        device=torch.device("cuda"),
        dtype=torch.bfloat16,
        sites={site.name: site for site in sites},
        facts=SimpleNamespace(vocab_size=128256, context_length=8192),
        layers=32,
        kv_heads=8,
        head_dim=128,
    )
    base = cast(Base, llama)
    config = ServerConfig(kv_cache_mb=8000, adapter_memory_mb=1000, max_step_tokens=8192, max_rows=256)
    needed = (8000 + 1000) * 2**20 + 8192 * (3 * 14336 + 2 * 4096) * 2 + (8192 * 2 + 256 * 8) * 128256
    monkeypatch.setattr(memory, "_free_device_bytes", lambda: needed)
    assert plan_memory(base, config).kv_blocks == 8000 * 2**20 // (2 * 32 * 8 * 128 * 16 * 2)
    monkeypatch.setattr(memory, "_free_device_bytes", lambda: needed - 1)
    with pytest.raises(FailedPrecondition, match=r"3,\d{3} MiB for a step .* MiB that the weights leave"):
        plan_memory(base, config)
