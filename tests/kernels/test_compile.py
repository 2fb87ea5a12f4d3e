"""The compile tier: every launch-table entry, for every GPU we name, in its own process without the interpreter."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from scratch import ROOT, TESTS

from mla_patch.compat.triton import TARGETS, gpu_compile, interpreted, slow_code
from mla_patch.drive import sglang_fetch

CPU_SECONDS = 1800  # see budget.py; two seconds a compile

# how many compiles each kernel module's launch tables come to: one that silently had none would pass
COMPILES = {
    "sparse.cases": 82,
    "decode.cases": 75,
    "indices.kv.cases": 54,
    "decode.splits": 28,
    "cache.dequantize": 18,
    "indices.prefill.cases": 36,
    "cache.kv_cast": 24,
    "cache.quantize": 12,
    "sparse.sm90": 8,
    "decode.sm90": 4,
}


def run(*command: str, limit: float = 1800, **more: str) -> subprocess.CompletedProcess[str]:
    """A process without the interpreter, and none of its own left behind; one that is too slow tells its last line."""
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"} | more
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, *command], cwd=TESTS, env=env, start_new_session=True, **streams) as process:
        try:
            out, err = process.communicate(timeout=limit)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            out, err = process.communicate()
            where = out.splitlines()[-1] if out else "no line"
            pytest.fail(
                f"{' '.join(command)[:200]}: killed after {limit:.0f} s, at: {where}\n{err[-2000:]}", pytrace=False
            )
        except BaseException:  # Ctrl-C, or a plugin's own limit
            os.killpg(process.pid, signal.SIGKILL)
            raise
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


@pytest.mark.parametrize("family", COMPILES)
def test_every_launch_table_entry_compiles_within_the_chip(family):
    # one job: other test workers have the other cores
    done = run("compile_matrix.py", "--jobs", "1", "--family", family)
    assert done.returncode == 0, "\n".join(line for line in done.stdout.splitlines() if "FAILED" in line) + done.stderr
    assert done.stdout.splitlines()[-1] == f"{COMPILES[family]} compiled, 0 failed"
    if family == "indices.kv.cases":
        for sm in TARGETS:
            for builder in ("token_indices", "page_table 64"):
                assert f"indices.kv.cases: sm_{sm}  {builder} " in done.stdout


@pytest.mark.network
def test_warp_specialized_kernels_compile_with_the_triton_of_engines():
    """CI has a newer Triton than torch 2.11, whose ptxas may think otherwise of registers and of wgmma."""
    path = os.pathsep.join(map(str, (sglang_fetch.fetch_triton("3.6.0"), ROOT)))
    for family, cases in {"decode.sm90": 2, "sparse.sm90": 4}.items():  # one for each kind of cache, with its options
        command = ("compile_matrix.py", "--jobs", "1", "--family", family, "--match", "True")
        done = run(*command, PYTHONPATH=path)
        assert done.returncode == 0, done.stdout + done.stderr
        assert done.stdout.splitlines()[0] == "Triton 3.6.0"
        assert done.stdout.splitlines()[-1] == f"{cases} compiled, 0 failed"


SETMAXNREG = "setmaxnreg.dec.sync.aligned.u32 40;"  # without a register count at entry
READ_TOO_EARLY = """
.reg .f32 %f<4>; .reg .b64 %d<4>;
ld.param.u64 %d3, [p]; mov.b64 %d1, 0; mov.b64 %d2, 0;
mov.f32 %f0, 0f00000000; mov.f32 %f1, 0f00000000; mov.f32 %f2, 0f00000000; mov.f32 %f3, 0f00000000;
wgmma.fence.sync.aligned;
wgmma.mma_async.sync.aligned.m64n8k16.f32.f16.f16 {%f0, %f1, %f2, %f3}, %d1, %d2, 1, 1, 1, 0, 0;
add.f32 %f0, %f0, 0f3F800000;
wgmma.commit_group.sync.aligned;
wgmma.wait_group.sync.aligned 0;
st.global.f32 [%d3], %f0;
"""


@pytest.mark.parametrize(
    "body, code",
    [
        pytest.param(SETMAXNREG, "C7508", id="registers"),
        pytest.param(READ_TOO_EARLY, "C7517", id="wgmma"),
        pytest.param("", "", id="neither"),
    ],
)
def test_code_that_ptxas_calls_slow_is_a_failure(body, code):
    head = ".version 8.4\n.target sm_90a\n.address_size 64\n.visible .entry k(.param .u64 p) {"
    found = slow_code(f"{head}\n{body}\nret;\n}}")
    assert [code in line for line in found] == ([True] if code else [])


def test_every_kernel_module_is_compiled():
    code = "import compile_matrix as m; print(*sorted({family for family, _ in m.collect(False)}))"
    assert run("-c", code).stdout.split() == sorted(COMPILES)


def test_a_run_that_is_too_slow_names_its_case_and_leaves_nobody():
    """Its children are killed with it."""
    code = """
