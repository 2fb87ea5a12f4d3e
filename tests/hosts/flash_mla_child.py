"""One SGLang release over a stand-in for its FlashMLA, in a process of its own: who serves which call.

    python flash_mla_child.py RELEASE OUT.json      with the release and the stand-in on PYTHONPATH, and MLA_PATCH=1

The stand-in's functions are named as the release's wrappers are, and answer with what they were called with.
"""

import functools
import importlib
import json
import os
import sys
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

sys.path.pop(0)  # this folder: a host must not find our modules by their plain names

import torch

import mla_patch
import mla_patch.flash_mla
import mla_patch.startup
from mla_patch.compat.sglang import flash_mla as sglang_flash_mla
from mla_patch.drive import sglang as sglang_trial
from mla_patch.kernels.cache.layouts import V4, V32, new_pages
from mla_patch.kernels.cache.quantize import quantize
from mla_patch.kernels.sparse import decode as sparse_decode
from mla_patch.kernels.sparse import dense as dense_decode
from mla_patch.kernels.sparse import dense_decode_ref, mla_sparse_prefill_ref, sparse_decode_ref
from mla_patch.kernels.sparse import prefill as sparse_prefill
from mla_patch.patcher import is_ours

mla_patch.startup.start()


def feature() -> dict[str, Any]:
    return next(row for row in mla_patch.report()["features"] if row["name"] == "sched_meta")


def served(call: Any) -> dict[str, Any]:
    """Run one call; who served it, and the reason where it was the host."""
    before = feature()
    result = call()
    after = feature()
    declined = [reason for reason, n in after["declined"].items() if n > before["declined"].get(reason, 0)]
    ours = after["served"] - before["served"]
    host = isinstance(result, dict)  # as the stand-in answers
    assert bool(ours) != host, (ours, result)
    row: dict[str, Any] = {"by": "host" if host else "triton", "reason": declined}
    return row | ({"with": sorted(result)} if host else {"result": result})


@functools.cache
def pages(layout: Any) -> torch.Tensor:
    """128 stored tokens, which nobody writes to: to store them takes the interpreter longer than to read them."""
    cache = new_pages(layout, 2, 64)
    quantize(torch.randn(128, layout.width), cache, torch.arange(128))
    return cache


def sparse(heads: int, layout: Any = V32, topk: int = 64, batch: int = 2) -> dict[str, Any]:
    return {
        "q": (torch.randn(batch, 1, heads, layout.width) / 4).bfloat16(), "k_cache": pages(layout),
        "indices": torch.randint(-1, 128, (batch, 1, topk)).int(), "head_dim_v": 512, "is_fp8_kvcache": True,
        "softmax_scale": 0.05,
    }  # fmt: skip


def error(result: Any, args: dict[str, Any], **options: Any) -> float:
    want, _ = sparse_decode_ref(args["q"], args["k_cache"], args["indices"], sm_scale=0.05, **options)
    return float((result[0].double() - want).norm() / want.norm())


def prefill(module: Any, heads: int, **more: Any) -> dict[str, Any]:
    """One call of flash_mla_sparse_fwd; how far each of its three results is from the definition, to the base 2."""
    args = {
        "q": (torch.randn(2, heads, 576) / 4).bfloat16(), "kv": torch.randn(90, 1, 576).bfloat16(),
        "indices": torch.randint(-1, 90, (2, 1, 128)).int(), "sm_scale": 0.05,
    }  # fmt: skip
    row = served(lambda: module.flash_mla_sparse_fwd(**args, **more))
    if "result" in row:
        want = mla_sparse_prefill_ref(**args, **more, return_log2=True)
        pairs = zip(row.pop("result"), want, strict=True)
        row["errors"] = [float((mine.double() - theirs).norm() / theirs.norm()) for mine, theirs in pairs]
    return row


def wrappers(release: str) -> Any:
    """The module that the release's backends take FlashMLA from."""
    homes = {"0.5.23": sglang_flash_mla.INTERFACE} | dict.fromkeys(PACKAGED, sglang_flash_mla.PACKAGE)
    return importlib.import_module(homes.get(release, sglang_flash_mla.SGL_KERNEL))


