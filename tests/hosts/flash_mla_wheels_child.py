"""The wrapper file of one kernel wheel, with or without its operators, under SGLang and MLA_PATCH=1.

    python flash_mla_wheels_child.py RELEASE OUT.json      with the release and the wrapper on PYTHONPATH

Who makes a schedule, of which class it is, and who serves a call with it. Where ``given.json`` beside
the wrapper is not empty, its extension loads, with operators that answer with zeros.
"""

import importlib
import json
import os
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

sys.path.pop(0)  # this folder: a host must not find our modules by their plain names

import torch

import mla_patch
import mla_patch.startup
from mla_patch.compat.sglang import flash_mla as sglang_flash_mla
from mla_patch.drive import sglang as sglang_trial
from mla_patch.hooks.sglang import flash_mla_providers as providers
from mla_patch.kernels.cache.layouts import V4, new_pages
from mla_patch.kernels.cache.quantize import quantize
from mla_patch.kernels.sparse import sparse_decode_ref

libraries = []  # which torch forgets with them


def operators(namespace: str, newest: bool) -> None:
    """Operators that the calls below reach, with the arguments of the wheels' and results of zeros."""
    library = torch.library.Library(namespace, "FRAGMENT")
    libraries.append(library)

    def schedule(lens: torch.Tensor, *rest: Any) -> tuple[torch.Tensor, torch.Tensor]:
        return lens.new_full((1, 8), 7), lens.new_full((len(lens) + 1,), 7)

    def decode(q: torch.Tensor, *rest: Any) -> tuple[torch.Tensor, ...]:
        batch, queries, heads, _ = q.shape
        schedule = torch.zeros(1, 8, dtype=torch.int32), torch.zeros(batch + 1, dtype=torch.int32)
        return q.new_zeros(batch, queries, heads, 512), torch.zeros(batch, heads, queries), *schedule

    def prefill(q: torch.Tensor, *rest: Any) -> tuple[torch.Tensor, ...]:
        return q.new_zeros(*q.shape[:2], 512), torch.zeros(q.shape[:2]), torch.zeros(q.shape[:2])

    sparse = "Tensor q, Tensor k, Tensor i, Tensor? l, Tensor? s, Tensor? a, Tensor? b, Tensor? xk, Tensor? xi, "
    sparse += "Tensor? xl, int d, float scale" + (", str? f" if newest else "")
    prompt = "Tensor q, Tensor k, Tensor i, float s, int d, Tensor? a, Tensor? l"
    prompt += ", bool log2, bool statistics" if namespace == "flash_mla_legacy" else ""
    for name, arguments, results, function in (
        ("get_mla_decoding_metadata", "Tensor l, int t, int k, int? h, bool f, int? n", 2, schedule),
        ("sparse_decode_fwd", sparse, 4, decode),
        ("sparse_prefill_fwd", prompt, 3, prefill),
    ):
        library.define(f"{name}({arguments}) -> ({', '.join(['Tensor'] * results)})")
        library.impl(name, function, "CPU")


def load(folder: Path, package: bool, given: list[str]) -> None:
    """Let the wrapper find its extension, or not."""
    if not package:
        if given:
            sys.modules["sgl_kernel.flashmla_ops"] = ModuleType("sgl_kernel.flashmla_ops")
            operators("sgl_kernel", "newest" in given)
        return

    def load_library(path: str) -> None:
        if "legacy" in path and not given:
            raise OSError("undefined symbol: as with another torch")
        if "legacy" in path:
            operators("flash_mla_legacy", True)

    torch.ops.load_library = load_library


def feature() -> dict[str, Any]:
    return next(row for row in mla_patch.report()["features"] if row["name"] == "sched_meta")


def by(call: Any) -> tuple[str, Any]:
    before = feature()["served"]
    result = call()
    return ("triton" if feature()["served"] > before else "host"), result


def main(release: str, out: str) -> None:
    package = release == "0.5.23"
    top = "flash_mla" if package else "sgl_kernel"
    folder = next(path for path in map(Path, sys.path) if (path / top).is_dir() and (path / "given.json").exists())
    load(folder, package, json.loads((folder / "given.json").read_text()))
    sys.meta_path.append(sglang_trial.StubFinder(["sgl_kernel"]))
    mla_patch.startup.start()
    sglang_trial.prepare()
    importlib.import_module("sglang")
    module = importlib.import_module(sglang_flash_mla.INTERFACE if package else sglang_flash_mla.SGL_KERNEL)
    providers.capability_of = lambda tensor: (9, 0)  # an H200, on which the wheel's operators serve these calls

    seen: dict[str, Any] = {"state": feature()["state"]}
    seen["schedule by"], (meta, nothing) = by(module.get_mla_metadata)
    assert nothing is None
    seen["of the class"] = type(meta) is module.FlashMLASchedMeta
    seen["class"] = type(meta).__module__
    v4 = importlib.import_module("sglang.srt.layers.attention.deepseek_v4_backend")
    seen["V4's"] = type(v4._create_flashmla_metadata()) is module.FlashMLASchedMeta

    cache = new_pages(V4, 2, 64)
    quantize(torch.randn(128, 512), cache, torch.arange(128))
    q = (torch.randn(2, 1, 64, 512) / 4).bfloat16()
    ids, lens, sink = torch.randint(-1, 128, (2, 1, 64)).int(), torch.tensor([64, 9]).int(), torch.randn(64)
    seen["decode by"], (got, _) = by(
        lambda: module.flash_mla_with_kvcache(
            q, cache, None, None, 512, meta, softmax_scale=0.05, is_fp8_kvcache=True, indices=ids, topk_length=lens,
            attn_sink=sink,
        )
    )  # fmt: skip
    want, _ = sparse_decode_ref(q, cache, ids, sm_scale=0.05, topk_length=lens, attn_sink=sink)
    seen["error"] = float((got.double() - want).norm() / want.norm())
    seen["recorded"] = [meta.have_initialized, type(meta.config) is module.FlashMLASchedMeta.Config, meta.config.topk]
    seen["tensors by"], (schedule, _) = by(
        lambda: module.get_mla_metadata(torch.tensor([64, 9]).int(), 64, 1, 64, True, 64)
    )
    seen["tensors"] = int(schedule.max())
    seen["prefill by"], _ = by(
        lambda: module.flash_mla_sparse_fwd(q[:, 0], torch.randn(9, 1, 512).bfloat16(), ids.repeat(1, 1, 2) % 9, 0.05)
    )
    Path(out).write_text(json.dumps(seen, indent=1))


if __name__ == "__main__":
    main(*sys.argv[1:])
    sys.stdout.flush()
    os._exit(0)  # what a release leaves running at exit is not on trial