import subprocess, sys
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
print("compiling decode: sm_90  a case of", child.pid, flush=True)
child.wait()
"""
    with pytest.raises(pytest.fail.Exception, match="at: compiling decode: sm_90  a case of") as failed:
        run("-c", code, limit=3)
    pid = int(str(failed.value).split("a case of ")[1].split()[0])
    for _ in range(100):
        if not _command(pid):
            break
        time.sleep(0.05)
    else:
        pytest.fail(f"process {pid} is alive")


def test_a_run_ends_with_its_parent():
    """Killed without a chance to clean up, as a test worker is: a pool's workers die of it, too."""
    code = """
import os, compile_matrix as m
if __name__ == "__main__":
    import multiprocessing
    from concurrent.futures import ProcessPoolExecutor
    m.die_with_parent()
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context, initializer=m.die_with_parent) as pool:
        print(os.getpid(), pool.submit(os.getpid).result(), flush=True)
        pool.submit(__import__("time").sleep, 600).result()
"""
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    script = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {code!r}])"
    with subprocess.Popen(
        [sys.executable, "-c", script], cwd=TESTS, env=env, stdout=subprocess.PIPE, text=True
    ) as worker:
        pids = worker.stdout.readline().split()
        worker.kill()
    assert len(pids) == 2
    for _ in range(200):
        alive = [pid for pid in pids if _command(pid)]
        if not alive:
            break
        time.sleep(0.05)
    assert not alive


def _command(pid):
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()  # empty where nobody has waited for its end
    except OSError:
        return b""


@pytest.mark.parametrize(
    "sabotage, fault",
    [
        ("m.SHARED_LIMIT[90] = -1", "of shared memory is all there is"),
        ("case = dataclasses.replace(case, stack=-1)", "expected a stack of at most -1"),
        ("case = dataclasses.replace(case, constexprs={})", "parameters without a type"),
    ],
)
def test_a_fault_is_reported(sabotage, fault):
    code = f"""
import dataclasses, compile_matrix as m
family, case = m.collect(False)[0]
{sabotage}
m.collect = lambda every: [(family, case)]
print(m.check(False, 0, 90)[-1])
"""
    done = run("-c", code)
    assert "FAILED" in done.stdout and fault in done.stdout, done.stdout + done.stderr


def test_nothing_that_changes_from_call_to_call_is_specialised():
    # a specialised argument is a compile in the middle of serving, at the first batch where it is 1 or divisible by 16
    code = """
import compile_matrix as m
for kernel in {id(case.kernel): case.kernel for _, case in m.collect(False)}.values():
    for p in kernel.params:
        loose = p.is_constexpr or p.do_not_specialize or p.do_not_specialize_on_alignment
        print(kernel.__name__, p.name, "loose" if loose else "specialised")
"""
    done = run("-c", code)
    lines = [line for line in done.stdout.splitlines() if line.startswith("_kv_indices")]
    assert lines, done.stdout + done.stderr
    assert not [line for line in lines if line.endswith("specialised")]


WIDTHS = """
import re
from mla_patch.compat.triton import compile_case
from mla_patch.kernels.decode import cases as decode, sm90 as decode_sm90, splits as decode_splits
from mla_patch.kernels.sparse import cases as sparse_cases, sm90 as sparse_sm90
names = ["decode direct, 16 heads, ", "decode e4m3, 16 heads, ", "splits direct, 16 heads, ", "sparse_decode query",
         "decode_sm90 16 bits, ", "decode_sm90 8 bits, ", "sparse_sm90 16 bits 576, ", "sparse_sm90 V4, "]
cases = [case for module in (decode, decode_sm90, decode_splits, sparse_cases, sparse_sm90)
         for case in module.compile_cases() if 90 in case.targets]
for name in names:
    case = next(case for case in cases if case.name.startswith(name))
    loose = [p.name for p in case.kernel.params if p.do_not_specialize_on_alignment]
    assert "q" in loose and "q" not in case.divisible, case.name  # a launch does not let Triton know either
    ptx = compile_case(case, 90).asm["ptx"]
    print(case.name, sorted(set(re.findall(r"(?:ld|st)[.]global[a-z0-9_.:]*", ptx))))
"""


def test_queries_and_results_move_sixteen_bytes_at_a_time():
    """Left to what a launch tells Triton, they would move two at a time: a third of a short request's time."""
    done = run("-W", "ignore", "-c", WIDTHS)
    lines = done.stdout.splitlines()
    assert len(lines) == 8, done.stdout + done.stderr
    for line in lines:
        assert "ld.global.v4.b32" in line and "st.global.v4.b32" in line and "b16'" not in line, line


INDICES = """
import re
from mla_patch.compat.triton import compile_case
from mla_patch.kernels.indices.prefill import cases
for case in cases.compile_cases():
    if case.name.endswith(", 16 bytes"):
        ptx = compile_case(case, 90).asm["ptx"]
        loop = ptx[ptx.index("ld.global.v4"):]
        print(case.name, "st.global.v4.b32" in loop, re.findall(r"(?:add|mad|mul)[a-z0-9.]*[.]s64", loop))
"""


def test_indices_are_combined_four_at_a_time_in_32_bits():
    """64 bits for every column took half of its time; addresses are what is left of them."""
    done = run("-W", "ignore", "-c", INDICES)
    lines = done.stdout.splitlines()
    assert len(lines) == 2, done.stdout + done.stderr
    assert all(line.split("bytes ")[1].startswith("True ") and line.count("s64") <= 4 for line in lines), lines


@pytest.mark.skipif(not interpreted(), reason="this process compiles")
def test_the_interpreter_is_refused():
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET"):
        gpu_compile(None, {}, {}, 90)
