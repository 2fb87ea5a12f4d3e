from mla_patch.compat.types import Target
from mla_patch.features import Feature
from mla_patch.hookspecs import hookimpl


def declines(call):
    return None if all(tensor.is_contiguous() for tensor in call) else "not contiguous"


TARGET = Target("fakehost.norm", "scale_rows", ("x", "weight"), bind=lambda x, weight: (x, weight),
                declines="fakehost_scale_rows:declines", serve="fakehost_scale_rows_kernel:serve")  # fmt: skip
FEATURE = Feature("scale_rows", "fakehost>=1,<2", lambda version: (TARGET,), why="the host multiplies row by row",
                  upstream="https://example.com/fakehost/1", drop_when="the host has a kernel for it")  # fmt: skip


@hookimpl
def mla_patch_features():
    return [FEATURE]
