"""torch.compile meets stand-ins of every kind: ours serves, or that it could not is on record."""

from __future__ import annotations

import copy
import inspect
import pickle
import sys
import threading
import types
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from test_status import deployment, told
from triton.runtime.jit import JITFunction

from mla_patch import reports
from mla_patch.compat import dynamo
from mla_patch.dispatch import ArmCode, EntryPoint, FeatureGate
from mla_patch.features import Counts, State
from mla_patch.stand_ins import is_ours, stand_in


class Call:
    __slots__ = ("q",)

    def __init__(self, q: Any) -> None:
        self.q = q


def of_method(owner: Any, q: Any) -> Call:
    return Call(q)


def of_kernel(grid: Any, q: Any, out: Any) -> Call:
    return Call((q, out))


def serve(call: Call) -> Any:
    if isinstance(call.q, tuple):
        call.q[1].copy_(call.q[0] * 3)
        return None
    return call.q * 3


def host(q: Any) -> Any:
    """The host's: twice its argument."""
    return q * 2


class Kernel:
    """As Triton's: ``kernel[grid](...)``."""

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        return lambda q, out: out.copy_(q * 2)


def triton_kernel(q, out):
    pass


class Host:
    """What of a host ours stands in for, and a function that calls each."""

    def __init__(self) -> None:
        self.counts, self.stops = Counts(), []
        self.switch = FeatureGate(lambda *stop: self.stops.append(stop))

        def site(bind: Callable[..., Any]) -> EntryPoint:
            return EntryPoint("host", bind, {"patch": ArmCode(serve, lambda call: None)}, self.counts, self.switch)

        class Backend:
            def method(self, q: Any) -> Any:
                return q * 2

            @staticmethod
            def static(q: Any) -> Any:
                return q * 2

            @classmethod
            def of_class(cls, q: Any) -> Any:
                return q * 2

        for name, bind in (("method", of_method), ("static", Call), ("of_class", of_method)):
            setattr(Backend, name, stand_in(vars(Backend)[name], "call", site(bind)))
        self.backend, self.function = Backend(), stand_in(host, "call", site(Call))
        self.kernel = stand_in(Kernel(), "kernel", site(of_kernel))
        self.triton_kernel = stand_in(JITFunction(triton_kernel), "kernel", site(of_kernel))
        self.calls: dict[str, Callable[[Any], Any]] = {
            "function": lambda q: self.function(q),
            "method": lambda q: self.backend.method(q),
            "method of a class": lambda q: Backend.method(self.backend, q),
            "staticmethod": lambda q: self.backend.static(q),
            "staticmethod of a class": lambda q: Backend.static(q),
            "classmethod": lambda q: self.backend.of_class(q),
            "classmethod of a class": lambda q: Backend.of_class(q),
            "kernel": lambda q: self.launch(self.kernel, q),
            "Triton kernel": lambda q: self.launch(self.triton_kernel, q),
        }

    @staticmethod
    def launch(kernel: Any, q: Any) -> Any:
        out = torch.empty_like(q)
        kernel[(1,)](q, out)
        return out


NAMES = list(Host().calls)


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("name", NAMES)
def test_ours_serves_in_a_compiled_function(name: str, backend: str) -> None:
    """Between other operations, at every call, and what is counted is counted as eager calls are."""
    it = Host()
    call = it.calls[name]
    step = torch.compile(lambda q: call(q + 1) - 1, backend=backend)
    for number in range(20):  # more than Dynamo compiles a function anew: nothing of ours is a constant of it
        assert step(torch.full((2,), float(number))).tolist() == [3.0 * number + 2] * 2
    assert (it.counts.served, it.counts.declined, it.counts.traced, it.stops) == (20, {}, 0, [])


@pytest.mark.filterwarnings("ignore")
def test_ours_serves_beside_what_inductor_compiles() -> None:
    """All kinds in one function, so that C++ is compiled as rarely as can be."""
    it = Host()

    def all_of_them(q: Any) -> Any:
        for name in NAMES:
            q = it.calls[name](q + 1) - 1
        return q

    step, want = torch.compile(all_of_them, backend="inductor"), 1.0
    for _ in NAMES:
        want = 3 * (want + 1) - 1
    for _ in range(2):
        assert step(torch.ones(2)).tolist() == [want] * 2
    assert (it.counts.served, it.counts.declined, it.counts.traced, it.stops) == (2 * len(NAMES), {}, 0, [])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
