"""What the rest of the server needs to know about the base model; no tensors, no transformers."""

from dataclasses import dataclass

from chorus.models.sites import Site


@dataclass(frozen=True, slots=True)
class BaseFacts:
    """The base model's facts, fixed at load.

    `digest` is the SHA-256, hex, of the canonical config and the weight files. `context_length` counts prompt and
    completion together, in tokens, and is what this server grants (the model's own, or less where KV memory is short).
    """

    name: str
    digest: str
    model_type: str
    context_length: int
    vocab_size: int
    dtype: str
    parameter_count: int
    sites: tuple[Site, ...]
    eos_token_ids: frozenset[int]
