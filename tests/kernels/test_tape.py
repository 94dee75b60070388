"""Tapes: a computation recorded on a CPU gives for other numbers in the same memory what it would give for them."""

import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from chorus.kernels import Norm, PackedWeight, residual_norm, silu_mul
from chorus.kernels.native import packed_linear as native
from chorus.kernels.native.tape import Memory, Tapes
from support.rows import noise

WIDTH = 64


@pytest.fixture(autouse=True)
def no_gradients() -> Iterator[None]:
    with torch.inference_mode():
        yield


class Layer:
    """Kernels with torch's operators between them."""

    def __init__(self, seed: int) -> None:
        self.norm = Norm("rms", noise(seed, WIDTH).bfloat16(), 1e-6)
        self.gate_up = PackedWeight(noise(seed + 1, 6 * WIDTH, WIDTH).bfloat16() / 8)
        self.down = PackedWeight(noise(seed + 2, WIDTH, 3 * WIDTH).bfloat16() / 8)

    def __call__(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up.linear(residual_norm(x, None, self.norm)).chunk(2, dim=-1)
        out = self.down.linear(silu_mul(gate, up), residual=x)
        values, _ = F.softmax(out.float(), dim=-1).sort(dim=-1)
        return out.add_(values.to(out.dtype))


def model(layers: int = 3) -> Callable[[Tensor], Tensor]:
    parts = [Layer(10 * i) for i in range(layers)]

    def run(x: Tensor) -> Tensor:
        x = x.clone()
        for part in parts:
            x = part(x)
        return x

    return run


def test_a_replay_gives_what_the_computation_gives_for_the_numbers_that_are_there_now() -> None:
    run, x = model(), noise(0, 16, WIDTH).bfloat16()
    first = run(x).clone()
    replay = Tapes()(lambda: run(x))
    for seed in (1, 2):
        x.copy_(noise(seed, 16, WIDTH))
        assert torch.equal(replay(), run(x))
    x.copy_(noise(0, 16, WIDTH))
    assert torch.equal(replay(), first)


def test_what_recording_computes_counts() -> None:
    total = torch.zeros(4)
    replay = Tapes()(lambda: total.add_(1))
    assert float(total[0]) == 1
    replay()
    assert float(total[0]) == 2


def test_threads_change_no_bit_of_a_replay() -> None:
    weight, x = PackedWeight(noise(1, 1024, 1024).bfloat16() / 32), noise(0, 16, 1024).bfloat16()

    def run() -> Tensor:  # each product is two threads' work, and needs all of the one before
        out = x
        for _ in range(20):
            out = weight.linear(out)
        return out

    replay, threads = Tapes()(run), torch.get_num_threads()
    try:
        outcomes = []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            outcomes += [replay().clone() for _ in range(3)]
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(outcome, outcomes[0]) for outcome in outcomes)


def test_tapes_that_share_memory_do_not_disturb_each_other() -> None:
    tapes, run = Tapes(), model()
    xs = [noise(i, rows, WIDTH).bfloat16() for i, rows in enumerate((16, 3, 40))]
    replays = [tapes(lambda x=x: run(x)) for x in xs]  # type: ignore[misc]
    for _ in range(2):
        for x, replay in zip(xs, replays, strict=True):
            x.add_(1)
            assert torch.equal(replay(), run(x))


def test_a_deeper_model_and_more_tapes_take_no_more_memory() -> None:
    def held(layers: int, recordings: int) -> int:
        tapes, run, x = Tapes(), model(layers), noise(0, 16, WIDTH).bfloat16()
        replays = [tapes(lambda: run(x)) for _ in range(recordings)]
        assert all(torch.equal(replay(), run(x)) for replay in replays)
        return tapes.memory.held

    assert held(2, 1) == held(12, 1) == held(2, 4) > 0


@pytest.mark.parametrize("rows", [16, 65])
def test_products_that_onednn_computes_are_recorded(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "MOST_ROWS", 0)
    run, x = model(), noise(0, rows, WIDTH).bfloat16()
    replay = Tapes()(lambda: run(x))
    x.add_(1)
    assert torch.equal(replay(), run(x))


def test_a_block_is_free_once_no_view_of_it_is_left() -> None:
    memory = Memory()
    one = memory.empty(torch.empty(10, 7))
    at, part = one.data_ptr(), one[2:].view(-1)
    del one
    assert memory.empty(torch.empty(10, 7)).data_ptr() != at
    del part
    again = memory.empty(torch.empty(7, 10).T)
    assert again.data_ptr() == at
    assert (again.shape, again.stride()) == ((10, 7), (1, 10))


