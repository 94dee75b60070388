"""The work that the engine benchmark's contestants do, and the weights that they all have.

16 requests of 64 tokens in and 64 out, greedy, bf16; adapters of rank 16 on all seven linears of a layer. Prompts are
new in every turn and workload, so that nobody's prefix cache has seen them.
"""

import json
import random
from pathlib import Path

from common import SHAPE_144M, or_toy

REQUESTS, TOKENS_IN, TOKENS_OUT = 16, or_toy(64, 8), or_toy(64, 8)
RANK, ADAPTERS = 16, 16
LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
# The base, and so many distinct adapters among the requests.
WORKLOADS = {"base": 0, "one": 1, "mixed8": 8, "mixed16": 16}


def prompts(adapters: int, turn: int) -> list[list[int]]:
    """The token ids of the requests of a workload's turn."""
    generator = random.Random(f"{adapters} adapters, turn {turn}")
    return [[generator.randrange(SHAPE_144M["vocab_size"]) for _ in range(TOKENS_IN)] for _ in range(REQUESTS)]


def base_folder(folder: Path) -> Path:
    return folder / "base"


def adapter_folders(folder: Path) -> list[Path]:
    return [folder / f"adapter-{i}" for i in range(ADAPTERS)]


def save_weights(folder: Path) -> None:
    """Writes a random base of the shape and its adapters, as transformers and peft save them."""
    import torch
    from peft import LoraConfig, PeftModel, get_peft_model
    from transformers import AutoConfig, AutoModelForCausalLM

    (folder / "config.json").write_text(json.dumps(SHAPE_144M))
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder), dtype=torch.bfloat16)
    base.save_pretrained(base_folder(folder))
    config = LoraConfig(r=RANK, lora_alpha=RANK, target_modules=list(LINEARS), init_lora_weights=False)
    model: PeftModel | None = None
    for path in adapter_folders(folder):
        if model is None:
            model = get_peft_model(base, config, adapter_name=path.name, autocast_adapter_dtype=False)
        else:
            model.add_adapter(path.name, config, autocast_adapter_dtype=False)
    assert model is not None
    model.save_pretrained(str(folder))
