"""A sampler written from the definitions, in float64 and numpy, one row at a time: the oracle for ours."""

from collections import Counter
from collections.abc import Iterable, Sequence

import numpy as np

from chorus.engine.messages import Sampling

Floats = np.ndarray[tuple[int], np.dtype[np.float64]]


def distribution(
    logits: Iterable[float],
    sampling: Sampling,
    prompt: Sequence[int] = (),
    output: Sequence[int] = (),
    eos: Iterable[int] = (),
) -> Floats:
    """The probability of each token; all of it on the smallest likeliest one where the temperature is 0."""
    scores = adjusted(logits, sampling, prompt, output, eos)
    if sampling.temperature == 0:
        return np.asarray(np.eye(len(scores))[int(np.argmax(scores))])
    shifted = (scores - scores.max()) / sampling.temperature
    probabilities = np.exp(shifted) / np.exp(shifted).sum()
    probabilities[probabilities < sampling.min_p * probabilities.max()] = 0
    likeliest_first = sorted(range(len(scores)), key=lambda token: (-scores[token], token))
    if sampling.top_k > 0:
        probabilities[likeliest_first[sampling.top_k :]] = 0
    probabilities /= probabilities.sum()
    reached = 0.0
    for token in likeliest_first:
        if sampling.top_p < 1 and reached >= sampling.top_p:
            probabilities[token] = 0
        reached += probabilities[token]
    return np.asarray(probabilities / probabilities.sum())


def adjusted(
    logits: Iterable[float],
    sampling: Sampling,
    prompt: Sequence[int] = (),
    output: Sequence[int] = (),
    eos: Iterable[int] = (),
) -> Floats:
    """Logits after bias, penalties and bans."""
    scores = np.array(list(logits), dtype=np.float64)
    for token, bias in sampling.logit_bias:
        scores[token] += bias
    for token in {*prompt, *output}:
        if scores[token] > 0:
            scores[token] /= sampling.repetition_penalty
        else:
            scores[token] *= sampling.repetition_penalty
    for token, times in Counter(output).items():
        scores[token] -= sampling.frequency_penalty * times
        scores[token] -= sampling.presence_penalty
    if len(output) < sampling.min_tokens:
        for token in {*eos, *sampling.stop_token_ids}:
            scores[token] = -np.inf
    return scores


def chi_squared(counts: Floats, probabilities: Floats) -> tuple[float, float]:
    """Pearson's statistic of drawn tokens, and the limit that chance passes once in 10,000 times.

    Tokens with less than 5 expected draws are counted as one; with no probability they must not be drawn at all. The
    limit is Wilson and Hilferty's approximation of the quantile.
    """
    assert not counts[probabilities == 0].any(), "a token was drawn that has no probability"
    expected = probabilities * counts.sum()
    rare = expected < 5
    observed = np.append(counts[~rare], counts[rare].sum())
    expected = np.append(expected[~rare], expected[rare].sum())
    observed, expected = observed[expected > 0], expected[expected > 0]
    freedom = max(len(expected) - 1, 1)
    limit = freedom * (1 - 2 / (9 * freedom) + 3.719 * (2 / (9 * freedom)) ** 0.5) ** 3
    return float(((observed - expected) ** 2 / expected).sum()), float(limit)
