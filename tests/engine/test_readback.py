"""What is read back is what the device had when it was asked, and nobody waits for more."""

from typing import Any

import pytest
import torch

from chorus.engine.readback import Readback


class Device:
    """Notes what it is asked, in order. Its memory on the host says whether it is pinned."""

    is_cuda = True
    shape = (2,)
    dtype = torch.int64

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.asked: list[str] = []
        device = self

        class Host:
            def __init__(self, *shape: Any, pin_memory: bool = False, **rest: Any) -> None:
                assert pin_memory, "the copy would wait"

            def copy_(self, tensor: Any, *, non_blocking: bool = False) -> None:
                assert tensor is device
                assert non_blocking
                device.asked.append("copy")

            def tolist(self) -> list[int]:
                device.asked.append("look")
                return [1, 2]

        class Event:
            def record(self) -> None:
                device.asked.append("record")

            def synchronize(self) -> None:
                device.asked.append("wait")

        monkeypatch.setattr(torch, "empty", Host)
        monkeypatch.setattr(torch.cuda, "Event", Event)


def test_the_copy_is_under_way_at_once_and_is_waited_for_before_it_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    device: Any = Device(monkeypatch)
    numbers = Readback[int](device)
    assert device.asked == ["copy", "record"]
    assert numbers.read() == [1, 2]
    assert device.asked == ["copy", "record", "wait", "look"]


def test_on_a_cpu_the_numbers_are_there() -> None:
    assert Readback[list[int]](torch.tensor([[1], [2]])).read() == [[1], [2]]
