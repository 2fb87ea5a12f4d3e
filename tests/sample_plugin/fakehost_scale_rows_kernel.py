import torch
import triton
import triton.language as tl


@triton.jit
def _scale(x, weight, out, cols, BLOCK: tl.constexpr):
    row, at = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    values = tl.load(x + row * cols + at, mask=at < cols)
    tl.store(out + row * cols + at, values * tl.load(weight + row), mask=at < cols)


def serve(call):
    x, weight = call
    out = torch.empty_like(x)
    _scale[(x.shape[0],)](x, weight, out, x.shape[1], BLOCK=triton.next_power_of_2(x.shape[1]))
    return out
