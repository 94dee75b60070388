"""Fakes that drive the services without a model: a scripted engine, a byte-level tokenizer, a tiny adapter."""

import json
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import count
from pathlib import Path

import torch
from safetensors.torch import save
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from chorus.adapters.checks import check
from chorus.adapters.kinds import Lowering
from chorus.admin.v1 import adapters_pb2
from chorus.engine.messages import (
    Abort,
    Check,
    Checked,
    CheckFailed,
    Command,
    Early,
    Event,
    FinishReason,
    Load,
    Loaded,
    LoadFailed,
    Pin,
    QueryResidency,
    ResidencyReport,
    ResidentAdapter,
    Started,
    StepEvents,
    StepStats,
    Submit,
    Tokens,
    Unload,
    Unpin,
)
from chorus.errors import ChorusError
from chorus.models.facts import BaseFacts
from chorus.models.sites import Site
from chorus.v1.generate_pb2 import GenerateResponse

EOS = 256
SITE = Site("model.layers.0.self_attn.q_proj", 16, 16)
FACTS = BaseFacts(
    name="tiny",
    digest="0" * 64,
    model_type="llama",
    context_length=512,
    vocab_size=257,
    dtype="float32",
    parameter_count=1234,
    sites=(SITE,),
    eos_token_ids=frozenset({EOS}),
)


def byte_tokenizer(chat_template: str | None = None) -> PreTrainedTokenizerFast:
    """Token i is byte i, so a test knows every token of every text; 256 is the end of sequence."""
    letters = _bytes_to_letters()
    vocab = {letters[byte]: byte for byte in range(256)} | {"<eos>": EOS}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>", chat_template=chat_template)


