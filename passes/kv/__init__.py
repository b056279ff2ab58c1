"""Hold the formats in which a KV cache can be stored, and the evictions that say which tokens stay in it, one a file.

A format says how the tokens of a cache site are kept (`core/cache.py`); the ops that append and attend are in
`effcompile/ops/kv/`. An eviction ranks tokens (`core/eviction.py`); `runtime/eviction.py` drops the last of them. Both
approximate, so they are used only where they are named: `eff.prepare(model, kv="int8-per-token", evict="snapkv{budget=1024}")`.
"""
