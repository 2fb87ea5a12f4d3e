"""Verdicts: on latencies as irregular as real ones, at most one in twenty is false, and a real difference is found."""

import itertools
import json
import math
import random
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from mla_patch.compat.types import HOST, PATCH
from mla_patch.experiment import analysis, stats
from mla_patch.experiment.analysis import DRIFTING, EVEN, FASTER, SLOWER, TOO_FEW, Comparison, compare, decide, effect
from mla_patch.experiment.merge import Merged
from mla_patch.experiment.record import Error, Note, Timing
from mla_patch.experiment.schedule import AGAIN, NOT_COMPARED, Plan, Schedule

CPU_SECONDS = 90  # see budget.py


def latencies(runs: int, steps: int, seed: int) -> np.ndarray:
    """[runs, steps] microseconds: drifting, autocorrelated, heavy-tailed, with stalls."""
    rng = np.random.default_rng(seed)
    walk, near = np.zeros(runs), np.zeros(runs)
    slope = rng.normal(0, 0.1, runs) / steps
    out = np.empty((runs, steps), np.float32)
    for step in range(steps):
        walk += rng.normal(0, 0.001, runs)  # clocks and temperature
        near = 0.95 * near + rng.normal(0, 0.006, runs)  # shared by neighbouring steps
        out[:, step] = walk + near + slope * step
    out += 0.03 * rng.standard_t(2, size=out.shape).astype(np.float32)  # no variance
    out += (rng.random(out.shape) < 0.01) * rng.pareto(1.5, out.shape).astype(np.float32)  # almost without a mean
    return 3000 * np.exp(np.minimum(out, 20))


def block_medians(runs: int, blocks: int, plan: Plan, seed: int) -> np.ndarray:
    steps = latencies(runs, blocks * plan.block, seed)
    medians = np.median(steps.reshape(runs, blocks, plan.block), axis=2)
    stalled = np.random.default_rng(seed + 1).random(medians.shape) < 0.01
    return medians * np.where(stalled, 1.6, 1.0)  # a stall that fills a block


def effects(medians: np.ndarray, plan: Plan, slow: float) -> list[float]:
    """The effects of one run under the schedule. The times of the tried arm are multiplied by ``slow``."""
    schedule = Schedule(plan)
    groups: dict[int, dict[str, list[float]]] = {}
    for number, us in enumerate(medians):
        assignment = schedule.assignment(plan.warmup + number * plan.block)
        if assignment.block != NOT_COMPARED:
            here = groups.setdefault(assignment.group, {HOST: [], PATCH: []})
            here[assignment.arm].append(float(us) * (slow if assignment.arm == PATCH else 1.0))
    return [effect(here[HOST], here[PATCH]) for here in groups.values()]


def verdicts(runs: int, groups: int, slow: float = 1.0, seed: int = 0, plan: Plan = Plan()) -> tuple[Counter, float]:  # noqa: B008
    """The verdicts on ``count`` runs, and how often the interval contains the true ratio."""
    medians = block_medians(runs, groups * Schedule(plan).size, plan, seed)
    said: Counter = Counter()
    covered = 0
    for run in range(runs):
        one = Comparison("decode", "graph/1/1024", PATCH, 1, 1, groups, 1, 1)
        decide([one], [effects(medians[run], replace(plan, seed=run), slow)])
        said[one.verdict] += 1
        covered += one.interval[0] <= slow <= one.interval[1]
    return said, covered / runs


def test_an_a_a_check_finds_a_difference_in_at_most_one_run_of_twenty() -> None:
    said, covered = verdicts(1000, 32, seed=5)
    assert said[FASTER] + said[SLOWER] <= 50, said
    assert said[DRIFTING] <= 20, said
    assert covered >= 0.94


@pytest.mark.parametrize("ratio, groups", [(0.1, 16), (0.25, 20), (0.8, 20)])
def test_an_a_a_check_at_other_ratios(ratio: float, groups: int) -> None:
    said, covered = verdicts(250, groups, seed=6, plan=Plan(ratio=ratio))
    assert said[FASTER] + said[SLOWER] <= 16, said  # 5% and two standard errors of 250 runs, less the interval's say
    assert covered >= 0.93


def test_these_latencies_would_fool_a_naive_test() -> None:
    """A test that takes each step for independent fails on the same data, so the simulation is hard enough."""
    steps = np.log(latencies(200, 2048, seed=5))
    schedule = Schedule(Plan(warmup=0))
    tried = np.array([schedule.assignment(step).arm == PATCH for step in range(2048)])
    a, b = steps[:, tried], steps[:, ~tried]
    z = (np.median(a, axis=1) - np.median(b, axis=1)) / np.sqrt((np.pi / 2) * 0.03**2 * 2 / 1024)
    assert (np.abs(z) > 1.96).mean() > 0.2


