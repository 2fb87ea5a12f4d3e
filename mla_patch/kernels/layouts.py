"""The documented import path of the cache formats, which live in ``mla_patch.kernels.cache.layouts``."""

from mla_patch.kernels.cache.layouts import LAYOUTS as LAYOUTS
from mla_patch.kernels.cache.layouts import ROPE as ROPE
from mla_patch.kernels.cache.layouts import V4 as V4
from mla_patch.kernels.cache.layouts import V32 as V32
from mla_patch.kernels.cache.layouts import Layout as Layout
from mla_patch.kernels.cache.layouts import new_pages as new_pages
from mla_patch.kernels.cache.layouts import pages_of as pages_of
