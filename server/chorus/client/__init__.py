"""The client: a typed, synchronous Python face of both gRPC services. Needs no torch.

    with Client("127.0.0.1:50051") as client:
        with client.stream("Once upon a time", adapter="acme/support", max_tokens=64) as answer:
            for delta in answer:
                print(delta.text, end="", flush=True)
        print(answer.result.usage)

Every failure is raised as a class of `chorus.errors`, whether the server or the transport reports it.
"""

from chorus.client.client import Client
from chorus.client.names import expand
from chorus.client.results import (
    Adapter,
    AdapterVersion,
    Completion,
    Delta,
    Model,
    PushedVersion,
    Residency,
    ResidencyTotals,
    ResidentVersion,
    Timing,
    Usage,
)
from chorus.client.stream import Sampling, Stream

__all__ = [
    "Adapter",
    "AdapterVersion",
    "Client",
    "Completion",
    "Delta",
    "Model",
    "PushedVersion",
    "Residency",
    "ResidencyTotals",
    "ResidentVersion",
    "Sampling",
    "Stream",
    "Timing",
    "Usage",
    "expand",
]
