"""Which page of the KV cache belongs to which sequence.

    pool     0 1 2 3 4 5 6 7          pages of `block_size` tokens; the tensors are the runner's
             . A B A . . B A          `.` is free; every other page has exactly one owner
    A.blocks = [7, 1, 3]              page 7 holds A's tokens 0 .. block_size - 1, page 1 the next, ...

Knows page numbers only: no tensors, no policy. All ownership is decided in this one class, so that sharing pages
between sequences can come without a change outside it.
"""

from collections.abc import Iterable

from chorus.engine.sequence import Sequence


class BlockPool:
    """Hands pages to sequences and takes them back.

    Raises:
        ValueError: fewer than one block, or blocks of less than one token.
    """

    def __init__(self, num_blocks: int, block_size: int) -> None:
        if num_blocks < 1 or block_size < 1:
            raise ValueError(f"a pool needs blocks: num_blocks={num_blocks}, block_size={block_size}")
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._free = list(reversed(range(num_blocks)))

    @property
    def capacity(self) -> int:
        """Tokens that fit into the whole pool."""
        return self.num_blocks * self.block_size

    @property
    def free_count(self) -> int:
        return len(self._free)

    @property
    def usage(self) -> float:
        """Share of the blocks that are taken, 0 to 1."""
        return 1 - len(self._free) / self.num_blocks

    def blocks_for(self, length: int) -> int:
        """How many blocks hold `length` tokens."""
        return -(-length // self.block_size)

    def allocate_for(self, seq: Sequence, new_length: int) -> bool:
        """Grows the block table to hold `new_length` tokens; takes nothing and says False where it can not."""
        missing = self.blocks_for(new_length) - len(seq.blocks)
        if missing > len(self._free):
            return False
        if missing > 0:
            seq.blocks.extend(reversed(self._free[-missing:]))
            del self._free[-missing:]
        return True

    def free(self, seq: Sequence) -> None:
        """Takes all of a sequence's blocks back; a second call does nothing."""
        self._free.extend(reversed(seq.blocks))
        seq.blocks.clear()

    def check_integrity(self, live: Iterable[Sequence]) -> None:
        """Checks that every block is free or owned once, and that tables are as long as their tokens need.

        A table covers at least what is computed and at most the tokens the sequence has.

        Raises:
            RuntimeError: naming the block or the sequence that is wrong.
        """
        owner: dict[int, str] = {}
        live = list(live)
        tables = [("the free list", self._free), *((f"sequence {seq.request_id}", seq.blocks) for seq in live)]
        for name, blocks in tables:
            for block in blocks:
                if block in owner:
                    raise RuntimeError(f"block {block} is in {owner[block]} and in {name}")
                owner[block] = name
        if owner.keys() != set(range(self.num_blocks)):
            raise RuntimeError(f"blocks lost or invented: {sorted(owner.keys() ^ set(range(self.num_blocks)))}")
        for seq in live:
            if not self.blocks_for(seq.computed) <= len(seq.blocks) <= self.blocks_for(seq.length):
                raise RuntimeError(
                    f"sequence {seq.request_id} has {len(seq.blocks)} blocks of {self.block_size} "
                    f"for {seq.computed} computed of {seq.length} tokens"
                )
