"""Find buffers from which both keys and values of an attention are computed: the latents of MLA, and the rotated keys beside them.

A model writes one latent and one rotated key a token and computes the keys and values of all heads from them, as DeepSeek-V2
(arXiv:2405.04434) does. Whatever it computes, it reads the buffer, so the buffer can be stored in 8 bits wherever it is written by
tokens and read after that: what is read is what was written, within half a scale.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from effcompile.core.attention_call import AttentionCall
from effcompile.core.program import Entry
from effcompile.core.site import CacheSite, Missed, Refusal
from effcompile.passes.recognize.kv_writes import CODE, Locate, Write, is_view, unknown, writes_of


@dataclass(frozen=True)
class LatentCache:
    """Hold a cache of latents: the first attention that reads what is made of them, and the writes of latents and rotated keys."""

    site: CacheSite
    attention: fx.Node
    writes: tuple[Write, ...]

    @property
    def base(self) -> fx.Node:
        """Return the input that holds the latents."""
        return self.writes[0].base


def find_latents(entry: Entry, taken: set[fx.Node], locate: Locate) -> tuple[list[LatentCache], list[Missed]]:
    """Return the caches of latents of a raised graph, beside the inputs in `taken`, and those that cannot be stored otherwise.

    Latents are buffers `[B, C, R]`, or `[B, 1, C, R]`.
    """
    writes = {
        base: mine for base, mine in writes_of(entry, (3, 4)).items() if base not in taken and _floats(entry, base)
    }
    of = {write.node: base for base, mine in writes.items() for write in mine}
    found: list[LatentCache] = []
    missed: list[Missed] = []
    seen = set[fx.Node]()
    for node in entry.graph.graph.nodes if writes else ():
        if node.op != "call_function" or node.target is not torch.ops.eff.attention_v1.default:
            continue
        call = AttentionCall.of(node)
        keys, values = (_reached(x, writes, of) for x in (call.k, call.v))
        latents = [base for base in keys if base in values and base not in seen]
        rotated = [base for base in keys if base not in values and base not in seen]
        if not latents:
            continue
        seen |= {*latents, *rotated}
        bases = [*latents, *rotated]
        site = _site(entry, node, bases, locate)
        refusal = _refusal(latents, rotated, writes)
        if refusal is None:
            found.append(LatentCache(site, node, tuple(writes[base][0] for base in bases)))
        else:
            missed.append(Missed(site, refusal))
    return found, missed


def _floats(entry: Entry, base: fx.Node) -> bool:
    described, value = entry.input_of(base), base.meta["val"]
    alone = value.dim() == 3 or value.shape[1] == 1
    return bool(value.is_floating_point()) and alone and described is not None and described.kind == "buffer"


def _reached(node: fx.Node, writes: dict[fx.Node, list[Write]], of: dict[fx.Node, fx.Node]) -> list[fx.Node]:
    """Return the written inputs from which a tensor is computed, not looking through another attention."""
    found: dict[fx.Node, None] = {}
    seen, left = set[fx.Node](), [node]
    while left:
        one = left.pop()
        if one in seen:
            continue
        seen.add(one)
        base = one if one in writes else of.get(one)
        if base is not None:
            found[base] = None
        elif one.op == "call_function" and one.target is not torch.ops.eff.attention_v1.default:
            left += one.all_input_nodes
    return list(found)


def _site(entry: Entry, node: fx.Node, bases: Sequence[fx.Node], locate: Locate) -> CacheSite:
    first: Any = bases[0].meta["val"]
    batch, tokens, rank = first.shape[0], first.shape[-2], first.shape[-1]
    return CacheSite(
        f"{node.meta.get('eff.site', 'graph')}.cache",
        "cache",
        entry.name,
        locate(node)[1],
        idiom="buffers",
        batch=_extent(batch),
        head_dim=int(rank),
        value_dim=int(bases[1].meta["val"].shape[-1]) if len(bases) > 1 else 0,
        capacity=_extent(tokens),
        dtype=str(first.dtype).removeprefix("torch."),
        layout="mla",
    )


def _refusal(
    latents: Sequence[fx.Node], rotated: Sequence[fx.Node], writes: dict[fx.Node, list[Write]]
) -> Refusal | None:
    """Return why latents cannot be stored in another form."""
    if len(latents) > 1 or len(rotated) > 1:
        return Refusal(
            CODE, f"keys are computed from {len(latents) + len(rotated)} caches", "one of latents, one of rotated keys"
        )
    if rotated and latents[0].meta["val"].shape[:-1] != rotated[0].meta["val"].shape[:-1]:
        return Refusal(CODE, "latents and rotated keys differ in batch, heads or capacity")
    for base in (*latents, *rotated):
        mine = writes[base]
        if len(mine) != 1:
            return Refusal(CODE, "the cache is written more than once in a call")
        if isinstance(mine[0].place, int) and mine[0].place < 0:
            return unknown(mine[0])
        path = path_of(mine[0])
        order = {other: number for number, other in enumerate(base.graph.nodes)}
        early = [user for user in base.users if user not in path and order[user] < order[mine[0].node]]
        if early:
            return Refusal(CODE, f"`{early[0].target}` reads the cache before its tokens are written")
        part = path if len(path) > 1 else path[1:]  # what a write through a view returns is the view
        if any(user not in path for node in part for user in node.users):
            return Refusal(CODE, "what is read is the part of the cache that was written")
    return None


def path_of(write: Write) -> tuple[fx.Node, ...]:
    """Return a write and the views through which it goes, the last one of the buffer itself."""
    path, target = [write.node], write.node.args[0]
    while isinstance(target, fx.Node) and target is not write.base and is_view(target):
        path.append(target)
        target = target.args[0]
    return tuple(path)


def _extent(value: Any) -> int | str:
    return value if isinstance(value, int) else str(value)
