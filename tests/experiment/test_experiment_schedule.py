"""The schedule: balanced, the same on every rank, and determined by the seed and the step number alone."""

import subprocess
import sys
import timeit
from collections import Counter

import pytest

from mla_patch import flags
from mla_patch.compat.types import HOST, PATCH
from mla_patch.experiment.schedule import AGAIN, NOT_COMPARED, Plan, Sampling, Schedule, parse_ab, parse_shadow


def blocks(plan: Plan, count: int) -> list[str]:
    """The arms of the first ``count`` blocks, read at the last step of each."""
    schedule = Schedule(plan)
    first = plan.start + plan.warmup
    return [schedule.assignment(first + (i + 1) * plan.block - 1).arm for i in range(count)]


def groups(plan: Plan, count: int) -> list[tuple[str, ...]]:
    size = Schedule(plan).size
    arms = blocks(plan, size * count)
    return [tuple(arms[i * size : (i + 1) * size]) for i in range(count)]


def test_ratio_one_half_gives_abba_or_baab() -> None:
    seen = Counter("".join(arm[0] for arm in group) for group in groups(Plan(), 400))
    assert set(seen) == {"hpph", "phhp"}
    assert 160 < seen["hpph"] < 240  # a fair coin: 200 +- 4 sigma


def test_more_than_two_arms_are_mirrored_too() -> None:
    drawn = groups(Plan(arms=("host", "patch", "mine")), 300)
    assert len(set(drawn)) == 6  # every order occurs
    for group in drawn:
        assert group == group[::-1]
        assert set(Counter(group).values()) == {2}


@pytest.mark.parametrize("ratio", [0.1, 0.2, 0.3, 0.6, 0.8, 0.9])
def test_tenths_are_exact_in_every_group(ratio: float) -> None:
    for group in groups(Plan(ratio=ratio), 200):
        assert len(group) == 10
        assert group.count(PATCH) == round(10 * ratio)


@pytest.mark.parametrize("ratio", [0.2, 0.4, 0.6, 0.8])
def test_even_numbers_of_blocks_are_mirrored(ratio: float) -> None:
    drawn = groups(Plan(ratio=ratio), 200)
    assert all(group == group[::-1] for group in drawn)
    assert len(set(drawn)) > 4


@pytest.mark.parametrize("ratio", [0.001, 0.03, 0.25, 0.333, 0.97])
def test_other_ratios_hold_in_the_long_run_and_no_group_lacks_an_arm(ratio: float) -> None:
    drawn = groups(Plan(ratio=ratio, block=1), 200)
    assert all({HOST, PATCH} == set(group) for group in drawn)
    assert sum(group.count(PATCH) for group in drawn) / sum(map(len, drawn)) == pytest.approx(ratio, rel=0.02)


@pytest.mark.parametrize("ratio", [0.1, 0.2, 0.3])
def test_every_place_in_a_group_is_equally_likely(ratio: float) -> None:
    drawn = groups(Plan(ratio=ratio, block=1), 2000)
    for place in range(10):
        assert sum(group[place] == PATCH for group in drawn) == pytest.approx(2000 * ratio, abs=90)  # 4 sigma


@pytest.mark.parametrize("ratio", [0.1, 0.2, 0.25, 0.3, 0.7, 0.9, 0.03])
def test_equal_numbers_of_blocks_are_compared_and_chance_decides_which(ratio: float) -> None:
    plan = Plan(ratio=ratio, block=1, warmup=0)
    schedule = Schedule(plan)
    first, spread = Counter(), Counter()
    for group in range(1000):
        assignments = [schedule.assignment(group * schedule.size + i) for i in range(schedule.size)]
        compared = [assignment for assignment in assignments if assignment.block != NOT_COMPARED]
        arms = Counter(assignment.arm for assignment in compared)
        assert arms[HOST] == arms[PATCH] == min(Counter(assignment.arm for assignment in assignments).values())
        assert {assignment.group for assignment in compared} == {group * schedule.size}
        first[compared[0].arm] += 1
        lead = sum(assignment.block if assignment.arm == PATCH else -assignment.block for assignment in compared)
        spread["after" if lead > 0 else "before" if lead < 0 else "mirrored"] += 1
    assert abs(first[HOST] - first[PATCH]) < 130  # 4 sigma
    assert abs(spread["after"] - spread["before"]) < 130
    assert spread["mirrored"] == 1000 or ratio not in (0.2, 0.8)