def through_the_backend(release: str, args: dict[str, Any]) -> tuple[torch.Tensor, int]:
    """The release's own sparse decode, of the backend class's method, on a made-up batch; how often ours served."""
    new = (Path(importlib.import_module("sglang").__file__).parent / "srt/layers/attention/dsa_backend.py").exists()
    name = "dsa" if new else "nsa"
    module = importlib.import_module(f"sglang.srt.layers.attention.{name}_backend")
    owner = module.DeepseekSparseAttnBackend if new else module.NativeSparseAttnBackend
    (batch, _, heads, _), topk = args["q"].shape, args["indices"].shape[-1]
    lens = torch.full((batch,), 64, dtype=torch.int32)
    made, splits = wrappers(release).get_mla_metadata(
        cache_seqlens=lens, num_q_tokens_per_head_k=heads, num_heads_k=1, num_heads_q=heads, is_fp8_kvcache=True,
        topk=topk,
    )  # fmt: skip
    kept = SimpleNamespace(flashmla_metadata=made, num_splits=splits)
    backend = SimpleNamespace(
        real_page_size=64, physical_page_size=64, kv_cache_dim=656, nsa_kv_cache_store_fp8=True,
        dsa_kv_cache_store_fp8=True, nsa_index_topk=topk, dsa_index_topk=topk, flashmla_kv_num_q_heads=heads,
        flashmla_kv_format="V32",
    )  # fmt: skip
    metadata = SimpleNamespace(nsa_cache_seqlens_int32=lens, dsa_cache_seqlens_int32=lens, flashmla_metadata=kept)
    before = feature()["served"]
    method = owner._forward_flashmla_decode if release == "0.5.3" else owner._forward_flashmla_kv
    out = method(
        backend, args["q"][:, 0], args["k_cache"], 512, 0.05, SimpleNamespace(tp_q_head_num=heads, head_dim=576),
        metadata, args["indices"][:, 0],
    )  # fmt: skip
    return out, feature()["served"] - before


def through(release: str) -> dict[str, Any]:
    """Who serves the release's own sparse decode, and how well."""
    args = sparse(16)
    out, ours = through_the_backend(release, args)
    return {"served": ours, "error": error((out,), args)}


def company(release: str) -> dict[str, Any]:
    """One query of it alone and beside two others, with the release's batch-invariant operators off and on."""
    operators = importlib.import_module("sglang.srt.batch_invariant_ops.batch_invariant_ops")
    args, seen = sparse(16, topk=192, batch=3), {}
    for mode in (False, True):
        operators._batch_invariant_MODE = mode
        (alone, first), (beside, second) = (
            through_the_backend(release, args | {name: args[name][:count] for name in ("q", "indices")})
            for count in (1, 3)
        )
        seen["on" if mode else "off"] = {
            "differs": int((alone.view(-1) != beside.view(3, -1)[0]).sum()), "served": first + second,
        }  # fmt: skip
    operators._batch_invariant_MODE = False
    return seen


def through_dense(heads: int) -> dict[str, Any]:
    """The release's own dense decode over an e4m3 cache, with descales, on a chip whose metadata are the package's."""
    module = importlib.import_module("sglang.srt.layers.attention.flashmla_backend")
    cache = torch.randn(3, 64, 1, 576).to(torch.float8_e4m3fn)
    table, lens = torch.tensor([[2, 0], [1, 1]]).int(), torch.tensor([100, 7])
    made, splits = torch.zeros(1, 8).int(), torch.arange(3).int()
    backend = SimpleNamespace(
        data_type=torch.float8_e4m3fn, kv_cache_dim=576, kv_lora_rank=512,
        forward_metadata=SimpleNamespace(flashmla_metadata=made, num_splits=splits, block_kv_indices=table),
    )  # fmt: skip
    pool = SimpleNamespace(get_key_buffer=lambda layer: cache)
    batch = SimpleNamespace(out_cache_loc=None, batch_size=2, token_to_kv_pool=pool, seq_lens=lens)
    layer = SimpleNamespace(layer_id=0, tp_q_head_num=heads, head_dim=576, v_head_dim=512, scaling=0.05)
    q = torch.randn(2, heads * 576)
    before = feature()["served"]
    out = module.FlashMLABackend.forward_decode(backend, q, None, None, layer, batch)
    stored = q.view(2, 1, heads, 576).to(torch.float8_e4m3fn)
    want, _ = dense_decode_ref(stored, cache, table, lens, sm_scale=0.05)
    wrong = (out.view_as(want).double() - want).norm() / want.norm()
    return {"served": feature()["served"] - before, "error": float(wrong)}


