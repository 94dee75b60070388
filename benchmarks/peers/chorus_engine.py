"""Our engine, stepped in this process with every adapter loaded; a step takes as many tokens as vLLM's may."""

import resource
import statistics
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import psutil

from chorus import allocator
from chorus.config import ServerConfig
from chorus.engine import messages as m
from chorus.engine.imports import leave_out_triton
from peers.process import Answer, serve
from peers.work import REQUESTS, TOKENS_IN, TOKENS_OUT, adapter_folders, base_folder, prompts

if TYPE_CHECKING:
    from step_profile import StepProfile

KV_MB, ADAPTER_MB = 64, 160


class ChorusEngine:
    """Answers with tokens/s and the median decode step; with where a step's time goes; with its memory."""

    def __init__(self, folder: Path, device: str) -> None:
        if device != "cuda":
            leave_out_triton()  # as a server's engine
        from loads.alone import alone, load_adapters

        config = ServerConfig(
            model=str(base_folder(folder)),
            device="cuda" if device == "cuda" else "cpu",
            kv_cache_mb=KV_MB,
            adapter_memory_mb=ADAPTER_MB,
            adapter_host_mb=0,
            max_rows=REQUESTS,
            max_step_tokens=REQUESTS * TOKENS_IN,
        )
        self._engine, self._base, _ = alone(config)
        self._refs, _ = load_adapters(self._engine, self._base, adapter_folders(folder))

    def answer(self, ask: str, adapters: int = 0, turn: int = 0) -> Answer:
        match ask:
            case "run":
                return self._run(adapters, turn)
            case "profile":
                return self._profile(adapters, turn)
            case _:
                return self._memory()

    def _run(self, adapters: int, turn: int, profile: "StepProfile | None" = None) -> Answer:
        """Decode steps are those with all requests under way, from their first tokens to the first end."""
        commands: list[m.Submit] = self._submits(adapters, turn)
        tokens, decoding, steps, parts = 0, False, [], []
        began = time.perf_counter()
        while tokens < REQUESTS * TOKENS_OUT:
            step_began = time.perf_counter()
            events = [event for event in self._engine.step(commands).events if isinstance(event, m.Tokens)]
            seconds = time.perf_counter() - step_began
            tokens, commands = tokens + sum(len(event.token_ids) for event in events), []
            spent = profile.take() if profile else {}
            if decoding and len(events) == REQUESTS and not any(event.finish for event in events):
                steps.append(seconds)
                parts.append(spent)
            decoding = decoding or tokens >= REQUESTS
        answer: Answer = {
            "tok_s": tokens / (time.perf_counter() - began),
            "decode_step_ms": statistics.median(steps) * 1e3,
        }
        if profile:
            answer["parts_ms"] = {
                name: statistics.median(spent.get(name, 0.0) for spent in parts) * 1e3 for name in profile.names
            }
        return answer

    def _profile(self, adapters: int, turn: int) -> Answer:
        from step_profile import StepProfile

        with StepProfile() as profile:
            return self._run(adapters, turn, profile)

    def _submits(self, adapters: int, turn: int) -> list[m.Submit]:
        sampling = m.Sampling(TOKENS_OUT, temperature=0.0, ignore_eos=True)
        return [
            m.Submit(i, tuple(prompt), sampling, self._refs[i % adapters] if adapters else None)
            for i, prompt in enumerate(prompts(adapters, turn))
        ]

    def _memory(self) -> Answer:
        """Peak and what is left now; of that, files mapped: their clean pages are shared, and the system's to take."""
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        now = psutil.Process().memory_info()
        weights = self._base.facts.parameter_count * self._base.dtype.itemsize / 2**20
        granted = weights + KV_MB + ADAPTER_MB
        return {
            "peak_rss_mb": peak,
            "rss_mb": now.rss / 2**20,
            "file_mapped_mb": now.shared / 2**20,
            "weights_mb": weights,
            "rss_over_budgets_mb": peak - granted,
        }


if __name__ == "__main__":
    allocator.start_again()  # as a server's engine
    serve(lambda: ChorusEngine(Path(sys.argv[1]), sys.argv[2]).answer)
