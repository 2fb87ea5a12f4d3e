"""Which arm runs a step: blocks of steps in balanced order, drawn from the seed and the step number alone.

    ratio 0.5    groups of an order and its mirror, every arm equally often: ABBA or BAAB, ABCCBA, ...
    other        groups of ten blocks, mirrored as far as the numbers allow; longer below 0.1 and above 0.9,
                 so that no group lacks an arm. Compared are as many blocks of the one arm as of the other, drawn
                 with the order; the rest carries its share of the traffic and is in no comparison

Nothing is carried from one step to the next, so every rank picks the same arm with no communication, also
one that starts late. What drifts in a straight line hits both arms of a mirrored group alike; what does not
is noise, not bias, since each group's order is a fresh draw.
"""

from __future__ import annotations

import difflib
import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

HOST, PATCH = "host", "patch"
AGAIN = "host-again"  # the host's code under another name: (HOST, AGAIN) is the A/A self-check
SHADOW = "shadow"  # the host's, with the first of the others beside it on the same inputs
_WHOLE = 10**6
MIN_STEPS = 4  # of a bucket in a block, for their median to count in a comparison
OUTSIDE = -1  # the block of a step that is in no comparison


class Turn(NamedTuple):
    """What one step runs. Blocks and groups are named by their first steps, which no change of plan repeats."""

    arm: str
    block: int
    group: int


@dataclass(frozen=True)
class Plan:
    """Everything that a schedule is drawn from."""

    block: int = 64  # steps
    ratio: float = 0.5  # share of the arms after the first, together; 0.5: every arm equally often
    seed: int = 0
    warmup: int = 128  # steps on the first arm before the first block
    arms: tuple[str, ...] = (HOST, PATCH)
    draft: bool = False  # draft models' decode steps run the arm, too
    start: int = 0  # step from which warmup counts; earlier ones run the first arm
    salt: str = ""  # the feature's name: features under test at the same time get independent orders

    def __post_init__(self) -> None:
        for name, (_, good, accepted) in _AB.items():
            if not good(getattr(self, name)):
                raise ValueError(f"{name}={getattr(self, name)}: expected {accepted}")


@dataclass(frozen=True)
class Sampling:
    """Which steps run both arms, and which error is too large."""

    every: int = 64
    tolerance: float = 0.02  # relative Frobenius error
    seed: int = 0

    def __post_init__(self) -> None:
        for name, (_, good, accepted) in _SHADOW.items():
            if not good(getattr(self, name)):
                raise ValueError(f"{name}={getattr(self, name)}: expected {accepted}")

    def due(self, step: int) -> bool:
        """One step in each ``every``, at a place drawn anew, lest it always meets the same step of a block."""
        window, place = divmod(step, self.every)
        return place == _draw(self.seed, "shadow", window) % self.every


class Schedule:
    """Step number -> turn. Cheap within a block, one hash at its first step."""

    __slots__ = ("_group", "_order", "_share", "_since", "_turn", "_until", "plan", "size")

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        tried = len(plan.arms) - 1
        self._share = min(max(round(plan.ratio * _WHOLE), 1), _WHOLE - 1)  # in whole numbers, for exact sums
        if plan.ratio == 0.5:
            self.size = 2 * len(plan.arms)  # blocks in a group
        else:
            size = max(10, -(-tried * _WHOLE // self._share), -(-_WHOLE // (_WHOLE - self._share)))
            self.size = size + size % 2  # even, so that a mirror has no middle
        self._group = -1
        self._order: list[tuple[str, bool]] = []  # of the blocks of a group: arm, compared
        self._since, self._until, self._turn = 0, 0, Turn(plan.arms[0], OUTSIDE, OUTSIDE)  # the cache, empty

    def turn(self, step: int) -> Turn:
        if self._since <= step < self._until:
            return self._turn
        return self._find(step)

    def _find(self, step: int) -> Turn:
        plan = self.plan
        first = plan.start + plan.warmup
        if step < first:
            self._since, self._until, self._turn = step, first, Turn(plan.arms[0], OUTSIDE, OUTSIDE)
            return self._turn
        block = (step - first) // plan.block
        group, place = divmod(block, self.size)
        if group != self._group:
            self._group, self._order = group, self._draw_order(group)
        self._since = first + block * plan.block
        self._until = self._since + plan.block
        arm, compared = self._order[place]
        start = first + group * self.size * plan.block
        self._turn = Turn(arm, self._since, start) if compared else Turn(arm, OUTSIDE, OUTSIDE)
        return self._turn

    def _draw_order(self, group: int) -> list[tuple[str, bool]]:
        plan = self.plan
        bits = _draw(plan.seed, plan.salt, group)
        if plan.ratio == 0.5:
            order, _ = _shuffled(plan.arms, bits)
            return [(arm, True) for arm in (*order, *order[::-1])]
        # whole blocks in each group; what is left over goes to later groups
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
            # around the border, so that which arm got which of these places is a fair coin
            turns[place] = (tried if i < count else plan.arms[0], count - fewer <= i < count + fewer)
        return turns


def _draw(seed: int, salt: str, number: int) -> int:
    """256 bits, the same on every machine and in every Python."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{salt}/{number}".encode()).digest(), "little")


def _shuffled(items: tuple, bits: int) -> tuple[list, int]:
    """Fisher and Yates, and the bits that it left."""
    items_ = list(items)
    for last in range(len(items_) - 1, 0, -1):
        bits, other = divmod(bits, last + 1)
        items_[last], items_[other] = items_[other], items_[last]
    return items_, bits


_Key = tuple[Callable[[str], Any], Callable[[Any], bool], str]
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
    """``MLA_PATCH_AB``'s value; ``arms`` are those of a text that names none.

    Raises:
        ValueError: names the key, what was found and what is accepted.
    """
    return Plan(**{"arms": arms} | _parse(text, _AB))


def parse_shadow(text: str) -> Sampling:
    """``MLA_PATCH_SHADOW``'s value, as `parse_ab`."""
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
