"""The client: a typed Python face of both gRPC services, synchronous and for asyncio. Needs no torch.

    with Client("127.0.0.1:50051") as client:
        with client.stream("Once upon a time", adapter="acme/support", max_tokens=64) as answer:
            for delta in answer:
                print(delta.text, end="", flush=True)
        print(answer.result.usage)

    async with AsyncClient("127.0.0.1:50051") as client:
        completion = await client.generate([{"role": "user", "content": "Hello"}], n=2, temperature=0.7)

Every failure is raised as a class of `chorus.errors`, whether the server or the transport reports it.
"""

from chorus.client.aio import AsyncClient
from chorus.client.batch import BatchOutcome, BatchRequest, run_batch
from chorus.client.batch_file import Progress, generate_file, run_file
from chorus.client.batch_lines import InputLine, read_lines
from chorus.client.client import Client
from chorus.client.names import expand
from chorus.client.requests import Message, Prompt, Sampling
from chorus.client.results import (
    Adapter,
    AdapterVersion,
    Completion,
    Delta,
    Model,
    Output,
    PushedVersion,
    Residency,
    ResidencyTotals,
    ResidentVersion,
    Score,
    Scores,
    Timing,
    TokenLogprob,
    Usage,
)
from chorus.client.stream import AsyncStream, Stream

__all__ = [
    "Adapter",
    "AdapterVersion",
    "AsyncClient",
    "AsyncStream",
    "BatchOutcome",
    "BatchRequest",
    "Client",
    "Completion",
    "Delta",
    "InputLine",
    "Message",
    "Model",
    "Output",
    "Progress",
    "Prompt",
    "PushedVersion",
    "Residency",
    "ResidencyTotals",
    "ResidentVersion",
    "Sampling",
    "Score",
    "Scores",
    "Stream",
    "Timing",
    "TokenLogprob",
    "Usage",
    "expand",
    "generate_file",
    "read_lines",
    "run_batch",
    "run_file",
]
