"""Turns records into verdicts: for each bucket, which arm is faster, and how certain that is.

1. The figure of a block is the median time of its steps in the bucket.
2. A group of blocks (such as ABBA) gives one effect: the mean log time of the arm's blocks minus that of the engine's
   blocks. A linear drift cancels out. Groups in which an arm is missing are left out.
3. The ratio is the mean effect without the highest and the lowest fifth, so that a stall that fills a block does not
   decide. Its interval is bootstrapped over the groups and widened for their small number.
4. The test is Wilcoxon's signed-rank test on the effects. If the arms are equally fast, the random order alone decided
   which arm had which blocks of a group. Each effect is then as likely to be negative as to be positive, however the
   latencies are distributed or correlated. (With a third arm and a ratio other than 0.5 this holds approximately.)
5. Several buckets give several chances of a false verdict, so the p values are adjusted by Holm's method: if no arm
   differs, at most one report in twenty names a difference. This holds for one look, at a time that does not depend on
   the figures. Somebody who looks repeatedly until a verdict appears will find false ones more often.
6. "faster" and "slower" need both an adjusted p below 0.05 and an interval that keeps 0.5% away from 1. The test alone
   would find more: two captures of one graph lie at different addresses, and differ by 0.1% of a step permanently.
7. "drifting" means that the effect itself changed between the two halves of the run, so that one ratio does not
   describe it. A latency that drifts for both arms alike is not "drifting". It is reported beside the verdict.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from statistics import fmean, median
from typing import Any

from mla_patch.compat.types import HOST
from mla_patch.experiment import stats
from mla_patch.experiment.merge import Merged
from mla_patch.experiment.record import Error, Timing
from mla_patch.experiment.schedule import MIN_STEPS, NOT_COMPARED
from mla_patch.experiment.stats import ALPHA

DRIFT_ALPHA = 0.01
MIN_GROUPS = 8  # with fewer, the two-sided p value cannot become small enough; with 8 its least value is 2 / 2**8
RESOLUTION = 0.005  # the smallest difference that a verdict names, as a fraction of a step
QUANTILES = (0.5, 0.9, 0.99, 1.0)
FASTER, SLOWER, EVEN = "faster", "slower", "no difference found"
TOO_FEW, DRIFTING = "not enough blocks", "drifting"


@dataclass
class Comparison:
    """One arm compared with the engine's arm in one bucket. Ratios are ratios of times: below 1 is faster."""

    feature: str
    bucket: str
    arm: str
    host_us: float | None  # median of the block medians, microseconds; None if no block has enough steps
    arm_us: float | None
    groups: int  # groups with blocks of both arms
    blocks: int
    steps: int
    ratio: float | None = None
    interval: tuple[float, float] | None = None  # 95%, for this bucket alone
    p: float | None = None
    p_adjusted: float | None = None
    drift: dict[str, float | None] = field(default_factory=dict)
    verdict: str = TOO_FEW
    text: str = ""


def analyse(merged: Merged) -> dict[str, Any]:
    """The analysis of one run as a dictionary for JSON."""
    comparisons = compare(merged.timings)
    return {
        "run": merged.run,
        "ranks": merged.ranks,
        "alpha": ALPHA,
        "resolution": RESOLUTION,
        "comparisons": [asdict(one) for one in comparisons],
        "shadow": shadow(merged.errors),
        "notes": [row._asdict() for row in merged.notes],
        "steps": len({row.step for row in merged.timings}),
        "outside": len(
            {row.step for row in merged.timings} - {row.step for row in merged.timings if row.block != NOT_COMPARED}
        ),
        "differed": merged.differed,
        "lost": merged.lost,
        "damaged": merged.damaged,
    }


