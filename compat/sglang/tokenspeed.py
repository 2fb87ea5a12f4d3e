"""SGLang: a TRT-LLM MLA backend whose decode and prefill kernels can be changed, per release.

Upstream's tokenspeed_mla is TRTLLMMLABackend with other kernels, so every place that knows "trtllm_mla" does right by
it: argument checks, handler tables, draft backends, and the literal tests in the model code that no data can extend.
Where the server's arguments are read, our name becomes trtllm_mla and a mark, which travels with them to every process;
where a TRTLLMMLABackend has been built with that mark, the instance becomes ours. Whoever builds it, a registry
(from 0.5.3), a method of ModelRunner (to 0.5.2), a draft worker or a multi-step draft backend, gets ours.

    arguments are read in    ServerArgs.__post_init__ to 0.5.18, ServerArgs.resolve_once from 0.5.19
    names                    tokenspeed_mla to 0.5.11, where it is nobody's; tokenspeed_mla_patch on all: 0.5.12 to
                             0.5.22 have a tokenspeed_mla of their own, 0.5.23 makes cutedsl_mla of that name

What TRTLLMMLABackend asks for:

    to 0.5.1       decode; prompts, target verify and draft extend are FlashInfer's
    0.5.2          prompts without a prefix too
    from 0.5.3     everything: decode, target verify, draft extend, prompts, prefix chunks
    to 0.5.11      in line, as flashinfer.decode.trtllm_batch_decode_with_kv_cache_mla and
                   flashinfer.prefill.trtllm_ragged_attention_deepseek: its module's name flashinfer gets a stand-in,
                   which is ours while one of our instances is in its forward method, flashinfer for all others
    from 0.5.12    through _run_decode_kernel, _run_prefill_kernel and _compute_decode_bmm1_scale
    from 0.5.17    _run_decode_kernel takes causal_seqs, cp_world, cp_rank, return_lse: decode context parallelism
"""

from __future__ import annotations

from mla_patch.compat.eras import Eras, between, era_of
from mla_patch.compat.types import Mark

NAME, OTHER_NAME, HOST_NAME = "tokenspeed_mla", "tokenspeed_mla_patch", "trtllm_mla"
PAGE_SIZES = (32, 64)  # of the TRT-LLM backend
ARGUMENTS = "sglang.srt.server_args"  # has ServerArgs
BACKEND = "sglang.srt.layers.attention.trtllm_mla_backend"  # has TRTLLMMLABackend

# the arguments that name a backend, as ServerArgs calls them
FIELDS = (
    "attention_backend", "decode_attention_backend", "prefill_attention_backend",
    "speculative_draft_attention_backend",
)  # fmt: skip

OWN_BACKEND = Mark("sglang.srt.layers.attention.tokenspeed_mla_backend", "0.5.12", "0.5.23")

# the names that the release does not know, so that they can be ours
_FREE_NAMES: Eras[tuple[str, ...]] = (
    ("0.5.12", (OTHER_NAME,)),
    ("0.5.1", (NAME, OTHER_NAME)),
)

# up to and including 0.5.11: method -> the function of flashinfer that it calls, as flashinfer.<module>.<function>
IN_LINE_CALLS = {
    "forward_decode": ("decode", "trtllm_batch_decode_with_kv_cache_mla"),
    "forward_extend": ("prefill", "trtllm_ragged_attention_deepseek"),
}


def is_native(version: str | None) -> bool:
    """Whether the release has the tokenspeed_mla backend itself."""
    return between(version, OWN_BACKEND.first, OWN_BACKEND.until)


def free_names(version: str | None) -> tuple[str, ...]:
    """The names of backends that can be ours in ``version``; in an unknown one, those that can be everywhere."""
    return min(era_of(_FREE_NAMES, version), key=len)
