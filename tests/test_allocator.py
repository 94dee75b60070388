"""What glibc's allocator is told when a process starts: pages of 2 MiB, and to keep what is freed."""

import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from chorus import allocator

MODE = Path("/sys/kernel/mm/transparent_hugepage/enabled")

HELD = """
data = bytearray(64 << 20)
rollup = dict(line.split(":") for line in open("/proc/self/smaps_rollup").read().splitlines()[1:])
print(int(rollup["AnonHugePages"].split()[0]) // 1024)
"""

AGAIN = """
import os, sys
from chorus import allocator
print("began", flush=True)
allocator.start_again()
print(os.environ["GLIBC_TUNABLES"], sys.argv[1:])
"""


def output(code: str, *arguments: str, environment: dict[str, str]) -> str:
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout


def are_for_those_who_ask() -> bool:
    libc, version = (os.confstr("CS_GNU_LIBC_VERSION") or "? 0").split()
    recent = libc == "glibc" and tuple(map(int, version.split("."))) >= (2, 35)
    return recent and MODE.exists() and "[madvise]" in MODE.read_text()


@pytest.mark.skipif(not are_for_those_who_ask(), reason="glibc is too old, or Linux gives them to all or to nobody")
def test_a_process_that_is_told_to_ask_has_them() -> None:
    plain = {name: value for name, value in os.environ.items() if name != "GLIBC_TUNABLES"}
    assert int(output(HELD, environment=plain)) == 0
    assert int(output(HELD, environment=allocator.told(plain))) >= 48  # MiB


FREED = """
import ctypes, resource
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_size_t], [ctypes.c_void_p]
faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for turn in range(3):
    before = faults()
    for at in [libc.malloc(24 << 20) for _ in range(4)]:
        ctypes.memset(at, 1, 24 << 20)
        libc.free(at)
print(faults() - before)
"""


@pytest.mark.skipif(not are_for_those_who_ask(), reason="glibc is too old, or a fault may be of more than a page")
def test_a_process_that_is_told_to_keeps_what_it_has_freed() -> None:
    small = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=0"}  # so that each page is a fault
    pages = 4 * (24 << 20) // resource.getpagesize()
    assert int(output(FREED, environment=os.environ | small)) > pages // 2
    assert int(output(FREED, environment=allocator.told(os.environ | small))) < pages // 100


KEPT = "glibc.malloc.mmap_threshold=33554432:glibc.malloc.trim_threshold=536870912"


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (None, f"glibc.malloc.hugetlb=1:{KEPT}"),
        ("", f"glibc.malloc.hugetlb=1:{KEPT}"),
        ("glibc.malloc.arena_max=2", f"glibc.malloc.arena_max=2:glibc.malloc.hugetlb=1:{KEPT}"),
        ("glibc.malloc.hugetlb=0", f"glibc.malloc.hugetlb=0:{KEPT}"),
        (
            "glibc.malloc.trim_threshold=9:glibc.malloc.hugetlb=2",
            "glibc.malloc.trim_threshold=9:glibc.malloc.hugetlb=2:glibc.malloc.mmap_threshold=33554432",
        ),
    ],
)
def test_what_is_set_already_stays(before: str | None, after: str) -> None:
    environment = {"HOME": "/"} | ({} if before is None else {"GLIBC_TUNABLES": before})
    assert allocator.told(environment) == {"HOME": "/", "GLIBC_TUNABLES": after}


def test_a_program_starts_again_once() -> None:
    plain = {name: value for name, value in os.environ.items() if name != "GLIBC_TUNABLES"}
    settings = allocator.told({})["GLIBC_TUNABLES"]
    said = output(AGAIN, "an argument", environment=plain)
    assert said.splitlines() == ["began", "began", f"{settings} ['an argument']"]
    assert output(AGAIN, environment=allocator.told(plain)).splitlines() == ["began", f"{settings} []"]
