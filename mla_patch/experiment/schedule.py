"""Maps step numbers to arms: blocks of steps in a balanced random order, drawn from the seed and the step number alone.

A block is a run of consecutive steps on one arm. A group is a few blocks that together give one comparison.

    ratio 0.5      A group is a random order of the arms followed by its mirror image, so that every arm has as many
                   blocks as every other: ABBA or BAAB with two arms, ABCCBA with three.
    other ratios   A group has ten blocks, or more if the ratio is below 0.1 or above 0.9, so that no group lacks an
                   arm. The order is mirrored as far as the numbers of blocks allow. Equal numbers of blocks of both
                   arms are compared; which ones is drawn with the order. The other blocks only carry their share of
                   the traffic.

The schedule keeps no state from step to step. So all ranks choose the same arm without communication, and so does a
rank that starts late. A linear drift affects both arms of a mirrored group equally. Any other drift adds noise but no
bias, because the order of each group is drawn independently.
"""

from __future__ import annotations

import difflib
import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

from mla_patch.compat.types import HOST, PATCH

AGAIN = "host-again"  # the engine's code under a second name: (HOST, AGAIN) is the A/A self-check
_WHOLE = 10**6  # ratios are counted in millionths, so that sums are exact
MIN_STEPS = 4  # steps that a block must have in a bucket for their median to be compared
NOT_COMPARED = -1  # stands for the block and the group of a step that no comparison uses


class Assignment(NamedTuple):
    """What one step runs.

    ``block`` and ``group`` are the numbers of their first steps, so they stay unique when the plan changes.
    """

    arm: str
    block: int
    group: int


@dataclass(frozen=True)
class Plan:
    """The parameters that determine a schedule."""

    block: int = 64  # steps in a block
    ratio: float = 0.5  # share of steps on all arms but the first; 0.5 means that every arm runs equally often
    seed: int = 0
    warmup: int = 128  # steps on the first arm before the first block
    arms: tuple[str, ...] = (HOST, PATCH)
    draft: bool = False  # whether decode steps of draft models run the arm, too
    start: int = 0  # step at which the warmup begins; earlier steps run the first arm
    salt: str = ""  # the feature's name, so that features tested at the same time get independent orders

    def __post_init__(self) -> None:
        for name, (_, good, accepted) in _AB.items():
            if not good(getattr(self, name)):
                raise ValueError(f"{name}={getattr(self, name)}: expected {accepted}")


@dataclass(frozen=True)
class Sampling:
    """Which steps run both arms on the same inputs, and which error is too large."""

    every: int = 64
    tolerance: float = 0.02  # relative Frobenius error
    seed: int = 0

    def __post_init__(self) -> None:
        for name, (_, good, accepted) in _SHADOW.items():
            if not good(getattr(self, name)):
                raise ValueError(f"{name}={getattr(self, name)}: expected {accepted}")

    def due(self, step: int) -> bool:
        """Whether ``step`` is sampled: one step at a random place of every window of ``every`` steps.

        A fixed place would always meet the same step of a block.
        """
        window, place = divmod(step, self.every)
        return place == _draw(self.seed, "shadow", window) % self.every


