"""Python's garbage collection, where a process of the server starts: half a million objects come to stay.

Packages, a model, compiled kernels: while they come, full collections look at all of them eight times, 0.8 s of a start
of 5.0, and find next to nothing. Once a server runs, each one takes 0.2 s, in which nobody decodes.
"""

import atexit
import gc
from collections.abc import Iterator
from contextlib import contextmanager

# Young objects are looked at every 50,000, without garbage of the compiler's piling up; all of them not at all.
_STARTING = (50_000, 10, 100)


@contextmanager
def of_a_start() -> Iterator[None]:
    """Inside, garbage is looked for seldom; what is there at the end never counts as garbage, and is not looked at.

    For a process that serves from then on, one use at a time.
    """
    usual = gc.get_threshold()
    gc.set_threshold(*_STARTING)
    try:
        yield
    finally:
        gc.set_threshold(*usual)
    gc.freeze()
    atexit.register(gc.unfreeze)  # packages complain of what is left of theirs when the interpreter is gone
