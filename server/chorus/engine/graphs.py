"""Steps of few tokens as graphs: recorded once for each shape that comes often, replayed for every batch that fits it.

    layout ── shape ──> rows 8, ranges 16, rank 16 ──> graph of that shape ── replay ──> logits
                         (5 rows and 3 that nobody asked for)   ^
                         token ids, positions, tables ──────────┘ written anew in place

A row is a token: a decode, or one of a prompt's, which sees what lies before it as a decode does, since all keys of a
layer are stored before anybody attends.

What a step launches costs the host more than the device where the batch is small: some 500 launches for 32 layers. A
CUDA graph is one. On a CPU a tape (`chorus.kernels.native.tape`) does the same for compiled kernels: 110 calls for 12
layers, whose Python is a fifth of a step of 16 rows. Either reads the same memory each time, so all that differs
between batches lies in buffers that are written before each replay, sized for the most that the shape holds; what the
shape does not use ends at once.

A batch without adapters has a graph of its own, in which nothing of adapters is.

Recording takes as long as several steps. While the engine has no work it is done for what has come twice, of rows that
nobody asked for (`StepGraphs.rehearse`); while it has, for what has come often.
"""

import logging
import time
from array import array
from collections import Counter, OrderedDict
from collections.abc import Callable, Collection, Sequence
from itertools import repeat
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from chorus.adapters.pool import AdapterPool
from chorus.adapters.static_plans import HeadSites, StaticPlans
from chorus.engine.layout import Layout
from chorus.engine.messages import Launch
from chorus.kernels import (
    AttentionCapacity,
    AttentionPlan,
    AttentionRow,
    LowRankCapacity,
    SlotSegment,
    decode_ranges,
    is_short,
    low_rank_family,
)
from chorus.kernels.upload import write

log = logging.getLogger(__name__)

Record = Callable[[Callable[[], Tensor]], Callable[[], Tensor]]
"""Gives what does the same work again, on the same memory."""

# A shape that does not come back is not worth its recording: several steps on a CPU, 0.1 to 1 s on CUDA, by estimate.
SEEN_BEFORE = 4
REHEARSED_FROM = 2
# Tokens of a step with prompts up to which it is recorded. With more, computing hides what launching costs, once it is
# so many products: of a small base up to four times as many tokens are.
MOST_WITH_PROMPTS, MOST_OF_SMALL_BASES = 64, 256
HIDING_PRODUCTS = 9e9
# Shapes at a time; the one that was replayed longest ago makes room.
KEPT = 128
LEAST_RANK = 16


class CudaGraphs:
    """Records CUDA graphs, which share their memory: only one is replayed at a time."""

    def __init__(self) -> None:
        self._memory = torch.cuda.graph_pool_handle()

    def __call__(self, run: Callable[[], Tensor]) -> Callable[[], Tensor]:
        graph = torch.cuda.CUDAGraph()
        # Other threads load adapters meanwhile.
        with torch.cuda.graph(graph, pool=self._memory, capture_error_mode="thread_local"):
            out = run()

        def replay() -> Tensor:
            graph.replay()
            return out

        return replay


class Shape(NamedTuple):
    """What a graph is recorded for: `rows` tokens whose contexts are cut into `ranges` together.

    It gives the logits of so many rows, which each batch names; with 0, of all. `low_rank` is None where no adapter
    acts, else for adapters at the first `linears` of the sites that are used.
    """

    rows: int
    logits: int
    ranges: int
    low_rank: LowRankCapacity | None
    linears: int


