"""The registry's files.

    TENANT/ADAPTER.json   one `AdapterRecord`; replaced whole: temp file, sync, rename, sync of the folder
    .lock                 held while a server runs

A `.tmp` file is a change that was never acknowledged; loading removes it. One writer at a time is the caller's matter.
"""

import fcntl
from io import BufferedWriter
from pathlib import Path

from chorus.adapters import records
from chorus.adapters.durable import disk_full_is_resource_exhausted, make_folder, sync_folder, write_synced
from chorus.adapters.names import AdapterName
from chorus.adapters.records import AdapterRecord
from chorus.errors import DataLoss, Unavailable


class RegistryFolder:
    """The folder of a registry, created where it is missing, and locked against other processes.

    Raises:
        Unavailable: REGISTRY_LOCKED.
    """

    def __init__(self, root: Path) -> None:
        self._root = root
        make_folder(root)
        self._lock_file = _lock(root / ".lock")

    def close(self) -> None:
        """Lets go of the lock; once is enough."""
        self._lock_file.close()

    def load(self) -> list[AdapterRecord]:
        """Reads every record.

        Raises:
            DataLoss: a file is damaged.
        """
        loaded = []
        for path in sorted(self._root.glob("*/*")):
            if path.suffix == ".tmp":
                path.unlink()
                continue
            what = f"{path.parent.name}/{path.name}"
            record = records.from_json(path.read_bytes(), what)
            if self._path(record.name) != path:
                raise DataLoss(f"the registry's file {what} is another adapter's", reason="REGISTRY_DAMAGED")
            loaded.append(record)
        return loaded

    def save(self, record: AdapterRecord) -> None:
        """Writes a record; either the old or the new one is there, whatever happens.

        Raises:
            ResourceExhausted: DISK_FULL; the old one is there.
        """
        path = self._path(record.name)
        temporary = path.with_suffix(".tmp")
        with disk_full_is_resource_exhausted():
            make_folder(path.parent)
            temporary.unlink(missing_ok=True)
            try:
                write_synced(temporary, records.to_json(record))
                temporary.rename(path)
            except BaseException:
                temporary.unlink(missing_ok=True)
                raise
            sync_folder(path.parent)

    def remove(self, name: AdapterName) -> None:
        """Removes a record that is there."""
        path = self._path(name)
        path.unlink()
        sync_folder(path.parent)

    def _path(self, name: AdapterName) -> Path:
        return self._root / name.tenant / f"{name.adapter}.json"


def _lock(path: Path) -> BufferedWriter:
    file = path.open("ab")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise Unavailable("another process holds this registry", reason="REGISTRY_LOCKED") from None
    return file
