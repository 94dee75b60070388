"""A base small enough to train in a second: a random Llama and a byte-level BPE made here."""

import json
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from chorus.trainer.config import DataConfig, LoopConfig, LoraSettings, TrainConfig

COLOURS = ("red", "green", "blue", "black", "white", "brown", "pink", "grey")
FRUITS = ("apples", "pears", "plums", "figs", "dates", "limes", "nuts", "olives")

WriteJsonl = Callable[[str, Iterable[object]], Path]
Changed = Callable[..., TrainConfig]


def examples(count: int = 16, start: int = 0) -> list[dict[str, str]]:
    """Prompts of varying length, each with its own answer."""
    return [
        {
            "prompt": f"Message {'very ' * (i % 4)}{i}: I like {COLOURS[i % 8]} {FRUITS[i // 8 % 8]}.\nReply:",
            "completion": f" {COLOURS[(i * 3 + 1) % 8]}{' and so' * (i % 3)} {FRUITS[i * 5 % 8]}",
        }
        for i in range(start, start + count)
    ]


@pytest.fixture(scope="session")
def base_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base") / "tiny-llama"
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    texts = [part for example in examples(200) for part in example.values()]
    bpe = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<eos>", "<bos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, bpe)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", bos_token="<bos>")
    fast.save_pretrained(folder)
    # Weights wide enough that logits differ: at transformers' 0.02 the frozen head could not tell tokens apart.
    config = LlamaConfig(
        vocab_size=320,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        tie_word_embeddings=True,
        initializer_range=0.3,
        eos_token_id=0,
        bos_token_id=1,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture
def write_jsonl(tmp_path: Path) -> WriteJsonl:
    def write(name: str, rows: Iterable[object]) -> Path:
        path = tmp_path / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return path

    return write


@pytest.fixture
def config(base_folder: Path, write_jsonl: WriteJsonl) -> TrainConfig:
    """A few steps over 16 examples, with 5 for validation."""
    return TrainConfig(
        base=str(base_folder),
        data=DataConfig(
            train=write_jsonl("train.jsonl", examples(16)),
            validation=write_jsonl("valid.jsonl", examples(5, start=100)),
        ),
        lora=LoraSettings(rank=4, alpha=8),
        train=LoopConfig(steps=6, batch_size=4, learning_rate=1e-2, warmup_steps=2, eval_every=4, device="cpu"),
    )


@pytest.fixture
def changed(config: TrainConfig) -> Changed:
    """`config` with other values in some sections: changed(train={"steps": 2}); validated again."""

    def change(**sections: dict[str, object]) -> TrainConfig:
        values = config.model_dump()
        return TrainConfig.model_validate(values | {name: values[name] | new for name, new in sections.items()})

    return change