def test_several_arms_share_the_ratio() -> None:
    drawn = groups(Plan(ratio=0.4, arms=("host", "a", "b")), 100)
    total = Counter(arm for group in drawn for arm in group)
    assert total == {"host": 600, "a": 200, "b": 200}
    assert all({"host", "a", "b"} == set(group) for group in groups(Plan(ratio=0.03, arms=("host", "a", "b")), 50))


def test_warmup_and_earlier_steps_run_the_first_arm() -> None:
    schedule = Schedule(Plan(start=1000, warmup=10, block=4))
    for step in (0, 999, 1000, 1009):
        assert schedule.assignment(step) == (HOST, NOT_COMPARED, NOT_COMPARED)
    assert schedule.assignment(1010).block == 1010


def test_blocks_and_groups_are_named_by_their_first_steps() -> None:
    schedule = Schedule(Plan(block=4, warmup=2))
    for step in range(2, 200):
        assignment = schedule.assignment(step)
        assert assignment.block == 2 + (step - 2) // 4 * 4
        assert assignment.group == 2 + (step - 2) // 16 * 16


@pytest.mark.parametrize("plan", [Plan(), Plan(ratio=0.3, seed=7), Plan(block=1, arms=("host", "a", "b"))], ids=repr)
def test_the_schedule_has_no_state(plan: Plan) -> None:
    one = Schedule(plan)
    forwards = [one.assignment(step) for step in range(5000)]
    assert [Schedule(plan).assignment(step) for step in range(0, 5000, 37)] == forwards[
        ::37
    ]  # each from a new schedule
    assert [one.assignment(step) for step in reversed(range(5000))] == forwards[::-1]


def test_seed_and_salt_change_the_draw() -> None:
    assert len({tuple(blocks(Plan(seed=seed), 64)) for seed in range(20)}) == 20
    a, b = groups(Plan(salt="decode"), 400), groups(Plan(salt="kv_indices"), 400)
    assert 160 < sum(x == y for x, y in zip(a, b, strict=True)) < 240  # independent


def test_another_process_draws_the_same() -> None:
    """Ranks differ in Python's hash seed, which must not matter."""
    code = (
        "from mla_patch.experiment.schedule import Plan, Schedule; s = Schedule(Plan(seed=3, salt='decode'));"
        "print(''.join(s.assignment(i).arm[0] for i in range(128, 4224, 64)))"
    )
    runs = [
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env={"PYTHONHASHSEED": seed})
        for seed in ("1", "2")
    ]
    mine = "".join(arm[0] for arm in blocks(Plan(seed=3, salt="decode"), 64))
    assert [run.stdout.strip() for run in runs] == [mine, mine], runs[0].stderr
    # pinned, so that releases draw the same order
    assert mine == PINNED


PINNED = "phhphpphhpphphhpphhphpphphhpphhpphhphpphphhphpphphhpphhpphhphpph"


