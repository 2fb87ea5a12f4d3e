"""Nothing compiles while serving: what a warm-up compiles, when an engine gets it, and what the report counts."""

import importlib
import json
import logging
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from scratch import TESTS, clean_env
from triton.runtime.jit import JITFunction

from mla_patch import reports
from mla_patch.cli import main as cli
from mla_patch.compat import compiles, gpu
from mla_patch.compat import triton as compat_triton
from mla_patch.compat.compiles import Compiles
from mla_patch.compat.sglang.decode import DecodeWarmup
from mla_patch.compat.types import Gpu
from mla_patch.drive import warmup
from mla_patch.features import Counts
from mla_patch.hooks import editing
from mla_patch.hooks.sglang import decode as sglang_decode
from mla_patch.kernels import decode
from mla_patch.kernels.common import launch as common_launch
from mla_patch.kernels.decode import splits as decode_splits
from mla_patch.kernels.indices import kv as kv_indices
from mla_patch.kernels.sparse import decode as sparse_decode
from mla_patch.kernels.sparse import dense as dense_decode
from mla_patch.kernels.sparse import prefill as sparse_prefill

CPU_SECONDS = 110  # see budget.py


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> Compiles:
    """A count of the test's own, wherever ours is looked up."""
    fresh = Compiles()
    for module in (compiles, compat_triton, common_launch, reports):
        monkeypatch.setattr(module, "COMPILES", fresh)
    return fresh


# reach

SERVE = """
import sys
sys.path.insert(0, TESTS)
import fake_chip
import itertools, torch
from mla_patch.compat.compiles import COMPILES
from mla_patch.kernels import decode
from mla_patch.kernels.decode import splits as decode_splits
from mla_patch.kernels.indices import kv as kv_indices
fake_chip.install()

place = torch.zeros(300, 128, 576, dtype=torch.bfloat16)
starts, ids = torch.zeros(301, dtype=torch.int32), torch.zeros(7, dtype=torch.int64)

def serve(heads, dtype, cache, batch):
    q = place.view(-1).view(dtype)[: batch * heads * 576].view(batch, heads, 576)
    out = place.view(-1).view(dtype)[: batch * heads * 512].view(batch, heads, 512)
    kv = torch.zeros(48, 1, 576).to(cache)
    decode.mla_decode(q, kv, out, starts[: batch + 1], ids, sm_scale=0.1)
"""


def in_a_fake_chip(code: str) -> list[str]:
    env = clean_env({"TRITON_INTERPRET": "0"})
    command = [sys.executable, "-W", "ignore", "-c", SERVE.replace("TESTS", repr(str(TESTS))) + code]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout.split("\n")[:-1]


def test_decode_compiles_nothing_more_on_any_chip() -> None:
    code = """
from mla_patch.compat.triton import TARGETS
half, fp8 = torch.bfloat16, torch.float8_e4m3fn
for fake_chip.SM in TARGETS:
    decode.remembered.KNOWN.clear()  # another chip, of the same number
    # the most first: what one round compiles is there for the next
    for (heads, most), cache in itertools.product([(16, 300), (128, 300), (20, 40), (5, 1)], (half, fp8)):
        COMPILES.reset()
        COMPILES.has_served = lambda: True
        warmed = decode.warmup("cpu", heads, half, cache, most)
        for batch in range(1, most + 1):
            serve(heads, half, cache, batch)
        print(fake_chip.SM, heads, cache, most, warmed == COMPILES.before, COMPILES.serving)
    print("in all", len(decode.triton._decode_kernel.device_caches[fake_chip.SM][0]) > 9)
serve(16, torch.float16, torch.float16, 3)
print("unforeseen", COMPILES.serving)
"""
    *rows, unforeseen = in_a_fake_chip(code)
    assert len(rows) == 6 * 9
    assert not [row for row in rows if not row.endswith(" True 0") and row != "in all True"]
    assert unforeseen == "unforeseen 2"  # or nothing above is counted