def compare(timings: Iterable[Timing]) -> list[Comparison]:
    """Compare every arm with the engine's arm, for each feature and bucket, with verdicts."""
    # (feature, bucket) -> group -> block -> (arm, times)
    times: dict[tuple[str, str], dict[int, dict[int, tuple[str, list[float]]]]] = {}
    for row in timings:
        if row.block != NOT_COMPARED and row.us > 0 and math.isfinite(row.us):
            groups = times.setdefault((row.feature, row.bucket), defaultdict(dict))
            groups[row.group].setdefault(row.block, (row.arm, []))[1].append(row.us)
    found, effects = [], []
    for (feature, bucket), groups in sorted(times.items(), key=lambda item: by_size(*item[0])):
        arms = sorted({arm for blocks in groups.values() for arm, _ in blocks.values()} - {HOST})
        for arm in arms:
            one, its_effects = _compare(feature, bucket, arm, groups)
            found.append(one)
            effects.append(its_effects)
    decide(found, effects)
    return found


def by_size(*name: str) -> list[tuple[str, int]]:
    """A sort key that puts graph/16/8192 before graph/16/131072."""
    parts = "/".join(name).split("/")
    # no batch or context has more digits, and Python refuses to convert very long numbers
    return [("", int(part)) if part.isdecimal() and len(part) < 20 else (part, 0) for part in parts]


