"""The lines that are fitted to step times, and what a start's log says."""

from pathlib import Path

import pytest

import growth
import registered
import startup
from chorus.adapters import records
from chorus.adapters.names import AdapterName
from chorus.adapters.records import VersionRecord
from loads.open_loop import TENANT, adapter_name


def test_a_line_finds_what_made_the_times_and_how_far_off_the_worst_one_is() -> None:
    times = [2.0 + 0.5 * rows for rows in (1, 4, 16, 64)]
    assert growth.line([1, 4, 16, 64], times) == pytest.approx({"fixed": 2.0, "each": 0.5, "worst": 0.0})
    assert growth.line([1, 4, 16, 64], [2.5, 4.0, 13.0, 34.0])["worst"] > 0.1


def test_contestants_take_turns_and_the_first_turn_does_not_count() -> None:
    calls: list[str] = []

    def measure(name: str, value: float) -> float:
        calls.append(name)
        return value if len(calls) > 2 else 99.0

    got = growth.in_turns(3, {"a": lambda: measure("a", 1.0), "b": lambda: measure("b", 2.0)})
    assert calls == ["a", "b"] * 4
    assert got == {"a": 1.0, "b": 2.0}


def test_stages_of_a_start_come_from_its_log() -> None:
    log = "\n".join(
        [
            "not a line of ours",
            '{"time": "2026-01-01T00:00:02.000+00:00", "message": "the engine\'s packages are imported"}',
            '{"time": "2026-01-01T00:00:02.250+00:00", "message": "the base\'s weights are read and hashed"}',
            '{"time": "2026-01-01T00:00:03.000+00:00", "message": "the base\'s weights are packed"}',
        ]
    )
    at = startup.stages(log)
    assert list(at) == ["imports", "weights", "packing"]
    assert at["weights"] - at["imports"] == pytest.approx(0.25)
    assert at["packing"] - at["weights"] == pytest.approx(0.75)


def test_a_registry_is_filled_with_names_of_one_content(tmp_path: Path) -> None:
    name = AdapterName(TENANT, adapter_name(0))
    version = VersionRecord("ab" * 32, "lora", 8, 1000, 14, 1.0)
    tenant = tmp_path / "registry" / TENANT
    tenant.mkdir(parents=True)
    record = records.with_version(records.new_adapter(name, 1.0), version, "live", 1.0)
    (tenant / f"{adapter_name(0)}.json").write_bytes(records.to_json(record))
    registered.register(tmp_path, 5)
    found = [records.from_json(path.read_bytes(), path.name) for path in sorted(tenant.iterdir())]
    assert [r.name.adapter for r in found] == [adapter_name(i) for i in range(5)]
    assert {r.versions[0].digest for r in found} == {"ab" * 32}
