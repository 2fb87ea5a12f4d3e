"""Drive a real SGLang release's own code on a made-up batch, with or without a GPU.

SGLang expects CUDA, its kernel packages and a loaded model. Its index builders and its Triton backend need
none of them: ``prepare`` makes the release importable by standing in for what cannot be imported, each route
below hands one attention backend a few request lengths and lets *its* method launch the builder, and
``DecodeTrial`` stores latents through the backend's own methods into the host's own pool and decodes from there.

Used by ``mla-patch demo`` and by the tests on real releases. Nothing here replaces a kernel, and
nothing here runs in a serving process.
"""

from __future__ import annotations

import copy
import dis
import functools
import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import inspect
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest import mock

import torch

from mla_patch.compat import interpreter
from mla_patch.compat.sglang import kv_indices
from mla_patch.compat.triton import interpreted

TOKEN_IDS = "create_flashinfer_kv_indices_triton"
PAGE_TABLE = "create_flashmla_kv_indices_triton"

# 1, exact pages of 32, 64 and 128, one token to either side, and rows longer than a 4096-token block
LENGTHS = (1, 64, 4097, 63, 128, 9000, 65, 4096, 31)

# Imported names that a CPU-only machine lacks; an attribute left out is a class that accepts anything.
_STUBS: dict[str, dict[str, Any]] = {
    "sgl_kernel": {},
    "torchvision": {"__version__": "0.28.0"},  # transformers compares it
    "flash_mla": {},
    "vllm": {},
    "IPython": {},
    "uvicorn": {},
}
# Installed is not importable: a CPU torch beside these fails at their import, so they are tried first.
_TRIED = ("torchvision", "sgl_kernel", "flash_mla")


class _Anything(type):
    """Classes stand in best for unknown names: they can be called, subclassed and used in annotations."""

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Anything(name, (_Stub,), {})


class _Stub(metaclass=_Anything):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return args[0] if len(args) == 1 and callable(args[0]) else self  # a decorator gives back what it decorates

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Stub()


class _StubFinder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Yields an empty package, at any depth, for each top-level name that it was told to stand in for."""

    def __init__(self, names: Sequence[str]) -> None:
        self.names = frozenset(names)

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        if fullname.partition(".")[0] not in self.names:
            return None
        return importlib.machinery.ModuleSpec(fullname, self, is_package=True)

    def exec_module(self, module: ModuleType) -> None:
        vars(module).update(_STUBS.get(module.__name__, {}))

        def missing(name: str) -> Any:
            if name.startswith("__"):
                raise AttributeError(name)
            return _Anything(name, (_Stub,), {})

        vars(module)["__getattr__"] = missing


def prepare() -> list[str]:
    """Make ``import sglang`` work here; the names that stubs stand in for. Installs nothing that is not needed."""
    stubbed = [name for name in _STUBS if name not in sys.modules and not _importable(name)]
    if stubbed:
        sys.meta_path.insert(0, _StubFinder(stubbed))
    if "sgl_kernel" in stubbed:
        _leave_operators_undescribed()
    _add_missing_names()
    if interpreted():
        interpreter.quicken()
    # 0.4.x compiles small helpers at import, which needs a C++ compiler and gains nothing here
    os.environ.setdefault("SGLANG_ENABLE_TORCH_COMPILE", "false")
    return stubbed


def _importable(name: str) -> bool:
    if importlib.util.find_spec(name) is None:
        return False
    if name not in _TRIED:
        return True
    try:
        importlib.import_module(name)
    except Exception:
        for loaded in [loaded for loaded in sys.modules if loaded.partition(".")[0] == name]:
            del sys.modules[loaded]
        return False
    return True


def _leave_operators_undescribed() -> None:
    """Where it finds a GPU the host describes sgl_kernel's operators to torch, and a stub registers none."""
    register = torch.library.register_fake

    @functools.wraps(register)
    def register_fake(op: Any, func: Any = None, /, **more: Any) -> Any:
        if isinstance(op, str) and op.startswith("sgl_kernel::"):
            return func or (lambda described: described)
        return register(op, func, **more)

    torch.library.register_fake = register_fake


