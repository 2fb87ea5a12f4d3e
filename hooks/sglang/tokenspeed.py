"""SGLang's tokenspeed_mla backend on the releases without it, and a place where anybody's MLA kernels can be put in.

Why: the TokenSpeed kernels decode and prefill MLA over fp8 caches on Blackwell. SGLang has a backend for them from
0.5.12 to 0.5.22; 0.5.1 - 0.5.11 have none, and 0.5.23 makes another backend of its name.

`--attention-backend tokenspeed_mla` to 0.5.11, `tokenspeed_mla_patch` on every release; on 0.5.12 - 0.5.22 with
MLA_PATCH_TOKENSPEED=on, since there the host's own is good enough. The kernels are those of the package tokenspeed_mla
or of a plugin, each chosen by a variable. Nothing of this has run on a Blackwell.

Where this differs from upstream's backend: compute capability 12.x is refused, since the kernels are for 10.x alone;
the workspace is large enough for fewer than 8 heads as well; prompts always ask for the log-sum-exp, so that the
package's own warm-up compiles all that is used; a k_scale other than 1 is refused in decode too.
"""

from __future__ import annotations

import functools
import importlib.util
import inspect
import logging
import sys
import time
from importlib import import_module, metadata
from types import ModuleType
from typing import Any

from mla_patch.compat import gpu
from mla_patch.compat.sglang import tokenspeed as sglang_tokenspeed
from mla_patch.compat.sglang.release import supported
from mla_patch.compat.types import Change, Edit, Gpu, MlaBackendSpec, MlaDecode, MlaKernel, MlaPrefill
from mla_patch.features import Feature
from mla_patch.hooks.sglang.edits.mla_kernels import VARIABLES, offer
from mla_patch.hooks.sglang.edits.server_args import accept_backend_name, accept_other_backend_name
from mla_patch.hooks.sglang.edits.trtllm_backend import install_kernel_slot
from mla_patch.hookspecs import hookimpl

log = logging.getLogger("mla_patch")

PACKAGE = "tokenspeed_mla"
MIN_Q_LEN = 8  # query tokens of a request that the workspace is always large enough for
TILE = 128  # query heads x tokens that one tile of the newer kernels covers, whatever there are


def native(target: Change, version: str | None) -> str | None:
    """SGLang 0.5.12 - 0.5.22 have the backend."""
    return "the release has its own tokenspeed_mla backend" if sglang_tokenspeed.is_native(version) else None


def problem(device: Gpu | None) -> str | None:
    """Why the TokenSpeed kernels cannot run here, or None. Imports nothing: a server's first process asks."""
    if device is not None and (not device.cuda or device.capability[0] != 10):
        found = f"compute capability {device.capability[0]}.{device.capability[1]} ({device.name})"
        found = found if device.cuda else f"a GPU of another vendor ({device.name})"
        return f"its kernels need compute capability 10.x, found {found}"
    if PACKAGE not in sys.modules and importlib.util.find_spec(PACKAGE) is None:
        return "the package tokenspeed_mla is not installed: pip install tokenspeed-mla"
    return None


def targets(version: str | None) -> tuple[Edit, ...]:
    """The arguments that name the backend, and the backend that becomes ours."""
    both = sglang_tokenspeed.NAME in sglang_tokenspeed.free_names(version)
    accept = accept_backend_name if both else accept_other_backend_name
    return (
        Edit(sglang_tokenspeed.ARGUMENTS, "ServerArgs.backend", accept),
        Edit(sglang_tokenspeed.BACKEND, "TRTLLMMLABackend.kernels", install_kernel_slot, counts_calls=True),
    )


FEATURE = Feature(
    name="tokenspeed",
    host=supported(),
    targets=targets,
    why="the release has no attention backend for the TokenSpeed MLA kernels",
    upstream="https://github.com/sgl-project/sglang/pull/24925",
    drop_when="the engine lets a plugin choose the kernels of its TRT-LLM MLA backend",
    native=native,
    marks=(sglang_tokenspeed.OWN_BACKEND,),
    promises="deterministic inference: the backend is refused when the engine reads its arguments, because nobody has "
    "shown that results of these kernels are independent of the batch. The engine refuses trtllm_mla and "
    "tokenspeed_mla in this mode, too",
    variables=tuple(VARIABLES.values()),
)
_HERE = "mla_patch.hooks.sglang.tokenspeed"
KERNEL = MlaKernel(PACKAGE, f"{_HERE}:decode", f"{_HERE}:prefill", problem, f"{_HERE}:prepare")


@hookimpl
def mla_patch_features() -> list[Feature]:
    return [FEATURE]


@hookimpl
def mla_patch_mla_kernels() -> list[MlaKernel]:
    return [KERNEL]


@hookimpl
def mla_patch_begin(kernels: list[MlaKernel]) -> None:
    offer(kernels)


_USED = {
    "get_num_sm": {"device"},
    "tokenspeed_mla_decode": {
        "query", "kv_cache", "workspace_buffer", "kv_lora_rank", "qk_rope_head_dim", "block_tables", "seq_lens",
        "max_seq_len", "softmax_scale", "output_scale", "enable_pdl",
    },
    "tokenspeed_mla_prefill": {
        "query", "key", "value", "seq_lens", "cum_seq_lens", "max_seq_len", "batch_size", "softmax_scale", "is_causal",
        "return_lse", "cum_seq_lens_q", "max_seq_len_q", "enable_pdl",
    },
}  # fmt: skip
_WARM = {"q_dtype", "d_qk", "d_v", "enable_pdl"}
_PRIVATE = ("_compile_prefill_kernel", "_compiled_kernels", "_enable_ex2_emulation")


