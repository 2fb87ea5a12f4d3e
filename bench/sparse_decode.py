"""Compares our sparse fp8 decode with FlashMLA's on the same tensors in one process, or sweeps our launch numbers.

    python bench/sparse_decode.py [--sweep] [--rounds N] [--ops FILE.so] [--json OUT]      needs a GPU

The peers are `flash_mla` (any wheel with the newer API), `sgl_kernel.flash_mla` and, with --ops, the operators of a
flashmla_ops library, whose older API serves only V3.2. If a peer is missing or refuses a case, the reason is printed.
Every arm is first compared with a float64 reference over the stored bytes, for at most eight queries including the
first and the last; the results of all others must be finite. Then the arms of a case take turns at CUDA-graph replay,
and the medians are reported. GB/s counts the bytes of the tokens that the indices name, each once.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))  # peers lies beside this file
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run from a checkout, without an install

import peers
from peers import Call

from mla_patch.kernels.cache.layouts import V4, V32, new_pages
from mla_patch.kernels.cache.quantize import quantize
from mla_patch.kernels.sparse import sparse_decode, sparse_decode_ref
from mla_patch.kernels.sparse.config import sparse_config

DEVICE = "cuda"
# layout, batch, heads, topk, extra topk, context
CASES = [
    *((V32, batch, heads, 2048, 0, 32768) for batch, heads in itertools.product((64, 128), (64, 128))),
    (V32, 1, 128, 2048, 0, 131072),
    (V32, 128, 16, 2048, 0, 32768),
    *((V4, batch, heads, 128, 512, 8192) for batch, heads in itertools.product((64, 128), (64, 128))),
]


def make_case(layout: Any, batch: int, heads: int, topk: int, extra: int, context: int) -> types.SimpleNamespace:
    """Requests over one pool. Each draws its indices from a context of its own.

    ``extra``: number of indices into a second list over the same cache, as V4 uses; 0 means no second list.
    """
    page, tokens = 64, min(batch * context, 2**21)
    cache = new_pages(layout, tokens // page, page, DEVICE)
    for first in range(0, tokens, 2**16):
        slots = torch.arange(first, min(first + 2**16, tokens), device=DEVICE)
        quantize(torch.randn(len(slots), layout.width, device=DEVICE).clamp(-1, 1), cache, slots)
    begin = torch.arange(batch, device=DEVICE)[:, None] * (tokens // batch)
    ids = begin + torch.stack([torch.randperm(tokens // batch, device=DEVICE)[:topk] for _ in range(batch)])
    case = types.SimpleNamespace(
        layout=layout, batch=batch, heads=heads, sm_scale=layout.width**-0.5, cache=cache,
        q=(torch.randn(batch, 1, heads, layout.width, device=DEVICE) / 4).bfloat16(),
        indices=ids[:, None].int().contiguous(), options={}, bytes=batch * (topk + extra) * layout.bytes,
        flops=2 * batch * heads * (topk + extra) * (layout.width + 512),
    )  # fmt: skip
    if layout is V4:
        lens = torch.full((batch,), topk, dtype=torch.int32, device=DEVICE)
        case.options = {"attn_sink": torch.randn(heads, device=DEVICE), "topk_length": lens}
    if extra:
        pick = torch.stack([torch.randperm(tokens // batch, device=DEVICE)[:extra] for _ in range(batch)])
        case.options |= {"extra_k_cache": cache, "extra_indices": (begin + pick)[:, None].int().contiguous()}
        case.options |= {"extra_topk_length": torch.full((batch,), extra, dtype=torch.int32, device=DEVICE)}
    case.picks = peers.pick(batch)
    case.want = definition(case)
    return case


def definition(case: Any) -> torch.Tensor:
    """The float64 reference of the picked queries: [picks, 1, H, 512]."""
    picks = case.picks.to(case.q.device)
    whole = ("attn_sink", "extra_k_cache")
    options = {name: value if name in whole else value[picks] for name, value in case.options.items()}
    return sparse_decode_ref(case.q[picks], case.cache, case.indices[picks], sm_scale=case.sm_scale, **options)[0]


def ours(case: Any, config: dict[str, int] | None = None) -> Call:
    return lambda: sparse_decode(
        case.q, case.cache, case.indices, sm_scale=case.sm_scale, config=config, **case.options
    )


def newer_api(module: str) -> Callable[[Any], Call]:
    return lambda case: peers.over_pages(module, case.q, case.cache, case.indices, case.sm_scale, case.options)


def older_ops(case: Any) -> Call:
    """The operators of sgl-kernel up to and including 0.4.2."""
    if case.layout is not V32:
        raise RuntimeError("the older API has no second cache")
    ops = torch.ops.sgl_kernel
    topk = case.indices.shape[-1]
    lens = torch.full((case.batch,), topk, dtype=torch.int32, device=DEVICE)
    meta, splits = ops.get_mla_decoding_metadata(lens, case.heads, 1, case.heads, True, topk)
    empty = torch.empty(case.batch, 0, dtype=torch.int32, device=DEVICE)
    cache = case.cache.view(torch.float8_e4m3fn)
    return lambda: ops.fwd_kvcache_mla(
        case.q, cache, 512, lens, empty, case.sm_scale, False, meta, splits, True, case.indices
    )


def configs(heads: int) -> dict[str, dict[str, int]]:
    """Launch numbers that are worth trying besides the default, by name."""
    return {
        name: numbers | {"PER_SM": 2 if numbers["BLOCK_H"] == 16 and numbers["BLOCK_N"] == 32 else 1}
        for name, numbers in peers.configs(heads, (1, 2, 3)).items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sweep", action="store_true", help="our launch numbers instead of peers")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--rep", type=int, default=30, help="milliseconds of replay per figure")
    parser.add_argument("--ops", type=Path, help="a library that registers sgl_kernel's FlashMLA operators")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    versions = peers.versions()
    print(*versions.values())
    torch.manual_seed(0)
    if args.ops:
        torch.ops.load_library(args.ops)
    rows = []
    for layout, batch, heads, topk, extra, context in CASES:
        case = make_case(layout, batch, heads, topk, extra, context)
        arms: peers.Arms = {"ours": ours}
        if args.sweep:
            for name, config in configs(heads).items():
                arms[name] = lambda case, config=config: ours(case, config)
        else:
            arms |= {"flash_mla": newer_api("flash_mla"), "sgl_kernel": newer_api("sgl_kernel.flash_mla")}
            arms |= {"older operators": older_ops} if args.ops else {}
        title = f"{layout.name} batch {batch} heads {heads} topk {topk}+{extra}"
        table = peers.measure(case, arms, args.rounds, args.rep)
        rows.append(peers.show(f"{title}   default {sparse_config(heads, peers.capability())}", case, table))
    if args.json:
        args.json.write_text(json.dumps(versions | {"rows": rows}, indent=1))


if __name__ == "__main__":
    main()
