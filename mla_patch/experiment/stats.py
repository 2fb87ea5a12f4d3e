"""Statistics of paired effects. Without NumPy, because a report may be read where only mla-patch is installed."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from statistics import NormalDist, fmean

ALPHA = 0.05
RESAMPLES = 1000
EXACT = 25  # up to this number of effects, the distribution of the signed rank is computed exactly
MAX_EFFECTS = 100  # more effects than this are averaged with their neighbours, to bound the time


def pooled(effects: Sequence[float]) -> list[float]:
    """At most `MAX_EFFECTS` effects; if there are more, neighbours are averaged.

    The mean of effects that are symmetric about 0 is symmetric about 0, so the signed-rank test stays valid.
    """
    size = -(-len(effects) // MAX_EFFECTS)
    return [fmean(effects[i : i + size]) for i in range(0, len(effects), size)]


def middle(effects: Sequence[float]) -> float:
    """The mean without the highest and the lowest fifth of the effects."""
    cut = len(effects) // 5
    kept = sorted(effects)[cut : len(effects) - cut]
    return sum(kept) / len(kept)


def bootstrap(effects: Sequence[float], seed: int = 0) -> tuple[float, float]:
    """A 95% interval of `middle`: percentiles over resampled effects, widened for small samples.

    The percentiles are moved outwards by as much as Student's t quantile exceeds the normal one.
    """
    n = len(effects)
    draw = random.Random(seed).choices
    means = sorted(middle(draw(effects, k=n)) for _ in range(RESAMPLES))
    tail = NormalDist().cdf(math.sqrt(n / (n - 1)) * _student(ALPHA / 2, n - 1))
    at = int(tail * RESAMPLES)
    return means[at], means[-1 - at]


def _student(p: float, df: int) -> float:
    """Quantile of Student's t by Fisher's expansion, exact to three digits from 5 degrees of freedom on."""
    z = NormalDist().inv_cdf(p)
    return (
        z
        + (z**3 + z) / (4 * df)
        + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * df**2)
        + (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * df**3)
    )


def _ranks(values: Sequence[float]) -> list[int]:
    """Twice the rank of each value. Ties share the mean rank, which is then still a whole number."""
    order = sorted(range(len(values)), key=values.__getitem__)
    ranks = [0] * len(values)
    start = 0
    while start < len(order):
        end = start
        while end < len(order) and values[order[end]] == values[order[start]]:
            end += 1
        for i in order[start:end]:
            ranks[i] = start + end + 1
        start = end
    return ranks


def signed_rank(effects: Sequence[float]) -> float:
    """Wilcoxon's signed-rank test: the two-sided p value for effects that are symmetric about 0.

    Exact for up to `EXACT` effects, ties included. Effects of 0 are left out.
    """
    values = [value for value in effects if value]
    if not values:
        return 1.0
    ranks = _ranks([abs(value) for value in values])
    total = sum(ranks)
    plus = sum(rank for rank, value in zip(ranks, values, strict=True) if value > 0)
    low = min(plus, total - plus)
    if len(values) <= EXACT:
        ways = [1] + [0] * total  # ways[i]: how many of the 2**n sign patterns have i as the sum of positive ranks
        for rank in ranks:
            for i in range(total, rank - 1, -1):
                ways[i] += ways[i - rank]
        return min(1.0, 2 * sum(ways[: low + 1]) / 2 ** len(values))
    sd = math.sqrt(sum(rank * rank for rank in ranks)) / 2
    return min(1.0, 2 * NormalDist().cdf((low - total / 2 + 1) / sd))  # + 1: continuity correction of half a rank


def rank_sum(first: Sequence[float], second: Sequence[float]) -> float:
    """The Mann-Whitney test: the two-sided p value for equal distributions, in the normal approximation."""
    a, b = len(first), len(second)
    ranks = _ranks([*first, *second])
    mean = fmean(ranks)
    spread = sum((rank - mean) ** 2 for rank in ranks)
    if not spread:
        return 1.0
    sd = math.sqrt(a * b / ((a + b) * (a + b - 1)) * spread)
    off = abs(sum(ranks[:a]) - a * mean)
    return min(1.0, 2 * NormalDist().cdf(-max(off - 1, 0.0) / sd))


def holm(ps: Sequence[float]) -> list[float]:
    """Adjust p values by Holm's method: with probability 1 - alpha no true null hypothesis has one below alpha."""
    adjusted = [0.0] * len(ps)
    worst = 0.0
    for place, i in enumerate(sorted(range(len(ps)), key=ps.__getitem__)):
        worst = max(worst, min(1.0, ps[i] * (len(ps) - place)))
        adjusted[i] = worst
    return adjusted
