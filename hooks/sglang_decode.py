"""The import path that arms of other packages use; the hook lives in ``mla_patch.hooks.sglang.decode``."""

from mla_patch.hooks.sglang.decode import declines as declines
from mla_patch.hooks.sglang.decode import serve as serve
