"""The demo's story, told on the terminal; every sentence that claims something is checked before it is printed."""

import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from threading import Event
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table

from chorus.client import Client, Completion
from chorus.errors import FailedPrecondition
from chorus.trainer.demo.server import Served, serving
from chorus.trainer.demo.tenants import Trained, heldout, train_all
from chorus.trainer.records import OnProgress, Record
from chorus.trainer.world.tenants import TENANTS, Tenant, exact_match

MAX_TOKENS = 48
STREAM_TOKENS = 700
SHOWN = 3
# What the adapters must reach on prompts that they never saw, and by how much they must beat the base.
ENOUGH, LEAD = 0.8, 0.5
# Base and tenants together make four kinds of rows; this many adapters must have shared a step.
SHARED = len(TENANTS)
GO_ON = (
    "chorus serve                             # the embedded base, or --model PATH_OR_ID",
    "chorus train CONFIG.yaml --output DIR    # the README has a config",
    "chorus adapters push DIR --tenant T --name NAME --admin 127.0.0.1:50052",
    "chorus generate --server 127.0.0.1:50051 --adapter T/NAME --prompt TEXT",
)

Answers = dict[Tenant | None, list[Completion]]


def demo(
    prompts: Annotated[int, typer.Option(min=SHOWN, max=200, help="Held-out prompts for each tenant.")] = 24,
) -> None:
    """Train three tenants' adapters, serve them in one batch, and check that each answers as if alone.

    Example: chorus demo

    Runs on CPU, ends by itself, leaves nothing behind. Fails if anything that it says does not hold.
    """
    console = Console(highlight=False)
    with tempfile.TemporaryDirectory(prefix="chorus-demo-") as name:
        folder = Path(name)
        console.print("[bold]1. Three tenants train their adapters[/] on the embedded base")
        with _training_bars(console) as bar:
            trained = train_all(folder, bar)
        for t in trained:
            losses = f"validation loss {t.validation_loss_before:.2f} -> {t.validation_loss:.2f}"
            console.print(f"   {t.tenant:8} {t.seconds:5.1f} s   {losses}")
        console.print("[bold]2. One server starts[/] with the base alone")
        with serving(folder / "state") as served:
            _push_while_streaming(console, served, trained)
            answers, steps = _mixed_batch(console, served, prompts)
        _show(console, answers)
        _check_shared(console, steps)
        _check_accuracy(console, answers)
        _check_solo(console, answers, trained)
    console.print("\n[bold green]All of it holds.[/] Go on with your own:")
    for line in GO_ON:
        console.print(f"  {line}", style="dim", soft_wrap=True)