def _add_missing_names() -> None:
    """Names that old releases take from Triton and torch, and newer ones of those no longer have."""
    import triton.runtime.cache as cache

    for name in ("default_cache_dir", "default_dump_dir", "default_override_dir"):
        if not hasattr(cache, name):
            setattr(cache, name, lambda: os.path.expanduser("~/.triton"))
    cpu = getattr(torch._C, "_cpu", None)
    if cpu is not None and not hasattr(cpu, "_is_amx_tile_supported"):
        cpu._is_amx_tile_supported = lambda: False


class _TorchOn:
    """``torch``, with ``torch.empty`` on the given device whatever the caller names."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)

    def empty(self, *args: Any, device: Any = None, **kwargs: Any) -> torch.Tensor:
        return torch.empty(*args, device=self._device, **kwargs)


@dataclass(frozen=True)
class Batch:
    """Requests as SGLang keeps them: a wide table of token slots, one row each, in no particular order."""

    lens: torch.Tensor  # [n] int64
    rows: torch.Tensor  # [n] int64, each request's row of the table
    table: torch.Tensor  # [rows, width] int32, token slots; those of one page are consecutive
    lens_list: tuple[int, ...]

    @property
    def device(self) -> torch.device:
        return self.lens.device


def make_batch(device: str, lens: Sequence[int] = LENGTHS, width: int = 16384, page: int = 128, seed: int = 0) -> Batch:
    """Requests of ``lens`` tokens whose pages lie anywhere in the pool; slots past a length are poison."""
    rng = torch.Generator().manual_seed(seed)
    count, pages = len(lens) + 3, -(-width // page)
    first = torch.randperm(count * pages, generator=rng).view(count, pages) * page
    table = (first[:, :, None] + torch.arange(page)).view(count, -1)[:, :width].to(torch.int32)
    rows = torch.randperm(count, generator=rng)[: len(lens)]
    for row, length in zip(rows.tolist(), lens, strict=True):
        table[row, length:] = -7
    return Batch(torch.tensor(lens).to(device), rows.to(device), table.contiguous().to(device), tuple(lens))


@dataclass(frozen=True)
class Trial:
    """What one of the host's methods built, and what it ought to have built."""

    route: str  # "triton_backend decode"
    builder: str  # the kernel's name in the host
    out: torch.Tensor
    expected: torch.Tensor

    @property
    def wrong(self) -> int:
        """How many entries differ from the definition."""
        return int((self.out != self.expected).sum())


def expected_token_ids(batch: Batch, lens: Sequence[int]) -> torch.Tensor:
    """The definition: every request's slots, one request after the other."""
    return torch.cat([batch.table[row, :length] for row, length in zip(batch.rows.tolist(), lens, strict=True)]).long()


def expected_page_table(batch: Batch, page: int, width: int) -> torch.Tensor:
    """The definition: the page of every page's first token; the host fills the rest with -1."""
    out = torch.full((len(batch.lens_list), width), -1, dtype=torch.int32, device=batch.device)
    for i, (row, length) in enumerate(zip(batch.rows.tolist(), batch.lens_list, strict=True)):
        slots = batch.table[row, :length:page]
        out[i, : len(slots)] = slots // page
    return out


def token_ids_decode(batch: Batch) -> Trial:
    """Flat token ids, as the Triton backend builds them for a decode step."""
    backend = _triton_backend(batch)
    backend.init_forward_metadata(_forward_batch(batch, "DECODE", backend))
    out = backend.forward_metadata.kv_indices
    return Trial("triton_backend decode", TOKEN_IDS, out, expected_token_ids(batch, batch.lens_list))


