"""Who is to blame for a step that fails: halves of it run again until the guilty stand alone.

    [ a b c d e f g h ]  fails
    [ a b c d ]          runs, its tokens stand        [ e f g h ]   fails
    [ e f ]              runs                          [ g h ]       fails
    [ g ]                fails: guilty                 [ h ]         runs

That is allowed because a step that failed has changed no sequence, and because what a chunk wrote to the KV cache it
writes again. If both halves run nobody is guilty: there was too little memory for all at once, or the fault has gone.
An error of the device itself is not looked into: nothing runs on it any more, so it ends the engine.
"""

import logging
import traceback
import uuid
from collections.abc import Callable, Sequence
from typing import Generic, NamedTuple, TypeVar

import torch

from chorus.engine.schedule import Chunk
from chorus.engine.sequence import Key
from chorus.errors import ChorusError, InternalError, ResourceExhausted

logger = logging.getLogger(__name__)

# Finding one guilty request of 64 takes 12 passes at most. Once this many are found in a step, what is left is tried
# part by part and not divided any further: then more is wrong than some requests, and everybody waits.
MAX_GUILTY = 4
MEMORY_RETRY_S = 1.0

T = TypeVar("T")


class Guilty(NamedTuple):
    """Requests that fail, and what they raised."""

    request_ids: list[int]
    error: Exception


class Verdict(NamedTuple, Generic[T]):
    """What the chunks that ran gave, and who did not."""

    results: dict[Key, T]
    guilty: list[Guilty]


def run(chunks: Sequence[Chunk], compute: Callable[[Sequence[Chunk]], dict[Key, T]]) -> Verdict[T]:
    """Computes chunks, all at once if that goes, and finds the requests that make it fail.

    `compute` must leave sequences as they are when it raises. A guilty request's other chunks may have results.

    Raises:
        Exception: the device is lost.
    """
    results: dict[Key, T] = {}
    guilty: list[Guilty] = []
    parts = [chunks]
    while parts:
        condemned = {request_id for found in guilty for request_id in found.request_ids}
        part = [chunk for chunk in parts.pop() if chunk.seq.request_id not in condemned]
        if not part:
            continue
        try:
            results |= compute(part)
        except Exception as error:
            if is_device_lost(error):
                raise
            traceback.clear_frames(error.__traceback__)  # they hold the activations, for which there is no room
            request_ids = list(dict.fromkeys(chunk.seq.request_id for chunk in part))
            if len(request_ids) == 1 or len(guilty) >= MAX_GUILTY:
                guilty.append(Guilty(request_ids, error))
            else:
                half = len(part) // 2
                parts += [part[half:], part[:half]]
    return Verdict(results, guilty)


def charge(error: Exception) -> ChorusError:
    """What the guilty are told; the log has the rest under the same incident."""
    incident = uuid.uuid4().hex[:12]
    logger.error("step failed, incident %s", incident, exc_info=error)
    if is_out_of_memory(error):
        message = f"a step of this request needs more memory than is free; ask for less, or later; incident {incident}"
        return ResourceExhausted(message, reason="STEP_OUT_OF_MEMORY", retry_after_s=MEMORY_RETRY_S)
    return InternalError(f"the step failed; incident {incident}")


def is_out_of_memory(error: Exception) -> bool:
    """Whether there was too little memory, on whichever device: torch says so in several ways."""
    text = str(error)
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or any(
        words in text for words in ("out of memory", "can't allocate memory", "CUBLAS_STATUS_ALLOC_FAILED")
    )


def is_device_lost(error: Exception) -> bool:
    """Whether the device itself failed: after that, everything on it does."""
    return not is_out_of_memory(error) and (isinstance(error, torch.AcceleratorError) or "CUDA error" in str(error))
