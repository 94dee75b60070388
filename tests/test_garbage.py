"""What came while a server started is not looked at by a collection any more."""

import gc
import subprocess
import sys
import weakref
from collections.abc import Iterator

import pytest

from chorus import garbage


class Node:
    """Refers to itself, so that only a collection frees it."""

    def __init__(self) -> None:
        self.own = self


@pytest.fixture(autouse=True)
def nothing_stays_frozen() -> Iterator[None]:
    yield
    gc.unfreeze()


def test_what_was_there_at_the_end_is_not_looked_at_and_what_comes_later_is() -> None:
    with garbage.of_a_start():
        stays = weakref.ref(Node())
    goes = weakref.ref(Node())
    gc.collect()
    assert goes() is None
    assert stays() is not None
    gc.unfreeze()
    gc.collect()
    assert stays() is None


def test_collections_are_as_usual_afterwards_even_if_the_start_failed() -> None:
    usual = gc.get_threshold()
    with garbage.of_a_start():
        assert gc.get_threshold()[0] > usual[0]
    with pytest.raises(ZeroDivisionError), garbage.of_a_start():
        1 / 0  # noqa: B018
    assert gc.get_threshold() == usual


GIVEN_BACK = """
import atexit, gc
atexit.register(lambda: print(gc.get_freeze_count()))
from chorus import garbage
with garbage.of_a_start():
    pass
print(gc.get_freeze_count() > 1000)
"""


def test_what_is_frozen_is_given_back_before_the_interpreter_ends() -> None:
    done = subprocess.run([sys.executable, "-c", GIVEN_BACK], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["True", "0"]
