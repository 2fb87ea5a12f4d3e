"""The documented import path of the chunk cache, which lives in ``mla_patch.chunk_cache``."""

from mla_patch.chunk_cache import ChunkInputs as ChunkInputs
from mla_patch.chunk_cache import SparsePrefillChunkCache as SparsePrefillChunkCache
from mla_patch.chunk_cache import pages_are_faster as pages_are_faster