def test_decode_of_other_backends_compiles_nothing_more() -> None:
    """FlashAttention-3 and FlashMLA by pages, FlashInfer by slots: queries in two parts, tables of any width."""
    code = """
half, fp8 = torch.bfloat16, torch.float8_e4m3fn
wide = torch.zeros(300, 700, dtype=torch.int32)
for heads, (page, parts), lens in itertools.product(
    (16, 128), ((1, True), (64, True), (64, False), (0, True)), (torch.int32, torch.int64)
):
    COMPILES.reset()
    COMPILES.has_served = lambda: True
    warmed = decode.warmup("cpu", heads, half, fp8, 300, page, (lens, torch.int32), parts)
    counts, cache = torch.zeros(301, dtype=lens), torch.zeros(128, 1, 576).to(fp8)
    for batch in (1, 2, 3, 64, 65, 255, 300):
        q = place.view(-1)[: batch * heads * 576].view(batch, heads, 576)
        if parts:  # as a model has them: the transpose of a batched product, and a slice
            rope = place.view(-1)[: batch * heads * 192].view(batch, heads, 192)[..., 128:]
            q = place.view(-1)[: batch * heads * 512].view(heads, batch, 512).transpose(0, 1), rope
        out = place.view(-1)[: batch * heads * 512].view(batch, heads, 512)
        for columns in (1, 37, 700) if page else (1,):
            if page:
                kv, table = cache.view(-1, page, 576), wide[:batch, :columns]
                decode.mla_decode_paged(q, kv, out, table, counts[:batch], sm_scale=0.1)
            else:
                decode.mla_decode(q, cache, out, counts[: batch + 1], wide.view(-1), sm_scale=0.1)
    print(heads, page, parts, lens, warmed == COMPILES.before, COMPILES.serving)
"""
    rows = in_a_fake_chip(code)
    assert len(rows) == 16 and not [row for row in rows if not row.endswith(" True 0")]


def test_a_launch_without_triton_is_the_launch_with_it() -> None:
    """The same kernel, grid, addresses, numbers and constants, in the same places, for every form of a call."""
    code = """
import weakref
from unittest import mock
fake_chip.again = True
half, fp8 = torch.bfloat16, torch.float8_e4m3fn
table = torch.zeros(3, 4, dtype=torch.int32)
def told(x):
    return x.data_ptr() if isinstance(x, torch.Tensor) else x
def scratch(size, dtype, device):
    mine = place.view(-1).view(dtype)[:1]  # at one address, though a call frees it
    living.append(weakref.ref(mine))
    return mine
class Launched(list):
    def append(self, launch):  # by now the scratch must not be another allocation's
        held.append(living[-1]() is not None)
        super().append(launch)
fake_chip.launched = Launched()
for heads, cache, (paged, options) in itertools.product((16, 40), (half, fp8), [
    (False, {}), (True, {}), (False, {"lse": torch.zeros(3, 40), "sinks": torch.zeros(40)}),
    (True, {"k_scale": torch.ones(()), "v_scale": torch.ones(1), "logit_cap": 2.0, "xai_temperature_len": 8}),
    (False, {"pair": True, "k_scale": 0.5, "v_scale": 3.0}),
]):
    options = {name: value[..., :heads] if name in ("lse", "sinks") else value for name, value in options.items()}
    q, out = torch.zeros(3, heads, 576, dtype=half), torch.zeros(3, heads, 512, dtype=half)
    if options.pop("pair", False):
        q = torch.zeros(heads, 3, 512, dtype=half).transpose(0, 1), torch.zeros(3, heads, 192, dtype=half)[..., 128:]
    kv = torch.zeros(64, 1, 576).to(cache)
    if paged:
        call = lambda: decode.mla_decode_paged(q, kv.view(4, 16, 576), out, table, starts[1:4], **options)
    else:
        call = lambda: decode.mla_decode(q, kv, out, starts[:4], ids, **options)
    options["sm_scale"] = 0.1
    fake_chip.launched.clear()
    living, held = [], []
    with mock.patch.object(torch, "empty", scratch):
        call(), call()
    first, second = [[tuple(map(told, one)) for one in fake_chip.launched[at : at + 2]] for at in (0, 2)]
    by_address = not any(isinstance(x, torch.Tensor) for one in fake_chip.launched[2:] for x in one)
    print(first == second, by_address, held)
"""
    rows = in_a_fake_chip(code)
    assert len(rows) == 20 and set(rows) == {"True True [True, True, True, True]"}


