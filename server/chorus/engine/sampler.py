"""Draws the next token of each row. What the parameters mean is what vLLM means by them.

Order: logit_bias, penalties, min_tokens' bans (`chorus.engine.penalties`), temperature, min_p, top_k, top_p
(`chorus.engine.filters`). Noise is one number per row, a function of (seed, position in the output) alone, never of the
batch; it is made on the host, so it needs no generator state and survives preemption. A token is drawn by inverting the
cumulative distribution there (`chorus.engine.inversion`).

On a device nothing here waits for it.
"""

import hashlib
import struct
from collections.abc import Callable
from collections.abc import Sequence as Seq

import torch
from torch import Tensor

from chorus.engine import penalties
from chorus.engine.filters import draw_kept
from chorus.engine.inversion import invert
from chorus.engine.messages import Sampling
from chorus.engine.sequence import Sequence
from chorus.kernels import likeliest
from chorus.kernels.upload import to_device

# Below this a temperature is greedy: dividing by it would overflow.
GREEDY_TEMPERATURE = 1e-5
# What `sample` gives for a row whose logits are not finite, and `likeliest` for it.
NOT_FINITE = -1

Way = Callable[[Tensor, Seq[Sequence], int], Tensor]
"""How a token is chosen for each row of logits, of sequences that have drawn so many more than are in their output."""


def sample(logits: Tensor, sequences: Seq[Sequence], eos_token_ids: frozenset[int]) -> list[int]:
    """What `draw` draws, once it is known."""
    tokens: list[int] = draw(logits, sequences, eos_token_ids).tolist()
    return tokens


@torch.inference_mode()
def draw(
    logits: Tensor, sequences: Seq[Sequence], eos_token_ids: frozenset[int], pending: Tensor | None = None
) -> Tensor:
    """The next token [S] of each row of logits [S, V]; NOT_FINITE where a row holds NaN, infinity or nothing to draw.

    `pending` [S] are the tokens that a step before has drawn for each, if that has not been read: then they are not in
    the sequences' outputs yet.
    """
    tokens = likeliest(logits)
    ahead = int(pending is not None)
    others = [i for i, seq in enumerate(sequences) if not _is_likeliest(seq, ahead)]
    if others:
        index = _on_device(others, torch.int64, logits.device)
        rows, chosen = logits.index_select(0, index).float(), [sequences[i] for i in others]
        penalties.apply(rows, chosen, eos_token_ids, None if pending is None else pending.index_select(0, index))
        finite = tokens.index_select(0, index) != NOT_FINITE
        tokens.index_copy_(0, index, torch.where(finite, _choose(rows, chosen, ahead), NOT_FINITE))
    return tokens


def uniform(seed: int, position: int) -> float:
    """A number in [0, 1) that depends on nothing but its arguments; 53 random bits of BLAKE2b."""
    digest = hashlib.blake2b(struct.pack("<QQ", seed & 0xFFFF_FFFF_FFFF_FFFF, position), digest_size=8).digest()
    return float(int.from_bytes(digest, "little") >> 11) * 2.0**-53


def _is_likeliest(seq: Sequence, ahead: int) -> bool:
    """Whether its token is just the model's likeliest."""
    return seq.sampling.temperature <= GREEDY_TEMPERATURE and not penalties.changes_logits(seq, ahead)


def _choose(logits: Tensor, sequences: Seq[Sequence], ahead: int) -> Tensor:
    """The next token of each row of float32 logits [S, V], which it changes; NOT_FINITE where nothing is left."""
    ways: dict[Way, list[int]] = {}
    for row, seq in enumerate(sequences):
        ways.setdefault(_way(seq.sampling, logits.shape[-1]), []).append(row)
    tokens = torch.empty(len(sequences), dtype=torch.int64, device=logits.device)
    for choose, rows in ways.items():
        index = _on_device(rows, torch.int64, logits.device)
        theirs = logits if len(ways) == 1 else logits.index_select(0, index)
        tokens[index] = choose(theirs, [sequences[row] for row in rows], ahead)
    return tokens


def _way(sampling: Sampling, vocabulary: int) -> Way:
    if sampling.temperature <= GREEDY_TEMPERATURE:
        return _likeliest
    return _draw_filtered if 0 < sampling.top_k < vocabulary or sampling.top_p < 1 else _draw_of_all


def _likeliest(logits: Tensor, sequences: Seq[Sequence], ahead: int) -> Tensor:
    return likeliest(logits)


def _draw_of_all(logits: Tensor, sequences: Seq[Sequence], ahead: int) -> Tensor:
    return invert(_weights(logits, sequences), _noise(sequences, ahead, logits.device))


def _draw_filtered(logits: Tensor, sequences: Seq[Sequence], ahead: int) -> Tensor:
    device = logits.device
    weights, noise = _weights(logits, sequences), _noise(sequences, ahead, device)
    top_k = _on_device([seq.sampling.top_k for seq in sequences], torch.int64, device)
    return draw_kept(weights, top_k, _column([seq.sampling.top_p for seq in sequences], device), noise)


def _weights(logits: Tensor, sequences: Seq[Sequence]) -> Tensor:
    """Turns float32 logits [S, V] into weights after temperature and min_p: a token's probability over the likeliest's.

    In place: 32 rows of 151,936 on 2 cores take 4 ms so, and 33 ms with float64 in new memory.
    """
    temperature = _column([seq.sampling.temperature for seq in sequences], logits.device).float()
    weights = logits.sub_(logits.amax(dim=-1, keepdim=True)).div_(temperature[:, None]).exp_()
    if any(seq.sampling.min_p > 0 for seq in sequences):
        min_p = _column([seq.sampling.min_p for seq in sequences], logits.device).float()
        weights.masked_fill_(weights < min_p[:, None], 0)
    return weights


def _noise(sequences: Seq[Sequence], ahead: int, device: torch.device) -> Tensor:
    return _column([uniform(seq.sampling.seed, len(seq.output) + ahead) for seq in sequences], device)


def _column(values: list[float], device: torch.device) -> Tensor:
    return _on_device(values, torch.float64, device)


def _on_device(values: list[int] | list[float], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Without waiting, unlike `torch.tensor(values, device=device)`."""
    return to_device(torch.tensor(values, dtype=dtype), device)