@contextmanager
def _training_bars(console: Console) -> Iterator[Callable[[Tenant], OnProgress]]:
    columns = (TextColumn("   {task.description:8}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:

        def bar(tenant: Tenant) -> OnProgress:
            task = progress.add_task(tenant, total=None)

            def show(record: Record) -> None:
                progress.update(task, completed=record.step, total=record.steps)

            return show

        yield bar


def _push_while_streaming(console: Console, served: Served, trained: Sequence[Trained]) -> None:
    """Hot-loads every adapter while the base streams, and checks that it went on.

    A stream takes one to three seconds; where a disk takes longer to store three adapters, another one follows it.
    """
    came, streams, all_there = 0, 0, Event()

    def keep_streaming(client: Client) -> None:
        nonlocal came, streams
        long: dict[str, Any] = {"max_tokens": STREAM_TOKENS, "temperature": 0.0, "ignore_eos": True}
        while not streams or not all_there.is_set():
            with client.stream("Once upon a time", **long) as stream:
                for delta in stream:
                    came += len(delta.token_ids)
            streams += 1

    with Client(served.inference, admin=served.admin) as client, ThreadPoolExecutor(1) as reader:
        reading = reader.submit(keep_streaming, client)
        console.print("[bold]3. The adapters are pushed and loaded while a stream runs[/]")
        try:
            for t in trained:
                began, before = time.monotonic(), came
                pushed = client.push(t.folder, tenant=t.tenant, name="replies")
                client.prefetch(pushed.version)
                took_ms, meanwhile = (time.monotonic() - began) * 1000, came - before
                if not meanwhile:
                    raise FailedPrecondition("the stream stood still while an adapter was loaded")
                console.print(f"   {pushed.name:32} {took_ms:4.0f} ms; the stream got {meanwhile} tokens meanwhile")
        finally:
            all_there.set()
        reading.result()
    if came != streams * STREAM_TOKENS:
        raise FailedPrecondition(f"the stream broke: {came} of {streams * STREAM_TOKENS} tokens")
    console.print(f"   the stream went on to its end: {came} tokens")


def _mixed_batch(console: Console, served: Served, prompts: int) -> tuple[Answers, dict[int, float]]:
    """Streams every prompt to every tenant and to the base, all at once; and steps by the adapters they held."""
    console.print(f"[bold]4. {prompts} held-out prompts go to every tenant and to the base, all at once[/]")
    askers: list[Tenant | None] = [None, *TENANTS]
    before = _steps_by_adapters(served)
    with Client(served.inference) as client, ThreadPoolExecutor(prompts * len(askers)) as pool:

        def ask(asker: Tenant | None, prompt: str) -> Completion:
            adapter = f"tenants/{asker}/adapters/replies" if asker else ""
            return client.generate(prompt, adapter=adapter, max_tokens=MAX_TOKENS, temperature=0.0)

        began = time.monotonic()
        examples = heldout(TENANTS[0], prompts)  # the prompts are every tenant's
        pending = [{asker: pool.submit(ask, asker, e["prompt"]) for asker in askers} for e in examples]
        answers = {asker: [futures[asker].result() for futures in pending] for asker in askers}
        seconds = time.monotonic() - began
    tokens = sum(c.usage.completion_tokens for completions in answers.values() for c in completions)
    console.print(f"   {prompts * len(askers)} streams, {tokens} tokens, {tokens / seconds:.0f} tokens/s")
    after = _steps_by_adapters(served)
    return answers, {count: after[count] - before[count] for count in after}


def _steps_by_adapters(served: Served) -> dict[int, float]:
    """Engine steps by how many distinct adapters they held: {at most 2: n, any: n}, from the server's metrics."""
    name = "chorus_step_distinct_adapters"
    return {
        SHARED - 1: served.metric(f"{name}_bucket", le=f"{SHARED - 1}.0"),
        SHARED: served.metric(f"{name}_count"),
    }


def _show(console: Console, answers: Answers) -> None:
    table = Table(title="the same prompts, each tenant's own answers", show_lines=True)
    table.add_column("prompt")
    for asker in answers:
        table.add_column(asker or "base")
    for i, example in enumerate(heldout(TENANTS[0], SHOWN)):
        table.add_row(example["prompt"], *(str(answers[asker][i].text).strip() for asker in answers))
    console.print(table)


def _check_shared(console: Console, steps: dict[int, float]) -> None:
    total, shared = steps[SHARED], steps[SHARED] - steps[SHARED - 1]
    if shared < 1:
        raise FailedPrecondition("no step held all tenants' adapters: they were not served in one batch")
    console.print(f"[bold]5. One batch:[/] {shared:.0f} of {total:.0f} steps ran all {SHARED} adapters together")


def _check_accuracy(console: Console, answers: Answers) -> None:
    console.print("[bold]6. Held-out accuracy[/] (exact match)      base   adapter")
    for tenant in TENANTS:
        examples = heldout(tenant, len(answers[tenant]))
        base, tuned = (_accuracy(answers[asker], [e["completion"] for e in examples]) for asker in (None, tenant))
        console.print(f"   {tenant:39} {base:6.0%}   {tuned:6.0%}")
        if tuned < ENOUGH or tuned < base + LEAD:
            raise FailedPrecondition(f"{tenant}: the adapter gets {tuned:.0%} right, the base {base:.0%}: not learned")


def _accuracy(completions: Sequence[Completion], expected: Sequence[str]) -> float:
    right = [exact_match(c.text or "", e) for c, e in zip(completions, expected, strict=True)]
    return sum(right) / len(right)


def _check_solo(console: Console, answers: Answers, trained: Sequence[Trained]) -> None:
    from chorus.trainer.demo.solo import solo_answers

    for t in trained:
        prompts = [example["prompt"] for example in heldout(t.tenant, len(answers[t.tenant]))]
        expected = solo_answers(t.folder, prompts, MAX_TOKENS)
        for prompt, completion, alone in zip(prompts, answers[t.tenant], expected, strict=True):
            if completion.token_ids != alone:
                raise FailedPrecondition(
                    f"{t.tenant}: served {completion.token_ids}, alone under peft {alone}, for {prompt!r}"
                )
    count = sum(len(answers[t.tenant]) for t in trained)
    console.print(f"[bold]7. As if alone:[/] {count} of {count} answers equal that adapter's under transformers + peft")
