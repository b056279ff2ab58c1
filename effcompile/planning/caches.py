"""Tell about KV caches: one line for layers whose caches are alike."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from effcompile.core.site import CacheSite


@dataclass(frozen=True)
class CacheRow:
    """Describe a cache; `places` are the paths of all modules that its graph ran for."""

    id: str
    graph: int
    places: tuple[str, ...]
    site: CacheSite

    def to_json(self) -> dict[str, Any]:
        """Return the fields as JSON values."""
        return {**self.site.to_json(), "id": self.id, "graph": self.graph, "places": list(self.places)}


def alike(rows: Sequence[CacheRow]) -> list[tuple[CacheSite, list[str]]]:
    """Return each kind of cache with the places that have it."""
    found: dict[CacheSite, list[str]] = {}
    for row in rows:
        found.setdefault(replace(row.site, id="", source="", entry=""), []).extend(row.places)
    return list(found.items())


def described(site: CacheSite) -> tuple[str, str, str]:
    """Return shape, places and format of a cache in words."""
    dims = f"{site.head_dim}" if site.head_dim == site.value_dim else f"{site.head_dim}/{site.value_dim}"
    reach = f", the last {site.window} of them read" if site.window else ""
    heads = f"latents of {site.head_dim}+{site.value_dim}" if site.layout == "mla" else f"H={site.kv_heads} D={dims}"
    return f"B={site.batch} {heads} {site.dtype}", f"{site.capacity} tokens{reach}", site.format
