"""transformers' `generate()` for the base, peft's batch with `adapter_names` for adapters."""

import sys
import time
from pathlib import Path

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from peers.process import Answer, serve
from peers.work import REQUESTS, TOKENS_IN, TOKENS_OUT, adapter_folders, base_folder, prompts


class TransformersPeft:
    """Two copies of the base, one of them with every adapter."""

    def __init__(self, folder: Path, device: str, dtype: torch.dtype) -> None:
        self._device = device
        self._base, wrapped = (
            AutoModelForCausalLM.from_pretrained(base_folder(folder), dtype=dtype).eval().to(device) for _ in range(2)
        )
        first, *others = adapter_folders(folder)
        self._adapted = PeftModel.from_pretrained(
            wrapped, str(first), adapter_name=first.name, autocast_adapter_dtype=False
        )
        for path in others:
            self._adapted.load_adapter(str(path), adapter_name=path.name, autocast_adapter_dtype=False)
        self._adapted.eval().to(device, dtype)
        self._names = [path.name for path in (first, *others)]

    @torch.inference_mode()
    def run(self, adapters: int, turn: int) -> Answer:
        ids = torch.tensor(prompts(adapters, turn), device=self._device)
        exactly = {"max_new_tokens": TOKENS_OUT, "min_new_tokens": TOKENS_OUT, "do_sample": False, "pad_token_id": 0}
        names = {"adapter_names": [self._names[i % adapters] for i in range(REQUESTS)]} if adapters else {}
        model = self._adapted if adapters else self._base
        began = time.perf_counter()
        out = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **exactly, **names)
        seconds = time.perf_counter() - began
        assert out.shape[1] == TOKENS_IN + TOKENS_OUT
        return {"tok_s": REQUESTS * TOKENS_OUT / seconds}


if __name__ == "__main__":
    serve(lambda: TransformersPeft(Path(sys.argv[1]), sys.argv[2], getattr(torch, sys.argv[3])).run)
