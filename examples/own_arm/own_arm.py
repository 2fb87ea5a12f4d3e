"""An arm for experiments with `decode`: our kernel with results that are wrong by 5%, to show what stops it."""

from mla_patch.compat.types import Arm
from mla_patch.hookspecs import hookimpl


@hookimpl
def mla_patch_arms():
    return [Arm("wrong", "decode@sglang", serve="own_arm_code:serve")]