class Schedule:
    """Maps step numbers to assignments. The first step of a group costs one hash, other steps cost less."""

    __slots__ = ("_group", "_now", "_order", "_share", "_since", "_until", "plan", "size")

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        tried = len(plan.arms) - 1
        self._share = min(max(round(plan.ratio * _WHOLE), 1), _WHOLE - 1)  # of the ratio, in millionths
        if plan.ratio == 0.5:
            self.size = 2 * len(plan.arms)  # blocks in a group
        else:
            size = max(10, -(-tried * _WHOLE // self._share), -(-_WHOLE // (_WHOLE - self._share)))
            self.size = size + size % 2  # even, so that a mirrored order has no middle block
        self._group = -1
        self._order: list[tuple[str, bool]] = []  # arm and whether it is compared, for each block of the group
        # the assignment of the steps from _since to before _until; none yet
        self._since = self._until = 0
        self._now = Assignment(plan.arms[0], NOT_COMPARED, NOT_COMPARED)

    def assignment(self, step: int) -> Assignment:
        if self._since <= step < self._until:
            return self._now
        return self._find(step)

    def _find(self, step: int) -> Assignment:
        plan = self.plan
        first = plan.start + plan.warmup
        if step < first:
            self._since, self._until, self._now = step, first, Assignment(plan.arms[0], NOT_COMPARED, NOT_COMPARED)
            return self._now
        block = (step - first) // plan.block
        group, place = divmod(block, self.size)
        if group != self._group:
            self._group, self._order = group, self._draw_order(group)
        self._since = first + block * plan.block
        self._until = self._since + plan.block
        arm, compared = self._order[place]
        start = first + group * self.size * plan.block
        self._now = Assignment(arm, self._since, start) if compared else Assignment(arm, NOT_COMPARED, NOT_COMPARED)
        return self._now

    def _draw_order(self, group: int) -> list[tuple[str, bool]]:
        plan = self.plan
        bits = _draw(plan.seed, plan.salt, group)
        if plan.ratio == 0.5:
            order, _ = _shuffled(plan.arms, bits)
            return [(arm, True) for arm in (*order, *order[::-1])]
        # Blocks on other arms than the first in all groups before this one, and with this one. Each group has a whole
        # number of them. The remainder is carried to later groups.
        before, after = (number * self._share * self.size // _WHOLE for number in (group, group + 1))
        pairs, bits = _shuffled(tuple((i, self.size - 1 - i) for i in range(self.size // 2)), bits)
        places: list[int] = []
        for pair in pairs:
            sides, bits = _shuffled(pair, bits)
            places += sides
        turns = [(plan.arms[0], False)] * self.size
        count = after - before
        fewer = min(count, self.size - count)
        for i, place in enumerate(places):
            tried = plan.arms[1 + (before + i) % (len(plan.arms) - 1)]
            # The compared blocks lie around the border between the two kinds. Which kind got which of these places is
            # then a fair coin toss, which the test in `analysis` needs.
            turns[place] = (tried if i < count else plan.arms[0], count - fewer <= i < count + fewer)
        return turns


def _draw(seed: int, salt: str, number: int) -> int:
    """256 random bits, the same on every machine and in every version of Python."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{salt}/{number}".encode()).digest(), "little")


def _shuffled(items: tuple, bits: int) -> tuple[list, int]:
    """The items in an order drawn from ``bits`` (Fisher-Yates), and the bits that were not used."""
    items_ = list(items)
    for last in range(len(items_) - 1, 0, -1):
        bits, other = divmod(bits, last + 1)
        items_[last], items_[other] = items_[other], items_[last]
    return items_, bits


_Key = tuple[Callable[[str], Any], Callable[[Any], bool], str]  # how to read it, whether it is valid, what is valid
_AB: dict[str, _Key] = {
    "block": (int, lambda v: v >= 1, "a whole number, 1 or more"),
    "ratio": (float, lambda v: 0 < v < 1, "a number between 0 and 1"),
    "seed": (int, lambda v: True, "a whole number"),
    "warmup": (int, lambda v: v >= 0, "a whole number, 0 or more"),
    "arms": (
        lambda text: tuple(text.split("+")),
        lambda v: len(v) > 1 and len(set(v)) == len(v) and all(v),
        "two or more different names joined by +, such as host+patch",
    ),
    "draft": (lambda text: {"1": True, "0": False}[text], lambda v: True, "1 or 0"),
}
_SHADOW: dict[str, _Key] = {
    "every": (int, lambda v: v >= 1, "a whole number, 1 or more"),
    "tolerance": (float, lambda v: 0 < v < math.inf, "a number above 0"),
}


def parse_ab(text: str, arms: tuple[str, ...] = (HOST, PATCH)) -> Plan:
    """Parse the value of ``MLA_PATCH_AB``. ``arms`` are used if the text names none.

    Raises:
        ValueError: names the key, what was found and what is accepted.
    """
    return Plan(**{"arms": arms} | _parse(text, _AB))


def parse_shadow(text: str) -> Sampling:
    """Parse the value of ``MLA_PATCH_SHADOW``. Raises as `parse_ab`."""
    return Sampling(**_parse(text, _SHADOW))


def _parse(text: str, keys: dict[str, _Key]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for part in filter(None, (part.strip() for part in text.split(","))):
        key, _, raw = (piece.strip() for piece in part.partition("="))
        if key not in keys:
            close = difflib.get_close_matches(key, keys, n=1, cutoff=0.5)
            hint = f"; did you mean {close[0]}?" if close else ""
            raise ValueError(f"{key!r} is not one of {', '.join(keys)}{hint}")
        if key in values:
            raise ValueError(f"{key} is given twice")
        read, good, accepted = keys[key]
        try:
            values[key] = read(raw)
            if not good(values[key]):
                raise ValueError
        except (ValueError, KeyError):
            raise ValueError(f"{key}={raw}: expected {accepted}") from None
    return values
