"""The code of the arm. A kernel of your own reads call.q and call.k, and writes call.out."""

from mla_patch.hooks.sglang import decode as sglang_decode


def serve(call):
    sglang_decode.serve(call)
    call.out.mul_(1.05)  # on the current stream and without a sync, so that it can be captured in a CUDA graph