def through_v4(heads: int) -> dict[str, Any]:
    """DeepSeek V4's own forward, over the window's cache and one of every 4 tokens', with metadata that it makes."""
    module = importlib.import_module("sglang.srt.layers.attention.deepseek_v4_backend")
    pools = importlib.import_module("sglang.srt.mem_cache.deepseek_v4_memory_pool")
    stored = {}
    for name, size in {"swa": 128, "extra": 64}.items():
        stored[name] = torch.zeros(2, V4.page_bytes(size), dtype=torch.uint8)
        view = stored[name][:, : size * 584].view(2, size, 1, 584)
        quantize(torch.randn(2 * size, 512), view, torch.arange(2 * size))
        stored[name, "view"] = view
    ids = {name: torch.randint(-1, 128, (3, 64)).int() for name in ("swa", "extra")}
    lens = {"swa": torch.tensor([64, 5, 0]).int(), "extra": torch.tensor([9, 64, 0]).int()}
    pool = object.__new__(pools.DeepSeekV4TokenToKVPool)
    vars(pool).update(
        page_size=256, swa_window_size=128, swa_kv_pool=SimpleNamespace(kv_cache_total_dim=584),
        get_swa_key_buffer_radix=lambda layer: stored["swa"], get_extra_key_buffer=lambda layer: stored["extra"],
    )  # fmt: skip
    core = object.__new__(module.DSV4AttnMetadata)
    vars(core).update(
        swa_page_indices=ids["swa"], swa_topk_lengths=lens["swa"], c4_sparse_page_indices=ids["extra"],
        c4_sparse_topk_lengths=lens["extra"], c4_flashmla_metadata=module._create_flashmla_metadata(),
    )  # fmt: skip
    batch = sglang_trial.make_batch("cpu", (64,), width=256, page=64)
    backend = sglang_trial.bare_backend(
        module.DeepseekV4AttnBackend, batch, head_dim_v=512, softmax_scale=0.05, mtp_enabled=False,
        forward_metadata=SimpleNamespace(core_attn_metadata=core),
    )  # fmt: skip
    q, k, sink = (torch.randn(3, heads, 512) / 4).bfloat16(), torch.zeros(3, 512), torch.randn(heads)
    before = feature()["served"]
    out = backend.forward(
        q, k, k, SimpleNamespace(layer_id=0, v_head_dim=512), SimpleNamespace(token_to_kv_pool=pool), 4, False, sink
    )
    want, _ = sparse_decode_ref(
        q[:, None], stored["swa", "view"], ids["swa"][:, None], sm_scale=0.05, attn_sink=sink,
        topk_length=lens["swa"], extra_k_cache=stored["extra", "view"], extra_indices=ids["extra"][:, None],
        extra_topk_length=lens["extra"],
    )  # fmt: skip
    error = float((out.double() - want[:, 0]).norm() / want.norm())
    return {"served": feature()["served"] - before, "error": error, "without a key": float(out[2].abs().max())}


def noted(rows: list[list[str]], kind: str) -> Any:
    """In the place of a kernel's warm-up: what it was asked for, but for the device."""

    def warmup(device: Any, *args: Any) -> int:
        rows.append([kind, *map(str, args)])
        return 1

    return warmup


