"""One more arm for experiments with decode: ours, made wrong by 5%, to see what stops it."""

from mla_patch.compat.types import Arm
from mla_patch.hookspecs import hookimpl


@hookimpl
def mla_patch_arms():
    return [Arm("wrong", "decode@sglang", serve="own_arm_code:serve")]