@functools.lru_cache(maxsize=1)
def package() -> ModuleType:
    """tokenspeed_mla, once it has all that is used of it.

    Raises:
        ImportError: it lacks something, or what it needs itself; says which version that is.
    """
    module = import_module(PACKAGE)
    missing = shortfall(module)
    if missing is not None:
        try:
            version = metadata.version("tokenspeed-mla")
        except metadata.PackageNotFoundError:
            version = "of unknown version"
        raise ImportError(f"tokenspeed_mla {version} cannot be used: {missing}")
    return module


def shortfall(module: ModuleType) -> str | None:
    """What a tokenspeed_mla lacks of what is used, or None; asked of its functions, not of its version."""
    for name, names in _USED.items():
        function = getattr(module, name, None)
        if function is None:
            return f"it has no {name}"
        taken = set(inspect.signature(function).parameters)
        if taken == {"args", "kwargs"}:  # what it puts there when its own imports fail
            cause = getattr(module, "_IMPORT_ERROR", None)
            return f"its requirements are not installed ({cause or 'its own imports failed'})"
        if not names <= taken:
            return f"{name} takes no {', '.join(sorted(names - taken))}"
    if _public_warmup(module) is None and not all(hasattr(_prefill_module(module), name) for name in _PRIVATE):
        return "its prefill cannot be compiled in advance"
    return None


def _public_warmup(module: ModuleType) -> Any:
    function = getattr(module, "warmup_compile_prefill", None)
    return function if function is not None and set(inspect.signature(function).parameters) >= _WARM else None


def _prefill_module(module: ModuleType) -> Any:
    return getattr(module, "mla_prefill", None)


def workspace_bytes(multiprocessors: int, heads: int, q_len: int, kv_lora_rank: int) -> int:
    """Enough for any batch: splits x requests are at most the multiprocessors, and one split of one request keeps a
    row of float32 and its log-sum-exp for each head and query token, or for each row of whole tiles of them."""
    rows = max(heads * max(MIN_Q_LEN, q_len), TILE * -(-heads * q_len // TILE))
    return multiprocessors * rows * (kv_lora_rank + 1) * 4


def workspace(seam: MlaBackendSpec, q_len: int) -> Any:
    """One call's int8 scratch, large enough for ``q_len`` query tokens of a request.

    It is kept for no later call: two graphs that share it would overwrite each other's, and torch's allocator gives
    every stream and every graph's pool its own.
    """
    import torch

    need = workspace_bytes(package().get_num_sm(seam.device), seam.heads, q_len, seam.kv_lora_rank)
    return torch.empty(need, dtype=torch.int8, device=seam.device)


def _use_pdl(device: Any) -> bool:
    return device.type == "cuda" and gpu.capability(gpu.index_of(device)) >= (9, 0)


def prepare(seam: MlaBackendSpec, parts: frozenset[str]) -> None:
    """Before a backend serves: its prefill compiled, which takes minutes and is done once."""
    module = package()
    if "prefill" not in parts or not seam.has_prefill:
        return
    import torch

    dtype = torch.float8_e4m3fn
    pdl = _use_pdl(seam.device)
    log.info("mla-patch: tokenspeed_mla: compiling its prefill, with and without a causal mask: a minute or two each")
    start = time.perf_counter()
    public = _public_warmup(module)
    if public is not None:
        public(q_dtype=dtype, d_qk=seam.head_dim, d_v=seam.v_head_dim, enable_pdl=pdl)
    else:
        _compile_privately(_prefill_module(module), dtype, seam.head_dim, seam.v_head_dim, pdl)
    log.info("mla-patch: tokenspeed_mla: prefill compiled in %.0f s", time.perf_counter() - start)


def _compile_privately(prefills: Any, dtype: Any, d_qk: int, d_v: int, pdl: bool) -> None:
    """What its public warm-up does, where there is none: the two variants that return the log-sum-exp."""
    emulate = prefills._enable_ex2_emulation()
    for causal in (True, False):
        key = (dtype, d_qk, d_v, causal, True, pdl, emulate)
        if key not in prefills._compiled_kernels:
            prefills._compiled_kernels[key] = prefills._compile_prefill_kernel(
                dtype, d_qk, d_v, causal, True, use_pdl=pdl, enable_ex2_emulation=emulate
            )


def decode(call: MlaDecode) -> Any:
    seam = call.seam
    return package().tokenspeed_mla_decode(
        query=call.query.contiguous(),
        kv_cache=call.kv_cache,
        workspace_buffer=workspace(seam, call.query.shape[1]),
        kv_lora_rank=seam.kv_lora_rank,
        qk_rope_head_dim=seam.qk_rope_head_dim,
        block_tables=call.block_tables.contiguous(),
        seq_lens=call.seq_lens,
        max_seq_len=call.max_seq_len,
        softmax_scale=call.softmax_scale,
        output_scale=1.0,
        enable_pdl=_use_pdl(seam.device),
    )


def prefill(call: MlaPrefill) -> Any:
    """Always with the log-sum-exp: the variants without it are not compiled ahead."""
    import torch

    result = package().tokenspeed_mla_prefill(
        query=call.q.contiguous(),
        key=call.k.contiguous(),
        value=call.v.contiguous(),
        seq_lens=call.seq_lens_kv.to(torch.int32),
        cum_seq_lens=call.cum_seq_lens_kv.to(torch.int32),
        max_seq_len=call.max_kv_len,
        batch_size=call.batch_size,
        softmax_scale=call.softmax_scale,
        is_causal=call.is_causal,
        return_lse=True,
        cum_seq_lens_q=call.cum_seq_lens_q.to(torch.int32),
        max_seq_len_q=call.max_q_len,
        enable_pdl=_use_pdl(call.seam.device),
    )
    return result if call.return_lse else result[0]
