"""First-token times on an idle server by where the adapter is: on disk, in the page cache, on the device.

cold    the server has never loaded it, and its file's pages are dropped first
warm    the server has never loaded it; the file is in the page cache
hot     it is on the device
"""

import os
import statistics
from collections.abc import Sequence
from pathlib import Path

from chorus.client.aio import AsyncClient
from loads.open_loop import replay
from loads.trace import BASE, Arrival

TOKENS_IN, TOKENS_OUT = 64, 2
WARM_UP = 8


def drop_pages(folder: Path) -> None:
    """Asks the kernel to forget what it holds of the files in a folder; it does where they are written back."""
    for path in folder.rglob("*.safetensors"):
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


async def first_token_ms(
    client: AsyncClient, blobs: Path, adapters: Sequence[int], vocabulary: int
) -> dict[str, float]:
    """Medians, of a server that has loaded none of the adapters yet; every second one is asked for cold."""

    async def first_token(adapter: int) -> float:
        outcome = (await replay(client, [Arrival(0.0, adapter, TOKENS_IN, TOKENS_OUT)], vocabulary))[0]
        if outcome.error:
            raise RuntimeError(f"adapter {adapter}: {outcome.error}")
        return outcome.first_token * 1e3

    base = [await first_token(BASE) for _ in range(2 * WARM_UP)]
    times: dict[str, list[float]] = {"base": base[WARM_UP:], "cold": [], "warm": [], "hot": []}
    for i, adapter in enumerate(adapters):
        if i % 2:
            drop_pages(blobs)
        times["cold" if i % 2 else "warm"].append(await first_token(adapter))
        times["hot"].append(await first_token(adapter))
        times["base"].append(await first_token(BASE))
    return {f"first_token_{tier}_ms": statistics.median(found) for tier, found in times.items() if found}
