"""The oracle: what Hugging Face transformers and peft answer with one adapter, one prompt at a time."""

import warnings
from collections.abc import Sequence
from pathlib import Path

import torch

from chorus.trainer.base import load_base


def solo_answers(adapter: Path, prompts: Sequence[str], max_tokens: int) -> list[tuple[int, ...]]:
    """Greedy token ids of each prompt under the adapter alone, in fp32, from `generate()`; EOS included."""
    from peft import PeftModel

    base = load_base(None, torch.device("cpu"), torch.float32)
    with warnings.catch_warnings(action="ignore", category=FutureWarning):  # peft on transformers 5.2x
        model = PeftModel.from_pretrained(base.module, str(adapter)).eval()
    answers = []
    for prompt in prompts:
        ids = torch.tensor([base.tokenizer(prompt)["input_ids"]])
        with torch.inference_mode():
            out = model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=max_tokens,
                do_sample=False,
                pad_token_id=base.pad,
                eos_token_id=base.eos,
            )
        answers.append(tuple(out[0, ids.shape[1] :].tolist()))
    return answers
