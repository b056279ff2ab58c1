"""Name the places that can be rewritten.

A site's id comes from the module tree (`model.layers.3.self_attn`) and its order of occurrence, never from FX node names, so that
Dynamo and export agree on it. Its fingerprint says what a plan was made for: structure, shapes and occurrence.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, fields, replace
from typing import Any

from effcompile.core.mask import AnyMask, Mask, Opaque


@dataclass(frozen=True)
class Refusal:
    """Say why something was not rewritten: stable code, reason, and what the user can do about it."""

    code: str
    reason: str
    hint: str = ""

    def __str__(self) -> str:
        return f"{self.code} {self.reason}" + (f" ({self.hint})" if self.hint else "")


@dataclass(frozen=True)
class Site:
    """Describe an occurrence; `source` is the user's `file:line`."""

    id: str
    kind: str
    entry: str
    source: str
    idiom: str = ""

    @property
    def layer(self) -> int:
        """Return the number of the layer that holds the site: the first number in its path, 0 where there is none."""
        return next((int(part) for part in self.id.split(".") if part.isdigit()), 0)

    @property
    def fingerprint(self) -> str:
        """Return a digest of everything but the source line, which an edit elsewhere moves, and names, which a capture makes."""
        parts = [f"{f.name}={getattr(self, f.name)}" for f in fields(self) if f.name not in ("source", "tensors")]
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]

    def to_json(self) -> dict[str, Any]:
        """Return the fields as JSON values."""
        plain = {f.name: getattr(self, f.name) for f in fields(self)}
        return {
            key: value if isinstance(value, int | float | str | None) else str(value) for key, value in plain.items()
        }


def place(owner: str, site: str) -> str:
    """Return where a site is in the module tree, for a graph that was run for the module `owner` ('' for the whole model)."""
    if not owner or site == owner or site.startswith(owner + "."):
        return site
    # A frame that holds the attention itself has no module of its own left in its names.
    return owner if site == "graph" or site.startswith("graph.") else f"{owner}.{site}"


FULL = Mask()


@dataclass(frozen=True)
class AttentionSite(Site):
    """Describe softmax(q k^T * scale + mask) v; sizes are ints or the text of a symbolic size.

    `cross` says that queries and keys derive from different inputs of the graph, as text and latents do. `tensors` names what the
    mask's t0, t1, ... are.
    """

    batch: int | str = 1
    heads: int | str = 1
    kv_heads: int | str = 1
    head_dim: int = 64
    value_dim: int = 64
    q_len: int | str = 1
    kv_len: int | str = 1
    mask: AnyMask = FULL
    scale: float = 1.0
    softcap: float = 0.0
    sinks: bool = False
    cross: bool = False
    dtype: str = "float32"
    tensors: tuple[str, ...] = ()

    @property
    def mask_known(self) -> bool:
        """Tell whether the predicate was proved."""
        return not isinstance(self.mask, Opaque)


@dataclass(frozen=True)
class CacheSite(Site):
    """Describe the KV cache of one attention: what its keys and values are, and how they are stored.

    `layout` is "heads" for keys `[B, Hkv, C, D]` and values `[B, Hkv, C, Dv]`, "mla" for latents of `head_dim` and rotated keys of
    `value_dim` channels, one of each a token for all heads. `capacity` counts tokens; `window` is how many of the last ones the
    layer ever reads, 0 where it reads all. `format` spells the policy of family `kv`, '' where keys and values are stored as the
    model made them.
    """

    batch: int | str = 1
    kv_heads: int | str = 1
    head_dim: int = 64
    value_dim: int = 64
    capacity: int | str = 0
    window: int = 0
    format: str = ""
    dtype: str = "float32"
    layout: str = "heads"


def shared(site: AttentionSite) -> AttentionSite:
    """Return the site without what does not change its price, so that equal layers are decided and priced once."""
    return replace(site, id="", source="", entry="", tensors=())


def is_symbolic(site: AttentionSite) -> bool:
    """Tell whether a size of the site is a symbol."""
    return any(isinstance(n, str) for n in (site.batch, site.heads, site.kv_heads, site.q_len, site.kv_len))


@dataclass(frozen=True)
class Missed:
    """Describe an occurrence that was seen but not raised, and why."""

    site: Site
    refusal: Refusal
