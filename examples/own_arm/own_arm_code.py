"""What the arm does with a call. A kernel of your own would read call.q and call.k, and write call.out."""

from mla_patch.compat.sglang import DecodeCall
from mla_patch.hooks import sglang_decode


def declines(call):
    """Takes calls of the Triton backend alone. Those of other backends have other fields, and return their output."""
    return sglang_decode.declines(call) if isinstance(call, DecodeCall) else "not a call of the Triton backend"


def serve(call):
    sglang_decode.serve(call)
    call.out.mul_(1.05)  # on the call's stream, no sync: it can be captured
