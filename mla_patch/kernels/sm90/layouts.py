"""Layouts, barriers and sizes of `mla_patch.kernels.decode.sm90`.

A module of their own because of what a launch costs: Triton compares a kernel's global constants by value at every
launch, 20 us for these, but not what it reaches through a module. Nor does it cache compiled kernels by them, so KEY is
an argument of the kernel.
"""

from __future__ import annotations

import zlib

from triton.experimental.gluon import language as gl

UNIT = gl.constexpr(128)  # keys of a unit of work: an even and an odd tile
CHANGE = gl.constexpr(2)  # units that a program could do while it changes from one request to the next: measured
LEAST = gl.constexpr(-3.4028234663852886e38)  # a maximum of no keys that can be subtracted from itself

LANES = gl.constexpr(gl.BlockedLayout([1], [32], [4], [0]))
ROWS = gl.constexpr(gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0]))  # 16 bytes a thread, 128 of a row together
FETCH = gl.constexpr(gl.BlockedLayout([1, 4], [8, 4], [4, 1], [1, 0]))  # the same in int32, 64 bytes of a row
READ = gl.constexpr(gl.BlockedLayout([1, 2], [4, 8], [4, 1], [1, 0]))  # 8 bytes: they become 16, 128 of a row
SCORES = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16]))
OUTPUT = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 256, 16]))
HEAD = gl.constexpr(gl.SliceLayout(1, gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16])))
OUTPUT_HEAD = gl.constexpr(gl.SliceLayout(1, gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 256, 16])))
WEIGHTS = gl.constexpr(
    gl.DotOperandLayout(0, gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 256, 16]), 2)
)  # probabilities as they leave the softmax

# Barriers. A half of a tile is there (FULL) or may be overwritten (FREE): low or high columns, the rope with the half
# that comes second. A group's probabilities are there (WEIGHTS). Between requests: q may be overwritten, q is there,
# row sums are there.
FULL_EVEN_LOW, FULL_EVEN_HIGH, FULL_ODD_LOW, FULL_ODD_HIGH = [gl.constexpr(i) for i in range(4)]
FREE_EVEN_LOW, FREE_EVEN_HIGH, FREE_ODD_LOW, FREE_ODD_HIGH = [gl.constexpr(i) for i in range(4, 8)]
WEIGHTS_EVEN, WEIGHTS_ODD = [gl.constexpr(i) for i in range(8, 10)]
Q_FREE, Q_FULL, SUMS = [gl.constexpr(i) for i in range(10, 13)]
BARRIERS = gl.constexpr(13)

_values = {name: seen.value for name, seen in list(globals().items()) if isinstance(seen, gl.constexpr)}
KEY = zlib.crc32(repr(_values).encode())