def _compare(
    feature: str, bucket: str, arm: str, groups: dict[int, dict[int, tuple[str, list[float]]]]
) -> tuple[Comparison, list[float]]:
    effects: list[float] = []
    medians: dict[str, list[float]] = {HOST: [], arm: []}
    steps = 0
    for _, blocks in sorted(groups.items()):
        here: dict[str, list[float]] = {HOST: [], arm: []}
        for _, (name, values) in sorted(blocks.items()):
            if name in here and len(values) >= MIN_STEPS:
                here[name].append(median(values))
                steps += len(values)
        if here[HOST] and here[arm]:
            effects.append(effect(here[HOST], here[arm]))
        for name in here:
            medians[name] += here[name]
    us = {name: median(values) if values else None for name, values in medians.items()}
    one = Comparison(feature, bucket, arm, us[HOST], us[arm], len(effects), sum(map(len, medians.values())), steps)
    host = medians[HOST]
    if len(host) >= 4:
        one.drift["latency"] = median(host[len(host) // 2 :]) / median(host[: len(host) // 2])
    return one, effects


def effect(host: Sequence[float], arm: Sequence[float]) -> float:
    """The effect of one group: the log of the ratio of the geometric means of the block medians."""
    return fmean(map(math.log, arm)) - fmean(map(math.log, host))


def decide(comparisons: Sequence[Comparison], effects: Sequence[Sequence[float]]) -> None:
    """Fill in ratio, interval, p and verdict of all comparisons of one report; ``effects`` are theirs, by group."""
    enough = [(one, stats.pooled(values)) for one, values in zip(comparisons, effects, strict=True) if _enough(values)]
    for one, values in enough:
        one.ratio = math.exp(stats.middle(values))
        low, high = stats.bootstrap(values)
        one.interval = math.exp(low), math.exp(high)
        one.p = stats.signed_rank(values)
        half = len(values) // 2
        one.drift["p"] = stats.rank_sum(values[:half], values[half:])
        one.drift["first"], one.drift["second"] = (math.exp(median(part)) for part in (values[:half], values[half:]))
    adjusted = stats.holm([one.p or 0.0 for one, _ in enough])
    drifts = stats.holm([one.drift["p"] or 0.0 for one, _ in enough])
    for (one, _), p, drift in zip(enough, adjusted, drifts, strict=True):
        one.p_adjusted = p
        one.drift["p"] = drift
        one.verdict = _verdict(one, p, drift)
    for one in comparisons:
        one.text = _text(one)


def _enough(effects: Sequence[float]) -> bool:
    return len(effects) >= MIN_GROUPS


def _verdict(one: Comparison, p: float, drift: float) -> str:
    low, high = one.interval or (0.0, 0.0)
    sure = p < ALPHA and (low > 1 + RESOLUTION or high < 1 - RESOLUTION)
    first, second = one.drift["first"] or 1.0, one.drift["second"] or 1.0
    # if the same arm is faster in both halves, only the size has changed and the verdict stands
    if drift < DRIFT_ALPHA and not (sure and (first < 1) == (second < 1)):
        return DRIFTING
    if not sure:
        return EVEN
    return FASTER if high < 1 else SLOWER


def _text(one: Comparison) -> str:
    if one.ratio is None or one.interval is None:
        return f"{TOO_FEW}: {one.groups} groups in which both arms ran this bucket, {MIN_GROUPS} needed"
    low, high = one.interval
    figures = f"{one.ratio:.3f} of {HOST}'s time, 95% interval {low:.3f} to {high:.3f}, {one.groups} groups"
    if one.verdict == DRIFTING:
        first, second = one.drift["first"], one.drift["second"]
        return f"{DRIFTING}: {first:.3f} of {HOST}'s time in the first half, {second:.3f} in the second"
    if one.verdict == EVEN:
        return f"{EVEN}: {figures}"
    return f"{one.arm} is {one.verdict}: {figures}"


def by_groups(comparisons: Iterable[Mapping[str, Any]]) -> tuple[list[Mapping[str, Any]], list[Mapping[str, Any]]]:
    """Split comparisons, in the form of a report, into those with a ratio and those with too few groups for one."""
    found: tuple[list[Mapping[str, Any]], list[Mapping[str, Any]]] = [], []
    for one in comparisons:
        found[one["ratio"] is None].append(one)
    return found


def in_few_groups(few: Sequence[Mapping[str, Any]]) -> str:
    """One line about all comparisons that have too few groups."""
    blocks, steps, most = (sum(one["blocks"] for one in few), sum(one["steps"] for one in few),
                           max(one["groups"] for one in few))  # fmt: skip
    which = "1 comparison has" if len(few) == 1 else f"{len(few)} comparisons have"
    return (
        f"{TOO_FEW}: {which} fewer than the {MIN_GROUPS} groups that a verdict needs, "
        f"{most} at most, {blocks} blocks and {steps} steps in all"
    )


def shadow(errors: Iterable[Error], points: int = 400) -> list[dict[str, Any]]:
    """For each feature: quantiles of the shadow errors, NaN counts, and at most ``points`` worst errors for a plot."""
    by_feature: dict[str, list[Error]] = defaultdict(list)
    for row in errors:
        by_feature[row.feature].append(row)
    found = []
    for feature, rows in sorted(by_feature.items()):
        finite = sorted(row.relative for row in rows if math.isfinite(row.relative))
        largest = sorted(row.max_abs for row in rows if math.isfinite(row.max_abs))
        found.append(
            {
                "feature": feature,
                "comparisons": len(rows),
                "steps": len({row.step for row in rows}),
                "relative": {str(q): quantile(finite, q) for q in QUANTILES},
                "max_abs": {str(q): quantile(largest, q) for q in QUANTILES},
                "nan": sum(row.nan for row in rows),
                "not_finite": len(rows) - len(finite),
                "over_time": _worst(rows, points),
            }
        )
    return found


def quantile(ordered: Sequence[float], q: float) -> float | None:
    """The smallest value that at least a share ``q`` of all values do not exceed; None if there are none."""
    return ordered[max(math.ceil(q * len(ordered)) - 1, 0)] if ordered else None


def _worst(rows: Sequence[Error], points: int) -> list[tuple[int, float]]:
    """``(step, worst relative error)`` in order of steps, at most ``points`` of them."""
    worst: dict[int, float] = {}
    for row in rows:
        if math.isfinite(row.relative):
            worst[row.step] = max(worst.get(row.step, 0.0), row.relative)
    steps = sorted(worst)
    size = max(1, -(-len(steps) // points))
    chunks = (steps[i : i + size] for i in range(0, len(steps), size))
    return [(chunk[0], max(worst[step] for step in chunk)) for chunk in chunks]