def token_ids_extend(batch: Batch) -> Trial:
    """Flat token ids of the cached prefixes, as the Triton backend builds them for a prefill step."""
    prefix = [length // 2 for length in batch.lens_list]
    backend = _triton_backend(batch)
    backend.init_forward_metadata(_forward_batch(batch, "EXTEND", backend, prefix))
    out = backend.forward_metadata.kv_indices
    return Trial("triton_backend extend", TOKEN_IDS, out, expected_token_ids(batch, prefix))


def page_table_flashmla(batch: Batch) -> Trial:
    """A page table of 64-token pages, as the FlashMLA backend builds it for a decode step."""
    module = importlib.import_module("sglang.srt.layers.attention.flashmla_backend")
    backend = _backend(
        module.FlashMLABackend, batch, num_q_heads=16, page_size=64, max_context_len=batch.table.shape[1]
    )
    # FlashMLA's own schedule is not on trial, and without its package there is none
    with mock.patch.object(module, "get_mla_metadata", lambda *args, **kwargs: (None, None)):
        backend.init_forward_metadata(_forward_batch(batch, "DECODE", backend))
    out = backend.forward_metadata.block_kv_indices
    return Trial("flashmla_backend decode", PAGE_TABLE, out, expected_page_table(batch, 64, out.shape[1]))


def page_table_cutlass(batch: Batch) -> Trial:
    """A page table of 128-token pages, as the Cutlass MLA backend builds it for a decode step."""
    module = importlib.import_module("sglang.srt.layers.attention.cutlass_mla_backend")
    backend = _backend(module.CutlassMLABackend, batch)
    with ExitStack() as stack:
        # the backend sizes and allocates a workspace, on "cuda" by name, which nothing here reads
        stack.enter_context(
            mock.patch.object(module, "cutlass_mla_get_workspace_size", lambda *args, **kwargs: 0, create=True)
        )
        stack.enter_context(mock.patch.object(module, "torch", _TorchOn(batch.device)))
        backend.init_forward_metadata(_forward_batch(batch, "DECODE", backend))
    out = backend.forward_metadata.block_kv_indices
    return Trial("cutlass_mla_backend decode", PAGE_TABLE, out, expected_page_table(batch, 128, out.shape[1]))


def page_table_trtllm(batch: Batch, page: int) -> Trial:
    """A page table of ``page``-token pages, as the TRT-LLM MLA backend builds it."""
    module = importlib.import_module("sglang.srt.layers.attention.trtllm_mla_backend")
    backend = _backend(module.TRTLLMMLABackend, batch, page_size=page, _kernel_page_multiplier=1)
    given = {
        "plan": _forward_batch(batch, "DECODE", backend).kv_loc_plan,
        "batch_size": len(batch.lens_list),
        "max_blocks": backend._calc_padded_blocks(max(batch.lens_list)),
        "req_pool_indices": batch.rows,
        "seq_lens": batch.lens,
        "device": batch.device,
    }
    names = inspect.signature(backend._create_block_kv_indices).parameters
    out = backend._create_block_kv_indices(**{name: given[name] for name in names})
    return Trial(f"trtllm_mla_backend page {page}", PAGE_TABLE, out, expected_page_table(batch, page, out.shape[1]))


ROUTES: dict[str, Callable[[Batch], Trial]] = {
    "triton_backend decode": token_ids_decode,
    "triton_backend extend": token_ids_extend,
    "flashmla_backend decode": page_table_flashmla,
    "cutlass_mla_backend decode": page_table_cutlass,
    "trtllm_mla_backend page 32": lambda batch: page_table_trtllm(batch, 32),
    "trtllm_mla_backend page 64": lambda batch: page_table_trtllm(batch, 64),
}


def run(route: str, batch: Batch) -> Trial:
    """Let the host build ``batch``'s indices by one of ``routes``."""
    with _one_rank(), _poisoned_memory():
        return ROUTES[route](batch)


def routes() -> Iterator[str]:
    """The routes whose backend exists in the SGLang on this path."""
    for route in ROUTES:
        if importlib.util.find_spec(f"sglang.srt.layers.attention.{route.split()[0]}") is not None:
            yield route


# name -> dtype of the cache, and the scale of every layer; the models' own dtype is float16
CACHES: dict[str, tuple[torch.dtype, float | None]] = {
    "float16": (torch.float16, None),
    "e4m3": (torch.float8_e4m3fn, None),
    "e5m2": (torch.float8_e5m2, None),
    "e4m3 k_scale 0.5": (torch.float8_e4m3fn, 0.5),
}
DECODE_LENGTHS = (1, 32, 97, 64, 130)


class DecodeTrial:
    """One decode step through the host's ``TritonAttnBackend`` over latents that it stored in its own pool."""

    def __init__(
        self, cache: str, device: str = "cpu", heads: int = 16, lens: Sequence[int] = DECODE_LENGTHS, seed: int = 0,
        deterministic: bool = False,
    ) -> None:  # fmt: skip
        """``deterministic``: as a server with --enable-deterministic-inference has its backend, in smaller tiles."""
        dtype, self.scale = CACHES[cache]
        rng = torch.Generator().manual_seed(seed)
        self.batch = batch = make_batch(device, lens, width=max(256, -(-max(lens) // 64) * 64), page=64)
        self.q = torch.randn(len(lens), heads * 576, generator=rng).to(device, torch.float16)
        self.slots = expected_token_ids(batch, lens)
        self.latents = torch.randn(len(self.slots), 1, 576, generator=rng).to(device, torch.float16)
        self.layer = SimpleNamespace(
            layer_id=0, tp_q_head_num=heads, tp_k_head_num=1, tp_v_head_num=1, qk_head_dim=576, v_head_dim=512,
            scaling=0.0417, logit_cap=0.0, logit_capping_method="tanh", sliding_window_size=-1, xai_temperature_len=-1,
            k_scale=None if self.scale is None else torch.tensor(self.scale, device=device), k_scale_float=self.scale,
            is_cross_attention=False, attn_type=None, orig_v_head_dim=512,
        )  # fmt: skip
        self.layer.v_scale, self.layer.v_scale_float = self.layer.k_scale, self.scale
        self.pool = _latent_pool(batch, dtype)
        self.backend = _triton_backend(
            batch, num_head=heads, use_mla=True, token_to_kv_pool=self.pool, enable_lean_attention=False,
            is_draft_runner=False, allow_bidirectional_attention_in_extend=False,
            decode_attention_fwd=torch.compiler.disable(imported("decode")),
            extend_attention_fwd=self._extended, use_verify_splitkv=False, use_verify_shared_kv=False,
            enable_deterministic=False, **{"use_pdl": False} | _as_started(batch),
        )  # fmt: skip
        self.prefix_scales: tuple[Any, ...] = ()
        self.last = torch.tensor(lens, device=device).cumsum(0) - 1
        self._store_prompts()
        if deterministic:  # prompts are stored in the same way, before attention of another kernel
            vars(self.backend).update(_as_deterministic(batch))

    def _extended(self, *args: Any, **kwargs: Any) -> None:
        """In the place of the extend kernel: what it was told to scale a stored prefix by."""
        given = dict(zip(inspect.signature(imported("extend")).parameters, args, strict=False)) | kwargs
        self.prefix_scales = given.get("k_scale", 1.0), given.get("v_scale", 1.0)

    def _store_prompts(self) -> None:
        """All tokens but the last of each request, as a prefill step without a prefix stores them."""
        prompt = torch.ones(len(self.slots), dtype=torch.bool, device=self.batch.device)
        prompt[self.last] = False
        k = self.latents[prompt]
        step = self._step("EXTEND", self.slots[prompt])
        self.backend.forward_metadata = _Metadata()
        q = self.q.new_zeros(len(k), self.q.shape[1])
        with _one_rank():
            self.backend.forward_extend(q, k.clone(), k[..., :512].clone(), self.layer, step)

    def _step(self, mode: str, slots: torch.Tensor) -> Any:
        step = _forward_batch(self.batch, mode, self.backend)
        vars(step).update(
            token_to_kv_pool=self.pool, out_cache_loc=slots, out_cache_loc_is_physical=True, mha_one_shot=False
        )
        return step

    def decode(self) -> torch.Tensor:
        """The step: the host stores each request's last token and calls its decode; [requests, heads, 512]."""
        with _one_rank():
            step = self._step("DECODE", self.slots[self.last])
            self.backend.init_forward_metadata(step)
            return self._forward(step, *self._given())

    def alone(self, request: int) -> torch.Tensor:
        """The same step of one request without the others; [heads, 512]."""
        only, batch = copy.copy(self), self.batch
        mine = slice(request, request + 1)
        only.batch = Batch(batch.lens[mine], batch.rows[mine], batch.table, batch.lens_list[mine])
        only.q, only.last = self.q[mine], self.last[mine]
        return only.decode()[0]

    def again(self) -> Callable[[], torch.Tensor]:
        """The step's attention, to be timed: its metadata is built here, and nothing is stored."""
        with _one_rank():
            step = self._step("DECODE", self.slots[self.last])
            self.backend.init_forward_metadata(step)
        given = self._given()

        def forward() -> torch.Tensor:
            with _one_rank():
                return self._forward(step, *given, save_kv_cache=False)

        return forward

    def _given(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The last tokens' k and v; the host may divide them in place."""
        k = self.latents[self.last]
        return k.clone(), k[..., :512].clone()

    def _forward(self, step: Any, k: torch.Tensor, v: torch.Tensor, **more: Any) -> torch.Tensor:
        out = self.backend.forward_decode(self.q, k, v, self.layer, step, **more)
        return out.view(len(self.last), -1, 512)

    def decode_rank(self, rank: int, size: int) -> tuple[torch.Tensor, torch.Tensor]:
        """One rank's step under decode context parallelism: what the host would combine over ranks, (out, lse).

        The rank has every ``size``-th token, and the queries of all ranks, here ``size`` times those of this one.
        """
        module = sys.modules[type(self.backend).__module__]
        pool = _latent_pool(self.batch, self.pool.dtype)
        own = torch.cat([torch.arange(length) % size == rank for length in self.batch.lens_list])
        _bytes(pool)[self.slots[own] // size] = _bytes(self.pool)[self.slots[own]]
        backend = copy.copy(self.backend)
        heads = size * self.layer.tp_q_head_num
        vars(backend).update(token_to_kv_pool=pool, dcp_size=size, dcp_rank=rank, num_head=heads)
        seen = []

        def combine(out: torch.Tensor, lse: torch.Tensor, group: Any) -> torch.Tensor:
            seen.append((out.clone(), lse.clone()))
            return out[:, : self.layer.tp_q_head_num]

        group = SimpleNamespace(all_gather=lambda q, dim: torch.cat([q] * size, dim))
        names = {
            "get_dcp_group": lambda: group,
            "get_parallel": lambda: SimpleNamespace(dcp_group=group),
            "use_symmetric_memory": nullcontext,
            "cp_lse_ag_out_rs_mha": combine,
        }
        with ExitStack() as stack:
            stack.enter_context(_one_rank())
            for name in names.keys() & vars(module).keys():
                stack.enter_context(mock.patch.object(module, name, names[name]))
            step = self._step("DECODE", self.slots[self.last])
            backend.init_forward_metadata(step)
            k = self.latents[self.last]
            backend.forward_decode(self.q, k.clone(), k[..., :512].clone(), self.layer, step, save_kv_cache=False)
        return seen[0]

    def expected_rank(self, rank: int, size: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The definition of one rank's step; where it has no token, zeros and -inf."""
        latents = self.pool.get_key_buffer(0)[self.slots].double()[:, 0] * self.factor()
        q = self.q.double().view(len(self.last), -1, 576).repeat(1, size, 1)
        scores = [
            (one @ row[rank::size].T) * self.layer.scaling for one, row in zip(q, self._rows(latents), strict=True)
        ]
        out = [s.softmax(-1) @ row[rank::size, :512] for s, row in zip(scores, self._rows(latents), strict=True)]
        return torch.stack(out), torch.stack([s.logsumexp(-1) for s in scores])

    def _rows(self, latents: torch.Tensor) -> Sequence[torch.Tensor]:
        return latents.split(list(self.batch.lens_list))

    def factor(self) -> float:
        """What the stored latents have to be multiplied by to be those that were given: 1, or the layer's scale."""
        stored = self.pool.get_key_buffer(0)[self.slots].double()
        near = {s: float((stored * s - self.latents.double()).norm()) for s in (1.0, self.scale or 1.0)}
        return min(near, key=near.__getitem__)

    def expected(self) -> torch.Tensor:
        """The definition, in float64, over the bytes that were stored."""
        latents = self.pool.get_key_buffer(0)[self.slots].double()[:, 0] * self.factor()
        q = self.q.double().view(len(self.last), -1, 576)
        out = [
            (one @ row.T * self.layer.scaling).softmax(-1) @ row[:, :512]
            for one, row in zip(q, self._rows(latents), strict=True)
        ]
        return torch.stack(out)


def relative_error(out: torch.Tensor, expected: torch.Tensor) -> float:
    """Relative Frobenius error."""
    return float((out.double() - expected).norm() / expected.norm())


class _Metadata(SimpleNamespace):
    """A prefill step's metadata, which only the attention kernel would read."""

    def __getattr__(self, name: str) -> None:
        return None


def has_ranks() -> bool:
    """Whether the release's Triton backend can divide decode over ranks."""
    module = importlib.import_module("sglang.srt.layers.attention.triton_backend")
    return hasattr(module, "cp_lse_ag_out_rs_mha")


def imported(what: str) -> Any:
    """``decode_attention_fwd`` or its sister, from where ``TritonAttnBackend.__init__`` imports it."""
    homes = ("sglang.kernels.ops.attention", "sglang.srt.layers.attention.triton_ops")
    home = homes[0] if importlib.util.find_spec("sglang.kernels") is not None else homes[1]
    return getattr(importlib.import_module(f"{home}.{what}_attention"), f"{what}_attention_fwd")


def _latent_pool(batch: Batch, dtype: torch.dtype) -> Any:
    """The host's own pool for one layer of latents; slots that nobody stores to are zero, as the host leaves them."""
    pool = importlib.import_module("sglang.srt.mem_cache.memory_pool").MLATokenToKVPool
    size = int(batch.table.max()) + 1
    given = {
        "size": size, "page_size": 1, "dtype": dtype, "kv_lora_rank": 512, "qk_rope_head_dim": 64, "layer_num": 1,
        "device": str(batch.device), "enable_memory_saver": False,
    }  # fmt: skip
    return pool(**given)


def _bytes(pool: Any) -> torch.Tensor:
    """A pool's latents, whatever their type; indexing does not know every 8-bit one."""
    return pool.get_key_buffer(0).view(torch.uint8)


def builder(name: str, version: str | None) -> Any:
    """The host's index builder of that name, from where ``version`` has it, or else from wherever it is."""
    find = (kv_indices.page_table, kv_indices.token_indices)
    homes = [home.module for told in (version, None) for homes in find for home in homes(told) if home.name == name]
    home = next((home for home in dict.fromkeys(homes) if importlib.util.find_spec(home) is not None), homes[0])
    return getattr(importlib.import_module(home), name)


def launch(kernel: Any, builder: str, batch: Batch, out: torch.Tensor | None = None) -> Callable[[], None]:
    """One launch of ``builder``, the host's kernel or what stands in for it, into ``out`` or a buffer of its own."""
    count, device = len(batch.lens_list), batch.device
    if builder == TOKEN_IDS:
        indptr = torch.tensor([0, *batch.lens_list], device=device).cumsum(0).to(torch.int32)
        if out is None:
            out = torch.empty(sum(batch.lens_list), dtype=torch.int64, device=device)
        args = (batch.table, batch.rows, batch.lens, indptr, None, out, batch.table.stride(0))
        return lambda: kernel[(count,)](*args)
    if out is None:
        out = torch.empty((count, -(-max(batch.lens_list) // 64)), dtype=torch.int32, device=device)
    # from 0.5.13 the kernel wants the grid's second axis to cover the width
    blocks = getattr(sys.modules[kernel.__module__], "get_num_kv_index_blocks_flashmla", None)
    grid = (count,) if blocks is None else (count, blocks(out.shape[1], 64))
    table = (batch.table, batch.rows, batch.lens, None, out, batch.table.stride(0), out.stride(0))
    return lambda: kernel[grid](*table)


def decode_launch(
    decode: Any, q: torch.Tensor, kv: torch.Tensor, out: torch.Tensor, indptr: torch.Tensor, token_ids: torch.Tensor,
    lens: torch.Tensor, sm_scale: float,
) -> Callable[[], None]:  # fmt: skip
    """One call of the host's decode, with the scratch and the splits that its Triton backend has for such a batch."""
    count, heads = q.shape[:2]
    batch = Batch(lens, torch.zeros_like(lens), torch.zeros(1, 1, dtype=torch.int32, device=q.device), (1,) * count)
    cores = torch.cuda.get_device_properties(q.device).multi_processor_count if q.is_cuda else 0
    module = importlib.import_module("sglang.srt.layers.attention.triton_backend")
    # 8 unless a flag says otherwise; from 0.5.12 raised to what fills the GPU
    cap = getattr(module, "_mla_decode_kv_splits_cap", None)
    most = 8 if cap is None else cap(8, cores, 163_840)
    known = {"num_head": heads, "max_kv_splits": most, "static_kv_splits": not cores, "device_core_count": cores}
    splits = torch.empty(count, dtype=torch.int32, device=q.device)
    with _one_rank():
        _triton_backend(batch, **known).get_num_kv_splits(splits, lens)
    scratch = torch.empty(count, heads, most, 512, dtype=torch.float32, device=q.device)
    given = {
        "q": q, "k_buffer": kv, "v_buffer": kv[..., :512], "o": out, "kv_indptr": indptr, "kv_indices": token_ids,
        "attn_logits": scratch, "attn_lse": torch.empty_like(scratch[..., 0]).contiguous(), "num_kv_splits": splits,
        "max_kv_splits": most, "sm_scale": sm_scale, "k_scale": 1.0, "v_scale": 1.0, "has_mla": True,
        "use_pdl": q.is_cuda and torch.cuda.get_device_capability(q.device) >= (9, 0),
    }  # fmt: skip
    args = {name: given[name] for name in inspect.signature(decode).parameters if name in given}
    return lambda: decode(**args)


def _triton_backend(batch: Batch, **known: Any) -> Any:
    module = importlib.import_module("sglang.srt.layers.attention.triton_backend")
    count = len(batch.lens_list)
    usual: dict[str, Any] = {
        "kv_indptr": torch.zeros(count + 1, dtype=torch.int32, device=batch.device),
        "qo_indptr": torch.zeros(count + 1, dtype=torch.int64, device=batch.device),
        "num_head": 16,
        "num_kv_head": 1,
        "v_head_dim": 512,
        "max_kv_splits": 8,
        "static_kv_splits": True,
        "device_core_count": 0,
        "lean_total_programs": 1,
        "lean_block_m": 1,
    }
    return _backend(module.TritonAttnBackend, batch, **usual | known)


def _as_started(batch: Batch) -> dict[str, Any]:
    """How a server's backend would decode on this device; on a CPU, the smaller numbers of the trials."""
    if batch.device.type != "cuda":
        return {}
    module = importlib.import_module("sglang.srt.layers.attention.triton_backend")
    cores = torch.cuda.get_device_properties(batch.device).multi_processor_count
    cap = getattr(module, "_mla_decode_kv_splits_cap", None)  # from 0.5.12
    splits = 8 if cap is None else cap(8, cores, batch.table.shape[1])
    pdl = getattr(module, "is_arch_support_pdl", None)  # likewise
    own = {"device_core_count": cores, "static_kv_splits": False, "max_kv_splits": splits}
    return own | {"use_pdl": pdl is not None and pdl() is True}  # it may be stood in for


def _as_deterministic(batch: Batch) -> dict[str, Any]:
    """What TritonAttnBackend.__init__ sets for deterministic inference, with tiles of 64 keys for 256."""
    splits = -(-batch.table.shape[1] // 64)
    return {
        "enable_deterministic": True, "split_tile_size": 64, "static_kv_splits": False, "max_kv_splits": splits,
    }  # fmt: skip


def _backend(cls: type, batch: Batch, **known: Any) -> Any:
    """An instance with no model behind it: all that ``__init__`` would set is None, but for what is known here."""
    backend: Any = object.__new__(cls)
    for base in cls.__mro__:
        code = getattr(
            inspect.unwrap(vars(base).get("__init__", object.__init__)), "__code__", None
        )  # ours warms up after it
        names = (step.argval for step in dis.get_instructions(code) if step.opname == "STORE_ATTR") if code else ()
        vars(backend).update((name, None) for name in names if not hasattr(cls, name))
    common = {"device": batch.device, "req_to_token": batch.table, "page_size": 1, "dcp_size": 1, "dcp_rank": 0}
    vars(backend).update(common | known)
    backend.kv_index_translator = _translator(batch, backend.page_size)
    return backend


def _translator(batch: Batch, page: int) -> Any:
    """From 0.5.20 backends ask this class of the host's for indices; over a plain pool it calls the builder."""
    if importlib.util.find_spec("sglang.srt.mem_cache.kv_index_translator") is None:
        return None
    module = importlib.import_module("sglang.srt.mem_cache.kv_index_translator")
    given = {
        "req_to_token": batch.table,
        "token_to_kv_pool_allocator": None,
        "token_to_kv_pool": None,
        "page_size": page,
        "device": str(batch.device),
    }
    names = inspect.signature(module.KVIndexTranslator).parameters
    return module.KVIndexTranslator(**{name: value for name, value in given.items() if name in names})


class _ForwardBatch(SimpleNamespace):
    """A class of its own, since 0.5.19 keeps weak references to these."""


def _forward_batch(batch: Batch, mode: str, backend: Any, prefix: Sequence[int] | None = None) -> Any:
    """What a scheduler hands ``backend`` for one step, as far as its metadata method reads it."""
    from sglang.srt.model_executor.forward_batch_info import ForwardMode

    prefix = list(prefix) if prefix is not None else [0] * len(batch.lens_list)
    extend = [length - cached for length, cached in zip(batch.lens_list, prefix, strict=True)]
    reads = {"req_pool_indices": batch.rows, "seq_lens": batch.lens, "seq_lens_cpu": batch.lens.cpu()}
    # from 0.5.22 a step's reads are planned once, by the translator
    plan = getattr(backend.kv_index_translator, "plan", None)
    return _ForwardBatch(
        forward_mode=getattr(ForwardMode, mode),
        batch_size=len(batch.lens_list),
        seq_lens_sum=sum(batch.lens_list),
        extend_prefix_lens=torch.tensor(prefix, device=batch.device),
        extend_prefix_lens_cpu=prefix,
        extend_seq_lens=torch.tensor(extend, device=batch.device),
        extend_seq_lens_cpu=extend,
        kv_loc_plan=plan(**reads, write_virtual=None) if plan is not None else None,
        spec_info=None,
        encoder_lens=None,
        out_cache_loc=None,
        **reads,
    )


@contextmanager
def _poisoned_memory() -> Iterator[None]:
    """``torch.empty`` gives the largest number, so that an entry nobody wrote cannot be right by chance."""
    was = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # on a GPU, that cumsum is not among those algorithms
            yield
    finally:
        torch.use_deterministic_algorithms(was[0], warn_only=was[1])


@contextmanager
def _one_rank() -> Iterator[None]:
    """From 0.5.16 backends ask a process-wide context how decode is split over ranks; a server publishes it."""
    with ExitStack() as stack:
        if importlib.util.find_spec("sglang.srt.runtime_context") is not None:
            parallel = importlib.import_module("sglang.srt.runtime_context").get_parallel()
            if hasattr(type(parallel), "dcp_enabled"):
                stack.enter_context(parallel.override(dcp_enabled=False))
        yield
