"""Adapters for a benchmark: distinct weights, so distinct memory, written without a model or peft."""

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file

LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def shapes(config: dict[str, int]) -> dict[str, tuple[int, int]]:
    """(in, out) of each linear of a layer of the Llama shape."""
    hidden, ffn = config["hidden_size"], config["intermediate_size"]
    heads, kv = (config[name] * config["head_dim"] for name in ("num_attention_heads", "num_key_value_heads"))
    return dict(
        zip(
            LINEARS,
            [(hidden, heads), (hidden, kv), (hidden, kv), (heads, hidden), (hidden, ffn), (hidden, ffn), (ffn, hidden)],
            strict=True,
        )
    )


def write_adapter(config: dict[str, int], folder: Path, index: int, ranks: Sequence[int]) -> Path:
    """A random LoRA adapter on all linears, as PEFT saves it; `index` is its seed and picks its rank."""
    rank = ranks[index % len(ranks)]
    generator = torch.Generator().manual_seed(index)
    tensors = {}
    for layer in range(config["num_hidden_layers"]):
        for name, (k, n) in shapes(config).items():
            room = "mlp" if name in LINEARS[4:] else "self_attn"
            key = f"base_model.model.model.layers.{layer}.{room}.{name}"
            tensors[f"{key}.lora_A.weight"] = torch.randn(rank, k, generator=generator) * k**-0.5
            tensors[f"{key}.lora_B.weight"] = torch.randn(n, rank, generator=generator) * 0.01
    folder.mkdir(parents=True)
    save_file({name: tensor.bfloat16() for name, tensor in tensors.items()}, folder / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": rank, "lora_alpha": rank}
    (folder / "adapter_config.json").write_text(json.dumps({**settings, "target_modules": list(LINEARS)}))
    return folder