class StaticStep:
    """What a recorded step reads, written anew for each batch: ids, positions and `is_long` [rows], and its plans.

    `wanted` [logits] are the rows whose logits are wanted, None if all are. Rows that a batch has not are decodes of a
    single token in a block that nobody else has. Of `head_sites` the plans are for the wanted rows alone.
    """

    def __init__(
        self,
        shape: Shape,
        pool: AdapterPool,
        head_sites: Collection[str],
        *,
        block_size: int,
        scratch_block: int,
        device: torch.device,
    ) -> None:
        self._rows = shape.rows
        self._nobody = (scratch_block,)
        self._inputs = torch.zeros(4, shape.rows, dtype=torch.int64, device=device)
        self.token_ids, self.positions, self.is_long, wanted = self._inputs
        self.wanted = wanted[: shape.logits] if shape.logits else None
        capacity = AttentionCapacity.of_decodes(shape.rows, shape.ranges, block_size)
        self.attention = AttentionPlan(self._filled([]), block_size, device, capacity)
        self.deltas: StaticPlans | None = None
        if shape.low_rank is not None:
            names = pool.linears_used[: shape.linears]
            heads = HeadSites(head_sites, shape.logits) if shape.logits else None
            self.deltas = StaticPlans(pool, names, shape.low_rank, device, heads)

    def write(self, layout: Layout, is_long: Sequence[bool], drawn: Tensor | None = None) -> None:
        """On the current stream and without waiting.

        Raises:
            ValueError: more than the shape holds, or a page that is none: what is recorded writes where it is told.
        """
        filled = array("q")
        for numbers in (layout.carried or layout.token_ids, layout.positions, is_long, layout.logit_rows):
            if len(numbers) > self._rows:
                raise ValueError(f"rows: {len(numbers)}, and the shape has {self._rows}")
            filled.extend(numbers)
            filled.extend(repeat(0, self._rows - len(numbers)))
        write(self._inputs, torch.frombuffer(filled, dtype=torch.int64).view_as(self._inputs))
        if drawn is not None:
            self.token_ids.copy_(carry(drawn, self.token_ids))
        self.attention.rewrite(self._filled(layout.rows))
        if self.attention.highest_block > self._nobody[0]:
            raise ValueError(f"rows: a block over {self._nobody[0]}, the last there is")
        if self.deltas is not None:
            self.deltas.write(layout.segments, layout.logit_segments)

    def _filled(self, rows: Sequence[AttentionRow]) -> list[AttentionRow]:
        tokens = _each_token(rows)
        return [*tokens, *(AttentionRow(i, i + 1, 1, self._nobody) for i in range(len(tokens), self._rows))]


class StepGraphs:
    """The recorded steps of a runner, whose `compute` gives a static step's logits, of all rows or of those named.

    Those with prompts have up to `with_prompts` tokens.
    """

    def __init__(
        self,
        record: Record,
        compute: Callable[[StaticStep], Tensor],
        new_step: Callable[[Shape], StaticStep],
        pool: AdapterPool,
        with_prompts: int = MOST_WITH_PROMPTS,
    ) -> None:
        self._record, self._compute, self._new_step, self._pool = record, compute, new_step, pool
        self._with_prompts = with_prompts
        self._seen: Counter[Shape] = Counter()  # those that have no graph, and were not refused
        self._refused: set[Shape] = set()
        self._kept: OrderedDict[Shape, tuple[StaticStep, Callable[[], Tensor]]] = OrderedDict()
        self._launches: Counter[Launch] = Counter()

    @property
    def held(self) -> int:
        """Graphs in memory."""
        return len(self._kept)

    @property
    def can_rehearse(self) -> bool:
        """Whether a shape has come twice that has no graph and can come again, and there is room for one more."""
        return self._due() is not None

    def rehearse(self) -> bool:
        """Records the one of those that has come most often; False where there is none, or no room.

        It is the first that makes room until it is replayed. One that can not be recorded is not tried again.
        """
        if (shape := self._due()) is None:
            return False
        try:
            if self._make(shape) is Launch.RECORDED:
                self._kept.move_to_end(shape, last=False)
        except Exception as error:  # nobody asked for this: in a step it is the request that fails
            self._refuse(shape, error)
        return True

    def take_launches(self) -> dict[Launch, int]:
        """How the batches since the last call were launched."""
        launches, self._launches = self._launches, Counter()
        return dict(launches)

    def run(self, layout: Layout, is_long: Sequence[bool], drawn: Tensor | None = None) -> Tensor | None:
        """The logits of the layout's `logit_rows`; None where the batch's shape has no graph, or can have none."""
        shape = shape_of(layout, self._pool, self._with_prompts)
        launch = shape if isinstance(shape, Launch) else self._prepare(shape, layout, is_long)
        self._launches[launch] += 1
        if isinstance(shape, Launch) or launch not in (Launch.GRAPH, Launch.RECORDED):
            return None
        self._kept.move_to_end(shape)
        step, replay = self._kept[shape]
        step.write(layout, is_long, drawn)
        return replay()[: len(layout.logit_rows)]

    def _prepare(self, shape: Shape, layout: Layout, is_long: Sequence[bool]) -> Launch:
        """Records the batch's step if it is time to; with GRAPH and RECORDED there is a graph of the shape."""
        if shape in self._kept:
            return Launch.GRAPH
        if shape in self._refused:
            return Launch.FAILED
        self._seen[shape] += 1
        if self._seen[shape] <= SEEN_BEFORE:
            return Launch.RARE
        return self._make(shape, layout, is_long)

    def _due(self) -> Shape | None:
        """What to rehearse next, if there is room for it."""
        if len(self._kept) >= KEPT:
            return None
        linears = len(self._pool.linears_used)  # it only grows, and shapes of fewer do not come any more
        often = {
            shape: count
            for shape, count in self._seen.items()
            if count >= REHEARSED_FROM and shape.linears in (0, linears)
        }
        return max(often, key=often.__getitem__, default=None)

    def _refuse(self, shape: Shape, error: Exception) -> None:
        self._refused.add(shape)
        log.warning("no graph of steps", extra={"shape": str(shape), "reason": str(error)})

    def _make(self, shape: Shape, layout: Layout | None = None, is_long: Sequence[bool] = ()) -> Launch:
        """Records a step, of rows that nobody asked for where there is no batch.

        FAILED where that does not work: batches of the shape are computed without a graph then.
        """
        began = time.monotonic()
        del self._seen[shape]
        step = self._new_step(shape)
        if layout is not None:
            step.write(layout, is_long)
        try:
            self._compute(step)  # what happens the first time only, compiling too, is not to be recorded
            self._kept[shape] = step, self._record(lambda: self._compute(step))
        except RuntimeError as error:
            self._refuse(shape, error)
            return Launch.FAILED
        if len(self._kept) > KEPT:
            self._kept.popitem(last=False)
        seconds = round(time.monotonic() - began, 3)
        log.info("recorded a graph of steps", extra={"shape": str(shape), "seconds": seconds})
        return Launch.RECORDED


