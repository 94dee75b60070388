"""Which page of the KV cache belongs to whom.

    pool     0 1 2 3 4 5 6 7          pages of `block_size` tokens; the tensors are the runner's
             . B A k . B A A          `.` is blank, `k` is nobody's and still found by what it holds; both are free
    A.blocks = [7, 2, 6]              page 7 holds A's tokens 0 .. block_size - 1, page 2 the next, ...

Whoever starts with tokens that others have computed shares their full pages; nobody writes to those any more:

    prompt   [ page 7 ][ page 2 ][ tail |          the tail has at least one token, which everyone computes itself:
    first      7         2         6               so it has a row to sample from, and no page of it is written
    second     7         2         0   4           by two. No page is ever copied.
    owners     2         2         1   1

Knows page numbers and keys only: no tensors, no policy. All ownership is decided in this one class.
"""

from collections import Counter
from collections.abc import Iterable, Sequence

from chorus.engine import sequence
from chorus.engine.prefix_cache import PrefixCache


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
        self.evictions = 0
        """Pages that could be found and had to make room, since the start."""
        self._blank = list(reversed(range(num_blocks)))
        self._owners = [0] * num_blocks
        self._prefixes = PrefixCache()

    @property
    def capacity(self) -> int:
        """Tokens that fit into the whole pool."""
        return self.num_blocks * self.block_size

    @property
    def free_count(self) -> int:
        """Blocks that nobody owns, those that can still be found among them."""
        return len(self._blank) + self._prefixes.unowned

    @property
    def kept_count(self) -> int:
        """Blocks that nobody owns and that can be found."""
        return self._prefixes.unowned

    @property
    def usage(self) -> float:
        """Share of the blocks that are owned, 0 to 1."""
        return 1 - self.free_count / self.num_blocks

    def blocks_for(self, length: int) -> int:
        """How many blocks hold `length` tokens."""
        return -(-length // self.block_size)

    def find(self, keys: Iterable[bytes]) -> list[int]:
        """The blocks of the first pages that are there, up to the first that is not."""
        found = []
        for key in keys:
            block = self._prefixes.find(key)
            if block is None:
                break
            found.append(block)
        return found

    def room_after(self, found: Sequence[int], length: int, without: Sequence[sequence.Sequence] = ()) -> int:
        """Free blocks that are left once a sequence has `found` and what it lacks for `length` tokens; may be < 0.

        As it would be if those `without` had given back theirs.
        """
        given_back = Counter(block for seq in without for block in seq.blocks)
        freed = {block for block, count in given_back.items() if count == self._owners[block]}
        owned = sum(self._owners[block] > 0 and block not in freed for block in found)
        return self.free_count + len(freed) - (self.blocks_for(length) - owned)

    def share(self, seq: sequence.Sequence, found: Sequence[int]) -> None:
        """Starts a sequence's block table with what `find` gave, before anything else happens to the pool.

        Raises:
            RuntimeError: the sequence has blocks already, or it would have nothing left to compute.
        """
        computed = len(found) * self.block_size
        if seq.blocks or computed >= seq.length:
            raise RuntimeError(f"sequence {seq.key} can not start with {len(found)} pages")
        for block in found:
            self._prefixes.acquire(block)
            self._owners[block] += 1
        seq.blocks.extend(found)
        seq.computed = computed

    def allocate_for(self, seq: sequence.Sequence, new_length: int) -> bool:
        """Grows the block table to hold `new_length` tokens; takes nothing and says False where it can not."""
        missing = self.blocks_for(new_length) - len(seq.blocks)
        if missing > self.free_count:
            return False
        for _ in range(missing):
            block = self._blank.pop() if self._blank else self._evict()
            self._owners[block] = 1
            seq.blocks.append(block)
        return True

    def allocate_for_all(self, lengths: Sequence[tuple[sequence.Sequence, int]]) -> bool:
        """`allocate_for` each sequence and its new length; takes nothing and says False where that is too much."""
        if sum(self.blocks_for(length) - len(seq.blocks) for seq, length in lengths) > self.free_count:
            return False
        return all(self.allocate_for(seq, length) for seq, length in lengths)

    def keep(self, block: int, key: bytes) -> None:
        """From now on an owned block, full and computed, is found by what it holds."""
        replaced = self._prefixes.add(block, key)
        if replaced is not None:
            self._blank.append(replaced)

    def forget(self, seq: sequence.Sequence) -> None:
        """Nobody finds a sequence's blocks any more; who shares them keeps them."""
        for block in seq.blocks:
            self._prefixes.remove(block)

    def free(self, seq: sequence.Sequence) -> None:
        """Takes all of a sequence's blocks back; a second call does nothing."""
        for block in reversed(seq.blocks):
            self._owners[block] -= 1
            if not self._owners[block] and not self._prefixes.release(block):
                self._blank.append(block)
        seq.blocks.clear()

    def check_integrity(self, live: Iterable[sequence.Sequence]) -> None:
        """Checks that every block is free or has the owners it counts, and that tables are as long as they must be.

        A table covers at least what is computed and at most the tokens the sequence has. A block with several owners,
        or one that is found, is the same page for all its owners, full and computed, and found by the key of theirs.

        Raises:
            RuntimeError: naming the block or the sequence that is wrong.
        """
        live = list(live)
        owners = Counter(block for seq in live for block in seq.blocks)
        free = Counter([*self._blank, *self._prefixes.check_integrity()])
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
            self._check_shared(seq)

    def _check_shared(self, seq: sequence.Sequence) -> None:
        full = seq.computed // self.block_size
        for page, block in enumerate(seq.blocks):
            key = self._prefixes.key(block)
            if self._owners[block] == 1 and key is None:
                continue
            if page >= full:
                raise RuntimeError(f"block {block} is shared, and sequence {seq.key} still writes to it")
            if key is not None and seq.page_keys[page : page + 1] != [key]:
                raise RuntimeError(f"block {block} of sequence {seq.key} is found as somebody else's, or another page")

    def _evict(self) -> int:
        self.evictions += 1
        return self._prefixes.evict()
