"""Where a decode step's time goes: the engine's own functions, timed from outside, each without what it calls.

A clock is read before and after each call of the functions below: 0.2 ms of a step of 30 ms, and nothing in operators
themselves, so a part's share is that of an undisturbed step. Needs work to be done when a function returns: CPU only.
A recorded step is a single call, so while a profile is taken none is replayed: its parts are those of the step that
Python asks for, operator by operator.
"""

import time
from collections.abc import Callable
from importlib import import_module
from types import TracebackType
from typing import Any, Self

from chorus.engine.graphs import StepGraphs

REST_OF_FORWARD = "norms, rotary, elementwise"
OTHER = "other"

# (part, module, name in it): renamed ones fail loudly, at the start.
POINTS = (
    ("linears", "chorus.models.linear", "AdaptedLinear.forward"),
    ("linears", "chorus.models.linear", "AdaptedLinear.add_to"),
    ("linears", "chorus.models.linear", "AdaptedConv1D.forward"),
    ("linears", "chorus.models.group", "LinearGroup.__call__"),
    ("linears", "chorus.kernels.packed_linear", "PackedWeight.gated"),  # with act(gate) * up, where that is one kernel
    (REST_OF_FORWARD, "chorus.kernels.packed_linear", "gated_mul"),
    ("deltas", "chorus.models.linear", "low_rank"),
    ("deltas", "chorus.models.group", "low_rank_group"),
    ("deltas", "chorus.models.embedding", "low_rank"),
    ("attention", "chorus.models.attention", "store_kv"),
    ("attention", "chorus.models.attention", "paged_attention"),
    ("attention", "chorus.models.block", "qk_norm_rope_store"),
    ("attention", "chorus.models.block", "paged_attention"),
    (REST_OF_FORWARD, "chorus.engine.runner", "Runner.forward"),
    ("sampling", "chorus.engine.evaluate", "draw"),
    ("sampling", "chorus.engine.readback", "Readback.read"),
    ("scheduling, layout", "chorus.engine.scheduler", "Scheduler.schedule"),
    ("scheduling, layout", "chorus.engine.scheduler", "Scheduler.advance"),
    ("scheduling, layout", "chorus.engine.engine", "lay_out"),
    ("scheduling, layout", "chorus.adapters.pool", "AdapterPool.plans"),
    (OTHER, "chorus.engine.engine", "Engine.step"),
)


class StepProfile:
    """While entered, counts the seconds of each part."""

    names = tuple(dict.fromkeys(part for part, _, _ in POINTS))

    def __init__(self) -> None:
        self._spent: dict[str, float] = {}
        self._inner = [0.0]  # of each call under way, the seconds of what it has called
        self._replaced: list[tuple[Any, str, Any]] = []

    def __enter__(self) -> Self:
        for part, module, name in POINTS:
            owner: Any = import_module(module)
            *classes, attribute = name.split(".")
            for inner in classes:
                owner = getattr(owner, inner)
            function = getattr(owner, attribute)
            setattr(owner, attribute, self._timed(part, function))
            self._replaced.append((owner, attribute, function))
        self._replaced.append((StepGraphs, "run", StepGraphs.run))
        StepGraphs.run = lambda *batch: None  # type: ignore[method-assign]
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        for owner, attribute, function in self._replaced:
            setattr(owner, attribute, function)

    def take(self) -> dict[str, float]:
        """Seconds of each part since the last call."""
        spent, self._spent = self._spent, {}
        return spent

    def _timed(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*arguments: Any, **options: Any) -> Any:
            self._inner.append(0.0)
            began = time.perf_counter()
            try:
                return function(*arguments, **options)
            finally:
                seconds = time.perf_counter() - began
                self._spent[part] = self._spent.get(part, 0.0) + seconds - self._inner.pop()
                self._inner[-1] += seconds

        return timed
