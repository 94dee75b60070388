"""Which pages can be found by what they hold, and which of them is given up first.

    found by   k1 → 7   k2 → 2   k5 → 4        pages that are full and computed
    unowned    { 4, 2 }                        nobody's any more: still found; the first is given up first

A page whose last owner goes is the one used last. Tables are given back from their end, so that of a prefix the tail
goes first: a page without those before it is of no use to anybody.

Knows pages and keys; does not know whose they are. `BlockPool` does.
"""


class PrefixCache:
    """Pages by key, one page a key. Whatever is not in here is not found."""

    def __init__(self) -> None:
        self._page_of: dict[bytes, int] = {}
        self._key_of: dict[int, bytes] = {}
        self._unowned: dict[int, None] = {}  # least recently used first

    @property
    def unowned(self) -> int:
        """Pages that nobody owns and that are kept until somebody needs the room."""
        return len(self._unowned)

    def find(self, key: bytes) -> int | None:
        return self._page_of.get(key)

    def add(self, page: int, key: bytes) -> int | None:
        """Makes an owned page known. Returns an unowned one of the same key that it replaces, which is free now.

        Where the other one has an owner it stays, and the new one is not found.
        """
        other = self._page_of.get(key)
        if other is not None and other not in self._unowned:
            return None
        if other is not None:
            self.remove(other)
        self._page_of[key], self._key_of[page] = page, key
        return other

    def remove(self, page: int) -> None:
        """It is not found any more, if it was."""
        self._unowned.pop(page, None)
        key = self._key_of.pop(page, None)
        if key is not None:
            del self._page_of[key]

    def release(self, page: int) -> bool:
        """Its last owner is gone; False if it is not known, and so of no use."""
        if page not in self._key_of:
            return False
        self._unowned[page] = None
        return True

    def acquire(self, page: int) -> None:
        """It has an owner; no harm if it had one before."""
        self._unowned.pop(page, None)

    def evict(self) -> int:
        """Gives up the unowned page that was used longest ago."""
        page = next(iter(self._unowned))
        self.remove(page)
        return page

    def key(self, page: int) -> bytes | None:
        """By what it is found, if it is."""
        return self._key_of.get(page)

    def check_integrity(self) -> set[int]:
        """Returns the unowned pages; RuntimeError if a page has another key than the one that finds it."""
        if {page: key for key, page in self._page_of.items()} != self._key_of:
            raise RuntimeError("a page is found by a key that it does not have")
        if stray := self._unowned.keys() - self._key_of.keys():
            raise RuntimeError(f"pages {sorted(stray)} are kept and can not be found")
        return set(self._unowned)