def test_a_slow_down_of_3_percent_is_found_within_8192_steps() -> None:
    """32 groups of 4 blocks of 64 steps. The documentation may state this."""
    said, _ = verdicts(200, 32, slow=1.03, seed=7)
    assert said[SLOWER] >= 196 and said[FASTER] == 0, said
    said, _ = verdicts(200, 32, slow=1 / 1.03, seed=8)
    assert said[FASTER] >= 196 and said[SLOWER] == 0, said


def test_with_many_buckets_a_whole_report_is_wrong_in_at_most_one_of_twenty() -> None:
    medians = block_medians(150 * 8, 16 * 4, Plan(), seed=9)
    wrong = by_itself = 0
    for report in range(150):
        rows = [effects(medians[report * 8 + i], Plan(seed=report * 8 + i), 1.0) for i in range(8)]
        comparisons = [Comparison("decode", str(i), PATCH, 1, 1, 16, 1, 1) for i in range(8)]
        decide(comparisons, rows)
        wrong += any(one.verdict in (FASTER, SLOWER) for one in comparisons)
        by_itself += any(one.p < 0.05 for one in comparisons)
    assert wrong <= 12  # 5%, and two standard errors of 150 reports
    assert by_itself > 30  # without the adjustment


# -- from rows


def rows(groups: int, slow: float = 1.0, *, plan: Plan = Plan(block=8), bucket: str = "graph/1/1024", seed: int = 1,  # noqa: B008
         tried: str = PATCH, drift: float = 0.0, feature: str = "decode") -> list[Timing]:  # fmt: skip
    """``groups`` groups of steps with little noise."""
    draw = random.Random(seed)
    schedule = Schedule(plan)
    found = []
    total = plan.warmup + groups * schedule.size * plan.block
    for step in range(total):
        assignment = schedule.assignment(step)
        us = 1000 * math.exp(draw.gauss(0, 0.01) + drift * step / total)
        us *= slow if assignment.arm != HOST else 1.0
        arm = tried if assignment.arm == PATCH else assignment.arm
        found.append(Timing(step, feature, arm, assignment.block, assignment.group, bucket, us))
    return found


def test_faster_slower_even() -> None:
    (one,) = compare(rows(20, 0.8))
    assert (one.verdict, one.groups, one.blocks, one.steps) == (FASTER, 20, 80, 640)
    assert one.ratio == pytest.approx(0.8, rel=0.01)
    assert (one.host_us, one.arm_us) == (pytest.approx(1000, rel=0.01), pytest.approx(800, rel=0.01))
    assert one.interval[0] < 0.8 < one.interval[1] and one.interval[1] - one.interval[0] < 0.02
    assert one.text == (
        f"patch is faster: {one.ratio:.3f} of host's time, "
        f"95% interval {one.interval[0]:.3f} to {one.interval[1]:.3f}, 20 groups"
    )
    assert compare(rows(20, 1.25))[0].verdict == SLOWER
    assert compare(rows(20))[0].verdict == EVEN
    assert compare(rows(20, 0.8, plan=Plan(block=8, ratio=0.3)))[0].verdict == FASTER


@pytest.mark.parametrize("size, verdict", [(0.001, EVEN), (-0.004, EVEN), (0.006, SLOWER), (-0.006, FASTER)])
def test_a_certain_difference_below_the_resolution_is_no_verdict(size: float, verdict: str) -> None:
    """On an H200, two captures of one graph differed by 0.1% of a step: 37 groups, interval 1.0006 to 1.0012."""
    one = Comparison("decode", "graph/1/1024", PATCH, 1, 1, 37, 148, 2368)
    decide([one], [[size + 1e-5 * (i % 7 - 3) for i in range(37)]])
    assert one.p < 0.05 and not one.interval[0] <= 1 <= one.interval[1]
    assert one.verdict == verdict


def test_the_analysis_is_deterministic() -> None:
    assert compare(rows(12, 0.9)) == compare(rows(12, 0.9))


