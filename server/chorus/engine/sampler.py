"""Draws the next token of each row. What the parameters mean is what vLLM means by them.

Noise is one number per row, a function of (seed, position in the output) alone, never of the batch; it is made on the
host, so it needs no generator state and survives preemption. A token is drawn by inverting the cumulative distribution
there. Order: min_tokens' bans, temperature, min_p, top_k, top_p.
"""

import hashlib
import struct
from collections.abc import Sequence as Seq

import torch
from torch import Tensor

from chorus.engine.sequence import Sequence

# Below this a temperature is greedy: dividing by it would overflow.
GREEDY_TEMPERATURE = 1e-5
# What `sample` gives for a row whose logits are not finite.
NOT_FINITE = -1


@torch.inference_mode()
def sample(logits: Tensor, sequences: Seq[Sequence], eos_token_ids: frozenset[int]) -> list[int]:
    """The next token of each row of logits [S, V]; NOT_FINITE where a row holds NaN or only -inf."""
    _ban_early_stops(logits, sequences, eos_token_ids)
    best, tokens = logits.max(dim=-1)
    finite = torch.isfinite(best)
    drawn = [i for i, seq in enumerate(sequences) if seq.sampling.temperature > GREEDY_TEMPERATURE]
    if drawn:
        index = torch.tensor(drawn, device=logits.device)
        rows = logits.index_select(0, index).nan_to_num(nan=0.0)
        tokens = tokens.index_copy(0, index, _draw(rows, [sequences[i] for i in drawn]))
    return torch.where(finite, tokens, NOT_FINITE).tolist()


def uniform(seed: int, position: int) -> float:
    """A number in [0, 1) that depends on nothing but its arguments; 53 random bits of BLAKE2b."""
    digest = hashlib.blake2b(struct.pack("<QQ", seed & 0xFFFF_FFFF_FFFF_FFFF, position), digest_size=8).digest()
    return float(int.from_bytes(digest, "little") >> 11) * 2.0**-53


def filter_probabilities(logits: Tensor, temperature: Tensor, min_p: Tensor, top_k: Tensor, top_p: Tensor) -> Tensor:
    """Probabilities [S, V] in float64 after temperature, min_p, top_k and top_p (each [S]); they add up to 1 per row.

    top_k 0 keeps all; of several tokens with the k-th probability those with the smallest ids are kept.
    """
    scaled = logits.to(torch.float64) / temperature[:, None].to(torch.float64)
    probabilities = torch.softmax(scaled, dim=-1)
    vocabulary = logits.shape[-1]
    if bool((min_p > 0).any()):
        floor = probabilities.amax(dim=-1, keepdim=True) * min_p[:, None]
        probabilities = probabilities.masked_fill(probabilities < floor, 0)
    if bool((top_k > 0).any()) or bool((top_p < 1).any()):
        ranked, order = probabilities.sort(dim=-1, descending=True, stable=True)
        kept = torch.where((top_k > 0) & (top_k < vocabulary), top_k, vocabulary)
        ranked = ranked.masked_fill(torch.arange(vocabulary, device=logits.device) >= kept[:, None], 0)
        ranked = ranked / ranked.sum(dim=-1, keepdim=True)
        before = ranked.cumsum(dim=-1) - ranked  # mass of the likelier tokens; the likeliest always stays
        ranked = ranked.masked_fill((before >= top_p[:, None]) & (top_p < 1)[:, None], 0)
        probabilities = torch.zeros_like(ranked).scatter_(-1, order, ranked)
    return probabilities / probabilities.sum(dim=-1, keepdim=True)


def _draw(logits: Tensor, sequences: Seq[Sequence]) -> Tensor:
    def column(values: list[float]) -> Tensor:
        return torch.tensor(values, dtype=torch.float64, device=logits.device)

    probabilities = filter_probabilities(
        logits,
        column([s.sampling.temperature for s in sequences]),
        column([s.sampling.min_p for s in sequences]),
        torch.tensor([s.sampling.top_k for s in sequences], device=logits.device),
        column([s.sampling.top_p for s in sequences]),
    )
    noise = column([uniform(s.sampling.seed, len(s.output)) for s in sequences])
    cumulative = probabilities.cumsum(dim=-1)
    total = cumulative[:, -1]
    # Strictly below the total, whatever the rounding: then the first entry above it is a token with mass.
    target = torch.minimum(noise * total, torch.nextafter(total, torch.zeros_like(total)))
    return torch.searchsorted(cumulative, target[:, None], right=True)[:, 0]


def _ban_early_stops(logits: Tensor, sequences: Seq[Sequence], eos_token_ids: frozenset[int]) -> None:
    """Rows under their min_tokens can not draw what would end them."""
    for row, seq in enumerate(sequences):
        if len(seq.output) < seq.sampling.min_tokens:
            banned = [*eos_token_ids, *seq.sampling.stop_token_ids]
            logits[row, banned] = float("-inf")
