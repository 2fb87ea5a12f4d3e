"""`dequantize_k_cache_paged`, bit by bit: in Triton's interpreter, or on a GPU with TRITON_INTERPRET=0."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from scratch import TESTS, clean_env

from mla_patch.compat.triton import interpreted
from mla_patch.kernels.cache import dequantize
from mla_patch.kernels.cache.dequantize import dequantize_k_cache_paged, dequantize_k_cache_paged_ref
from mla_patch.kernels.cache.layouts import V4

CPU_SECONDS = 70  # see budget.py

DEVICE = "cpu" if interpreted() else "cuda"
SIZES = [None, 1, 2, 64, 128]  # None: V3.2


def width_of(page_size):
    return 576 if page_size is None else 512


def random_cache(page_size, tokens, seed=0):
    """Any bytes at all: NaN values, infinite and subnormal scales."""
    torch.manual_seed(seed)
    if page_size is None:
        return torch.randint(0, 256, (tokens, 1, 656), dtype=torch.uint8)
    return torch.randint(0, 256, (-(-tokens // page_size), V4.page_bytes(page_size)), dtype=torch.uint8)


def bits(x):
    """bfloat16 as integers, every NaN the same among the nope values; rope is copied, NaN and all."""
    width = x.shape[-1]
    raw = x.cpu().contiguous().view(torch.int16)
    nan = x.cpu().isnan()
    nan[..., width - 64 :] = False
    return torch.where(nan, 0x7FC0, raw.int())


@pytest.mark.parametrize("kind", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("page_size", SIZES)
def test_random_bytes(page_size, kind):
    cache = random_cache(page_size, 200)
    slots = torch.randint(0, 200, (150,)).to(DEVICE, kind)  # any order, and some twice
    got = dequantize_k_cache_paged(cache.to(DEVICE), slots, page_size)
    assert got.shape == (150, 1, width_of(page_size)) and got.dtype == torch.bfloat16
    assert torch.equal(bits(got), bits(dequantize_k_cache_paged_ref(cache, slots, page_size)))


def test_every_scale_code():
    """ue8m0 from 0, which is 0, to 255, which is infinity, on every e4m3 code."""
    cache = torch.zeros(256, V4.page_bytes(1), dtype=torch.uint8)
    cache[:, :256] = torch.arange(256)
    cache[:, 576:583] = torch.arange(256)[:, None]
    slots = torch.arange(256, device=DEVICE)
    got = dequantize_k_cache_paged(cache.to(DEVICE), slots, 1)
    assert torch.equal(bits(got), bits(dequantize_k_cache_paged_ref(cache, slots, 1)))
    one = 0x38  # 1.0
    assert got[[0, 127, 255], 0, one].tolist() == [0, 1, float("inf")]
    assert got[255, 0, 0].isnan() and got[0, 0, 0x7F].isnan()  # 0 * infinity, and the code that is NaN


@pytest.mark.parametrize("page_size", SIZES)
def test_a_slice_of_a_workspace(page_size):
    """Rows that lie apart, and nothing else touched."""
    cache, width = random_cache(page_size, 130), width_of(page_size)
    slots = torch.randint(0, 130, (20,), device=DEVICE)
    room = torch.full((40, 3, width), 7.0, dtype=torch.bfloat16, device=DEVICE)
    out = room[5:25, 1:2]
    assert dequantize_k_cache_paged(cache.to(DEVICE), slots, page_size, out).data_ptr() == out.data_ptr()
    assert torch.equal(bits(out), bits(dequantize_k_cache_paged_ref(cache, slots, page_size)))
    out.fill_(7)
    assert (room == 7).all()


@pytest.mark.parametrize("page_size", [None, 64])
def test_unwritten_slots_stay_to_themselves(page_size):
    """NaN wherever nothing is stored: none of it reaches a slot that is."""
    cache = random_cache(page_size, 128)
    cache.fill_(0xFF)
    raw = cache.view(-1)
    slots = [3, 64, 127]
    for slot in slots:
        if page_size is None:
            raw[slot * 656 : (slot + 1) * 656] = 0
        else:
            page = slot // 64 * V4.page_bytes(64)
            raw[page + slot % 64 * 576 : page + (slot % 64 + 1) * 576] = 0
            raw[page + 64 * 576 + slot % 64 * 8 : page + 64 * 576 + slot % 64 * 8 + 7] = 127  # not the eighth
    got = dequantize_k_cache_paged(cache.to(DEVICE), torch.tensor([*slots, 4], device=DEVICE), page_size)
    assert not got[:3].any() and got[3].isnan().all()


@pytest.mark.parametrize("page_size", [None, 64])
def test_slots_outside_the_cache_are_zeros(page_size):
    cache = random_cache(page_size, 128)
    got = dequantize_k_cache_paged(cache.to(DEVICE), torch.tensor([-1, 128, 2**31], device=DEVICE), page_size)
    assert not got.any()
    none = random_cache(page_size, 64)[:0].to(DEVICE)
    assert not dequantize_k_cache_paged(none, torch.tensor([0, 5], device=DEVICE), page_size).any()


def test_types_that_a_pool_shows():
    cache, slots = random_cache(64, 128), torch.arange(0, 128, 5, device=DEVICE)
    want = bits(dequantize_k_cache_paged_ref(cache, slots, 64))
    for kind in (torch.bfloat16, torch.int8, torch.float8_e4m3fn):
        assert torch.equal(bits(dequantize_k_cache_paged(cache.to(DEVICE).view(kind), slots, 64)), want)
    cache = random_cache(None, 128)
    want = bits(dequantize_k_cache_paged_ref(cache, slots))
    cache = cache.to(DEVICE).view(torch.float8_e4m3fn)
    for shape in ((128, 1, 656), (2, 64, 1, 656), (128, 656)):
        assert torch.equal(bits(dequantize_k_cache_paged(cache.view(shape), slots)), want)


def test_bytes_past_31_bits():
    """Slots whose bytes begin past 2**31, and rows of the output past 2**31 elements; little is touched of either."""
    for page_size, last in ((None, 3_300_000), (64, 64 * 57_400)):
        small = random_cache(page_size, 64)
        if page_size is None:
            big = torch.empty(last + 64, 1, 656, dtype=torch.uint8, device=DEVICE)
            big[last:] = small
            assert last * 656 > 2**31
        else:
            big = torch.empty(last // 64 + 1, V4.page_bytes(64), dtype=torch.uint8, device=DEVICE)
            big[-1] = small[0]
            assert (len(big) - 1) * big.shape[1] > 2**31
        slots = torch.arange(0, 64, 7, device=DEVICE, dtype=torch.int32)
        want = bits(dequantize_k_cache_paged_ref(small, slots, page_size))
        assert torch.equal(bits(dequantize_k_cache_paged(big, slots + last, page_size)), want)
        del big
    room = torch.empty(2**31 + 1024, dtype=torch.bfloat16, device=DEVICE)
    out = room.as_strided((3, 1, 512), (2**30, 512, 1))
    dequantize_k_cache_paged(small.to(DEVICE), slots[:3], 64, out)
    assert torch.equal(bits(out), want[:3])


@pytest.mark.parametrize("page_size", [None, 64])
def test_no_slot_no_launch(page_size, monkeypatch):
    monkeypatch.setattr(dequantize, "_dequantize_kernel", None)
    none = torch.empty(0, dtype=torch.int32, device=DEVICE)
    got = dequantize_k_cache_paged(random_cache(page_size, 64).to(DEVICE), none, page_size)
    assert got.shape == (0, 1, width_of(page_size))
    assert dequantize_k_cache_paged_ref(random_cache(page_size, 64), none, page_size).shape == got.shape


@pytest.mark.parametrize(
    "args_of, message",
    [
        (
            lambda b, n: (b, n),
            r"cache: torch.uint8, shape \(2, 74880\), .*expected \[..., 656\], contiguous, or a page_size",
        ),
        (lambda b, n: (b[:, :1312].view(2, 2, 656), n), r"cache: .*strides \(74880, 656, 1\), expected \[..., 656\]"),
        (lambda b, n: (b, n, 0), "page_size: 0, expected 1 or more"),
        (lambda b, n: (b, n, 256), "cache: 74880 bytes a page, expected 149760 for a page_size of 256"),
        (lambda b, n: (b[:, ::2], n, 64), r"cache: .*expected \[pages, bytes of a page\]"),
        (lambda b, n: (b[None], n, 64), r"cache: torch.uint8, shape \(1, 2, 74880\)"),
        (lambda b, n: (b, n.float(), 128), "slots: torch.float32"),
        (lambda b, n: (b, n, 128, torch.zeros(3, 512)), r"out: shape \(3, 512\), expected \(3, 1, 512\)"),
        (lambda b, n: (b, n, 128, torch.zeros(3, 1, 576)), r"out: shape \(3, 1, 576\), expected \(3, 1, 512\)"),
        (lambda b, n: (b, n, 128, torch.zeros(3, 1, 512)), "out: torch.float32"),
    ],
)
def test_misuse(args_of, message):
    pool, slots = (
        torch.zeros(2, 74880, dtype=torch.uint8, device=DEVICE),
        torch.zeros(3, dtype=torch.int64, device=DEVICE),
    )
    args = args_of(pool, slots)
    with pytest.raises(ValueError, match=message):
        dequantize_k_cache_paged(*args)


def paged(cache, page_size):
    """What `random_cache` made, as FlashMLA takes it."""
    return cache.to(DEVICE)[:, : page_size * V4.bytes].view(-1, page_size, 1, V4.bytes)


@pytest.mark.parametrize("tokens, warps", [(1, 4), (16, 4)])
def test_other_launch_numbers(tokens, warps):
    cache, slots = random_cache(64, 128), torch.randint(0, 128, (37,), device=DEVICE)
    config = {"TOKENS": tokens, "num_warps": warps}
    got = dequantize.dequantize(paged(cache, 64), slots, config=config)
    assert torch.equal(bits(got), bits(dequantize_k_cache_paged_ref(cache, slots, 64)[:, 0]))


WIDTHS = """
from mla_patch.compat.triton import compile_case
from mla_patch.kernels.cache.dequantize import compile_cases
for case in (case for case in compile_cases() if 90 in case.targets):
    wide = [p.name for p in case.kernel.params if not (p.do_not_specialize or p.do_not_specialize_on_alignment)]
    assert set(case.divisible) <= set(wide), wide  # a launch lets Triton know it, too
    compiled = compile_case(case, 90)
    ptx = compiled.asm["ptx"]
    print(case.name, "ld.global.v4.b32" in ptx and "st.global.v4.b32" in ptx)