def warm_ups(release: str) -> dict[str, Any]:
    """Of each backend that calls FlashMLA: what ours is compiled for on another chip, by attributes of its own."""
    from mla_patch.hooks.sglang import flash_mla_providers as providers
    from mla_patch.hooks.sglang import sched_meta as hook
    from mla_patch.hooks.sglang.edits import flash_mla_reach as reach

    providers.capability_of = lambda tensor: (8, 9)
    runner = SimpleNamespace(device="cpu", model_config=SimpleNamespace(num_attention_heads=128))
    pool = SimpleNamespace(page_size=256, swa_kv_pool=SimpleNamespace(page_size=128, kv_cache_total_dim=584))
    impls = {"prefill": "flashmla_prefill", "decode": "flashmla_decode"} if release == "0.5.3" else IMPLS
    of_sparse = {f"{name}_{part}_impl": impl for name in ("nsa", "dsa") for part, impl in impls.items()}
    of_sparse |= {f"{name}_index_topk": 2048 for name in ("nsa", "dsa")}
    of_sparse |= {"num_q_heads": 16, "flashmla_kv_num_q_heads": 64, "device_sm_major": 8, "qk_rope_head_dim": 64}
    of_dense = {"num_q_heads": 16, "data_type": torch.bfloat16, "q_data_type": torch.bfloat16}
    of_dense |= {"kv_lora_rank": 512, "qk_rope_head_dim": 64}
    known = {
        "warm_dense": (of_dense, reach.dense_calls),
        "warm_v32": (of_sparse, reach.v32_calls),
        "warm_v4": ({"token_to_kv_pool": pool, "present_ratios": (4, 128)}, reach.v4_calls),
    }
    batch = sglang_trial.make_batch("cpu", (64,), width=256, page=64)
    warmed: dict[str, Any] = {}
    for target in hook.targets(release):
        if not target.name.endswith(".warmup"):
            continue
        module = importlib.import_module(target.module)
        name = target.edit.__name__
        owner = next(
            vars(module)[one]
            for one in ("FlashMLABackend", "NativeSparseAttnBackend", "DeepseekSparseAttnBackend",
                        "DeepseekV4AttnBackend")
            if one in vars(module) and vars(module)[one].__module__ == target.module
        )  # fmt: skip
        bare = sglang_trial.bare_backend(owner, batch)  # with every attribute that its __init__ sets
        given = {key: value for key, value in known[name][0].items() if key in vars(bare)}
        backend = sglang_trial.bare_backend(owner, batch, **given)
        scope = {f"NSA_{part.upper()}_IMPL": impl for part, impl in impls.items()}
        for key in scope.keys() & vars(module).get("__annotations__", {}).keys():
            setattr(module, key, scope[key])
        with ExitStack() as stack:
            rows = warmed[name] = []
            for kind, kernel in {"dense": dense_decode, "sparse": sparse_decode, "prefill": sparse_prefill}.items():
                stack.enter_context(mock.patch.object(kernel, "warmup", noted(rows, kind)))
            hook.warm(known[name][1](target.edit.args[0], backend, runner))
    return warmed


IMPLS = {"prefill": "flashmla_sparse", "decode": "flashmla_kv"}