@pytest.mark.parametrize("name", NAMES)
def test_ours_serves_in_a_function_compiled_for_the_gpu(name: str, mode: str) -> None:
    """With inductor's own CUDA graphs, too, which end where a graph breaks."""
    it = Host()
    call = it.calls[name]
    step = torch.compile(lambda q: call(q + 1) - 1, mode=mode)
    for number in range(20):
        assert step(torch.full((2,), float(number), device="cuda")).tolist() == [3.0 * number + 2] * 2
    assert (it.counts.served, it.counts.declined, it.stops) == (20, {}, [])


def test_nothing_of_ours_is_compiled() -> None:
    """Neither what serves nor what binds: Triton's launches would become parts of a graph."""
    it, seen = Host(), []

    def watch(call: Call) -> Any:
        seen.append(torch._C._dynamo.eval_frame.get_eval_frame_callback())
        return call.q * 3

    it.function._self_entry.serve = watch
    torch.compile(lambda q: it.function(q) + 1, backend="eager")(torch.ones(1))
    torch.compile(it.function, backend="eager")(torch.ones(1))
    assert seen == [None, None] and it.counts.served == 2
    graphs: list[Any] = []

    def keep(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    torch.compile(lambda q: it.function(q + 1) - 1, backend=keep)(torch.ones(1))
    operations = [node.target.__name__ for graph in graphs for node in graph.graph.nodes if node.op == "call_function"]
    assert operations == ["add", "sub"]


def test_calls_out_of_a_compiled_function_may_be_declined_restored_or_fail() -> None:
    it = Host()
    site, ones = it.function._self_entry, torch.ones(1)
    step = torch.compile(lambda q: it.function(q) + 1, backend="eager")
    site.declines = lambda call: "not today"
    assert step(ones).item() == 3 and it.counts.declined == {"not today": 1}
    site.declines = lambda call: None
    assert step(ones).item() == 4
    it.switch.set(off=True)
    assert step(ones).item() == 3
    it.switch.set(off=False)

    def broken(call: Call) -> Any:
        raise RuntimeError("boom")

    site.serve = broken
    assert step(ones).item() == 3 and it.stops == [("host: RuntimeError('boom')", State.FAILED)]


class Model(torch.nn.Module):
    def __init__(self, call: Callable[[Any], Any]) -> None:
        super().__init__()
        self.call = [call]

    def forward(self, q: Any) -> Any:
        return self.call[0](q) + 1


WHOLE: dict[str, Callable[[Callable[[Any], Any]], Callable[[Any], Any]]] = {
    "fullgraph": lambda call: torch.compile(lambda q: call(q) + 1, backend="eager", fullgraph=True),
    "export": lambda call: torch.export.export(Model(call), (torch.ones(1),), strict=True).module(),
}


@pytest.mark.parametrize("how", WHOLE)
@pytest.mark.parametrize("name", [name for name in NAMES if "Triton" not in name and name != "method of a class"])
def test_a_graph_that_may_not_be_broken_has_the_hosts_code_and_says_so(name: str, how: str) -> None:
    it = Host()
    assert WHOLE[how](it.calls[name])(torch.ones(1)).item() == 3
    assert it.counts.served == 0 and it.counts.traced >= 1 and not it.stops
    assert it.calls[name](torch.ones(1)).item() == 3.0 and it.counts.served == 1  # an eager call is ours


def test_what_is_on_record_of_it(tmp_path: Any, capsys: pytest.CaptureFixture[str]) -> None:
    it = Host()
    WHOLE["fullgraph"](it.calls["function"])(torch.ones(1))
    row = reports.FeatureStatus("decode", "sglang", "MLA_PATCH_DECODE", "on", "default", counts=it.counts).as_dict()
    assert row["traced"] == 1 and row["reason"] == reports.traced_text(1)
    deployment(tmp_path, traced=2)
    status, answer, shown = told(tmp_path, capsys)
    assert status == 1 and answer["findings"] == [f"pid 11: decode@sglang: {reports.traced_text(2)}"]
    assert "the engine's own code is in 2 graphs that may not be broken" in " ".join(shown.split())
    it.counts.reset()
    assert it.counts.traced == 0


def test_a_trace_without_dynamo() -> None:
    """torch.export without strict runs ours on tensors that have no memory: what it cannot take is the host's."""
    it = Host()

    def launches(call: Call) -> Any:
        call.q.data_ptr()
        return call.q * 3

    it.function._self_entry.serve = launches
    exported = torch.export.export(Model(it.function), (torch.ones(1),), strict=False).module()
    assert exported(torch.ones(1)).item() == 3 and not it.stops
    assert it.counts.declined == {"a tensor without memory, as tracers have": 1}
    assert it.function(torch.ones(1)).item() == 3.0 and it.counts.served == 1


def test_to_all_others_it_is_what_it_stands_for(monkeypatch: pytest.MonkeyPatch) -> None:
    it, own = Host(), host
    assert isinstance(it.function, types.FunctionType) and it.function.__class__ is types.FunctionType
    assert inspect.isfunction(it.function) and inspect.signature(it.function) == inspect.signature(own)
    assert isinstance(it.backend.method, types.MethodType) and inspect.ismethod(it.backend.method)
    assert isinstance(it.kernel, Kernel) and isinstance(it.triton_kernel, JITFunction)
    assert isinstance(vars(type(it.backend))["static"], staticmethod)
    assert it.function.__wrapped__ is own and copy.deepcopy(it.function) is it.function
    assert is_ours(it.function) and is_ours(it.kernel) and not is_ours(own)
    assert not hasattr(it.function, "_torchdynamo_disable")
    monkeypatch.setattr(sys.modules[__name__], "host", it.function)
    assert pickle.loads(pickle.dumps(it.function)) is it.function


def test_neither_torch_nor_dynamo_is_imported(run_python: Any) -> None:
    code = """
import sys
from mla_patch.compat import dynamo
from mla_patch.dispatch import ArmCode, EntryPoint, FeatureGate
from mla_patch.stand_ins import stand_in
from mla_patch.features import Counts

def host(q):
    return q

def put():
    codes = {"patch": ArmCode(lambda call: "ours", lambda call: None)}
    return stand_in(host, "call", EntryPoint("host", lambda q: q, codes, Counts(), FeatureGate(lambda *stop: None)))

print(put()(1), isinstance(put(), type(host)), "torch" in sys.modules)
import torch
print(put()(1), "torch._dynamo" in sys.modules)
"""
    assert run_python(code, check=True).stdout == "ours True False\nours False\n"


def test_what_is_used_of_torch_is_there() -> None:
    """A release in which one of these is gone must not pass unseen."""
    assert dynamo.callback() is torch._C._dynamo.eval_frame.get_eval_frame_callback
    assert callable(torch._dynamo.eval_frame.skip_code)
    assert issubclass(type(dynamo.unsupported("why")), torch._dynamo.exc.Unsupported)


def test_a_torch_that_is_made_otherwise_fails_nothing() -> None:
    """Nor does code that gives itself a name of another kind: whoever asks is the engine, or imports torch."""
    dynamo.leave_alone(types.ModuleType("torch._dynamo"), lambda: None)
    asking: dict[str, Any] = {"__name__": None, "it": Host().function}
    exec("answer = isinstance(it, type(lambda: None))", asking)
    assert asking["answer"] is True


def test_another_thread_is_not_taken_for_a_compiled_function() -> None:
    it, both, seen = Host(), threading.Barrier(2), []

    def eager() -> None:
        both.wait(20)
        seen.append(it.function(torch.ones(1)).item())
        both.wait(20)

    def waits(call: Call) -> Any:
        if sys._getframe(1).f_code.co_name == "dispatch" and threading.current_thread() is threading.main_thread():
            both.wait(20)
            both.wait(20)
        return call.q * 3

    it.function._self_entry.serve = waits
    thread = threading.Thread(target=eager)
    thread.start()
    assert torch.compile(lambda q: it.function(q) + 1, backend="eager")(torch.ones(1)).item() == 4
    thread.join(20)
    assert seen == [3.0] and it.counts.served == 2
