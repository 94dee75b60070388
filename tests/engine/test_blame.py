"""A step that fails costs the guilty only, and finding them is cheap."""

import logging
import math
import weakref
from collections.abc import Sequence as Seq

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from chorus.engine import blame
from chorus.engine.messages import Sampling
from chorus.engine.schedule import Chunk
from chorus.engine.sequence import Key, Sequence
from chorus.errors import InternalError, ResourceExhausted


def chunks_of(*request_ids: int) -> list[Chunk]:
    """A decode for each; an id that comes again is another output of the same request."""
    return [
        Chunk(Sequence(request_id, (5,), Sampling(max_tokens=9), index=request_ids[:i].count(request_id)), 0, 1, True)
        for i, request_id in enumerate(request_ids)
    ]


class Device:
    """Computes chunks unless a guilty request is among them; counts how often it was asked."""

    def __init__(self, guilty: set[int], error: Exception | None = None) -> None:
        self.guilty = guilty
        self.error = error or RuntimeError("shapes do not match")
        self.passes: list[list[Key]] = []

    def compute(self, chunks: Seq[Chunk]) -> dict[Key, int]:
        self.passes.append([chunk.seq.key for chunk in chunks])
        if any(chunk.seq.request_id in self.guilty for chunk in chunks):
            raise self.error
        return {chunk.seq.key: 100 * chunk.seq.request_id + chunk.seq.index for chunk in chunks}


def condemned(verdict: blame.Verdict[int]) -> set[int]:
    return {request_id for found in verdict.guilty for request_id in found.request_ids}


@given(st.integers(1, 64).flatmap(lambda n: st.tuples(st.just(n), st.sets(st.integers(0, n - 1), max_size=4))))
def test_the_guilty_alone_fail_after_few_passes(case: tuple[int, set[int]]) -> None:
    count, guilty = case
    device = Device(guilty)
    verdict = blame.run(chunks_of(*range(count)), device.compute)
    assert condemned(verdict) == guilty
    assert verdict.results == {(i, 0): 100 * i for i in range(count) if i not in guilty}
    assert len(device.passes) <= 1 + 2 * math.ceil(math.log2(count)) * len(guilty)


def test_when_many_are_guilty_the_search_ends_and_nobody_is_forgotten() -> None:
    device = Device(set(range(64)))
    verdict = blame.run(chunks_of(*range(64)), device.compute)
    assert condemned(verdict) == set(range(64))
    assert len(device.passes) < 20


def test_after_the_search_has_ended_what_runs_still_runs() -> None:
    device = Device(set(range(8)))
    verdict = blame.run(chunks_of(*range(64)), device.compute)
    assert set(range(8)) <= condemned(verdict)
    assert set(verdict.results) >= {(i, 0) for i in range(32, 64)}
    assert len(verdict.results) + len(condemned(verdict)) == 64


def test_outputs_of_one_request_are_guilty_together_and_are_not_looked_for_twice() -> None:
    device = Device({2})
    verdict = blame.run(chunks_of(1, 2, 2, 2, 2, 3), device.compute)
    assert [found.request_ids for found in verdict.guilty] == [[2]]
    assert {(1, 0), (3, 0)} <= verdict.results.keys()
    assert len([keys for keys in device.passes if {key[0] for key in keys} == {2}]) == 1


@pytest.mark.parametrize("room", [1, 5, 8, 15])
def test_a_step_that_is_too_large_for_the_memory_runs_in_parts(room: int) -> None:
    parts: list[int] = []

    def compute(chunks: Seq[Chunk]) -> dict[Key, int]:
        if len(chunks) > room:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        parts.append(len(chunks))
        return {chunk.seq.key: 0 for chunk in chunks}

    verdict = blame.run(chunks_of(*range(16)), compute)
    assert (len(verdict.results), verdict.guilty) == (16, [])
    assert sum(parts) == 16


def test_a_fault_that_has_passed_is_nobodys() -> None:
    failures = [RuntimeError("once")]

    def compute(chunks: Seq[Chunk]) -> dict[Key, int]:
        if failures:
            raise failures.pop()
        return {chunk.seq.key: 0 for chunk in chunks}

    assert blame.run(chunks_of(1, 2, 3), compute).guilty == []


def test_what_a_failed_part_held_is_gone_before_the_next_runs() -> None:
    class Activations:
        pass

    held: list[weakref.ref[Activations]] = []

    def compute(chunks: Seq[Chunk]) -> dict[Key, int]:
        assert all(ref() is None for ref in held)
        activations = Activations()
        held.append(weakref.ref(activations))
        if any(chunk.seq.request_id == 1 for chunk in chunks):
            raise MemoryError
        return {chunk.seq.key: 0 for chunk in chunks}

    assert condemned(blame.run(chunks_of(1, 2, 3, 4), compute)) == {1}
    assert len(held) == 5


@pytest.mark.parametrize(
    "error",
    [
        torch.AcceleratorError("CUDA error: device-side assert triggered"),
        RuntimeError("CUDA error: an illegal memory access was encountered"),
    ],
)
def test_a_lost_device_is_nobodys_fault(error: Exception) -> None:
    device = Device({1}, error)
    with pytest.raises(type(error), match="CUDA error"):
        blame.run(chunks_of(0, 1, 2), device.compute)
    assert len(device.passes) == 1


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        torch.AcceleratorError("CUDA error: out of memory"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:119] . DefaultCPUAllocator: can't allocate memory: you tried"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    ],
    ids=str,
)
def test_who_needs_too_much_memory_is_told_when_to_come_back(error: Exception) -> None:
    verdict = blame.run(chunks_of(0, 1, 2), Device({1}, error).compute)
    assert condemned(verdict) == {1}
    told = blame.charge(verdict.guilty[0].error)
    assert isinstance(told, ResourceExhausted)
    assert (told.reason, told.retry_after_s) == ("STEP_OUT_OF_MEMORY", 1.0)


def test_who_is_guilty_is_told_no_more_than_an_incident_that_the_log_has(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.ERROR):
        told = blame.charge(RuntimeError("secret"))
    assert isinstance(told, InternalError)
    assert "secret" not in told.message
    assert told.message.split()[-1] in caplog.text
