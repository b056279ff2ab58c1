"""Find the KV caches of a graph: attention that reads packed tokens becomes a cache site.

A prepared model's calls are `eff::kv_attention_*` already; `kv_buffers.py` finds caches that a model keeps in its own tensors.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from effcompile.core.program import Program
from effcompile.core.site import CacheSite
from effcompile.ops.kv import places

Locate = Callable[[fx.Node], tuple[str, str]]
"""Return the module path and the source line of a node."""


def recognize_caches(program: Program, locate: Locate) -> tuple[CacheSite, ...]:
    """Return a site for every attention over a cache, in the order of the graph, and mark its node with it."""
    found: list[CacheSite] = []
    seen: dict[str, int] = {}
    for entry in program.entries:
        for node in entry.graph.graph.nodes:
            if node.op != "call_function" or not _reads_cache(node.target):
                continue
            names = [argument.name for argument in node.target._schema.arguments]
            given = dict(zip(names, node.args)) | dict(node.kwargs)
            k, v = (given[name].meta["val"] for name in ("k", "v"))
            tensors = {name: x.meta["val"] for name, x in given.items() if isinstance(x, fx.Node)}
            owner, source = locate(node)
            number = seen[owner] = seen.get(owner, -1) + 1
            site = CacheSite(
                (owner or "graph") + ".cache" + (f".{number}" if number else ""),
                "cache",
                entry.name,
                source,
                idiom=str(node.target._schema.name),
                batch=_extent(k.shape[0]),
                kv_heads=_extent(k.shape[1]),
                head_dim=int(k.shape[3]),
                value_dim=int(v.shape[3]),
                capacity=_extent(places(tensors)),
                window=int(given["window"]),
                format=str(given["format"]),
                dtype=str(k.dtype).removeprefix("torch."),
                layout="mla" if "latents" in tensors else "heads",
            )
            node.meta["eff.site"] = site.id
            found.append(site)
    return tuple(found)


def _reads_cache(target: Any) -> bool:
    return isinstance(target, torch._ops.OpOverload) and target._schema.name.startswith("eff::kv_attention_")


def _extent(value: Any) -> int | str:
    return value if isinstance(value, int) else str(value)