def main(release: str, out: str) -> None:
    # what the stand-in lacks of sgl_kernel is stood in for once it has been looked for in vain
    sys.meta_path.append(sglang_trial.StubFinder(["sgl_kernel"]))
    sglang_trial.prepare()
    importlib.import_module("sglang")
    package = None
    if sglang_flash_mla.has_package() and release in (*PACKAGED, "0.5.12"):
        package = importlib.import_module("flash_mla")
    module = wrappers(release)
    seen: dict[str, Any] = {"ours": {name: is_ours(getattr(module, name)) for name in (*NAMES, PREFILL)}}
    kind = getattr(module, "FlashMLASchedMeta", None)
    seen["class"] = kind and kind.__module__
    backend = importlib.import_module("sglang.srt.layers.attention.flashmla_backend")
    seen["backend"] = {name: is_ours(getattr(backend, name)) for name in NAMES}
    from mla_patch.hooks.sglang import flash_mla_providers as providers

    tensors = {"tile_scheduler_metadata": torch.zeros(1, 8).int(), "num_splits": torch.arange(3).int()}
    tensors |= {"block_table": torch.empty(2, 0).int(), "cache_seqlens": torch.ones(2).int()}
    newer = {"block_table": None, "cache_seqlens": None, "num_splits": None}
    calls: dict[str, Any] = {}
    seen["prefill"] = {}
    for chip, capability in {"sm_90": (9, 0), "sm_120": (12, 0)}.items():
        providers.capability_of = lambda tensor, capability=capability: capability
        for heads in (64, 16):
            args = sparse(heads)
            row = served(lambda args=args: module.flash_mla_with_kvcache(**args, **tensors))
            calls[f"{chip} V3.2 {heads} heads"] = row
            if "result" in row:
                row["error"] = error(row.pop("result"), args)
        args, lens, sinks = sparse(64, V4), torch.tensor([64, 9]).int(), torch.randn(64)
        made = module.get_mla_metadata()[0]
        calls[f"{chip} class"] = {"is": isinstance(made, kind or mla_patch.flash_mla.FlashMLASchedMeta)}
        more = newer | {"tile_scheduler_metadata": made, "topk_length": lens, "attn_sink": sinks}
        row = served(lambda args=args, more=more: module.flash_mla_with_kvcache(**args, **more))
        calls[f"{chip} V4 lengths, sinks"] = row
        if "result" in row:
            row["error"] = error(row.pop("result"), args, topk_length=lens, attn_sink=sinks)
        row = served(lambda: module.get_mla_metadata(torch.ones(2).int(), 64, 1, 64, True, 64))
        row.pop("result", None)
        calls[f"{chip} metadata"] = row
        if release in PACKAGED:  # whose sparse prefill stays the package's
            continue
        for heads in (64, 16):
            seen["prefill"][f"{chip} {heads} heads"] = prefill(module, heads)
        more = {"attn_sink": torch.randn(64), "topk_length": torch.tensor([128, 9]).int()}
        seen["prefill"][f"{chip} sink, lengths"] = prefill(module, 64, **more)
    seen["calls"] = calls
    seen["through"] = through(release)
    seen["company"] = company(release)
    if release in PACKAGED:
        providers.capability_of = lambda tensor: (9, 0)
        seen["through dense"] = through_dense(16)
    if release == "0.5.12":
        importlib.import_module("sglang.srt.layers.attention.deepseek_v4_backend")
        seen["v4"] = through_v4(20)
    if package is not None:
        seen["package"] = {name: is_ours(getattr(package, name)) for name in NAMES}
        args = sparse(16, V4)
        more = newer | {"tile_scheduler_metadata": package.get_mla_metadata()[0]}
        row = served(lambda: package.flash_mla_with_kvcache(**args, **more))
        seen["package call"] = {"by": row["by"], "error": error(row["result"], args)}
    seen["warm"] = warm_ups(release)
    seen["feature"] = {key: feature()[key] for key in ("state", "reason")}
    seen["not taken"] = [one["name"] for one in feature()["targets"] if one["replaced_by"] is None]
    mla_patch.restore("sched_meta")
    seen["restored"] = [is_ours(getattr(one, name)) for one in (module, backend, package) if one for name in NAMES]
    seen["restored"].append(is_ours(getattr(module, PREFILL)))
    seen["class restored"] = hasattr(module, "FlashMLASchedMeta")
    Path(out).write_text(json.dumps(seen, indent=1))


PACKAGED = ("0.5.3", "0.5.4")  # which take all of FlashMLA from the flash_mla package
NAMES = ("get_mla_metadata", "flash_mla_with_kvcache")
PREFILL = "flash_mla_sparse_fwd"  # which flashmla_backend does not import


if __name__ == "__main__":
    main(*sys.argv[1:])
    sys.stdout.flush()
    os._exit(0)  # what a release leaves running at exit is not on trial