def carry(drawn: Tensor, places: Tensor) -> Tensor:
    """The tokens at `places` of those that a step drew, as the next one reads them.

    NOT_FINITE becomes a token like any other: what is computed from it is thrown away, but must be computable.
    """
    return drawn.index_select(0, places).clamp(min=0)


def most_with_prompts(parameters: int) -> int:
    """Tokens of a step with prompts up to which it is recorded, of a base of so many parameters."""
    return int(min(max(MOST_WITH_PROMPTS, HIDING_PRODUCTS / parameters), MOST_OF_SMALL_BASES))


def shape_of(
    layout: Layout, pool: AdapterPool, with_prompts: int = MOST_WITH_PROMPTS
) -> Shape | Literal[Launch.PROMPT, Launch.ADAPTER]:
    """The smallest shape that holds the batch; PROMPT where it has prompts and more than `with_prompts` tokens, or they
    are scored; ADAPTER where one embeds."""
    rows, logits = len(layout.token_ids), len(layout.logit_rows)
    if not logits or layout.scored or (rows > len(layout.rows) and not _are_few(layout.rows, with_prompts)):
        return Launch.PROMPT
    size = _round_rows(rows)
    wanted = 0 if layout.wants_all else min(_round_up(logits, least=1), size)
    if any(pool.embeds(segment.slot) for segment in layout.segments):
        return Launch.ADAPTER
    ranges = sum(decode_ranges(row.context) for row in _each_token(layout.rows)) + size - rows
    low_rank = _low_rank(layout.segments, size, pool)
    linears = len(pool.linears_used) if low_rank else 0
    return Shape(size, wanted, _round_up(ranges, least=size), low_rank, linears)


def _are_few(rows: Sequence[AttentionRow], most: int) -> bool:
    """Whether tokens of prompts are few enough, and their contexts short enough, to be computed like decodes."""
    return rows[-1].end <= most and all(map(is_short, rows))


def _each_token(rows: Sequence[AttentionRow]) -> Sequence[AttentionRow]:
    if not rows or rows[-1].end == len(rows):
        return rows
    return [token for row in rows for token in row.each_token()]


def _low_rank(segments: Sequence[SlotSegment], rows: int, pool: AdapterPool) -> LowRankCapacity | None:
    rank = max((pool.rank_of(segment.slot) for segment in segments), default=0)
    if not rank:
        return None
    longest = max(segment.end - segment.start for segment in segments)
    return LowRankCapacity(rows, _round_up(rank, least=LEAST_RANK), low_rank_family(rows, longest))


def _round_rows(rows: int) -> int:
    """1, 2, 4, 8, 16, 24, .. 64, 80, 96, ..: at most 8 rows are computed for nobody, 16 where there are many."""
    if rows <= 8:
        return _round_up(rows, least=1)
    step = 8 if rows <= MOST_WITH_PROMPTS else 16
    return -(-rows // step) * step


def _round_up(count: int, *, least: int) -> int:
    """`least` times a power of two."""
    while least < count:
        least *= 2
    return least
