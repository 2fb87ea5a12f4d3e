"""Drive a real SGLang release's own code on a made-up batch, with or without a GPU.

SGLang expects CUDA, its kernel packages and a loaded model. Its index builders and its Triton backend need none of
them. ``stubs`` makes the release importable. ``routes`` hands an attention backend a few request lengths and lets the
backend's own method launch the builder. ``DecodeTrial`` stores latents through the backend's own methods into SGLang's
own pool and decodes from there.

``mla-patch demo``, ``mla-patch bench`` and the tests on real releases use it. Nothing here replaces a kernel, and
nothing here runs in a serving process.
"""

from mla_patch.drive.batch import (
    LENGTHS,
    Batch,
    expected_page_table,
    expected_token_ids,
    make_batch,
    relative_error,
)
from mla_patch.drive.sglang.backends import (
    ForwardBatch,
    PrefillMetadata,
    bare_backend,
    forward_batch,
    one_rank,
    translator,
    triton_backend,
)
from mla_patch.drive.sglang.decode import (
    CACHES,
    DECODE_LENGTHS,
    DecodeTrial,
    decode_launch,
    has_ranks,
    imported,
    latent_pool,
    pool_bytes,
)
from mla_patch.drive.sglang.routes import (
    PAGE_TABLE,
    ROUTES,
    TOKEN_IDS,
    BuiltIndices,
    builder,
    launch,
    routes,
    run,
)
from mla_patch.drive.sglang.stubs import STUBS, Anything, Stub, StubFinder, prepare

__all__ = [
    "CACHES",
    "DECODE_LENGTHS",
    "LENGTHS",
    "PAGE_TABLE",
    "ROUTES",
    "STUBS",
    "TOKEN_IDS",
    "Anything",
    "Batch",
    "BuiltIndices",
    "DecodeTrial",
    "ForwardBatch",
    "PrefillMetadata",
    "Stub",
    "StubFinder",
    "bare_backend",
    "builder",
    "decode_launch",
    "expected_page_table",
    "expected_token_ids",
    "forward_batch",
    "has_ranks",
    "imported",
    "latent_pool",
    "launch",
    "make_batch",
    "one_rank",
    "pool_bytes",
    "prepare",
    "relative_error",
    "routes",
    "run",
    "translator",
    "triton_backend",
]
