"""Shadow checks: the error is right, no value is read from the device, and a replay needs no Python."""

import math

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

from mla_patch.experiment import shadow
from mla_patch.experiment.record import Error
from mla_patch.experiment.shadow import Drain, Ring


def fetch(ring: Ring, drain: Drain) -> list[Error]:
    ring.end()
    drain.poll()  # starts
    drain.poll()  # arrives
    return drain.take()


@pytest.fixture
def ring() -> Ring:
    return Ring("cpu", slots=16)


@pytest.fixture
def drain(ring: Ring) -> Drain:
    return Drain(ring, "decode")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("shape", [(1,), (3, 5), (2, 7, 33)], ids=str)
def test_the_error_equals_the_definition(ring: Ring, drain: Drain, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    host = torch.randn(shape).to(dtype)
    ours = (host.double() * (1 + 0.01 * torch.randn(shape).double())).to(dtype)
    ring.begin(77)
    ring.compare(host, ours, tag=5)
    (error,) = fetch(ring, drain)
    d = ours.double() - host.double()
    assert error[:3] == (77, "decode", 5)
    # the difference is computed in float32, sums in float64
    assert error.max_abs == pytest.approx(d.abs().max().item(), rel=1e-5, abs=1e-7)
    assert error.relative == pytest.approx((d.norm() / host.double().norm()).item(), rel=1e-4, abs=1e-7)
    assert error.nan == 0


def test_integers_are_exact(ring: Ring, drain: Drain) -> None:
    host = torch.tensor([2**31 - 1, 5, 0], dtype=torch.int32)
    ours = torch.tensor([2**31 - 2, 5, 0], dtype=torch.int32)
    ring.compare(host, ours)
    ring.compare(host, host.clone())
    one, same = fetch(ring, drain)
    assert (one.max_abs, same.max_abs, same.relative) == (1.0, 0.0, 0.0)


NAN, INF = math.nan, math.inf


@pytest.mark.parametrize(
    "host, ours, expected",  # max_abs, relative, nan
    [
        ([3.0, 4.0], [3.0, NAN], (0.0, 0.0, 1)),
        ([3.0, 4.0], [INF, 4.5], (0.5, 0.1, 1)),
        ([3.0, 4.0], [NAN, NAN], (0.0, 0.0, 2)),
        ([NAN, 4.0], [1.0, 4.0], (0.0, 0.0, 0)),  # not finite in the engine's result
        ([NAN, INF], [NAN, INF], (0.0, 0.0, 0)),
        ([0.0, 0.0], [0.0, 0.0], (0.0, 0.0, 0)),
        ([0.0, 0.0], [0.0, 2.0], (2.0, INF, 0)),
        ([3e38, 4.0], [-3e38, 4.0], (INF, INF, 0)),
    ],
)
def test_values_that_are_not_finite(ring: Ring, drain: Drain, host: list, ours: list, expected: tuple) -> None:
    ring.compare(torch.tensor(host), torch.tensor(ours))
    (error,) = fetch(ring, drain)
    assert (error.max_abs, error.relative, error.nan) == pytest.approx(expected)


def test_inputs_are_not_changed(ring: Ring) -> None:
    host, ours = torch.tensor([1.0, NAN]), torch.tensor([NAN, 2.0])
    ring.compare(host, ours)
    assert str(host.tolist() + ours.tolist()) == "[1.0, nan, nan, 2.0]"


def test_different_shapes_are_refused_and_empty_tensors_ignored(ring: Ring) -> None:
    with pytest.raises(ValueError, match=r"ours: shape \(2,\), expected the host's \(3,\)"):
        ring.compare(torch.ones(3), torch.ones(2))
    ring.compare(torch.ones(0, 4), torch.ones(0, 4))
    assert int(ring.count) == 0


class Ops(TorchDispatchMode):
    """Records the name of every operation."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def test_a_comparison_is_some_30_small_kernels(ring: Ring) -> None:
    """docs/experiments.md states this."""
    host, ours = torch.ones(4, 5, dtype=torch.bfloat16), torch.ones(4, 5, dtype=torch.bfloat16)
    with Ops() as ops:
        ring.compare(host, ours)
    assert len([name for name in ops.names if name not in ("detach", "view", "unsqueeze")]) <= 31


def test_no_value_is_read() -> None:
    """Reading a value would wait for the device and could not be captured."""
    ring = Ring("meta")  # it has no values, so reading one raises
    ring.begin(3)
    ring.compare(torch.ones(4, 5, device="meta"), torch.ones(4, 5, device="meta"))
    ring = Ring("cpu")
    drain = Drain(ring, "decode")
    with Ops() as ops:
        ring.begin(3)
        ring.compare(torch.ones(4, 5), torch.ones(4, 5))
        ring.end()
        drain.poll()
        drain.poll()
    assert "index_copy_" in ops.names
    assert not {"_local_scalar_dense", "item", "nonzero", "masked_select", "is_nonzero", "equal"} & set(ops.names)


def test_a_replayed_graph_continues_the_rows(ring: Ring, drain: Drain) -> None:
    """Traced once and run often: neither the step nor the row number is a Python number."""
    host, ours = torch.ones(2, 3), torch.ones(2, 3)

    def layer(host: torch.Tensor, ours: torch.Tensor) -> torch.Tensor:
        ring.compare(host, ours, tag=9)
        return ring.count

    graph = make_fx(layer)(host, ours)
    start = int(ring.count)  # written while tracing
    for step in (100, 101, 102):
        ring.begin(step)
        ours.fill_(step)
        graph(host, ours)
    assert int(ring.count) == start + 3
    assert [(error.step, error.tag, error.max_abs) for error in fetch(ring, drain)][start:] == [
        (100, 9, 99.0),
        (101, 9, 100.0),
        (102, 9, 101.0),
    ]


# -- the drain


def put(ring: Ring, *steps: int) -> None:
    for step in steps:
        ring.begin(step)
        ring.compare(torch.ones(2), torch.ones(2))
    ring.end()


def test_each_row_comes_once(ring: Ring, drain: Drain) -> None:
    put(ring, 1, 2)
    assert [error.step for error in fetch(ring, drain)] == [1, 2]
    assert fetch(ring, drain) == []
    put(ring, 3)
    assert [error.step for error in fetch(ring, drain)] == [3]
    assert drain.take() == []


def test_rows_that_were_overwritten_are_counted(ring: Ring, drain: Drain) -> None:
    put(ring, *range(40))
    assert [error.step for error in fetch(ring, drain)] == list(range(25, 40))  # one of the 16 may be half written
    assert drain.lost == 25
    put(ring, 40)
    assert [error.step for error in fetch(ring, drain)] == [40]
    assert drain.lost == 25


def test_a_row_with_the_wrong_number_is_lost(ring: Ring, drain: Drain) -> None:
    put(ring, 1, 2, 3)
    ring.rows[1, 0] = 17
    assert [error.step for error in fetch(ring, drain)] == [1, 3]
    assert drain.lost == 1


class Slow:
    """A device that copies when the test says so, and can write rows in the meantime."""

    def __init__(self) -> None:
        self.copies = 0
        self.done = False
        self.meanwhile = None

    def __call__(self, targets: list, sources: tuple) -> "Slow":
        self.copies += 1
        self.done = False
        targets[0].copy_(sources[0])
        if self.meanwhile:
            self.meanwhile()
        for target, source in zip(targets[1:], sources[1:], strict=True):
            target.copy_(source)
        return self

    def query(self) -> bool:
        if self.done == "broken":
            raise RuntimeError("an illegal memory access was encountered")
        return bool(self.done)


def test_the_drain_never_waits(ring: Ring) -> None:
    device = Slow()
    drain = Drain(ring, "decode", copy=device)
    drain.poll()
    assert device.copies == 0  # there is nothing to fetch
    put(ring, 1)
    for _ in range(5):
        drain.poll()
        assert drain.take() == []
    put(ring, 2)
    device.done = True
    drain.poll()
    drain.poll()  # not taken yet, so the buffers are not overwritten
    assert device.copies == 1
    assert [error.step for error in drain.take()] == [1]
    drain.poll()
    device.done = True
    drain.poll()
    assert [error.step for error in drain.take()] == [2]
    assert device.copies == 2


@pytest.mark.parametrize("more, kept, lost", [(3, [0, 1, 2, 3, 4], 0), (13, [3, 4], 3), (20, [], 5)])
def test_rows_written_during_the_copy(ring: Ring, more: int, kept: list[int], lost: int) -> None:
    device = Slow()
    device.meanwhile = lambda: put(ring, *range(100, 100 + more))
    drain = Drain(ring, "decode", copy=device)
    put(ring, *range(5))
    drain.poll()
    device.done, device.meanwhile = True, None
    drain.poll()
    assert [error.step for error in drain.take()] == kept
    assert drain.lost == lost
    drain.poll()
    device.done = True
    drain.poll()
    assert [error.step for error in drain.take()] == list(range(100 + max(more - 15, 0), 100 + more))
    assert drain.lost == lost + max(more - 15, 0)


def test_an_error_of_the_device_is_left_to_the_engine(ring: Ring) -> None:
    device = Slow()
    drain = Drain(ring, "decode", copy=device)
    put(ring, 1)
    drain.poll()
    device.done = "broken"
    drain.poll()
    assert "illegal memory access" in drain.problem
    assert drain.take() == []


def test_a_capture_is_not_disturbed(ring: Ring) -> None:
    device, capturing = Slow(), [True]
    drain = Drain(ring, "decode", copy=device, capturing=lambda: capturing[0])
    put(ring, 1)
    drain.poll()
    assert device.copies == 0
    capturing[0] = False
    drain.poll()
    assert device.copies == 1


def test_results_land_on_the_cpu_whatever_the_default_device_is(ring: Ring) -> None:
    """Engines load models with CUDA as the default device, for which torch refuses pinned memory."""
    with torch.device("meta"):
        drain = Drain(ring, "decode")
    assert {tensor.device.type for tensor in drain._host} == {"cpu"}


def test_the_size_of_the_ring() -> None:
    """The size of each copy, which docs/experiments.md states."""
    assert Ring("cpu").rows.numel() * 8 < 64 << 10
    assert shadow.BAD == 6
