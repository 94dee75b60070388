"""Checks of uploaded adapters, before anything is stored: each reads a folder whole and fits it onto the base.

    folder ──(loader thread: read, base, fit, digested)──> CheckedAdapter, or the ChorusError that says why not

The step thread submits and collects; it never waits.
"""

import logging
import uuid
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import NamedTuple

from chorus.adapters import artifact as artifacts
from chorus.adapters import chat_template
from chorus.adapters.digest import version_digest
from chorus.adapters.kinds import Lowering
from chorus.adapters.loader_threads import LoaderThreads
from chorus.adapters.records import CheckedAdapter
from chorus.errors import ChorusError, InternalError

logger = logging.getLogger(__name__)

THREADS = 2


def check(folder: Path, lowering: Lowering, base_digest: str) -> CheckedAdapter:
    """Reads an adapter and fits it onto the base. Raises what `artifact.read`, `check_base` and `fit` raise."""
    artifact = artifacts.read(folder)
    artifacts.check_base(artifact, base_digest)
    fit = lowering.fit(artifact)
    template = artifact.task.chat_template if artifact.task else None
    return CheckedAdapter(
        digest=version_digest(artifact, base_digest),
        kind=fit.kind,
        max_rank=max(fit.ranks.values(), default=0),
        size_bytes=artifact.size_bytes,
        site_count=len(fit.ranks),
        task=artifact.task.task if artifact.task else "",
        metrics=dict(artifact.task.metrics) if artifact.task else {},
        chat_template=chat_template.digest(template) if template else "",
        alpha=artifact.config.lora_alpha,
        target_modules=tuple(sorted({name.rpartition(".")[2] for name in fit.ranks})),
    )


class CheckOutcome(NamedTuple):
    """Of one check: what it found, or why the adapter is refused."""

    check_id: int
    found: CheckedAdapter | ChorusError


class Checks:
    """Checks under way. `on_ready` is called on a loader thread when one has ended."""

    def __init__(self, check: Callable[[Path], CheckedAdapter], *, on_ready: Callable[[], None]) -> None:
        self._check = check
        self._on_ready = on_ready
        self._threads = LoaderThreads(THREADS)
        self._under_way: dict[int, Future[CheckedAdapter]] = {}

    def submit(self, check_id: int, folder: str) -> None:
        future = self._under_way[check_id] = self._threads.submit(self._check, Path(folder))
        future.add_done_callback(lambda _: self._on_ready())

    def advance(self) -> list[CheckOutcome]:
        """Those that have ended since the last call."""
        ended = [check_id for check_id, future in self._under_way.items() if future.done()]
        return [CheckOutcome(check_id, _outcome(self._under_way.pop(check_id))) for check_id in ended]

    def close(self) -> None:
        self._threads.shutdown()


def _outcome(future: Future[CheckedAdapter]) -> CheckedAdapter | ChorusError:
    try:
        return future.result()
    except ChorusError as error:
        return error
    except Exception as error:
        incident = uuid.uuid4().hex[:12]
        logger.error("an upload could not be checked, incident %s", incident, exc_info=error)
        return InternalError(f"the adapter could not be checked; incident {incident}")
