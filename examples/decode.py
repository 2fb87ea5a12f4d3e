"""MLA decode on its own: one query token per request over a paged cache of latents.

    python examples/decode.py [--cache bf16|fp16|e4m3|e5m2] [--heads 16] [--lengths 8192,640,1]

Without a GPU the kernel runs in Triton's interpreter, and no time is printed, since it would mean nothing.
"""

import argparse
import os

import torch

ON_GPU = torch.cuda.is_available()
if not ON_GPU:
    os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported

from mla_patch.kernels.decode import mla_decode, mla_decode_ref  # noqa: E402

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cache", choices=DTYPES, default="e4m3")
    parser.add_argument("--heads", type=int, default=16)
    parser.add_argument("--lengths", default="8192,640,1" if ON_GPU else "130,64,1", help="tokens of each request")
    args = parser.parse_args()
    lengths = [int(length) for length in args.lengths.split(",")]
    device = "cuda" if ON_GPU else "cpu"
    dtype = torch.bfloat16 if ON_GPU and args.cache != "fp16" else torch.float16
    if args.cache == "bf16" and not ON_GPU:
        parser.error("--cache bf16 needs a GPU: the interpreter's bf16 products are wrong")

    # The pool has a row of 512 latent and 64 rotary numbers per token slot. The latent numbers are also the values, so
    # an fp8 cache has one scale for keys and values: stored = true / scale.
    slots, scale = sum(lengths) + 100, 0.5 if args.cache in ("e4m3", "e5m2") else 1.0
    rng = torch.Generator().manual_seed(0)
    latents = torch.randn(slots, 1, 576, generator=rng)
    kv = (latents / scale).to(device, dtype).to(DTYPES[args.cache])
    q = torch.randn(len(lengths), args.heads, 576, generator=rng).to(device, dtype)
    out = torch.empty(len(lengths), args.heads, 512, device=device, dtype=dtype)
    # The tokens of request b lie in the slots token_ids[indptr[b]:indptr[b + 1]], in any order.
    indptr = torch.tensor([0, *lengths], device=device).cumsum(0).to(torch.int32)
    token_ids = torch.randperm(slots, generator=rng)[: sum(lengths)].to(device)
    options = {"sm_scale": 192**-0.5, "k_scale": scale, "v_scale": scale}  # 192: DeepSeek's head before absorption

    mla_decode(q, kv, out, indptr, token_ids, **options)

    want = mla_decode_ref(q, kv, indptr, token_ids, **options)
    error = float((out.double() - want).norm() / want.norm())
    print(f"{len(lengths)} requests, {args.heads} heads, {args.cache} cache: relative error {error:.6f}")
    if ON_GPU:
        from triton.testing import do_bench_cudagraph

        us = 1e3 * do_bench_cudagraph(lambda: mla_decode(q, kv, out, indptr, token_ids, **options))
        print(f"{torch.cuda.get_device_name()}: {us:.1f} us, {sum(lengths) * kv.nbytes / slots / us / 1e3:.0f} GB/s")
    return 0 if error <= 0.004 else 1


if __name__ == "__main__":
    raise SystemExit(main())