def test_numbers_that_python_gives_stay_where_kernels_find_them() -> None:
    x = noise(0, 4, WIDTH).bfloat16()

    def run() -> Tensor:
        weight = torch.tensor([2.0] * WIDTH, dtype=torch.bfloat16)
        return residual_norm(x, None, Norm("rms", weight, 1e-6))

    replay, once = Tapes()(run), run().clone()
    littered = [torch.full((WIDTH,), 9.0).bfloat16() for _ in range(1000)]
    assert torch.equal(replay(), once)
    assert len(littered) == 1000


def test_rows_are_looked_up_where_the_numbers_say_now() -> None:
    x, places = noise(0, 8, WIDTH), torch.tensor([1, 5])
    replay = Tapes()(lambda: x[None][:, places] * 2)
    places.copy_(torch.tensor([7, 0]))
    assert torch.equal(replay(), x[None, [7, 0]] * 2)


@pytest.mark.parametrize(
    "compute",
    [
        lambda x: x.T.double(),  # a cast that keeps strides
        lambda x: x.to(torch.bfloat16, copy=True),
        lambda x: torch.cat([x.cos(), x.sin() * 0.5], dim=-1),
        lambda x: torch.add(x, x.T, alpha=3)[1:],
        lambda x: x @ x.T,
        lambda x: x[None] @ x.T,
        lambda x: F.linear(x[None], x, x[0]),  # torch's variant that writes it where it is told to rounds once more
        lambda x: x.max(dim=0).values,  # of two results one
        lambda x: x.sum(),
        lambda x: x.square().mean(-1, keepdim=True).rsqrt(),
        lambda x: F.softmax(x, dim=-1, dtype=torch.float32),
        lambda x: torch.where(x > 0, x, x.pow(2)),
        lambda x: F.embedding((x > 0).long(), x),
        lambda x: (x > 0).to(torch.int32).cumsum(0),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_operators_compute_again_where_their_results_were(
    compute: Callable[[Tensor], Tensor], dtype: torch.dtype
) -> None:
    x = noise(0, WIDTH, WIDTH).to(dtype)
    replay = Tapes()(lambda: compute(x.clone()))
    for seed in (1, 2):
        x.copy_(noise(seed, WIDTH, WIDTH))
        given, wanted = replay(), compute(x)
        assert torch.equal(given, wanted)
        assert (given.dtype, given.stride()) == (wanted.dtype, wanted.stride())


class Asked(TorchDispatchMode):
    """Notes the names of the operators that are asked for."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(func).removeprefix("aten."))
        return func(*args, **(kwargs or {}))


def test_results_are_written_to_where_they_are_kept_without_a_copy() -> None:
    x = noise(0, 8, 8)
    replay = Tapes()(lambda: torch.cat([x.cos() * 2, x]).bfloat16())
    with Asked() as asked:
        replay()
    assert asked.names == ["cos.out", "mul.out", "cat.out", "copy_.default"]


@pytest.mark.parametrize(
    "read",
    [
        lambda x: x[0].item(),
        lambda x: x.nonzero(),
        lambda x: bool((x > 0).any()),
        lambda x: x.unique(),
        lambda x: x[x > 0],
        lambda x: x[x.to(torch.uint8)],
    ],
)
def test_what_depends_on_numbers_is_not_recorded(read: Callable[[Tensor], object]) -> None:
    x = torch.ones(4)

    def run() -> Tensor:
        read(x)
        return x + 1

    with pytest.raises(RuntimeError, match="reads a tensor's numbers"):
        Tapes()(run)


def test_other_threads_have_the_interpreter_during_a_replay() -> None:
    x, weight = noise(0, 64, 1024).bfloat16(), PackedWeight(noise(1, 1024, 1024).bfloat16() / 32)

    def run() -> Tensor:
        out = x
        for _ in range(100):
            out = weight.linear(out)
        return out

    replay, counted, stop = Tapes()(run), 0, threading.Event()

    def count() -> None:
        nonlocal counted
        while not stop.is_set():
            counted += 1
            time.sleep(0.001)

    interval, other = sys.getswitchinterval(), threading.Thread(target=count)
    other.start()
    try:
        sys.setswitchinterval(100)  # only who lets go is followed by another
        before = counted
        replay()
        assert counted > before
    finally:
        sys.setswitchinterval(interval)
        stop.set()
        other.join()
