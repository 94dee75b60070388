"""vLLM's CPU build, in the virtual environment that `vllm_venv.py` makes, set up as its documentation advises.

One engine without LoRA for the base, as whoever serves only a base would run it, and one with room for all adapters:
each in a process of its own. Tokenizer and detokenizer are off. tcmalloc and Intel's OpenMP are preloaded, and a thread
is bound to every core.
"""

import os
import sys
import time
from pathlib import Path

from peers.process import Answer, Contestant, serve
from peers.vllm_venv import PYTHON, preloads
from peers.work import ADAPTERS, RANK, REQUESTS, TOKENS_IN, TOKENS_OUT, adapter_folders, base_folder, prompts

MISSING = "vLLM is not here: python benchmarks/peers/vllm_venv.py makes its environment, .peers/vllm (about 2 GB)"


def require() -> str:
    """What has to be preloaded.

    Raises:
        FileNotFoundError: the environment is not there, or a library that has to be preloaded; says what to do.
    """
    preload = preloads()
    if not PYTHON.exists() or preload is None:
        raise FileNotFoundError(MISSING)
    return preload


def start(folder: Path, dtype: str, *, lora: bool) -> Contestant:
    """Starts vLLM's process; raises as `require` does."""
    environment = {
        "LD_PRELOAD": require(),
        "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
        "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, sorted(os.sched_getaffinity(0)))),
        "VLLM_LOGGING_LEVEL": "CRITICAL",
    }
    return Contestant(
        "peers.vllm_cpu",
        *(str(folder), "lora" if lora else "base", dtype),
        python=str(PYTHON),
        environment=environment,
    )


class Vllm:
    """An engine that runs all requests at once."""

    def __init__(self, folder: Path, lora: bool, dtype: str) -> None:
        # vLLM looks at models in a process of its own, where transformers would take a folder of ours, or a script, for
        # the package `kernels`.
        folder = folder.resolve()
        os.environ.pop("PYTHONPATH", None)
        os.chdir(folder)

        from vllm import LLM

        options = {"enable_lora": True, "max_loras": ADAPTERS, "max_lora_rank": RANK} if lora else {}
        self._llm = LLM(
            model=str(base_folder(folder)),
            skip_tokenizer_init=True,
            dtype=dtype,
            max_model_len=2 * (TOKENS_IN + TOKENS_OUT),
            max_num_seqs=REQUESTS,
            max_num_batched_tokens=REQUESTS * TOKENS_IN,
            **options,
        )
        self._adapters = adapter_folders(folder)

    def run(self, adapters: int, turn: int) -> Answer:
        from vllm import SamplingParams
        from vllm.lora.request import LoRARequest

        sampling = SamplingParams(max_tokens=TOKENS_OUT, temperature=0, ignore_eos=True, detokenize=False)
        asked = [{"prompt_token_ids": prompt} for prompt in prompts(adapters, turn)]
        chosen = [i % adapters for i in range(REQUESTS)] if adapters else []
        requests = [LoRARequest(f"a{i}", i + 1, str(self._adapters[i])) for i in chosen] or None
        began = time.perf_counter()
        answers = self._llm.generate(asked, sampling, lora_request=requests, use_tqdm=False)
        seconds = time.perf_counter() - began
        assert all(len(answer.outputs[0].token_ids) == TOKENS_OUT for answer in answers)
        return {"tok_s": REQUESTS * TOKENS_OUT / seconds}


if __name__ == "__main__":
    serve(lambda: Vllm(Path(sys.argv[1]), sys.argv[2] == "lora", sys.argv[3]).run)
