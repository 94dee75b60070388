"""Tiny random models and adapters, and what transformers + peft make of them alone: the oracle.

Weights are scaled up so that the likeliest token stands clear of the second; peft's B = 0 is replaced by noise.
"""

import copy
import warnings
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    OPTConfig,
    Phi3Config,
    PhiConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)

VOCAB = 96
_SHAPE: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 112,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_GEMMA: dict[str, Any] = {**_SHAPE, "num_hidden_layers": 4, "head_dim": 24, "query_pre_attn_scalar": 20}
FAMILIES: dict[str, PreTrainedConfig] = {
    "llama": LlamaConfig(**_SHAPE, tie_word_embeddings=False),
    "llama-tied-bias": LlamaConfig(**_SHAPE, tie_word_embeddings=True, attention_bias=True, mlp_bias=True),
    "gpt2": GPT2Config(
        vocab_size=VOCAB, n_embd=64, n_layer=3, n_head=4, n_positions=256, bos_token_id=1, eos_token_id=2
    ),
    "qwen2": Qwen2Config(**_SHAPE),
    "qwen2-windowed": Qwen2Config(**_SHAPE, use_sliding_window=True, sliding_window=12, max_window_layers=1),
    "qwen3": Qwen3Config(**_SHAPE, head_dim=16),
    "mistral-windowed": MistralConfig(**_SHAPE, sliding_window=12),
    "gemma": GemmaConfig(**_SHAPE, head_dim=24),
    "gemma2": Gemma2Config(**_GEMMA, sliding_window=12, attn_logit_softcapping=5.0, final_logit_softcapping=10.0),
    "gemma3": Gemma3TextConfig(**_GEMMA, sliding_window=12, layer_types=["sliding_attention", "full_attention"] * 2),
    "phi": PhiConfig(**_SHAPE),
    "phi3-windowed": Phi3Config(**_SHAPE, sliding_window=12),
    "phi3-longrope": Phi3Config(
        **_SHAPE,
        rope_parameters={
            "rope_type": "longrope",
            "rope_theta": 10000.0,
            "short_factor": [1.0, 1.1, 1.2, 1.3, 1.4, 1.5, 1.6, 1.7],
            "long_factor": [2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 9.0],
        },
        original_max_position_embeddings=24,
    ),
    "opt": OPTConfig(
        vocab_size=VOCAB,
        hidden_size=64,
        word_embed_proj_dim=64,
        ffn_dim=112,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=256,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    ),
    "gpt-neox": GPTNeoXConfig(
        vocab_size=VOCAB,
        hidden_size=64,
        intermediate_size=112,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=256,
        bos_token_id=1,
        eos_token_id=2,
    ),
}


def save_base(folder: Path, family: str, *, tied: bool | None = None, layers: int | None = None) -> Path:
    """Writes a tiny random model of the family; the same weights each time.

    `tied` says whether the head is the embedding; as the family's row has it if None, as are its layers.
    """
    config = copy.deepcopy(FAMILIES[family])
    if layers is not None:
        config.num_hidden_layers = layers
        if getattr(config, "layer_types", None):
            config.layer_types = config.layer_types[:layers]
    if tied is not None:
        config.tie_word_embeddings = tied
    torch.manual_seed(7)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:  # layers outweigh the embedding, or a tied head would only repeat its input
                parameter.mul_(4 if "embed" in name or "wte" in name else 8)
            else:
                parameter.add_(torch.randn_like(parameter) * 0.1)  # biases and norms that matter
    model.save_pretrained(folder)
    return folder


def save_adapter(base: Path, folder: Path, seed: int, **config: Any) -> Path:
    """Writes a PEFT LoRA adapter of the base with random A and B."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_pretrained(base)
    options = {"target_modules": "all-linear", "task_type": "CAUSAL_LM", **config}
    with warnings.catch_warnings():
        # PEFT advises against what is tested here: LoRA on tied embeddings, which it saves with the adapter.
        warnings.filterwarnings("ignore", message=".*(tie_word_embeddings|save_embedding_layers)", category=UserWarning)
        adapted = get_peft_model(model, LoraConfig(init_lora_weights=False, **options))
        adapted.save_pretrained(str(folder))
    return folder


@lru_cache(maxsize=32)
def solo(base: Path, adapter: Path | None) -> PreTrainedModel | PeftModel:
    """The base, alone or under one adapter, in fp32, as transformers and peft run it."""
    model = AutoModelForCausalLM.from_pretrained(base, attn_implementation="eager", dtype=torch.float32)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*tie_word_embeddings", category=UserWarning)
        return (PeftModel.from_pretrained(model, str(adapter)) if adapter else model).eval()


@torch.no_grad()
def solo_logits(base: Path, adapter: Path | None, tokens: list[int]) -> torch.Tensor:
    """Logits [T, V] of one sequence, computed in one go without a cache."""
    return solo(base, adapter)(input_ids=torch.tensor([tokens]), use_cache=False).logits[0]  # type: ignore[no-any-return]


def solo_greedy(base: Path, adapter: Path | None, prompt: list[int], count: int) -> tuple[list[int], float]:
    """`count` greedy tokens, each from a full pass without a cache, and the smallest gap between first and second."""
    tokens, gap = list(prompt), float("inf")
    for _ in range(count):
        top = solo_logits(base, adapter, tokens)[-1].topk(2)
        gap = min(gap, float(top.values[0] - top.values[1]))
        tokens.append(int(top.indices[0]))
    return tokens[len(prompt) :], gap