@pytest.mark.parametrize("groups, enough", [(7, False), (8, True)])
def test_the_least_number_of_groups(groups: int, enough: bool) -> None:
    (one,) = compare(rows(groups, 0.5))
    assert (one.verdict == FASTER) == enough
    if not enough:
        assert one.text == "not enough blocks: 7 groups in which both arms ran this bucket, 8 needed"
        assert (one.verdict, one.ratio, one.interval, one.p) == (TOO_FEW, None, None, None)


def test_a_drift_of_both_arms_does_not_prevent_a_verdict() -> None:
    (one,) = compare(rows(20, 0.97, drift=0.5))
    assert one.verdict == FASTER
    assert one.ratio == pytest.approx(0.97, rel=0.01)
    assert one.drift["latency"] == pytest.approx(math.exp(0.25), rel=0.05)


def changing(before: float, after: float) -> list[Timing]:
    timings = rows(40)
    half = timings[len(timings) // 2].step
    return [
        row._replace(us=row.us * (1 if row.arm == HOST else before if row.step < half else after)) for row in timings
    ]


def test_an_effect_that_changes_is_drifting() -> None:
    (one,) = compare(changing(0.9, 1.1))
    assert one.verdict == DRIFTING
    first, second = one.drift["first"], one.drift["second"]
    assert (first, second) == (pytest.approx(0.9, rel=0.02), pytest.approx(1.1, rel=0.02))
    assert one.text == f"drifting: {first:.3f} of host's time in the first half, {second:.3f} in the second"
    assert compare(changing(0.9, 0.7))[0].verdict == FASTER  # the same arm is faster in both halves


def test_warmup_forced_arms_and_impossible_times_are_left_out() -> None:
    timings = rows(10, 0.9)
    bad = [timings[200]._replace(us=us) for us in (0.0, -1.0, math.nan, math.inf)]
    forced = [Timing(10**6 + i, "decode", PATCH, NOT_COMPARED, NOT_COMPARED, "graph/1/1024", 1.0) for i in range(5000)]
    assert compare(timings + bad + forced) == compare(timings)
    assert compare(forced) == []


def test_a_group_that_lacks_an_arm_is_left_out() -> None:
    timings = rows(12, 0.9)
    gone = sorted({row.group for row in timings if row.block != NOT_COMPARED})[3]
    without = [row for row in timings if row.group != gone or row.arm == HOST]
    assert compare(without)[0].groups == 11
    few = [row for row in timings if row.group != gone or row.arm == HOST or row.step % 8 < 3]
    assert compare(few)[0].groups == 11  # a block needs more than three steps for a median


def test_buckets_features_and_arms_are_apart() -> None:
    timings = rows(10, 0.8) + rows(10, 1.2, bucket="eager/4/512") + rows(10, 0.8, feature="kv_indices", tried="mine")
    found = {(one.feature, one.bucket, one.arm): one.verdict for one in compare(timings)}
    assert found == {
        ("decode", "graph/1/1024", PATCH): FASTER,
        ("decode", "eager/4/512", PATCH): SLOWER,
        ("kv_indices", "graph/1/1024", "mine"): FASTER,
    }
    assert compare(rows(10, tried=AGAIN))[0].arm == AGAIN


def test_buckets_are_in_order_of_size() -> None:
    names = ["eager/8/512", "graph/4/1024", "graph/4/8192", "graph/4/131072", "graph/16/1024", "odd"]
    found = [one.bucket for one in compare([row for name in reversed(names) for row in rows(1, bucket=name)])]
    assert found == names


def test_three_arms() -> None:
    plan = Plan(block=8, arms=(HOST, PATCH, "mine"))
    timings = [row._replace(us=row.us * (1 / 0.9 if row.arm == "mine" else 1)) for row in rows(20, 0.9, plan=plan)]
    assert [(one.arm, one.verdict, one.groups) for one in compare(timings)] == [
        ("mine", EVEN, 20),
        (PATCH, FASTER, 20),
    ]


def test_a_report_is_json() -> None:
    merged = Merged("r", rows(9, 0.9), [Error(5, "decode", 1, 0.5, math.nan, 1)], [Note(1, "decode", "x", "y")], [0, 1])
    report = analysis.analyse(merged)
    assert json.loads(json.dumps(report, allow_nan=False)).keys() == report.keys()
    assert (report["steps"], report["outside"], report["ranks"]) == (128 + 9 * 32, 128, [0, 1])
    assert report["comparisons"][0]["verdict"] == FASTER
    assert report["notes"] == [{"step": 1, "feature": "decode", "what": "x", "text": "y"}]
    assert analysis.analyse(Merged("empty"))["comparisons"] == []


# -- the statistics alone


@pytest.mark.parametrize(
    "values", [[1.0, 2.0, -3.0, 4.0, 5.0, 6.0, 7.0, 8.0], [1.0, 1.0, -1.0, 2.0, 2.0], [0.0, 0.0, 3.0, -4.0, 5.0], [1.0]]
)
def test_signed_rank_equals_the_enumeration(values: list[float]) -> None:
    kept = [value for value in values if value]
    order = sorted(map(abs, kept))
    ranks = [2 * order.index(abs(v)) + order.count(abs(v)) + 1 for v in kept]
    plus = [
        sum(rank for rank, sign in zip(ranks, signs, strict=True) if sign)
        for signs in itertools.product((0, 1), repeat=len(kept))
    ]
    mine = sum(rank for rank, value in zip(ranks, kept, strict=True) if value > 0)
    off = abs(mine - sum(ranks) / 2)
    extreme = sum(abs(one - sum(ranks) / 2) >= off for one in plus)
    assert stats.signed_rank(values) == pytest.approx(extreme / len(plus))


def test_signed_rank_with_more_effects_continues_smoothly(monkeypatch: pytest.MonkeyPatch) -> None:
    draw = random.Random(3)
    off = []
    for _ in range(50):
        values = [draw.gauss(0.4, 1) for _ in range(25)]
        exact = stats.signed_rank(values)
        with monkeypatch.context() as patch:
            patch.setattr(stats, "EXACT", 0)
            off.append(stats.signed_rank(values) - exact)
    assert max(map(abs, off)) < 0.008  # without the continuity correction: 0.015
    assert stats.signed_rank([0.0] * 30) == 1.0
    assert stats.signed_rank([1.0] * 30) < 1e-6


def test_known_figures() -> None:
    # R: p.adjust(c(0.01, 0.04, 0.03, 0.5), "holm"); qt(0.025, c(7, 31))
    assert stats.holm([0.01, 0.04, 0.03, 0.5]) == pytest.approx([0.04, 0.09, 0.09, 0.5])
    assert stats.holm([]) == []
    assert stats._student(0.025, 7) == pytest.approx(-2.3646, abs=2e-3)
    assert stats._student(0.025, 31) == pytest.approx(-2.0395, abs=1e-4)
    assert stats.rank_sum([1, 2, 3, 4], [5, 6, 7, 8]) == pytest.approx(0.0304, abs=1e-4)
    assert stats.rank_sum([1, 1], [1, 1]) == 1.0
    assert stats.middle([1, 2, 3, 4, 1000]) == 3


def test_many_groups_are_pooled() -> None:
    values = [random.Random(i).gauss(0.01, 1) for i in range(1234)]
    pooled = stats.pooled(values)
    assert len(pooled) <= stats.MAX_EFFECTS
    assert pooled[0] == pytest.approx(sum(values[:13]) / 13)
    assert stats.pooled(values[:50]) == values[:50]


# -- agreement


def test_shadow_quantiles() -> None:
    errors = [Error(step, "decode", 0, step / 10, step / 1000, 0) for step in range(1, 101)]
    errors += [Error(50, "decode", 1, math.inf, math.nan, 3), Error(1, "kv_indices", 0, 0.0, 0.0, 0)]
    decode, kv = analysis.shadow(errors)
    assert decode["relative"] == {"0.5": 0.05, "0.9": 0.09, "0.99": 0.099, "1.0": 0.1}
    assert decode["max_abs"]["1.0"] == 10.0
    assert (decode["comparisons"], decode["steps"], decode["nan"], decode["not_finite"]) == (101, 100, 3, 1)
    assert kv["relative"]["1.0"] == 0.0
    assert analysis.shadow([]) == []


def test_errors_over_time_keep_the_worst() -> None:
    errors = [Error(step, "decode", layer, 0.0, 0.001 * layer, 0) for step in range(5000) for layer in range(3)]
    errors[9000] = errors[9000]._replace(relative=0.7)
    (one,) = analysis.shadow(errors)
    assert len(one["over_time"]) <= 400
    assert one["over_time"][0] == (0, 0.002)
    assert max(error for _, error in one["over_time"]) == 0.7


def test_a_bucket_of_a_damaged_row_can_be_sorted() -> None:
    """Python reads no number of 5000 digits, and a superscript is a digit that int() does not take."""
    names = ["graph/1/131072", "graph/1/" + "9" * 5000, "graph/²/1", "graph/1/8192", ""]
    assert sorted(names, key=analysis.by_size)[1:3] == ["graph/1/8192", "graph/1/131072"]