@pytest.mark.gpu
@pytest.mark.skipif(
    compat_triton.interpreted() or not torch.cuda.is_available(), reason="needs a GPU and TRITON_INTERPRET=0"
)
def test_decode_compiles_nothing_more_on_the_gpu(counted: Compiles) -> None:
    counted.has_served = lambda: True
    before = torch.cuda.memory_allocated()
    compiled = decode.warmup("cuda", 12, torch.bfloat16, torch.float8_e4m3fn, 80)
    assert (counted.before, torch.cuda.memory_allocated()) == (compiled, before)
    kv = torch.zeros(48, 1, 576, device="cuda").to(torch.float8_e4m3fn)
    ids = torch.arange(48, device="cuda").repeat(80)
    for batch in range(1, 81):
        q = torch.randn(batch, 12, 576, device="cuda", dtype=torch.bfloat16)
        starts = torch.arange(batch + 1, device="cuda", dtype=torch.int32) * 48
        decode.mla_decode(q, kv, torch.empty_like(q[..., :512]), starts, ids, sm_scale=0.1)
    assert counted.serving == 0


def test_splits_compile_nothing_more() -> None:
    code = """
from mla_patch.kernels.decode import splits as decode_splits
half, fp8 = torch.bfloat16, torch.float8_e4m3fn
COMPILES.has_served = lambda: True
for cache in (half, fp8):
    compiled = decode_splits.warmup("cpu", 32, half, cache, 16)
    for batch in (1, 2, 16, 100):
        logits, lse = torch.zeros(batch, 32, 16, 512), torch.zeros(batch, 32, 16)
        q, kv = place[:batch, :32], torch.zeros(48, 1, 576).to(cache)
        counts = torch.ones(batch, dtype=torch.int32)
        given = q, kv, torch.zeros(batch, 32, 512), starts[: batch + 1], ids, logits, lse, counts
        decode_splits.mla_decode_splits(*given, sm_scale=0.1)
    print(compiled, COMPILES.serving)
"""
    assert in_a_fake_chip(code) == ["2 0", "1 0"]


def test_the_index_builders_compile_nothing_more() -> None:
    code = """
COMPILES.has_served = lambda: True
print(kv_indices.warmup("cpu", (32, 64)), COMPILES.before, COMPILES.serving)
for rows, pool, lens in itertools.product((1, 2, 16, 100), *[(torch.int32, torch.int64)] * 2):
    table = torch.zeros(rows, 160, dtype=torch.int32)
    given = table, torch.zeros(rows, dtype=pool), torch.zeros(rows, dtype=lens)
    kv_indices.build_token_indices(*given, torch.zeros(rows + 1, dtype=torch.int32), torch.zeros(9, dtype=torch.int64))
    for page in (32, 64):
        kv_indices.build_page_table(*given, torch.zeros(rows, 7, dtype=torch.int32), page_size=page)
print(COMPILES.serving)
kv_indices.build_page_table(*given, torch.zeros(rows, 7, dtype=torch.int32), page_size=128)
print(COMPILES.serving)
"""
    assert in_a_fake_chip(code) == ["12 12 0", "0", "1"]


def test_casts_of_pages_compile_nothing_more() -> None:
    """Over tables and lengths that begin anywhere, one column and many, packed behind others and not."""
    code = """
from mla_patch.kernels.cache import kv_cast
COMPILES.has_served = lambda: True
for page in (1, 64):
    compiled = kv_cast.warmup("cpu", torch.bfloat16, torch.float8_e4m3fn, page)
    cache = torch.zeros(4 * 64, 1, 576, dtype=torch.uint8).view(torch.float8_e4m3fn)
    out = torch.zeros(99 * 64, 1, 576, dtype=torch.bfloat16)
    table, lens = torch.zeros(5, 16, dtype=torch.int32), torch.zeros(6, dtype=torch.int32)
    for some, batch, width, packed in itertools.product((True, False), (1, 3), (1, 2, 15), (True, False)):
        ids = table[1 : 1 + batch, 1 : 1 + width]
        places = torch.zeros(batch, width, dtype=torch.int32) if packed else None
        for first in (0, 1, 16):
            given = lens[1 : 1 + batch] if some else None
            kv_cast.cast_pages(cache, ids, given, out, page_size=page, places=places, first=first)
    print(compiled, COMPILES.serving)
"""
    assert in_a_fake_chip(code) == ["4 0", "4 0"]


