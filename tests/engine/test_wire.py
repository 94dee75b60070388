"""Messages survive the wire, however it cuts them up."""

import math

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from chorus.adapters.records import CheckedAdapter
from chorus.engine import messages as m
from chorus.engine.memory import MemoryPlan
from chorus.engine.wire import Died, Frames, Ready, Refused, Start, Steps, frame, from_engine, to_engine
from chorus.models.facts import BaseFacts
from chorus.models.sites import Site

ADAPTER = m.AdapterRef("d" * 64, "/state/blobs")
SAMPLING = m.Sampling(
    8, seed=2**64 - 1, stop_token_ids=frozenset({3, 5}), logit_bias=((7, -math.inf), (8, 1.5)), logprobs=0
)
TO_ENGINE = [
    Start("{}"),
    m.Submit(1, (1, 2, 2**31), SAMPLING, ADAPTER, -5, 12.5, 4),
    m.Submit(2, (), m.Sampling(0)),
    m.Abort(3),
    m.Abort(3, 1),
    m.Load(ADAPTER),
    m.Pin(ADAPTER),
    m.Unpin("d"),
    m.Unload("d"),
    m.QueryResidency(4),
    m.Check(5, "/tmp/ü"),
]
STEP = m.StepEvents(
    (
        m.Started(1, 2.5, 0.0),
        m.PromptLogprobs(1, (m.TokenLogprob(-math.inf, ((1, -0.5),)),)),
        m.Tokens(1, (7,), m.FinishReason.STOP_STRING, 2, (m.TokenLogprob(-0.25),), first=True),
        m.Failed(2, "INTERNAL", "X", "text", 1.0),
        m.Loaded("d", (("read", 0.1),)),
        m.LoadFailed("d", "DATA_LOSS", "X", "text"),
        m.ResidencyReport(9, (m.ResidentAdapter("d", "host", 1, 2, 3, 4, True, 5),), 1, 2, 3, 4, 5, 6),
        m.Checked(5, CheckedAdapter("d", "lora", 8, 100, 3, "chat", {"loss": 0.5}, "e")),
        m.CheckFailed(6, "INVALID_ARGUMENT", "X", "text", None, (("file", "bad"),)),
    ),
    m.StepStats(seconds=0.5, rows=3, running=2, launches={m.Launch.GRAPH: 1}, graphs=2),
    ran=True,
)
SITE = Site("model.layers.0.mlp.up_proj", 8, 16, has_bias=True, shard="column")
FACTS = BaseFacts("tiny", "0" * 64, "llama", 64, 300, "float32", 12, (SITE,), frozenset({2}))
FROM_ENGINE = [
    Ready(FACTS, MemoryPlan(4, 16, 1024, 8, 64)),
    Refused("NOT_FOUND", "X", "text"),
    Steps([STEP, m.StepEvents(), m.Early(STEP.events, 2.5)]),
    Died("RuntimeError"),
]


@given(cuts=st.lists(st.integers(1, 400), max_size=30))
def test_messages_arrive_whole_and_in_order_in_whatever_pieces(cuts: list[int]) -> None:
    for messages, decoder in ((TO_ENGINE, to_engine), (FROM_ENGINE, from_engine)):
        data = b"".join(frame(message) for message in messages)  # type: ignore[arg-type]
        frames = Frames(decoder)
        got: list[object] = []
        for cut in cuts:
            got += frames.feed(data[:cut])
            data = data[cut:]
        got += frames.feed(data)
        assert [_plain(message) for message in got] == [_plain(message) for message in messages]


def test_what_is_no_message_is_refused() -> None:
    with pytest.raises(msgspec.MsgspecError):
        list(Frames(to_engine).feed(frame(Died("x"))))


def _plain(message: object) -> object:
    """Lists and tuples are one on the wire where only a Sequence is asked for."""
    return message if not isinstance(message, Steps) else tuple(message.steps)
