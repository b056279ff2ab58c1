"""Hold the formats in which a KV cache can be stored, one a file.

A format says how the tokens of a cache site are kept (`core/cache.py`); the ops that append and attend are in
`effcompile/ops/kv/`. A format approximates, so it is used only where it is named: `eff.prepare(model, kv="int8-per-token")`.
"""
