"""Records what a computation asks of torch and asks it again, as a CUDA graph does: same memory, same numbers.

Whatever the host decided while it was recorded is fixed, so a replay with other inputs is wrong wherever something
depended on them that does not lie in static memory. What a capture refuses, reading from the device, is refused here.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

READS = ("aten._local_scalar_dense", "aten.item", "aten.nonzero", "aten.equal", "aten.is_nonzero")


class _Recording(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.calls: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if str(func).startswith(READS):
            raise RuntimeError(f"{func} waits for the device")
        out = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, out))
        return out


class Tape:
    """A `Record`. Counts what was recorded and replayed."""

    def __init__(self) -> None:
        self.recorded = self.replayed = 0

    def __call__(self, run: Callable[[], Tensor]) -> Callable[[], Tensor]:
        with _Recording() as recording:
            recorded = run()
        self.recorded += 1

        def replay() -> Tensor:
            self.replayed += 1
            now: dict[int, Tensor] = {}

            def current(value: Any) -> Any:
                return now.get(id(value), value) if isinstance(value, Tensor) else value

            for func, args, kwargs, out in recording.calls:
                with torch.inference_mode():
                    again = func(*tree_map(current, args), **tree_map(current, kwargs))
                _pair(out, again, now)
            return now[id(recorded)]

        return replay


def _pair(before: Any, after: Any, now: dict[int, Tensor]) -> None:
    if isinstance(before, Tensor):
        now[id(before)] = after
    elif isinstance(before, tuple | list):
        for one, other in zip(before, after, strict=True):
            _pair(one, other, now)
