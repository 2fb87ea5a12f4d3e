"""Register layouts, barriers and sizes of the sm_90 kernels; `seesaw_pipeline` says how they are used.

They have a module of their own because of the cost of a launch. Triton compares a kernel's global constants by value at
every launch, which takes 20 us for these, but it does not compare what a kernel reaches through a module. Nor does it
cache compiled kernels by such values, so that KEY, a hash of them all, is an argument of the kernels.
"""

from __future__ import annotations

import zlib

from triton.experimental.gluon import language as gl

KEYS_PER_UNIT = gl.constexpr(128)  # a unit of work: an even and an odd tile of 64 keys
CHANGE_UNITS = gl.constexpr(2)  # what the change from one request to the next costs, in units: measured
EMPTY_MAX = gl.constexpr(-3.4028234663852886e38)  # a maximum of no keys that can be subtracted from itself

# Layouts of tensors in the registers of a warp group. The producer's, by what a thread holds of a row:
LANES = gl.constexpr(gl.BlockedLayout([1], [32], [4], [0]))
ROWS = gl.constexpr(gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0]))  # 16 bytes a thread, 128 of a row together
FETCH = gl.constexpr(gl.BlockedLayout([1, 4], [8, 4], [4, 1], [1, 0]))  # the same in int32, 64 bytes of a row
READ = gl.constexpr(gl.BlockedLayout([1, 2], [4, 8], [4, 1], [1, 0]))  # 8 bytes: they become 16, 128 of a row
# a consumer's: score tiles, its columns of the output, and a number for each head beside either
SCORES = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16]))
OUTPUT = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 256, 16]))
HEAD = gl.constexpr(gl.SliceLayout(1, gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16])))
OUTPUT_HEAD = gl.constexpr(gl.SliceLayout(1, gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 256, 16])))
WEIGHTS = gl.constexpr(
    gl.DotOperandLayout(0, gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 256, 16]), 2)
)  # probabilities as they leave the softmax

# Barriers. FULL: half of a tile is there, low or high columns; the rope comes with the half that comes second. FREE:
# it may be overwritten. WEIGHTS: a consumer's probabilities and row maxima are there. Between queries, Q_FREE: q may be
# overwritten; Q_FULL: q is there; SUMS: row sums are there.
FULL_EVEN_LOW, FULL_EVEN_HIGH, FULL_ODD_LOW, FULL_ODD_HIGH = [gl.constexpr(i) for i in range(4)]
FREE_EVEN_LOW, FREE_EVEN_HIGH, FREE_ODD_LOW, FREE_ODD_HIGH = [gl.constexpr(i) for i in range(4, 8)]
WEIGHTS_EVEN, WEIGHTS_ODD = [gl.constexpr(i) for i in range(8, 10)]
Q_FREE, Q_FULL, SUMS = [gl.constexpr(i) for i in range(10, 13)]
BARRIERS = gl.constexpr(13)

_values = {name: seen.value for name, seen in list(globals().items()) if isinstance(seen, gl.constexpr)}
KEY = zlib.crc32(repr(_values).encode())