def test_importing_it_loads_only_the_standard_library() -> None:
    code = (
        "import sys, pkgutil, mla_patch.experiment as e\n"
        "for m in pkgutil.iter_modules(e.__path__): __import__('mla_patch.experiment.' + m.name)\n"
        "print([m for m in ('torch', 'numpy', 'triton', 'wrapt', 'rich', 'pluggy') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("[]\n", "")


@pytest.mark.cost
def test_a_step_costs_little() -> None:
    schedule = Schedule(Plan())
    steps = range(128, 128 + 64 * 100)
    seconds = min(timeit.repeat(lambda: [schedule.assignment(step) for step in steps], number=1, repeat=5))
    assert seconds / len(steps) < 2e-6


# -- shadow sampling


@pytest.mark.parametrize("every", [1, 2, 64, 100])
def test_one_step_in_each_window_is_sampled(every: int) -> None:
    sampling = Sampling(every=every)
    due = [step for step in range(every * 200) if sampling.due(step)]
    assert [step // every for step in due] == list(range(200))
    if every > 2:
        assert len({step % every for step in due}) > every // 2  # at different places of the windows


# -- the variables


@pytest.mark.parametrize(
    "text, plan",
    [
        ("", Plan()),
        ("block=64,ratio=0.5,seed=0,warmup=128", Plan()),
        (" block=8 , ratio=0.25,seed=-3,warmup=0,", Plan(8, 0.25, -3, 0)),
        ("draft=1", Plan(draft=True)),
        ("draft=0", Plan()),
    ],
)
def test_ab(text: str, plan: Plan) -> None:
    assert parse_ab(text) == plan
    assert flags.read({"MLA_PATCH_AB": text}, []).problems == []


def test_without_arms_all_arms_run() -> None:
    assert parse_ab("block=8", (HOST, PATCH, "mine")).arms == (HOST, PATCH, "mine")
    assert parse_ab("arms = host+mine", (HOST, PATCH, "mine")).arms == (HOST, "mine")


def test_defaults_are_the_flags() -> None:
    settings = flags.read({}, []).settings
    assert parse_ab(settings["MLA_PATCH_AB"].value) == Plan()
    assert parse_shadow(settings["MLA_PATCH_SHADOW"].value) == Sampling()


@pytest.mark.parametrize(
    "text, problem",
    [
        ("blok=3", "'blok' is not one of block, ratio, seed, warmup, arms, draft; did you mean block?"),
        ("xyz", "'xyz' is not one of block, ratio, seed, warmup, arms, draft"),
        ("block", "block=: expected a whole number, 1 or more"),
        ("block=0", "block=0: expected a whole number, 1 or more"),
        ("block=1.5", "block=1.5: expected a whole number, 1 or more"),
        ("ratio=1", "ratio=1: expected a number between 0 and 1"),
        ("ratio=nan", "ratio=nan: expected a number between 0 and 1"),
        ("ratio=half", "ratio=half: expected a number between 0 and 1"),
        ("seed=x", "seed=x: expected a whole number"),
        ("draft=yes", "draft=yes: expected 1 or 0"),
        ("warmup=-1", "warmup=-1: expected a whole number, 0 or more"),
        ("block=1,block=2", "block is given twice"),
        ("arms=host", "arms=host: expected two or more different names joined by +, such as host+patch"),
        ("arms=host+host", "arms=host+host: expected two or more different names joined by +, such as host+patch"),
    ],
)
def test_bad_ab(text: str, problem: str) -> None:
    with pytest.raises(ValueError) as caught:
        parse_ab(text)
    assert str(caught.value) == problem
    assert flags.read({"MLA_PATCH_AB": text}, []).problems == [f"MLA_PATCH_AB={text}: {problem}"]


@pytest.mark.parametrize(
    "text, problem",
    [
        ("every=0", "every=0: expected a whole number, 1 or more"),
        ("tolerance=nan", "tolerance=nan: expected a number above 0"),
        ("tolerance=inf", "tolerance=inf: expected a number above 0"),
        ("tolerance=-1", "tolerance=-1: expected a number above 0"),
        ("evry=5", "'evry' is not one of every, tolerance; did you mean every?"),
    ],
)
def test_bad_shadow(text: str, problem: str) -> None:
    with pytest.raises(ValueError) as caught:
        parse_shadow(text)
    assert str(caught.value) == problem
    assert parse_shadow("every=8,tolerance=1e-3") == Sampling(8, 1e-3)


@pytest.mark.parametrize("bad", [{"block": 0}, {"ratio": 0.0}, {"arms": ("host",)}, {"arms": ("host", "host")}])
def test_a_plan_checks_itself(bad: dict) -> None:
    with pytest.raises(ValueError, match=next(iter(bad))):
        Plan(**bad)
    assert Plan(arms=(HOST, AGAIN)).arms == (HOST, AGAIN)
