"""Device times: nothing waits, memory is bounded, and steps without a time are counted."""

import timeit

import pytest

from mla_patch.experiment.timing import EventPool


class Device:
    """A device that passes an event when the test says so. Its events have no ``synchronize``, so calling it fails."""

    def __init__(self) -> None:
        self.made = 0
        self.clock = 0.0  # ms
        self.queries = 0
        self.reached = -1.0  # the device has passed all events up to this time

    def event(self) -> "FakeEvent":
        self.made += 1
        return FakeEvent(self)


class FakeEvent:
    def __init__(self, device: Device) -> None:
        self.device = device
        self.at = float("nan")
        self.lost = False

    def record(self) -> None:
        self.at = self.device.clock

    def query(self) -> bool:
        self.device.queries += 1
        if self.lost == "broken":
            raise RuntimeError("an illegal memory access was encountered")
        return not self.lost and self.at <= self.device.reached

    def elapsed_time(self, end_event: "FakeEvent") -> float:
        assert end_event.query(), "not ready: the real one raises too"
        return end_event.at - self.at


@pytest.fixture
def device() -> Device:
    return Device()


def run(pool: EventPool, device: Device, about: object, ms: float = 1.0) -> None:
    pool.begin()
    device.clock += ms
    pool.end(about)
    device.clock += 1  # between steps


def test_times_come_back_in_order_once_the_device_has_passed(device: Device) -> None:
    pool = EventPool(device.event)
    for step in range(3):
        run(pool, device, ("step", step), ms=step + 0.5)
    assert pool.harvest() == []
    device.reached = 2.6  # the second step has begun
    assert pool.harvest() == [(("step", 0), 500.0)]
    device.reached = 99
    assert pool.harvest() == [(("step", 1), 1500.0), (("step", 2), 2500.0)]
    assert pool.harvest() == []
    assert (pool.untimed, pool.dropped) == (0, 0)


def test_pairs_are_reused(device: Device) -> None:
    pool = EventPool(device.event)
    for step in range(1000):
        run(pool, device, step)
        device.reached = device.clock
        assert [about for about, _ in pool.harvest()] == [step]
    assert device.made == 2


def test_the_pool_is_bounded(device: Device) -> None:
    pool = EventPool(device.event, capacity=8)
    for step in range(20):
        run(pool, device, step)
    assert (device.made, pool.untimed) == (16, 12)
    device.reached = device.clock
    assert [about for about, _ in pool.harvest(limit=100)] == list(range(8))
    run(pool, device, 20)
    assert pool.untimed == 12


def test_a_harvest_makes_few_queries(device: Device) -> None:
    pool = EventPool(device.event)
    for step in range(100):
        run(pool, device, step)
    pool.harvest()
    assert device.queries == 1  # if the oldest is not done, no other is queried
    device.reached = device.clock
    assert len(pool.harvest(limit=3)) == 3


@pytest.mark.parametrize("lost", [True, "broken"])
def test_an_event_that_never_completes_is_given_up(device: Device, lost: object) -> None:
    pool = EventPool(device.event, capacity=8, patience=20)
    run(pool, device, "lost")
    pool._pending[0][2][1].lost = lost
    timed = []
    for step in range(100):
        run(pool, device, step)
        device.reached = device.clock
        timed += pool.harvest()
    assert pool.dropped == 1
    assert "lost" not in [about for about, _ in timed]
    assert len(timed) + pool.untimed == 100
    assert len(timed) > 80
    assert device.made <= 2 * (8 + 1)


def test_lost_pairs_are_replaced(device: Device) -> None:
    pool = EventPool(device.event, capacity=2, patience=1)
    for step in range(10):
        run(pool, device, "lost")
        pool._pending[-1][2][1].lost = True
        device.reached = device.clock
        for _ in range(3):
            pool.begin()  # not timed: a step that raised
        pool.harvest()
        assert pool._pending == type(pool._pending)(), step
    assert pool.dropped >= 10


def test_a_step_that_raised_has_no_time(device: Device) -> None:
    pool = EventPool(device.event)
    pool.begin()  # and the engine raised
    device.clock = 100
    run(pool, device, "next")
    device.reached = device.clock
    assert pool.harvest() == [("next", 1000.0)]
    assert (pool.dropped, device.made) == (1, 2)
    pool.end("no begin")
    assert pool.harvest() == []


def test_nothing_is_recorded_or_queried_during_a_capture(device: Device) -> None:
    capturing = [False]
    pool = EventPool(device.event, capturing=lambda: capturing[0])
    run(pool, device, "before")
    device.reached = device.clock
    capturing[0] = True
    run(pool, device, "captured")
    assert pool.harvest() == []
    assert (device.made, device.queries) == (2, 0)
    capturing[0] = False
    assert [about for about, _ in pool.harvest()] == ["before"]


@pytest.mark.cost
def test_a_step_costs_little(device: Device) -> None:
    device.reached = float("inf")
    pool = EventPool(device.event)

    def steps() -> None:
        for step in range(2000):
            pool.begin()
            pool.end(step)
            pool.harvest()

    assert min(timeit.repeat(steps, number=1, repeat=5)) / 2000 < 8e-6  # includes the time of the fake itself
