"""tests/hosts/reviewed.json: what each reviewed release's source says of the places that our tables name.

    python tests/hosts/reviewed.py --write      fetch every release and write the file (`make reviewed`)

Names alone, no code: parameters of the functions that we replace or edit, in which releases; which releases have a
module; where a module takes FlashMLA from; which releases' backends look at scales; what a release pins.
`tests/compat/test_reviewed.py` holds the tables of compat against it, without a network.
"""

from __future__ import annotations

import ast
import json
import re
import sys
from collections import defaultdict
from functools import cache
from pathlib import Path
from typing import Any

import hosts

from mla_patch import sources
from mla_patch.compat.sglang import deterministic
from mla_patch.compat.sglang import flash_mla as sglang_flash_mla
from mla_patch.compat.sglang import release as sglang
from mla_patch.compat.sglang import tokenspeed as sglang_tokenspeed
from mla_patch.drive.sglang_fetch import fetch_files, fetch_package
from mla_patch.hooks.sglang import decode as sglang_decode
from mla_patch.hooks.sglang import decode_backends as sglang_decode_backends
from mla_patch.hooks.sglang import kv_cast as sglang_kv_cast
from mla_patch.hooks.sglang import kv_indices as sglang_kv_indices
from mla_patch.hooks.sglang import sched_meta as sglang_sched_meta
from mla_patch.hooks.sglang import sparse_prefill as sparse_prefill_hook
from mla_patch.hooks.sglang import tokenspeed as tokenspeed_hook
from mla_patch.hooks.sglang.edits import graphs as sglang_graphs

PATH = hosts.HERE / "reviewed.json"
TABLES = {
    "decode": sglang_decode.triton_targets,
    "decode of other backends": sglang_decode_backends.targets,
    "kv_cast": sglang_kv_cast.targets,
    "kv_indices": sglang_kv_indices.targets,
    "sched_meta": sglang_sched_meta.targets,
    "sparse_prefill": sparse_prefill_hook.targets,
    "tokenspeed": tokenspeed_hook.targets,
    "graphs": sglang_graphs.step_targets,
}
_SRT = "sglang.srt.layers.attention"
# what edits change or rely on, beside the entry points that targets name
EDITED = {
    f"{_SRT}.deepseek_v4_backend": (
        "DeepseekV4AttnBackend.__init__", "DeepseekV4AttnBackend.forward", "DeepseekV4AttnBackend._forward_attention",
        "DeepseekV4AttnBackend._forward_prefill_sparse", "DeepseekV4AttnBackend.init_forward_metadata",
        "DSV4Metadata.copy_",
    ),
    f"{_SRT}.dsv4.indexer": ("topk_transform_512",),
    f"{_SRT}.flashattention_backend": ("FlashAttentionBackend.__init__",),
    f"{_SRT}.flashinfer_mla_backend": ("FlashInferMLAAttnBackend.__init__",),
    f"{_SRT}.flashmla_backend": ("FlashMLABackend.__init__", "FlashMLABackend.forward_extend"),
    f"{_SRT}.nsa_backend": ("NativeSparseAttnBackend.__init__",),
    f"{_SRT}.dsa_backend": ("DeepseekSparseAttnBackend.__init__",),
    f"{_SRT}.triton_backend": ("TritonAttnBackend.__init__",),
    f"{_SRT}.trtllm_mla_backend": ("TRTLLMMLABackend.__init__",),
    "sglang.srt.model_executor.model_runner": ("ModelRunner.forward",),
    "sglang.srt.model_executor.cuda_graph_runner": ("CudaGraphRunner.capture_one_batch_size",),
    "sglang.srt.model_executor.runner.decode_cuda_graph_runner": ("DecodeCudaGraphRunner._make_graph_key",),
}  # fmt: skip
# names in a backend's source that tell what it does with an 8-bit cache
MENTIONED = {f"{_SRT}.flashmla_backend": ("k_scale",)}
IMPORTERS = (f"{_SRT}.flashmla_backend", f"{_SRT}.deepseek_v4_backend")
FLASH_MLA = ("flash_mla", "flash_mla.flash_mla_interface", "sgl_kernel.flash_mla", sglang_flash_mla.INTERFACE)
SWITCH = "SGLANG_OPT_FLASHMLA_SPARSE_PREFILL"


def names() -> dict[str, set[str]]:
    """Functions to look for, by module: all that any release's targets name, and what is edited."""
    found: dict[str, set[str]] = defaultdict(set)
    for targets in TABLES.values():
        for release in (*hosts.REVIEWED, None):
            for one in targets(release):
                if one.kind != "edit" and one.module.startswith("sglang."):
                    found[one.module].add(one.name)
    for module, some in EDITED.items():
        found[module] |= set(some)
    return found


