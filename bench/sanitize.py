"""Small launches that reach every branch of our kernels, to be run under compute-sanitizer.

compute-sanitizer --tool memcheck|racecheck python bench/sanitize.py [NAME ...]

Every result is compared with its reference. Without a name, all of these run: kv_indices, kv_cast, decode, decode_wide,
pages_and_splits, sparse_and_dense, prefill_indices, sparse_prefill, fp8_pages.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run from a checkout, without an install

from mla_patch.kernels.cache.dequantize import dequantize, dequantize_ref
from mla_patch.kernels.cache.kv_cast import cast_pages, cast_pages_ref
from mla_patch.kernels.cache.layouts import V4, V32, new_pages
from mla_patch.kernels.cache.quantize import quantize
from mla_patch.kernels.decode import mla_decode, mla_decode_paged, mla_decode_ref
from mla_patch.kernels.decode.splits import mla_decode_splits, mla_decode_splits_ref
from mla_patch.kernels.indices.kv import build_page_table, build_token_indices, page_table_ref, token_indices_ref
from mla_patch.kernels.indices.prefill import (
    build_swa_token_ids,
    build_swa_token_ids_ref,
    combine_topk_swa_indices,
    combine_topk_swa_indices_ref,
)
from mla_patch.kernels.sparse import (
    dense_decode,
    dense_decode_ref,
    mla_sparse_prefill,
    mla_sparse_prefill_ref,
    sparse_decode,
    sparse_decode_ref,
)


def kv_indices() -> None:
    lens = torch.tensor([3000, 0, 65, 5, 700], device="cuda")
    pool = torch.tensor([1, 0, 3, 2, 4], device="cuda")
    indptr = lens.cumsum(0) - lens
    table = torch.randint(0, 2**30, (5, 3000), device="cuda", dtype=torch.int32)
    for ctas, wide, rows in ((2, 1, 0), (2, 2, 4), (3, 1, 256)):
        config = {"ctas": ctas, "BLOCK": 128, "WIDE": wide, "ROWS": rows, "num_warps": 4}
        ids = torch.full((int(lens.sum()),), -1, device="cuda", dtype=torch.int64)
        want = token_indices_ref(table, pool, lens, indptr, ids)
        assert torch.equal(build_token_indices(table, pool, lens, indptr, ids, config=config), want)
        pages = torch.full((5, 188), -1, device="cuda", dtype=torch.int32)
        want = page_table_ref(table, pool, lens, pages, page_size=16)
        assert torch.equal(build_page_table(table, pool, lens, pages, page_size=16, config=config), want)


def kv_cast() -> None:
    """Lengths of 0, within a page and beyond the table; page numbers outside the cache. Other rows must not change."""
    for cache_type, kind, page in itertools.product(
        (torch.float8_e4m3fn, torch.float8_e5m2), (torch.bfloat16, torch.float16), (1, 64)
    ):
        cache = torch.randn(30 * page, 1, 576, device="cuda").to(cache_type)
        table = torch.randperm(30, device="cuda").int()[:28].view(4, 7)
        table[3, 2], table[3, 3] = -1, 30
        some = torch.tensor([7 * page, 0, page + 1, 9 * page], device="cuda").int()
        for lens, compact in itertools.product((some, None), (False, True)):
            rows = 28 * page if compact else len(cache)
            out = torch.full((rows, 1, 576), -1, device="cuda", dtype=kind)
            places = torch.full_like(table, -1) if compact else None
            cast_pages(cache, table, lens, out, page_size=page, places=places)
            here = (
                cache.cpu(),
                table.cpu(),
                lens if lens is None else lens.cpu(),
            )  # on the GPU the reference would make thousands of launches
            want, named = cast_pages_ref(*here, kind, page_size=page, places=compact)
            out, places = out.cpu(), places if places is None else places.cpu()
            assert all(torch.equal(out[row, 0], values) for row, values in want.items())
            assert (out[[row for row in range(rows) if row not in want]] == -1).all()
            assert places is None or all(int(places[at]) == place for at, place in named.items())


def decode(heads: int) -> None:
    for cache in (torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2):
        for lens in ([300, 0, 70, 1], [900], [65] * 40):
            rows = sum(lens)
            q = torch.randn(len(lens), heads, 576, device="cuda", dtype=torch.bfloat16)
            kv = torch.randn(rows, 576, device="cuda").to(cache)
            ids = torch.randperm(rows, device="cuda")
            indptr = torch.tensor([0, *lens], device="cuda").cumsum(0)
            out = torch.full((len(lens), heads, 512), float("nan"), device="cuda", dtype=torch.bfloat16)
            want = mla_decode_ref(q, kv, indptr, ids, sm_scale=0.04)
            got = mla_decode(q, kv, out, indptr, ids, sm_scale=0.04).double()
            assert (got - want).norm() <= 4e-3 * want.norm()
            # q in two parts, a log-sum-exp, scales on the device; the second call reuses the launch of the first
            pair = q[..., :512].transpose(0, 1).contiguous().transpose(0, 1), q[..., 512:]
            half, two = torch.tensor([0.5], device="cuda"), torch.tensor(2.0, device="cuda")
            lse = torch.full((len(lens), heads), float("nan"), device="cuda")
            for _ in range(2):
                out.fill_(float("nan"))
                mla_decode(pair, kv, out, indptr, ids, sm_scale=0.08, k_scale=half, v_scale=two, lse=lse)
                assert (out.double() - 2 * want).norm() <= 8e-3 * want.norm() and not lse.isnan().any()


def pages_and_splits() -> None:
    over_pages(24)
    over_pages(64)  # a page has whole tiles


def over_pages(page: int) -> None:
    lens, most = [300, 0, 70, 1], 8
    ends = torch.tensor([0, *lens], device="cuda").cumsum(0)
    slots = torch.full((len(lens), 13), -(2**30), device="cuda", dtype=torch.int32)
    for b, (length, first) in enumerate(zip(lens, (3, 0, 16, 20), strict=True)):
        count = -(-length // page)
        slots[b, :count] = torch.arange(first, first + count, device="cuda")
    j = [torch.arange(length, device="cuda") for length in lens]
    ids = torch.cat([slots[b, j[b] // page].long() * page + j[b] % page for b in range(len(lens))])
    splits = torch.tensor([8, 1, 2, 5], device="cuda", dtype=torch.int32)
    logits = torch.full((len(lens), 3, most, 512), float("nan"), device="cuda")
    lse = torch.full((len(lens), 3, most), float("nan"), device="cuda")
    for cache in (torch.bfloat16, torch.float8_e4m3fn):
        for kind in (torch.bfloat16, torch.float32):
            q = torch.randn(len(lens), 3, 576, device="cuda", dtype=kind)
            kv = torch.randn(24, page, 576, device="cuda").to(cache)
            out = torch.full((len(lens), 3, 512), float("nan"), device="cuda", dtype=kind)
            want = mla_decode_ref(q, kv.view(-1, 576), ends, ids, sm_scale=0.04)
            got = mla_decode_paged(q, kv, out, slots, ends.diff(), sm_scale=0.04).double()
            assert (got - want).norm() <= 4e-3 * want.norm()
            inputs = ends, ids, logits, lse, splits
            _, lses = mla_decode_splits_ref(q, kv.view(-1, 576), *inputs, sm_scale=0.04)
            got = mla_decode_splits(q, kv.view(-1, 576), out.fill_(0), *inputs, sm_scale=0.04).double()
            assert (got - want).norm() <= 4e-3 * want.norm()
            torch.testing.assert_close(lse.double(), lses, rtol=1e-3, atol=1e-3, equal_nan=True)


def sparse_and_dense() -> None:
    for layout in (V32, V4):
        cache, second = new_pages(layout, 9, 64, "cuda"), new_pages(layout, 70, 2, "cuda")
        for one, slots in ((cache, 576), (second, 140)):
            quantize(torch.randn(slots, layout.width, device="cuda"), one, torch.arange(slots, device="cuda"))
        for heads, batch in ((3, 2), (70, 200)):
            q = (torch.randn(batch, 2, heads, layout.width, device="cuda") / 4).bfloat16()
            ids = torch.randint(-9, 600, (batch, 2, 130), device="cuda").int()
            more = torch.randint(-1, 141, (batch, 2, 33), device="cuda").int()
            lens = torch.randint(0, 131, (batch,), device="cuda").int()
            options = {"sm_scale": 0.04, "topk_length": lens, "attn_sink": torch.randn(heads, device="cuda")}
            options |= {"extra_k_cache": second, "extra_indices": more, "extra_topk_length": lens // 4}
            want, _ = sparse_decode_ref(q, cache, ids, **options)
            got, _ = sparse_decode(q, cache, ids, **options)
            assert (got.double() - want).norm() <= 4e-3 * want.norm()
    table = torch.full((2, 13), -(2**30), device="cuda", dtype=torch.int32)
    table[0, :4], table[1, 0] = torch.arange(4, device="cuda"), 5
    lens = torch.tensor([200, 1], device="cuda").int()
    two = {"descale_q": torch.full((1,), 0.5, device="cuda"), "descale_k": torch.full((1,), 2.0, device="cuda")}
    kinds = ((torch.bfloat16, 576, {}), (torch.bfloat16, 512, {}), (torch.float8_e4m3fn, 576, two))
    for (kind, width, descale), heads in itertools.product(kinds, (3, 70)):
        q, kv = (torch.randn(n, 64, h, width, device="cuda").to(kind) for n, h in ((2, heads), (6, 1)))
        options = {"sm_scale": 0.04, "causal": True} | descale
        want, _ = dense_decode_ref(q[:, :2], kv, table, lens, **options)
        got, _ = dense_decode(q[:, :2], kv, table, lens, **options)
        assert (got.double() - want).norm() <= 4e-3 * want.norm()


def prefill_indices() -> None:
    def ints(*values: int) -> torch.Tensor:
        return torch.tensor(values, device="cuda", dtype=torch.int32)

    seq, extend, table = ints(200, 9, 0, 131), ints(70, 0, 0, 3), torch.randperm(800, device="cuda").int().view(4, 200)
    to_swa = torch.randperm(800, device="cuda")
    want = build_swa_token_ids_ref(seq, extend, ints(3, 1, 0, 2), table, to_swa, 128)
    for total in (len(want[0]), len(want[0]) + 300):
        got = build_swa_token_ids(seq, extend, ints(3, 1, 0, 2), table, to_swa, 128, total)
        assert got[0].tolist() == want[0] + [-1] * (total - len(want[0]))
        assert [part.tolist() for part in got[1:]] == [*want[1:]]
    gather, offsets = got[2], got[3]
    start = ints(0, 70, 70, 70, 73)
    position = torch.cat([torch.arange(130, 200, device="cuda"), torch.arange(128, 131, device="cuda")]).int()
    for topk, ratio in ((0, 1), (33, 4)):
        named = torch.randint(-1, 50, (73, max(topk, 1)), device="cuda").int()
        given = (named, start, seq, gather, ints(0, 50, 52, 52), offsets[:-1] + 84, 128, ratio, topk)
        for positions in (None, position):
            rows, lens = combine_topk_swa_indices(*given, query_pos=positions)
            wanted, counts = combine_topk_swa_indices_ref(*given, query_pos=positions)
            assert rows.tolist() == wanted and lens.tolist() == counts


def sparse_prefill() -> None:
    for width, heads, queries in ((576, 3, 7), (512, 3, 7), (576, 70, 90), (512, 70, 90)):
        q, kv = (torch.randn(n, h, width, device="cuda").bfloat16() for n, h in ((queries, heads), (300, 1)))
        ids = torch.randint(-9, 320, (queries, 1, 130), device="cuda").int()
        options = {"sm_scale": 0.04, "topk_length": torch.randint(0, 140, (queries,), device="cuda").int()}
        options |= {"attn_sink": torch.randn(heads, device="cuda")}
        want = mla_sparse_prefill_ref(q, kv, ids, **options)[0]
        got = mla_sparse_prefill(q, kv, ids, **options)[0]
        assert (got.double() - want).norm() <= 4e-3 * want.norm()


def fp8_pages() -> None:
    """Tokens written to fp8 pages and read back."""
    for layout, pages, size in ((V32, 9, 64), (V4, 70, 2)):
        cache = new_pages(layout, pages, size, "cuda")
        every = torch.arange(pages * size, device="cuda")
        quantize(torch.randn(len(every), layout.width, device="cuda"), cache, every)
        slots = torch.randint(0, len(every), (300,), device="cuda").int()
        assert torch.equal(dequantize(cache, slots), dequantize_ref(cache, slots).bfloat16())


EVERY: dict[str, Callable[[], None]] = {
    "kv_indices": kv_indices,
    "kv_cast": kv_cast,
    "decode": lambda: decode(3),
    "decode_wide": lambda: decode(70),  # many heads: sm_90 has a kernel of its own for them
    "pages_and_splits": pages_and_splits,
    "sparse_and_dense": sparse_and_dense,
    "prefill_indices": prefill_indices,
    "sparse_prefill": sparse_prefill,
    "fp8_pages": fp8_pages,
}


if __name__ == "__main__":
    for name in sys.argv[1:] or EVERY:
        EVERY[name]()
    torch.cuda.synchronize()
    print("every result equals its reference")
