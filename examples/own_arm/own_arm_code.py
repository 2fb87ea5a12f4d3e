"""What the arm does with a call. A kernel of your own would read call.q and call.k, and write call.out."""

from mla_patch.hooks import sglang_decode


def serve(call):
    sglang_decode.serve(call)
    call.out.mul_(1.05)  # on the call's stream, no sync: it can be captured
