"""The documented import path of the chunk cache, which lives in ``mla_patch.chunk_cache``."""

from mla_patch.chunk_cache import ChunkInputs as ChunkInputs
from mla_patch.chunk_cache import SparsePrefillChunkCache as SparsePrefillChunkCache
