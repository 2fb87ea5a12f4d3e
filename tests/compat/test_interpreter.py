"""The quickened interpreter computes what Triton's own does, and leaves Triton's language as a launch found it."""

import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
import triton
import triton.language as tl
from scratch import clean_env

from mla_patch.compat import interpreter
from mla_patch.compat.triton import interpreted

pytestmark = pytest.mark.skipif(not interpreted(), reason="needs TRITON_INTERPRET=1")

# Our largest kernel, with its helpers and with Triton's own, and sums that leave 32 bits.
SAME = """
import hashlib, sys, torch, triton, triton.language as tl
from mla_patch.compat import interpreter
from mla_patch.kernels.decode import mla_decode

@triton.jit
def twice(x):
    return x + x

@triton.jit
def wrap(out, start):
    i = tl.arange(0, 8)
    x = twice(start + i)
    tl.store(out + i, x * x - tl.sum(x) + tl.max(twice(i)))

left_out = interpreter.quicken() if sys.argv[1] == "quick" else []
torch.manual_seed(0)
lens = (1, 33, 70)
q, kv = torch.randn(3, 3, 576).half(), torch.randn(sum(lens), 1, 576).half()
indptr = torch.tensor([0, *lens]).cumsum(0).int()
out = torch.empty(3, 3, 512).half()
mla_decode(q, kv, out, indptr, torch.arange(sum(lens)), sm_scale=0.04)
wrapped = torch.empty(8, dtype=torch.int32)
wrap[(1,)](wrapped, 2**30)
print(*left_out, hashlib.sha256(out.numpy().tobytes()).hexdigest(), wrapped.tolist(), tl.core.is_builtin(tl.load))
"""


def test_results_are_the_same_bit_by_bit() -> None:
    said = {}
    for how in ("quick", "slow"):
        command = [sys.executable, "-W", "ignore", "-c", SAME, how]
        done = subprocess.run(command, env=clean_env({"TRITON_INTERPRET": "1"}), capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        said[how] = done.stdout
    assert said["quick"] == f"language overflow types {said['slow']}"
    assert said["slow"].endswith("True\n") and "-" in said["slow"]  # restored; and something did leave 32 bits


def test_it_is_done_once() -> None:
    assert interpreter.quicken() == []  # conftest.py has


@triton.jit
def _plus_one(x):
    return x + 1


@triton.jit
def _ten_times(out):
    x = tl.load(out)
    for _ in range(10):
        x = _plus_one(x)
    tl.store(out, x)


def test_the_language_is_replaced_once_a_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    from triton.runtime import interpreter as tritons

    looked = []
    search = tritons._patch_builtin
    monkeypatch.setattr(tritons, "_patch_builtin", lambda pkg, *rest: (looked.append(pkg), search(pkg, *rest)))
    out = torch.zeros(1)
    _ten_times[(3,)](out)
    assert out.item() == 30
    assert looked.count(tl) == 1  # not once more for each of 30 calls of a helper
    assert tl.core.is_builtin(tl.load)


def test_an_interpreter_of_another_shape_is_left_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where assertions are on, the sums in 64 bits are not in vain."""
    from triton.runtime import interpreter as tritons

    options = SimpleNamespace(sanitize_overflow=True, debug=True)
    monkeypatch.setattr(tritons, "interpreter_builder", SimpleNamespace(options=options))
    monkeypatch.setattr(tritons, "_patch_lang", lambda fn: None)
    monkeypatch.delattr(tritons, "_LangPatchScope")
    monkeypatch.delattr(tritons, "_get_np_dtype")
    patch = tritons._patch_lang
    assert interpreter.quicken() == []
    assert tritons._patch_lang is patch and tritons.interpreter_builder.options is options
