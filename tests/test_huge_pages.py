"""Memory in pages of 2 MiB, which a process is told to ask for when it starts."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from chorus import huge_pages

MODE = Path("/sys/kernel/mm/transparent_hugepage/enabled")

HELD = """
data = bytearray(64 << 20)
rollup = dict(line.split(":") for line in open("/proc/self/smaps_rollup").read().splitlines()[1:])
print(int(rollup["AnonHugePages"].split()[0]) // 1024)
"""

AGAIN = """
import os, sys
from chorus import huge_pages
print("began", flush=True)
huge_pages.start_again()
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
    assert int(output(HELD, environment=huge_pages.asked_for(plain))) >= 48  # MiB


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (None, "glibc.malloc.hugetlb=1"),
        ("", "glibc.malloc.hugetlb=1"),
        ("glibc.malloc.arena_max=2", "glibc.malloc.arena_max=2:glibc.malloc.hugetlb=1"),
        ("glibc.malloc.hugetlb=0", "glibc.malloc.hugetlb=0"),
        ("glibc.malloc.hugetlb=2:glibc.malloc.arena_max=2", "glibc.malloc.hugetlb=2:glibc.malloc.arena_max=2"),
    ],
)
def test_what_is_set_already_stays(before: str | None, after: str) -> None:
    environment = {"HOME": "/"} | ({} if before is None else {"GLIBC_TUNABLES": before})
    assert huge_pages.asked_for(environment) == {"HOME": "/", "GLIBC_TUNABLES": after}


def test_a_program_starts_again_once() -> None:
    plain = {name: value for name, value in os.environ.items() if name != "GLIBC_TUNABLES"}
    said = output(AGAIN, "an argument", environment=plain)
    assert said.splitlines() == ["began", "began", "glibc.malloc.hugetlb=1 ['an argument']"]
    asking = huge_pages.asked_for(plain)
    assert output(AGAIN, environment=asking).splitlines() == ["began", "glibc.malloc.hugetlb=1 []"]
