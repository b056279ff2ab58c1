"""Hold what lives beside a compiled graph while it runs: KV caches.

A cache owns tensors; what they mean is said by a `Storage` (core/cache.py). No framework is needed here: `integrations/` puts a
cache into the classes of transformers.
"""
