"""A process whose memory lies in pages of 2 MiB, where Linux gives them to whoever asks.

A decode step reads every weight once, so of pages of 4 KiB it needs more than the processor keeps the places of, and
looks most of them up in memory.

glibc asks for all that it allocates, if it is told to by a tunable when the process starts, so it is the parent who
does that. It has effect where transparent huge pages are for those who ask ("madvise"), from glibc 2.35 on.
"""

import os
import sys
from collections.abc import Mapping

_VARIABLE, _TUNABLE = "GLIBC_TUNABLES", "glibc.malloc.hugetlb"


def asked_for(environment: Mapping[str, str]) -> dict[str, str]:
    """The environment with which a process has them; what it says of huge pages already stays."""
    tunables = environment.get(_VARIABLE, "").split(":")
    if not any(tunable.startswith(f"{_TUNABLE}=") for tunable in tunables):
        tunables.append(f"{_TUNABLE}=1")
    return {**environment, _VARIABLE: ":".join(filter(None, tunables))}


def start_again() -> None:
    """For a program whose parent does not ask: the same command once more, with them. Before it has done anything."""
    if (asking := asked_for(os.environ)) != dict(os.environ):
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], asking)