def _bytes_to_letters() -> list[str]:
    """GPT-2's table: printable bytes stand for themselves, the others for code points from 256 on."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    spare = count(256)
    return [chr(byte) if byte in printable else chr(next(spare)) for byte in range(256)]


Reply = Callable[[Submit, "FakeEngine"], Iterable[Event | float]]


def says(text: str, *, finish: FinishReason = FinishReason.STOP, pause_s: float = 0.0) -> Reply:
    """Answers with the bytes of `text`, one token a step, then EOS where the reason is STOP."""

    def reply(submit: Submit, engine: "FakeEngine") -> Iterator[Event | float]:
        ids = [*text.encode(), *([EOS] if finish is FinishReason.STOP else [])]
        yield Started(submit.request_id, time.monotonic(), 0.0)
        for i, token in enumerate(ids):
            yield Tokens(submit.request_id, (token,), finish if i == len(ids) - 1 else None)
            yield pause_s

    return reply


def says_to(heard: Sequence[GenerateResponse], text: str) -> Reply:
    """Answers as `says`, each token once the one before it has come to `heard`, however slow the machine is."""

    def reply(submit: Submit, engine: "FakeEngine") -> Iterator[Event | float]:
        yield Started(submit.request_id, time.monotonic(), 0.0)
        for told, token in enumerate([*text.encode(), EOS]):
            while sum(len(message.token_ids) for message in heard) < told:
                yield 0.001
            yield Tokens(submit.request_id, (token,), FinishReason.STOP if token == EOS else None)

    return reply


def interleaved(*texts: str, finish: FinishReason = FinishReason.STOP, then_endless: Sequence[int] = ()) -> Reply:
    """Answers output i with the bytes of text i, all outputs a token a step, each until it ends or is aborted.

    Outputs in `then_endless` go on after their text.
    """

    def reply(submit: Submit, engine: "FakeEngine") -> Iterator[Event | float]:
        yield Started(submit.request_id, time.monotonic(), 0.0)
        left = {i: [*text.encode(), *([EOS] if finish is FinishReason.STOP else [])] for i, text in enumerate(texts)}
        while left:
            events = []
            for index, ids in list(left.items()):
                token = ids.pop(0)
                if index in then_endless and len(ids) < 2:
                    ids.append(ord("x"))
                events.append(Tokens(submit.request_id, (token,), None if ids else finish, index))
                if not ids or engine.has_aborted(submit.request_id, index):
                    del left[index]
            engine.post(*events)
            yield 0.001

    return reply


def never_ends(submit: Submit, engine: "FakeEngine") -> Iterator[Event | float]:
    """One token every few milliseconds until the request is aborted."""
    yield Started(submit.request_id, time.monotonic(), 0.0)
    while not engine.has_aborted(submit.request_id):
        yield Tokens(submit.request_id, (ord("x"),))
        yield 0.002


def silent(submit: Submit, engine: "FakeEngine") -> Iterator[Event | float]:
    """Never answers."""
    return iter(())


class FakeEngine:
    """Speaks the engine's protocol from threads of its own, one a request. `reply` says what a Submit gets."""

    def __init__(
        self, on_events: Callable[[Sequence[StepEvents | Early]], None], on_death: Callable[[BaseException], None]
    ) -> None:
        self.commands: list[Command] = []
        self.aborted: set[int] = set()
        self.aborted_outputs: set[tuple[int, int]] = set()
        self.reply: Reply = says("ok")
        self.load_error: LoadFailed | None = None
        self.loads_answered = True
        self.resident: tuple[ResidentAdapter, ...] = ()
        self.base_digest = FACTS.digest
        self.max_rank = 128
        self.stopped = threading.Event()
        self.die = on_death
        self._on_events = on_events
        self._threads: list[threading.Thread] = []

    def start(self) -> None:
        pass

    def stop(self) -> None:
        self.stopped.set()
        for thread in self._threads:
            thread.join()

    def send(self, command: Command, /) -> None:
        self.commands.append(command)
        match command:
            case Submit():
                self._run(lambda: self._answer(command))
            case Abort(request_id, None):
                self.aborted.add(request_id)
            case Abort(request_id, int() as index):
                self.aborted_outputs.add((request_id, index))
            case Load(adapter) | Pin(adapter):
                if self.loads_answered:
                    self._run(lambda: self.post(self.load_error or Loaded(adapter.digest, (("device", 0.01),))))
            case Check(check_id, folder):
                self._run(lambda: self.post(self._checked(check_id, Path(folder))))
            case QueryResidency(query_id):
                self._run(lambda: self.post(ResidencyReport(query_id, self.resident, 64, 16, 4096, 1024, 32, 3)))
            case Unpin() | Unload():
                pass

    def post(self, *events: Event, stats: StepStats | None = None) -> None:
        self._on_events([StepEvents(events, stats or StepStats(seconds=0.001, rows=1), ran=True)])

    def has_aborted(self, request_id: int, index: int = 0) -> bool:
        """The request, or this output of it."""
        return request_id in self.aborted or (request_id, index) in self.aborted_outputs

    def sent(self, kind: type[Command]) -> list[Command]:
        return [command for command in self.commands if isinstance(command, kind)]

    def _checked(self, check_id: int, folder: Path) -> Event:
        """As the engine does it."""
        try:
            return Checked(
                check_id, check(folder, Lowering({SITE.name: SITE}, max_rank=self.max_rank), self.base_digest)
            )
        except ChorusError as error:
            fields = tuple((violation.field, violation.description) for violation in error.violations)
            return CheckFailed(check_id, error.code, error.reason, error.message, error.retry_after_s, fields)

    def _answer(self, submit: Submit) -> None:
        for item in self.reply(submit, self):
            if self.stopped.is_set():
                return
            if isinstance(item, float):
                time.sleep(item)
            else:
                self.post(item)

    def _run(self, action: Callable[[], None]) -> None:
        thread = threading.Thread(target=action, daemon=True)
        self._threads.append(thread)
        thread.start()


def lora_files(
    *, rank: int = 4, seed: int = 0, module: str = SITE.name, task: dict[str, object] | None = None
) -> dict[str, bytes]:
    """The two files of a LoRA that fits `SITE`, as PEFT writes them, and a task card where there is one."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {
        f"base_model.model.{module}.lora_A.weight": torch.randn(rank, 16, generator=generator),
        f"base_model.model.{module}.lora_B.weight": torch.randn(16, rank, generator=generator),
    }
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": 8, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM"}
    files = {"adapter_config.json": json.dumps(config).encode(), "adapter_model.safetensors": save(tensors)}
    return files | ({"task.json": json.dumps(task).encode()} if task is not None else {})


def upload(
    parent: str,
    files: dict[str, bytes],
    *,
    alias: str | None = None,
    request_id: str = "",
    chunk: int = 1000,
    sizes: dict[str, int] | None = None,
) -> Iterator[adapters_pb2.CreateAdapterVersionRequest]:
    """The messages of one upload; `sizes` overrides what the header announces."""
    announced = {name: len(data) for name, data in files.items()} | (sizes or {})
    header = adapters_pb2.UploadHeader(
        parent=parent,
        request_id=request_id,
        alias=alias,
        files=[adapters_pb2.UploadFile(name=name, size_bytes=size) for name, size in announced.items()],
    )
    yield adapters_pb2.CreateAdapterVersionRequest(header=header)
    data = b"".join(files.values())
    for start in range(0, len(data), chunk):
        part = adapters_pb2.UploadChunk(data=data[start : start + chunk])
        yield adapters_pb2.CreateAdapterVersionRequest(chunk=part)
