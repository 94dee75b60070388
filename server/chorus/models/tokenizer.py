"""The base's own tokenizer."""

from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerFast

from chorus.errors import FailedPrecondition


def load_tokenizer(folder: Path) -> PreTrainedTokenizerFast | None:
    """The tokenizer in a base's folder, None where there is none.

    Raises:
        FailedPrecondition: one without a fast (tokenizers) form.
    """
    if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json")):
        return None
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise FailedPrecondition(
            f"model: the tokenizer of {folder} has no fast (tokenizers) form", reason="UNSUPPORTED_TOKENIZER"
        )
    return tokenizer
