"""SGLang: its releases that were reviewed, and what tells one from another."""

from __future__ import annotations

from mla_patch.compat.types import Host

NAME = "sglang"
# read one by one; a post release is applied when its signatures match, and called unreviewed
REVIEWED = (
    "0.5.1", "0.5.2", "0.5.3", "0.5.4", "0.5.5", "0.5.6", "0.5.7", "0.5.8", "0.5.9", "0.5.10", "0.5.11", "0.5.12",
    "0.5.12.post1", "0.5.13", "0.5.13.post1", "0.5.14", "0.5.15", "0.5.16", "0.5.17", "0.5.18", "0.5.19", "0.5.20",
    "0.5.21", "0.5.22", "0.5.23",
)  # fmt: skip
UNTIL = "0.5.24"  # the first release that nobody has reviewed


def supported(first: str = REVIEWED[0]) -> str:
    """The requirement of a feature that is for ``first`` and all later reviewed releases: "sglang>=0.5.1,<0.5.24"."""
    return f"{NAME}>={first},<{UNTIL}"


DETERMINISTIC = "SGLANG_ENABLE_DETERMINISTIC_INFERENCE"
DETERMINISTIC_PROMISE = "deterministic inference: the engine promises batch-invariant results"
_ATTENTION, _OPS = "sglang.srt.layers.attention", "sglang.kernels.ops"
# (release, two modules that no earlier release has): they tell the release of source whose version does not
MARKS = (
    ("0.5.23", (f"{_OPS}.attention.kv_indices", f"{_OPS}.attention.flash_mla_interface")),
    ("0.5.22", (f"{_OPS}.kvcache.copy_pages", "sglang.kernels.numerics")),
    ("0.5.21", (f"{_OPS}.attention.dsv4.kv_layout", f"{_OPS}.attention.deep_select")),
    ("0.5.20", (f"{_OPS}.attention.suffix_attention_merge", "sglang.kernels.jit.cute_aot_cache")),
    ("0.5.19", (f"{_OPS}.kvcache.kv_read_table", "sglang.srt.arg_groups.attention_hook")),
    ("0.5.18", (f"{_OPS}.attention.verify_mla", "sglang.kernels.kernel_api_logging")),
    ("0.5.17", (f"{_OPS}.attention.concat_mla", "sglang.kernels.jit.utils.common")),
    ("0.5.16", (f"{_OPS}.attention.decode_attention", f"{_OPS}.attention.dsa.dequant_k_cache")),
    ("0.5.15", ("sglang.srt.layers.dcp.planner", "sglang.srt.mem_cache.unified_memory_pool")),
    ("0.5.14", ("sglang.srt.model_executor.runner.decode_cuda_graph_runner", "sglang.srt.mem_cache.pool_host.base")),
    ("0.5.13", (f"{_ATTENTION}.dsa_backend", f"{_ATTENTION}.dsv4.sparse_prefill_utils")),
    ("0.5.12", (f"{_ATTENTION}.deepseek_v4_backend", "sglang.srt.mem_cache.deepseek_v4_memory_pool")),
    ("0.5.11", ("sglang.srt.managers.communicator", "sglang.srt.model_executor.pool_configurator")),
    ("0.5.10", ("sglang.srt.managers.hisparse_coordinator", "sglang.srt.layers.conv")),
    ("0.5.9", ("sglang.srt.layers.radix_linear_attention", "sglang.srt.layers.quantization.base_scheme")),
    ("0.5.8", ("sglang.srt.managers.prefill_delayer", "sglang.srt.mem_cache.swa_memory_pool")),
    ("0.5.7", (f"{_ATTENTION}.nsa.nsa_backend_mtp_precompute", "sglang.srt.layers.utils.common")),
    ("0.5.6", ("sglang.srt.model_executor.input_buffers", "sglang.srt.mem_cache.cache_init_params")),
    ("0.5.5", ("sglang.srt.layers.moe.moe_runner.triton_kernels", "sglang.srt.mem_cache.utils")),
    ("0.5.4", ("sglang.srt.managers.scheduler_pp_mixin", "sglang.srt.mem_cache.common")),
    ("0.5.3", (f"{_ATTENTION}.attention_registry", "sglang.srt.speculative.eagle_info")),
    ("0.5.2", (f"{_ATTENTION}.hybrid_linear_attn_backend", "sglang.srt.managers.multi_tokenizer_mixin")),
    ("0.5.1", (f"{_ATTENTION}.trtllm_mla_backend", "sglang.srt.layers.moe.utils")),
    ("0.4.10", ("sglang.srt.server_args", "sglang.srt.managers.scheduler")),  # and all before it
)
HOST = Host(
    NAME,
    NAME,
    (NAME,),
    reviewed=REVIEWED,
    plugin_filter="SGLANG_PLUGINS",
    marks=MARKS,
    promises=((DETERMINISTIC, DETERMINISTIC_PROMISE),),
)