def test_no_gpu_is_nothing_to_do() -> None:
    """Without the interpreter; with it the launches are made, and nothing is compiled for them."""
    code = (
        "from mla_patch.kernels import decode; from mla_patch.kernels.indices import kv as kv_indices; import torch\n"
    )
    code += "print(kv_indices.warmup('cpu'), decode.warmup('cpu', 16, torch.bfloat16, torch.bfloat16, 64))"
    env = clean_env({"TRITON_INTERPRET": "0"})
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=120)
    assert done.stdout == "0 0\n", done.stderr
    assert decode.warmup("cpu", 4, torch.float16, torch.float8_e4m3fn, 3) == kv_indices.warmup("cpu") == 0


@pytest.mark.parametrize(
    ("heads", "cache", "says"), [(129, torch.float16, "129 heads"), (16, torch.uint8, "kv: torch.uint8")]
)
def test_what_decode_does_not_take_is_refused(heads: int, cache: torch.dtype, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        decode.warmup("cuda" if torch.cuda.is_available() else "cpu", heads, torch.float16, cache, 4)


# in the host


@pytest.fixture
def backend(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """A triton_backend as every release has it, as far as a warm-up looks at it."""

    class TritonAttnBackend:
        def __init__(self, model_runner: Any, skip_prefill: bool = False, kv_indptr_buf: Any = None) -> None:
            self.num_head = 16
            self.kv_indptr = torch.zeros(model_runner.most + 1, dtype=torch.int32)
            self.skip_prefill = skip_prefill

    monkeypatch.setattr(editing, "_said", set())
    module = ModuleType("triton_backend")
    module.TritonAttnBackend = TritonAttnBackend  # type: ignore[attr-defined]
    return module


def runner(**changes: Any) -> SimpleNamespace:
    pool = SimpleNamespace(kv_lora_rank=512, qk_rope_head_dim=64, dtype=torch.float8_e4m3fn)
    given = {"token_to_kv_pool": pool, "dtype": torch.float16, "device": "cpu", "most": 6}
    return SimpleNamespace(**given | changes)


@pytest.fixture
def warmed(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """What our kernels were warmed for."""
    calls: list[tuple[Any, ...]] = []

    def note(kernel: str, compiled: int) -> Callable[..., int]:
        return lambda *args: calls.append((kernel, *args)) or compiled

    monkeypatch.setattr(decode, "warmup", note("decode", 10))
    monkeypatch.setattr(decode_splits, "warmup", note("decode_splits", 2))
    monkeypatch.setattr(kv_indices, "warmup", note("kv_indices", 4))
    return calls


def test_a_backend_is_warmed_when_it_has_been_built(
    backend: ModuleType, warmed: list[tuple[Any, ...]], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    before = dict(vars(backend.TritonAttnBackend))
    undo = sglang_decode.warm_decode(backend)
    built = backend.TritonAttnBackend(runner(), skip_prefill=True)
    assert built.skip_prefill
    assert warmed == [("kv_indices", "cpu", ()), ("decode", "cpu", 16, torch.float16, torch.float8_e4m3fn, 6)]
    assert "14 kernels compiled" in caplog.text
    hybrid = SimpleNamespace(full_kv_pool=runner().token_to_kv_pool)
    backend.TritonAttnBackend(model_runner=runner(token_to_kv_pool=hybrid, most=9))
    assert warmed[-1][-1] == 9
    undo()
    assert dict(vars(backend.TritonAttnBackend)) == before
    backend.TritonAttnBackend(runner())
    assert len(warmed) == 4


def test_a_warm_up_with_nothing_to_compile_says_nothing(
    backend: ModuleType, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A backend of speculation is built for kernels that the target's has had compiled."""
    caplog.set_level(logging.INFO)
    asked = []
    monkeypatch.setattr(sglang_decode, "warm", lambda capacity: asked.append(capacity) or 0)
    sglang_decode.warm_decode(backend)
    backend.TritonAttnBackend(runner())
    assert len(asked) == 1 and not caplog.records


@pytest.mark.parametrize(
    "pool", [SimpleNamespace(dtype=torch.float16), SimpleNamespace(kv_lora_rank=256, qk_rope_head_dim=32)]
)
def test_a_cache_that_is_not_ours_warms_nothing(
    pool: Any, backend: ModuleType, warmed: list[tuple[Any, ...]], caplog: pytest.LogCaptureFixture
) -> None:
    sglang_decode.warm_decode(backend)
    backend.TritonAttnBackend(runner(token_to_kv_pool=pool))
    assert not warmed and not caplog.records


def test_decode_context_parallelism_is_warmed_for_its_splits(warmed: list[tuple[Any, ...]]) -> None:
    ranks = SimpleNamespace(num_head=32, kv_indptr=torch.zeros(5), dcp_size=2, max_kv_splits=16)
    assert sglang_decode.warm(DecodeWarmup(ranks, runner(), torch.float16)) == 6
    assert warmed[1:] == [("decode_splits", "cpu", 32, torch.float16, torch.float16, 16)]


def test_one_head_is_declined_and_not_warmed(warmed: list[tuple[Any, ...]]) -> None:
    one = SimpleNamespace(num_head=1, kv_indptr=torch.zeros(5))
    assert sglang_decode.warm(DecodeWarmup(one, runner(), torch.float16)) == 0 and not warmed


def test_an_amd_gpu_is_not_warmed(warmed: list[tuple[Any, ...]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "from_tensor", lambda tensor: Gpu("AMD Instinct MI300X", (9, 4), cuda=False))
    sixteen = SimpleNamespace(num_head=16, kv_indptr=torch.zeros(5))
    assert sglang_decode.warm(DecodeWarmup(sixteen, runner(), torch.float16)) == 0 and not warmed


@pytest.mark.parametrize("broken", ["runner", "kernel"])
def test_a_warm_up_that_fails_is_said_once_and_the_engine_goes_on(
    broken: str, backend: ModuleType, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*args: Any) -> int:
        raise torch.OutOfMemoryError("no memory")

    monkeypatch.setattr(kv_indices, "warmup", fail)
    undo = sglang_decode.warm_decode(backend)
    given = runner()
    if broken == "runner":
        del given.token_to_kv_pool
    assert backend.TritonAttnBackend(given).num_head == 16 and backend.TritonAttnBackend(given).num_head == 16
    (record,) = caplog.records
    assert "compile at their first calls" in record.getMessage()
    assert ("no memory" if broken == "kernel" else "token_to_kv_pool") in record.getMessage()
    undo()


def test_the_edit_leaves_what_others_put_there_and_tells_a_strange_init(backend: ModuleType) -> None:
    undo = sglang_decode.warm_decode(backend)
    backend.TritonAttnBackend.__init__ = theirs = lambda self, other: None
    undo()
    assert vars(backend.TritonAttnBackend)["__init__"] is theirs
    with pytest.raises(TypeError, match=r"__init__ does not take \(model_runner"):
        sglang_decode.warm_decode(backend)


def test_explain_shows_the_warm_up(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["explain", "decode", "--json"]) == 0
    routes = json.loads(capsys.readouterr().out)["routes"]
    (route,) = [route for route in routes if route["name"] == "TritonAttnBackend.warmup"]
    assert (route["releases"], route["kind"]) == ("0.5.1 - 0.5.23", "edit")
    assert route["replaced_by"] == "mla_patch.hooks.sglang.decode:warm_decode"


# the count


def test_what_is_counted_when(counted: Compiles) -> None:
    served = False
    counted.has_served = lambda: served
    counted.note()
    served = True
    counted.note()
    with counted.warming():
        counted.note()
    counted.note()
    assert (counted.as_dict(), counted.total) == ({"before": 2, "serving": 2}, 4)
    with pytest.raises(ZeroDivisionError), counted.warming():
        raise ZeroDivisionError
    counted.note()
    assert counted.serving == 3
    counted.reset()
    assert counted.as_dict() == {"before": 0, "serving": 0}


def nothing(x):
    pass


def test_only_the_watched_kernels_are_counted(counted: Compiles, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []

    def do_compile(self: Any, *args: Any, **kwargs: Any) -> str:
        seen.append((self, args, kwargs))
        return "compiled"

    monkeypatch.setattr(JITFunction, "_do_compile", do_compile)
    ours, theirs = JITFunction(nothing), JITFunction(nothing)
    compat_triton.watch_compiles(ours)
    assert theirs._do_compile(1) == ours._do_compile(2, warmup=False) == "compiled"
    assert seen == [(theirs, (1,), {}), (ours, (2,), {"warmup": False})]
    assert counted.as_dict() == {"before": 1, "serving": 0}


def test_a_triton_that_cannot_be_watched_says_so(counted: Compiles, monkeypatch: pytest.MonkeyPatch) -> None:
    compat_triton.watch_compiles(object())
    assert counted.as_dict() is not None  # interpreted: nothing is compiled, and that is known
    monkeypatch.setattr(compat_triton, "interpreted", lambda: False)
    compat_triton.watch_compiles(object())
    assert counted.as_dict() is None


def test_every_kernel_with_a_compile_case_is_watched() -> None:
    code = """
for module in (decode.cases, kv_indices.cases):
    for kernel in {id(case.kernel): case.kernel for case in module.compile_cases()}.values():
        print(kernel.__name__, kernel._do_compile.__name__)
"""
    rows = in_a_fake_chip(code)
    assert len(rows) >= 3 and all(row.endswith(" compile_and_count") for row in rows)


def test_the_report_counts(counted: Compiles) -> None:
    status = reports.FeatureStatus("decode", "sglang", "MLA_PATCH_DECODE", "on", "default", counts=Counts())
    report = reports.ProcessReport(features=[status])
    counted.has_served = report.has_served
    counted.note()
    status.counts.served = 1
    counted.note()
    assert report.as_dict()["compiled"] == {"before": 1, "serving": 1}
    report.renew()
    assert report.as_dict()["compiled"] == {"before": 0, "serving": 0}


def test_the_session_tells_when_something_served(run_python) -> None:
    code = """
import mla_patch
from mla_patch import startup
from mla_patch.compat.compiles import COMPILES
before = mla_patch.report()
session = startup._get_session()
from mla_patch.reports import FeatureStatus
session.report.features = [FeatureStatus("decode", "sglang", "", "on", "default")]
COMPILES.note()
session.report.features[0].counts.served += 1
COMPILES.note()
import sys
print(mla_patch.report()["compiled"], "triton" in sys.modules)
"""
    assert run_python(code, check=True).stdout == "{'before': 1, 'serving': 1} False\n"


def test_status_prints_the_count(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    report = {"engine": "sglang", "pid": 10, "argv": [], "started": 1.0, "problems": [], "features": []}
    for pid, compiled in ((10, {"before": 3, "serving": 2}), (11, {"before": 0, "serving": 0}), (12, None)):
        path = tmp_path / f"sglang-host-{pid}-1.json"
        path.write_text(json.dumps(report | {"pid": pid, "compiled": compiled}))
    assert cli.main(["status", str(tmp_path)]) == 1  # a finding: the reports hold no feature
    shown = capsys.readouterr().out
    assert "pid 10: 3 of our kernels compiled before the first served call, 2 later" in shown
    assert "pid 11" not in shown and "pid 12: this Triton does not let us count compilations" in shown


# mla-patch warmup


def told(capsys: pytest.CaptureFixture[str], *argv: str) -> Any:
    assert cli.main(["warmup", "--json", *argv]) == 0
    return json.loads(capsys.readouterr().out)


def test_warmup_without_a_gpu(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "from_torch", lambda: None)
    why = ["no GPU: there is nothing to compile"]
    assert told(capsys) == {"device": None, "kernels": [], "compiled": 0, "notes": why}
    assert cli.main(["warmup"]) == 0
    assert why[0] in capsys.readouterr().out
    monkeypatch.setattr(gpu, "from_torch", lambda: Gpu("NVIDIA H200", (9, 0)))
    monkeypatch.setattr(warmup, "interpreted", lambda: True)
    assert told(capsys)["notes"] == ["TRITON_INTERPRET is set: there is nothing to compile"]


def test_warmup_of_what_is_asked(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, warmed: list[tuple[Any, ...]]
) -> None:
    monkeypatch.setattr(gpu, "from_torch", lambda: Gpu("NVIDIA H200", (9, 0)))
    monkeypatch.setattr(warmup, "interpreted", lambda: False)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    result = told(capsys)
    assert (result["device"], result["compiled"]) == ("NVIDIA H200 (sm_90)", 44)
    assert warmed[0] == ("kv_indices", "cuda", (32, 64, 128))
    half, fp8 = torch.bfloat16, torch.float8_e4m3fn
    assert warmed[1:] == [("decode", "cuda", n, half, kind, 512) for n in (16, 128) for kind in (half, fp8)]
    last = result["kernels"][-1]
    assert [last[key] for key in ("kernel", "heads", "cache", "compiled")] == ["decode", 128, "e4m3", 10]
    warmed.clear()
    told(capsys, "--heads", "8", "--dtype", "fp16", "--cache", "e5m2", "fp16", "--max-batch", "64")
    kinds = torch.float8_e5m2, torch.float16
    assert warmed[1:] == [("decode", "cuda", 8, torch.float16, kind, 64) for kind in kinds]
    assert cli.main(["warmup"]) == 0
    assert "compiled for NVIDIA H200 (sm_90)" in capsys.readouterr().out
    for kernel in (dense_decode, sparse_decode, sparse_prefill):
        name = kernel.__name__.removeprefix("mla_patch.kernels.")
        monkeypatch.setattr(kernel, "warmup", lambda *args, name=name: warmed.append((name, *args)) or 3)
    warmed.clear()
    result = told(capsys, "--backend", "flashmla", "dsa", "dsv4", "--heads", "64", "--cache", "bf16", "e4m3", "e5m2")
    assert warmed[1:] == [
        *[("sparse.dense", "cuda", 64, kind) for kind in (half, fp8)],
        ("sparse.decode", "cuda", 64),
        *[("sparse.prefill", "cuda", 64, 576, half, False, lengths) for lengths in (False, True)],
        ("sparse.decode", "cuda", 64, (128,), (64, 2)),
        ("sparse.prefill", "cuda", 64, 512, half, True),
    ]
    assert [(row["kernel"], row.get("cache"), row["compiled"]) for row in result["kernels"][1:]] == [
        ("dense_decode", "bf16", 3), ("dense_decode", "e4m3", 3), ("sparse_decode", "V3.2", 3),
        ("sparse_prefill", "bf16", 6), ("sparse_decode", "V4", 3), ("sparse_prefill", "bf16", 3),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["--cache", "fp16"], "--cache fp16 with --dtype bf16, expected bf16, e4m3 or e5m2"),
        (["--heads", "0"], "'0', expected a number from 1 to 128"),
        (["--max-batch", "many"], "'many', expected a number from 1"),
        (["--backend", "nsa"], "invalid choice: 'nsa'"),
    ],
)
def test_warmup_misuse_is_2(argv: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    try:
        status: Any = cli.main(["warmup", *argv])
    except SystemExit as ended:
        status = ended.code
    assert (status, says in capsys.readouterr().err) == (2, True)


def test_warmup_needs_triton(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert cli.main(["warmup"]) == 2
    assert "warmup: it needs torch and triton" in capsys.readouterr().err
