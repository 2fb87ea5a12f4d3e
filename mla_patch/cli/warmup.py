"""``mla-patch warmup``: compile the kernels that an engine on this machine can reach, before it starts."""

from __future__ import annotations

import argparse

from mla_patch.cli import here, show
from mla_patch.cli.exits import OK, Misuse


def warmup(args: argparse.Namespace) -> int:
    """Compile in this process; an engine finds the results in Triton's cache."""
    here.need_triton("warmup")
    from mla_patch.drive import warmup as warmup_

    if args.cache is None:
        args.cache = [args.dtype, "e4m3"]
    for cache in args.cache:
        if cache in ("bf16", "fp16") and cache != args.dtype:
            raise Misuse(f"warmup: --cache {cache} with --dtype {args.dtype}, expected {args.dtype}, e4m3 or e5m2")
    device = here.torch_gpu()
    result = warmup_.run(device, args.heads, args.dtype, args.cache, args.max_batch, args.backend)
    if args.json:
        show.as_json(result)
        return OK
    if result["kernels"]:
        show.table(
            f"compiled for {result['device']}", ["kernel", "heads", "cache", "compiled", "seconds"], result["kernels"]
        )
    show.lines(result["notes"])
    return OK
