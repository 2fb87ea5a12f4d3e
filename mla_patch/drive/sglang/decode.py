"""A decode step through SGLang's Triton backend, over latents that it stored in its own pool."""

from __future__ import annotations

import copy
import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack, nullcontext
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch

from mla_patch.drive.batch import Batch, expected_token_ids, make_batch
from mla_patch.drive.sglang.backends import (
    PrefillMetadata,
    as_deterministic,
    as_started,
    forward_batch,
    one_rank,
    triton_backend,
)

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
        self.pool = latent_pool(batch, dtype)
        self.backend = triton_backend(
            batch, num_head=heads, use_mla=True, token_to_kv_pool=self.pool, enable_lean_attention=False,
            is_draft_runner=False, allow_bidirectional_attention_in_extend=False,
            decode_attention_fwd=torch.compiler.disable(imported("decode")),
            extend_attention_fwd=self._extended, use_verify_splitkv=False, use_verify_shared_kv=False,
            enable_deterministic=False, **{"use_pdl": False} | as_started(batch),
        )  # fmt: skip
        self.prefix_scales: tuple[Any, ...] = ()
        self.last = torch.tensor(lens, device=device).cumsum(0) - 1
        self._store_prompts()
        if deterministic:  # prompts are stored in the same way, before attention of another kernel
            vars(self.backend).update(as_deterministic(batch))

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
        self.backend.forward_metadata = PrefillMetadata()
        q = self.q.new_zeros(len(k), self.q.shape[1])
        with one_rank():
            self.backend.forward_extend(q, k.clone(), k[..., :512].clone(), self.layer, step)

    def _step(self, mode: str, slots: torch.Tensor) -> Any:
        step = forward_batch(self.batch, mode, self.backend)
        vars(step).update(
            token_to_kv_pool=self.pool, out_cache_loc=slots, out_cache_loc_is_physical=True, mha_one_shot=False
        )
        return step

    def decode(self) -> torch.Tensor:
        """The step: the host stores each request's last token and calls its decode; [requests, heads, 512]."""
        with one_rank():
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
        with one_rank():
            step = self._step("DECODE", self.slots[self.last])
            self.backend.init_forward_metadata(step)
        given = self._given()

        def forward() -> torch.Tensor:
            with one_rank():
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
        pool = latent_pool(self.batch, self.pool.dtype)
        own = torch.cat([torch.arange(length) % size == rank for length in self.batch.lens_list])
        pool_bytes(pool)[self.slots[own] // size] = pool_bytes(self.pool)[self.slots[own]]
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
            stack.enter_context(one_rank())
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


def has_ranks() -> bool:
    """Whether the release's Triton backend can divide decode over ranks."""
    module = importlib.import_module("sglang.srt.layers.attention.triton_backend")
    return hasattr(module, "cp_lse_ag_out_rs_mha")


def imported(what: str) -> Any:
    """``decode_attention_fwd`` or its sister, from where ``TritonAttnBackend.__init__`` imports it."""
    homes = ("sglang.kernels.ops.attention", "sglang.srt.layers.attention.triton_ops")
    home = homes[0] if importlib.util.find_spec("sglang.kernels") is not None else homes[1]
    return getattr(importlib.import_module(f"{home}.{what}_attention"), f"{what}_attention_fwd")


def latent_pool(batch: Batch, dtype: torch.dtype) -> Any:
    """The host's own pool for one layer of latents; slots that nobody stores to are zero, as the host leaves them."""
    pool = importlib.import_module("sglang.srt.mem_cache.memory_pool").MLATokenToKVPool
    size = int(batch.table.max()) + 1
    given = {
        "size": size, "page_size": 1, "dtype": dtype, "kv_lora_rank": 512, "qk_rope_head_dim": 64, "layer_num": 1,
        "device": str(batch.device), "enable_memory_saver": False,
    }  # fmt: skip
    return pool(**given)


def pool_bytes(pool: Any) -> torch.Tensor:
    """A pool's latents, whatever their type; indexing does not know every 8-bit one."""
    return pool.get_key_buffer(0).view(torch.uint8)


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
    with one_rank():
        triton_backend(batch, **known).get_num_kv_splits(splits, lens)
    scratch = torch.empty(count, heads, most, 512, dtype=torch.float32, device=q.device)
    given = {
        "q": q, "k_buffer": kv, "v_buffer": kv[..., :512], "o": out, "kv_indptr": indptr, "kv_indices": token_ids,
        "attn_logits": scratch, "attn_lse": torch.empty_like(scratch[..., 0]).contiguous(), "num_kv_splits": splits,
        "max_kv_splits": most, "sm_scale": sm_scale, "k_scale": 1.0, "v_scale": 1.0, "has_mla": True,
        "use_pdl": q.is_cuda and torch.cuda.get_device_capability(q.device) >= (9, 0),
    }  # fmt: skip
    args = {name: given[name] for name in inspect.signature(decode).parameters if name in given}
    return lambda: decode(**args)
