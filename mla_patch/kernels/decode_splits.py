"""A documented import path of what lives in ``mla_patch.kernels.decode.splits``."""

from mla_patch.kernels.decode.splits import mla_decode_splits as mla_decode_splits
from mla_patch.kernels.decode.splits import mla_decode_splits_ref as mla_decode_splits_ref
