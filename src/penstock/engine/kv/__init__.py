"""The KV cache as integers: which block holds which tokens of whom. Nothing here sees a tensor."""

from penstock.engine.kv.block_pool import BlockPool
from penstock.engine.kv.block_table import BlockTable
from penstock.engine.kv.manager import CacheManager
from penstock.engine.kv.prefix import PrefixHasher, prompt_digest

__all__ = ["BlockPool", "BlockTable", "CacheManager", "PrefixHasher", "prompt_digest"]
