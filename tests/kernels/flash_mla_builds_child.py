"""Calls of one FlashMLA's wrappers: whom our table gives each, and what both sides make of it.

    python flash_mla_builds_child.py FOLDER OUT.jsonl FIRST    from case number FIRST on, two lines for each

The second line has who is to serve and how both did; a case without one ended the process. FOLDER holds what the
release imports: sgl_kernel/, or sglang/kernels/ops/attention/ and flash_mla/, or flash_mla/ alone.
"""

from __future__ import annotations

import inspect
import itertools
import json
import sys
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from mla_patch import flash_mla
from mla_patch.compat.sglang import flash_mla as sglang_flash_mla
from mla_patch.hooks.sglang import flash_mla_providers as providers
from mla_patch.hooks.sglang import sched_meta as hook
from mla_patch.kernels.cache.layouts import V4, V32, new_pages
from mla_patch.kernels.cache.quantize import quantize
from mla_patch.kernels.sparse import dense_decode_ref, mla_sparse_prefill_ref, sparse_decode_ref

E4M3 = torch.float8_e4m3fn
GPU = {"device": "cuda"}
INT = {"device": "cuda", "dtype": torch.int32}
ROWS = 700  # tokens in a cache


class Host:
    """The wrappers in a folder, and what their signatures tell."""

    def __init__(self, folder: Path) -> None:
        sys.path.insert(0, str(folder))
        homes = {"sgl_kernel": sglang_flash_mla.SGL_KERNEL, "sglang": sglang_flash_mla.INTERFACE}
        name = next((home for top, home in homes.items() if (folder / top).is_dir()), sglang_flash_mla.PACKAGE)
        self.module: Any = import_module(name)
        newer = hasattr(self.module, "FlashMLASchedMeta")
        self.build = sglang_flash_mla.Build(name, newer)
        self.has_prefill = name != sglang_flash_mla.PACKAGE  # whose sparse prefill is not ours to serve
        self.metas = ("newer",) if not self.has_prefill else ("older", "newer") if newer else ("older",)
        named = inspect.signature(self.module.flash_mla_with_kvcache).parameters
        self.descales, self.formats = "descale_q" in named, "kv_format" in named


def cases(host: Host) -> Iterator[tuple[str, dict[str, Any]]]:
    """(kind, what is asked of it), one thing changed at a time but for heads, queries and topk."""
    dense = {"heads": 64, "queries": 1, "page": 64, "width": 576, "dtype": "bfloat16"}
    metas = host.metas
    for meta in metas:
        plain = dense | {"meta": meta}
        for heads, queries in itertools.product((1, 16, 20, 64, 128), (1, 2, 5)):
            yield "dense", plain | {"heads": heads, "queries": queries}
        for change in (
            {"dtype": "float16"}, {"width": 512}, {"page": 32}, {"page": 128}, {"batch": 0}, {"queries": 0},
            {"causal": False, "queries": 3}, {"width": 512, "dtype": "float16"},
        ):  # fmt: skip
            yield "dense", plain | change
        if host.descales:
            yield "dense", plain | {"descales": True}
        for heads, queries, descales in itertools.product((16, 20, 128), (1, 2), (host.descales, False)):
            yield "dense", plain | {"dtype": "e4m3", "heads": heads, "queries": queries, "descales": descales}
        for change in ({"width": 512}, {"page": 32}, {"batch": 0}, {"queries": 0}):
            yield "dense", plain | {"dtype": "e4m3", "descales": host.descales} | change
    for layout in ("V3.2", "V4"):
        sparse = {"layout": layout, "heads": 64, "queries": 1, "page": 64, "topk": 128}
        for meta in metas:
            plain = sparse | {"meta": meta}
            for heads, topk, queries in itertools.product((16, 64, 128), (64, 100, 128, 0), (1, 2)):
                yield "sparse", plain | {"heads": heads, "topk": topk, "queries": queries}
            for page in (1, 2, 32, 128, 256):
                yield "sparse", plain | {"page": page}
            yield "sparse", plain | {"batch": 0}
            yield "sparse", plain | {"queries": 0}
            if host.formats:
                yield "sparse", plain | {"format": "V32" if layout == "V3.2" else "V4"}
        if "newer" in metas:
            plain = sparse | {"meta": "newer"}
            for heads in (64, 128):
                yield "sparse", plain | {"heads": heads, "sink": True}
                yield "sparse", plain | {"heads": heads, "lengths": True}
            for more, page, lengths in itertools.product((64, 512, 33), (64, 128, 2), (False, True)):
                yield "sparse", plain | {"extra": more, "extra page": page, "lengths": lengths, "sink": True}
    for heads, width, topk in itertools.product((16, 64, 128), (576, 512), (64, 100, 128, 1280, 2048, 0)):
        for sink, lengths in itertools.product({False, "newer" in metas}, repeat=2):
            asked = {"heads": heads, "width": width, "topk": topk, "sink": sink, "lengths": lengths}
            yield "prefill", asked
    for width in (576, 512):
        yield "prefill", {"heads": 64, "width": width, "topk": 128, "queries": 0}
        yield "prefill", {"heads": 64, "width": width, "topk": 128, "dtype": "float16"}


