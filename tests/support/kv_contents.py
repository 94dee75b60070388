"""What a KV cache would hold: for each position of each page, which tokens its keys and values were computed from."""

from chorus.engine.schedule import Chunk
from chorus.engine.sequence import Sequence


class KVContents:
    """Filled by chunks as the model would fill it; says whether a chunk finds what it attends to.

    Another tenant's tokens are other contents, and so are another adapter's. A sequence of more than `short_length`
    tokens is computed otherwise from its first token on.
    """

    def __init__(self, block_size: int, short_length: int | None = None) -> None:
        self._block_size = block_size
        self._short_length = short_length
        self._prefixes: dict[tuple[int, int], tuple[object, ...]] = {}

    def write(self, chunk: Chunk, *, spoiled: bool = False) -> None:
        """The chunk runs; if it is `spoiled`, the step fails after the cache was written."""
        tokens = self._tokens(chunk.seq)
        for position in range(chunk.start, chunk.start + chunk.count):
            self._prefixes[self._place(chunk.seq, position)] = () if spoiled else tokens[: position + 4]

    def check(self, chunk: Chunk) -> None:
        """AssertionError unless every position before the chunk holds the sequence's own tokens."""
        tokens = self._tokens(chunk.seq)
        for position in range(chunk.start):
            held = self._prefixes.get(self._place(chunk.seq, position))
            assert held == tokens[: position + 4], f"sequence {chunk.seq.key} reads {held} at {position}"

    def spoil(self, block: int) -> None:
        """What is in there is wrong now; nobody may read it."""
        for offset in range(self._block_size):
            self._prefixes[block, offset] = ()

    def _place(self, seq: Sequence, position: int) -> tuple[int, int]:
        page, offset = divmod(position, self._block_size)
        return seq.blocks[page], offset

    def _tokens(self, seq: Sequence) -> tuple[object, ...]:
        """Its tokens, behind what else keys and values depend on, and whose they are."""
        is_long = self._short_length is not None and seq.length > self._short_length
        return (seq.salt, seq.adapter, is_long, *seq.prompt, *seq.output)
