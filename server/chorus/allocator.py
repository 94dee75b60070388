"""What glibc's allocator is told by the parent of a process that computes: where it holds memory, and to keep it.

    pages of 2 MiB     where Linux gives them to whoever asks ("madvise"), from glibc 2.35 on. A decode step reads every
                       weight once, so of pages of 4 KiB it needs more than the processor keeps the places of, and looks
                       most of them up in memory.
    no giving back     of what a step has freed, for the next to ask for again: a prompt of 1024 tokens of a 144M Llama
                       had 30 to 80 pages of 2 MiB cleared, 20 to 40 ms of 235, which it does not take now.

Tunables are read when a process starts, so they are in its environment.
"""

import os
import sys
from collections.abc import Mapping

_VARIABLE = "GLIBC_TUNABLES"
_SETTINGS = {
    "glibc.malloc.hugetlb": 1,
    "glibc.malloc.mmap_threshold": 32 << 20,  # larger tensors are given back at once; glibc before 2.35 takes no more
    "glibc.malloc.trim_threshold": 512 << 20,  # of all others so much is kept
}


def told(environment: Mapping[str, str]) -> dict[str, str]:
    """The environment with which a process is told; what it says of a setting already stays."""
    tunables = [tunable for tunable in environment.get(_VARIABLE, "").split(":") if tunable]
    said = {tunable.partition("=")[0] for tunable in tunables}
    tunables += [f"{name}={value}" for name, value in _SETTINGS.items() if name not in said]
    return {**environment, _VARIABLE: ":".join(tunables)}


def start_again() -> None:
    """For a program whose parent tells nothing: the same command once more, told. Before it has done anything."""
    if (environment := told(os.environ)) != dict(os.environ):
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], environment)
