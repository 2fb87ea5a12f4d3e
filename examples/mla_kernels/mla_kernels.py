"""Two kernels for the backend of the feature `tokenspeed`: a decode in Triton, a prefill in plain torch."""

from mla_patch.compat.types import MlaKernel
from mla_patch.hookspecs import hookimpl


@hookimpl
def mla_patch_mla_kernels():
    return [
        MlaKernel("triton", decode="mla_kernels_code:decode"),
        MlaKernel("torch", prefill="mla_kernels_code:prefill"),
    ]