"""


def test_values_are_read_and_written_wide(run_python):
    """16 bytes at once: how many bytes a second depends on it."""
    done = run_python(WIDTHS, env={"TRITON_INTERPRET": None}, args=("-W", "ignore"), check=True)
    lines = done.stdout.splitlines()
    assert len(lines) == 3 and all(line.endswith(" True") for line in lines), done.stdout


SERVE = """
import sys
sys.path.insert(0, TESTS)
import fake_chip
import torch
from mla_patch.compat.compiles import COMPILES
from mla_patch.kernels.cache import dequantize
from mla_patch.kernels.cache.layouts import V4, V32, new_pages
fake_chip.install()
COMPILES.has_served = lambda: True

def serve(layout, page, pages, tokens, kind):
    room = torch.zeros(tokens + 3, layout.width, dtype=torch.bfloat16)[3:]
    dequantize.dequantize(new_pages(layout, pages, page), torch.zeros(tokens + 1, dtype=kind)[1:], room)

for fake_chip.SM in (80, 90, 120):
    for layout, sizes in ((V32, (1, 64)), (V4, (64, 2, 256))):
        COMPILES.reset()
        warmed = dequantize.warmup("cpu", sizes if layout is V4 else ())
        for page in sizes:
            for pages in (1, 16, 1000):
                for tokens in (1, 16, 33):
                    for kind in (torch.int32, torch.int64):
                        serve(layout, page, pages, tokens, kind)
        print(fake_chip.SM, layout.name, 0 < warmed == COMPILES.before, COMPILES.serving)
serve(V4, 32, 3, 3, torch.int64)
print("unforeseen", COMPILES.serving > 0)
"""


def test_nothing_compiles_after_a_warm_up():
    command = [sys.executable, "-W", "ignore", "-c", SERVE.replace("TESTS", repr(str(TESTS)))]
    env = clean_env({"TRITON_INTERPRET": "0"})
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    *rows, unforeseen = done.stdout.splitlines()
    assert len(rows) == 6 and all(row.endswith("True 0") for row in rows), rows
    assert unforeseen == "unforeseen True"


@pytest.mark.gpu
@pytest.mark.skipif(interpreted(), reason="needs a GPU and TRITON_INTERPRET=0")
@pytest.mark.parametrize("page_size", [None, 2, 256])
def test_many_tokens(page_size):
    cache = random_cache(page_size, 4096)
    slots = torch.randint(0, 4096, (100_000,), device=DEVICE)
    every = torch.arange(4096)
    want = bits(dequantize_k_cache_paged_ref(cache, every, page_size))[slots.cpu()]
    assert torch.equal(bits(dequantize_k_cache_paged(cache.to(DEVICE), slots, page_size)), want)
