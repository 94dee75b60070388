"""What a KV cache would hold: for each position of each page, which tokens its keys and values were computed from."""

from chorus.engine.schedule import Chunk
from chorus.engine.sequence import Sequence


class KVContents:
    """Filled by chunks as the model would fill it; says whether a chunk finds what it attends to."""

    def __init__(self, block_size: int) -> None:
        self._block_size = block_size
        self._prefixes: dict[tuple[int, int], tuple[int, ...]] = {}

    def write(self, chunk: Chunk, *, spoiled: bool = False) -> None:
        """The chunk runs; if it is `spoiled`, the step fails after the cache was written."""
        tokens = _tokens(chunk.seq)
        for position in range(chunk.start, chunk.start + chunk.count):
            self._prefixes[self._place(chunk.seq, position)] = () if spoiled else tokens[: position + 1]

    def check(self, chunk: Chunk) -> None:
        """AssertionError unless every position before the chunk holds the sequence's own tokens."""
        tokens = _tokens(chunk.seq)
        for position in range(chunk.start):
            held = self._prefixes.get(self._place(chunk.seq, position))
            assert held == tokens[: position + 1], f"sequence {chunk.seq.key} reads {held} at {position}"

    def _place(self, seq: Sequence, position: int) -> tuple[int, int]:
        page, offset = divmod(position, self._block_size)
        return seq.blocks[page], offset


def _tokens(seq: Sequence) -> tuple[int, ...]:
    return (*seq.prompt, *seq.output)
