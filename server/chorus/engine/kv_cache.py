"""Which page of the KV cache belongs to whom.

    pool     0 1 2 3 4 5 6 7          pages of `block_size` tokens; the tensors are the runner's
             . B A . . B A A          `.` is free
    A.blocks = [7, 2, 6]              page 7 holds A's tokens 0 .. block_size - 1, page 2 the next, ...

Outputs of one request share the full pages of their prompt, once these are computed; nobody writes to them any more:

    prompt   [ page 7 ][ page 2 ][ tail |          the tail has at least one token, which every output computes
    output 0   7         2         6               itself: so it has a row to sample from, and no page of it is
    output 1   7         2         0   4           written by two. No page is ever copied.
    owners     2         2         1   1

Knows page numbers only: no tensors, no policy. All ownership is decided in this one class.
"""

from collections import Counter
from collections.abc import Iterable

from chorus.engine.sequence import Sequence


class BlockPool:
    """Hands pages to sequences and takes them back; a page is free again when its last owner is gone.

    Raises:
        ValueError: fewer than one block, or blocks of less than one token.
    """

    def __init__(self, num_blocks: int, block_size: int) -> None:
        if num_blocks < 1 or block_size < 1:
            raise ValueError(f"a pool needs blocks: num_blocks={num_blocks}, block_size={block_size}")
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._free = list(reversed(range(num_blocks)))
        self._owners = [0] * num_blocks

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

    def prompt_pages(self, seq: Sequence) -> int:
        """How many pages the outputs of its request can share: those full of its prompt but for the last token."""
        return (len(seq.prompt) - 1) // self.block_size

    def share(self, donor: Sequence, seq: Sequence) -> None:
        """Starts a sequence's block table with the prompt's pages of another output of the same request.

        Raises:
            RuntimeError: the sequence has blocks already, or the donor has not computed those pages.
        """
        pages = self.prompt_pages(seq)
        if seq.blocks or donor.request_id != seq.request_id or donor.computed < pages * self.block_size:
            raise RuntimeError(f"sequence {seq.key} can not share {pages} pages of sequence {donor.key}")
        seq.blocks.extend(donor.blocks[:pages])
        seq.computed = pages * self.block_size
        for block in seq.blocks:
            self._owners[block] += 1

    def allocate_for(self, seq: Sequence, new_length: int) -> bool:
        """Grows the block table to hold `new_length` tokens; takes nothing and says False where it can not."""
        missing = self.blocks_for(new_length) - len(seq.blocks)
        if missing > len(self._free):
            return False
        for _ in range(missing):
            block = self._free.pop()
            self._owners[block] = 1
            seq.blocks.append(block)
        return True

    def free(self, seq: Sequence) -> None:
        """Takes all of a sequence's blocks back; a second call does nothing."""
        for block in reversed(seq.blocks):
            self._owners[block] -= 1
            if not self._owners[block]:
                self._free.append(block)
        seq.blocks.clear()

    def check_integrity(self, live: Iterable[Sequence]) -> None:
        """Checks that every block is free or has the owners it counts, and that tables are as long as they must be.

        A table covers at least what is computed and at most the tokens the sequence has. A block with several owners
        is the same page of the same prompt for all of them, full and computed.

        Raises:
            RuntimeError: naming the block or the sequence that is wrong.
        """
        live = list(live)
        owners = Counter(block for seq in live for block in seq.blocks)
        free = Counter(self._free)
        for block in range(self.num_blocks):
            if owners[block] != self._owners[block]:
                raise RuntimeError(f"block {block} is in {owners[block]} tables, and counts {self._owners[block]}")
            if free[block] != (owners[block] == 0):
                raise RuntimeError(f"block {block} is {free[block]} times free and has {owners[block]} owners")
        if stray := {*owners, *free} - set(range(self.num_blocks)):
            raise RuntimeError(f"blocks invented: {sorted(stray)}")
        for seq in live:
            if not self.blocks_for(seq.computed) <= len(seq.blocks) <= self.blocks_for(seq.length):
                raise RuntimeError(
                    f"sequence {seq.key} has {len(seq.blocks)} blocks of {self.block_size} "
                    f"for {seq.computed} computed of {seq.length} tokens"
                )
        self._check_shared(live)

    def _check_shared(self, live: list[Sequence]) -> None:
        page_of: dict[int, tuple[int, int]] = {}
        for seq in live:
            for page, block in enumerate(seq.blocks):
                if self._owners[block] == 1:
                    continue
                if page_of.setdefault(block, (seq.request_id, page)) != (seq.request_id, page):
                    raise RuntimeError(f"block {block} of sequence {seq.key} is somebody else's, or another page")
                if page >= self.prompt_pages(seq) or (page + 1) * self.block_size > seq.computed:
                    raise RuntimeError(f"block {block} is shared, and sequence {seq.key} still writes to it")