def randn(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, **GPU)


def dense(asked: dict[str, Any]) -> tuple[dict[str, Any], Any]:
    lens = [70, 1, 200][: asked.get("batch", 3)]
    lens = [max(one, asked["queries"]) for one in lens]
    page, width, e4m3 = asked["page"], asked["width"], asked["dtype"] == "e4m3"
    dtype = E4M3 if e4m3 else getattr(torch, asked["dtype"])
    pages = [-(-one // page) for one in lens]
    order = torch.randperm(max(sum(pages), 1)).tolist()
    table = torch.zeros(len(lens), max(pages, default=1), dtype=torch.int32)
    for b, count in enumerate(pages):
        table[b, :count] = torch.tensor([order.pop() for _ in range(count)], dtype=torch.int32)
    args: dict[str, Any] = {
        "q": randn(len(lens), asked["queries"], asked["heads"], width).to(dtype),
        "k_cache": randn(max(sum(pages), 1), page, 1, width).to(dtype), "block_table": table.cuda(),
        "cache_seqlens": torch.tensor(lens, **INT), "softmax_scale": 0.05, "causal": asked.get("causal", True),
    }  # fmt: skip
    if asked.get("descales"):
        args |= {"descale_q": torch.tensor([0.5], **GPU), "descale_k": torch.tensor([1.5], **GPU)}
    named = {"sm_scale" if name == "softmax_scale" else name: one for name, one in args.items()}
    if not e4m3:
        named = {name: one for name, one in named.items() if not name.startswith("descale")}
    return args | {"is_fp8_kvcache": e4m3}, lambda: dense_decode_ref(**named)


def cache(layout: Any, page: int, batch: int, queries: int, topk: int) -> tuple[torch.Tensor, torch.Tensor]:
    pages = new_pages(layout, -(-ROWS // page), page, "cuda")
    slots = torch.arange(pages.shape[0] * page, **GPU)
    quantize(randn(len(slots), layout.width), pages, slots)
    ids = torch.randint(0, len(slots), (batch, queries, topk), **INT)
    ids[torch.rand(ids.shape, **GPU) < 0.1] = -1
    return pages, ids


def sparse(asked: dict[str, Any]) -> tuple[dict[str, Any], Any]:
    layout, batch = {"V3.2": V32, "V4": V4}[asked["layout"]], asked.get("batch", 3)
    q = (randn(batch, asked["queries"], asked["heads"], layout.width) / 4).bfloat16()
    args: dict[str, Any] = {"q": q, "softmax_scale": 0.05}
    args["k_cache"], args["indices"] = cache(layout, asked["page"], batch, asked["queries"], asked["topk"])
    if asked.get("sink"):
        args["attn_sink"] = randn(asked["heads"])
    if asked.get("extra"):
        extra = cache(layout, asked["extra page"], batch, asked["queries"], asked["extra"])
        args["extra_k_cache"], args["extra_indices_in_kvcache"] = extra
    if asked.get("lengths"):
        args["topk_length"] = torch.tensor([asked["topk"], 0, 1], **INT)
        if asked.get("extra"):
            args["extra_topk_length"] = torch.tensor([0, 0, asked["extra"]], **INT)
    names = {"softmax_scale": "sm_scale", "extra_indices_in_kvcache": "extra_indices"}
    named = {names.get(name, name): one for name, one in args.items()}
    if "format" in asked:
        args["kv_format"] = asked["format"]
    lens = torch.full((batch,), asked["topk"], **INT)
    older = {"block_table": torch.empty(batch, 0, **INT), "cache_seqlens": lens}
    if asked["meta"] == "newer":
        older = dict.fromkeys(older)
    return args | older | {"is_fp8_kvcache": True}, lambda: sparse_decode_ref(**named)


def prefill(asked: dict[str, Any]) -> tuple[dict[str, Any], Any]:
    queries, dtype = asked.get("queries", 5), getattr(torch, asked.get("dtype", "bfloat16"))
    kv = randn(ROWS, 1, asked["width"]).to(dtype)
    ids = torch.randint(0, ROWS, (queries, 1, asked["topk"]), **INT)
    ids[torch.rand(ids.shape, **GPU) < 0.1] = -1
    q = (randn(queries, asked["heads"], asked["width"]) / 4).to(dtype)
    args: dict[str, Any] = {"q": q, "kv": kv, "indices": ids, "sm_scale": 0.05}
    if asked.get("sink"):
        args["attn_sink"] = randn(asked["heads"])
    if asked.get("lengths"):
        args["topk_length"] = torch.randint(0, asked["topk"] + 1, (queries,), **INT)
    return args, lambda: mla_sparse_prefill_ref(**args, return_log2=True)


def off(got: torch.Tensor, want: torch.Tensor) -> float:
    """The worst query's distance, relative to its norm; NaN is 9."""
    wrong, norm = (got.double() - want).flatten(-2).norm(dim=-1), want.flatten(-2).norm(dim=-1)
    return float((wrong / torch.where(norm == 0, 1.0, norm)).nan_to_num(9).max()) if wrong.numel() else 0.0


def apart(got: torch.Tensor, want: torch.Tensor) -> float:
    """Of statistics; NaN, and infinities in other places, are 9."""
    distance = torch.where(got.double() == want, 0.0, (got.double() - want).abs()).nan_to_num(9, 9)
    return float(distance.max()) if distance.numel() else 0.0


def outcome(serve: Callable[[], Any], want: Any, loose: bool) -> str:
    try:
        got = serve()
        torch.cuda.synchronize()
    except Exception as problem:
        return f"{type(problem).__name__}: {problem}"[:160]
    errors = (off(got[0], want[0]), *(apart(mine, other) for mine, other in zip(got[1:], want[1:], strict=True)))
    # fp8 products of FlashMLA's; else 16-bit keys and weights
    right = errors[0] < (0.2 if loose else 0.02) and max(errors[1:]) < (0.1 if loose else 0.02)
    return "right" if right else f"wrong: {errors}"


def row_of(provider: Any) -> dict[str, str]:
    return {"by": provider.provider, "when": provider.when}


def one(host: Host, kind: str, asked: dict[str, Any], tell: Callable[[dict[str, Any]], None]) -> None:
    """``tell`` is given what is known so far, as the host may end the process."""
    args, definition = {"dense": dense, "sparse": sparse, "prefill": prefill}[kind](asked)
    want = definition()
    loose = asked.get("dtype") == "e4m3"
    if kind == "prefill":
        call: Any = sglang_flash_mla.PrefillCall(host.build, **args)
        row = row_of(next(one for one in providers.PREFILL_PROVIDERS if one.applies(call)))
        row["ours"] = outcome(lambda: flash_mla.flash_mla_sparse_fwd(**args, return_log2=True), want, loose)
        tell(row)
        tell(row | {"host": outcome(lambda: host.module.flash_mla_sparse_fwd(**args), want, loose)})
        return
    given: tuple[Any, ...] = ()
    if asked["meta"] == "older":
        lens = args["cache_seqlens"]
        topk = asked.get("topk")
        given = (lens, asked["queries"] * asked["heads"], 1, asked["heads"], args["is_fp8_kvcache"], topk)
    made = flash_mla.get_mla_metadata(*given)
    args |= {"head_dim_v": 512, "tile_scheduler_metadata": made[0], "num_splits": made[1]}
    call = sglang_flash_mla.KvCacheCall(host.build, **args)
    row = row_of(next(one for one in providers.PROVIDERS if one.applies(call)))
    row["ours"] = outcome(lambda: flash_mla.flash_mla_with_kvcache(**args), want, loose)
    if given:
        meta = sglang_flash_mla.MetadataCall(host.build, *given)
        row["metadata by"] = "triton" if hook.declines_metadata(meta) is None else "host"
    tell(row)

    def serve() -> Any:
        schedule, splits = host.module.get_mla_metadata(*given)
        metadata = {"tile_scheduler_metadata": schedule, "num_splits": splits}
        return host.module.flash_mla_with_kvcache(**args | metadata)

    tell(row | {"host": outcome(serve, want, loose)})


def main(folder: Path, out: Path, first: int) -> None:
    torch.manual_seed(first)
    host = Host(folder)
    with out.open("a", encoding="utf-8") as lines:
        for number, (kind, asked) in enumerate(cases(host)):
            if number < first or (kind == "prefill" and not host.has_prefill):
                continue

            def tell(row: dict[str, Any], known: Any = (number, kind, asked)) -> None:
                print(
                    json.dumps({"number": known[0], "kind": known[1], "asked": known[2]} | row), file=lines, flush=True
                )
                if "CUDA error" in row.get("host", ""):
                    sys.exit("the process can do no more")

            one(host, kind, asked, tell)
        print(json.dumps({"end": True}), file=lines)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]))
