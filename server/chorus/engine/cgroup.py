"""The memory that this process may have at most where it runs in a control group, as in a container.

    /proc/self/cgroup              0::/pod/app          v2, or with v1        4:memory:/pod/app
    /sys/fs/cgroup/pod/app/memory.max                   /sys/fs/cgroup/memory/pod/app/memory.limit_in_bytes
    /sys/fs/cgroup/pod/memory.max, and so on up         a group's limit holds for all groups in it

Inside a container the path may be the host's, which is not there; then what is mounted at the top is the container's.
"""

from pathlib import Path, PurePosixPath


def memory_limit(root: Path = Path("/")) -> int | None:
    """Bytes; None where there is no limit, or no control groups. `root` holds `proc` and `sys`."""
    limits = [int(text) for file in _limit_files(root) if (text := _read(file)).isdecimal()]
    return min(limits, default=None)


def _limit_files(root: Path) -> list[Path]:
    """Where limits may be written, of our groups and those around them."""
    mount = root / "sys/fs/cgroup"
    files = []
    for line in _read(root / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            top, name = mount, "memory.max"
        elif "memory" in controllers.split(","):
            top, name = mount / "memory", "memory.limit_in_bytes"
        else:
            continue
        group = PurePosixPath(path.lstrip("/"))
        files += [top / part / name for part in (group, *group.parents)]
    return files


def _read(file: Path) -> str:
    try:
        return file.read_text().strip()
    except OSError:
        return ""