def modules() -> set[str]:
    """Modules whose being there decides something."""
    found = {one.module for targets in TABLES.values() for release in hosts.REVIEWED for one in targets(release)}
    found |= {name for _, some in sglang.HOST.marks for name in some} | {sglang_tokenspeed.OWN_BACKEND.module}
    found |= {deterministic.OPS}
    return {name for name in found if name.startswith("sglang.")}


@cache
def root(release: str) -> Path:
    return fetch_package("sglang", release)


def source(release: str, module: str) -> Path | None:
    path = root(release).joinpath(*module.split("."))
    options = (path.with_suffix(".py"), path / "__init__.py")
    return next((one for one in options if one.is_file()), None)


def imported(path: Path) -> set[str]:
    """Modules of which an import stands anywhere in a file, also where the name is imported from its package."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def is_on(release: str) -> bool | None:
    """What V4's own switch is by default, or None where there is none."""
    path = source(release, "sglang.srt.environ")
    found = path and re.search(rf"{SWITCH} = EnvBool\((True|False)\)", path.read_text(encoding="utf-8"))
    return found.group(1) == "True" if found else None


def pin(release: str) -> str:
    """The kernel package that a release asks for."""
    text = next(root(release).glob("sglang-*.dist-info/METADATA")).read_text(encoding="utf-8")
    found = re.search(r"^Requires-Dist: (sgl(?:ang)?-kernel)\s*\(?==\s*([\w.]+)", text, re.MULTILINE)
    return " ".join(found.groups()) if found else ""


def wrappers(wheel: str) -> dict[str, str]:
    """FlashMLA's calls in a kernel wheel; whether it has the newer API's class."""
    module = sglang_flash_mla.PACKAGE if wheel.startswith("sgl-flash-mla") else sglang_flash_mla.SGL_KERNEL
    path = fetch_files(*wheel.split(), hosts.WHEEL_FILES).joinpath(*module.split(".")).with_suffix(".py")
    have = sources.read_module(str(path)).params
    wanted = ("get_mla_metadata", "flash_mla_with_kvcache", "flash_mla_sparse_fwd")
    newer = "class FlashMLASchedMeta" in path.read_text(encoding="utf-8")
    return {"module": module, "newer": str(newer)} | {name: " ".join(have[name]) for name in wanted}


def read() -> dict[str, Any]:
    told: dict[str, Any] = {"functions": {}, "modules": {}, "imports": {}, "mentions": {}, "switch": {}, "pins": {}}
    told["wheels"] = {wheel: wrappers(wheel) for wheel in hosts.WHEELS}
    wanted = names()
    for release in hosts.REVIEWED:
        print(f"SGLang {release}", file=sys.stderr)
        for module in sorted(wanted):
            path = source(release, module)
            have = sources.read_module(str(path)).params if path else {}
            for name in sorted(wanted[module] & set(have)):
                eras = told["functions"].setdefault(f"{module}:{name}", [])
                params = " ".join(have[name])
                for era in eras:
                    if era["params"] == params:
                        era["releases"].append(release)
                        break
                else:
                    eras.append({"params": params, "releases": [release]})
        for module in sorted(modules()):
            if source(release, module):
                told["modules"].setdefault(module, []).append(release)
        for module in IMPORTERS:
            path = source(release, module)
            for name in sorted(imported(path) & set(FLASH_MLA)) if path else ():
                told["imports"].setdefault(f"{module} <- {name}", []).append(release)
        for module, some in MENTIONED.items():
            path = source(release, module)
            text = path.read_text(encoding="utf-8") if path else ""
            for name in some:
                if re.search(rf"\b{name}\b", text):
                    told["mentions"].setdefault(f"{module} {name}", []).append(release)
        on = is_on(release)
        if on is not None:
            told["switch"].setdefault("on" if on else "off", []).append(release)
        told["pins"][release] = pin(release)
    for part in ("functions", "modules", "imports", "mentions"):
        told[part] = dict(sorted(told[part].items()))
    for eras in told["functions"].values():
        for era in eras:
            era["releases"] = " ".join(era["releases"])
    for part in ("modules", "imports", "mentions", "switch"):
        told[part] = {name: " ".join(releases) for name, releases in told[part].items()}
    return told


if __name__ == "__main__":
    text = json.dumps(read(), indent=1) + "\n"
    if sys.argv[1:] == ["--write"]:
        PATH.write_text(text, encoding="utf-8")
    else:
        print(text, end="")
