"""What the keys and values in a page depend on, in a few bytes: pages of equal keys hold the same.

    root     hash of (salt, adapter version, rotation)
    page 0   hash of (root, its tokens)
    page 1   hash of (page 0, its tokens)         so a page's key stands for all tokens up to its end

The salt is the tenant: nobody finds, or can tell from how fast an answer comes, what another tenant has computed. The
version is the digest of the adapter's content: whatever comes under an old name is another version and finds nothing
of the old one, and a version that was unloaded and comes back finds pages that are still right. Nothing has to be
purged. The rotation tells the bases' short set of frequencies from the long one.

Knows tokens; does not know which pages there are.
"""

from array import array
from hashlib import blake2b

from chorus.engine.sequence import Sequence

# Nobody finds two contents with one key by trying: that takes 2^64 pages.
_DIGEST_SIZE = 16


class PageKeys:
    """The keys of sequences' pages of `block_size` tokens; each is computed once and stays with its sequence.

    Unless `across_requests`, a request's id is in its keys: then its own outputs find each other's pages and nobody
    else's. Sequences of more than `short_length` tokens are rotated otherwise.
    """

    def __init__(self, block_size: int, *, across_requests: bool, short_length: int | None = None) -> None:
        self._block_size = block_size
        self._across_requests = across_requests
        self._short_length = short_length

    def of(self, seq: Sequence, pages: int) -> list[bytes]:
        """The keys of its first `pages` pages, which its tokens fill."""
        keys = seq.page_keys
        parent = keys[-1] if keys else self._root(seq)
        for page in range(len(keys), pages):
            tokens = array("q", seq.token_slice(page * self._block_size, self._block_size))
            parent = blake2b(parent + tokens.tobytes(), digest_size=_DIGEST_SIZE).digest()
            keys.append(parent)
        return keys[:pages]

    def is_long(self, seq: Sequence) -> bool:
        """Whether it is rotated by the long frequencies."""
        return self._short_length is not None and seq.length > self._short_length

    def _root(self, seq: Sequence) -> bytes:
        only_here = None if self._across_requests else seq.request_id
        parts = (seq.salt, seq.adapter.digest if seq.adapter else None, self.is_long(seq), only_here)
        return blake2b(repr(parts).encode(), digest_size=_DIGEST_SIZE).digest()
