"""Store the caches that a graph keeps in tensors of its own in another form: appends compress, attention reads what they wrote.

Each cache's tensors become inputs behind the others; the model's own stay inputs that nothing reads. The places that the
model writes to say how many tokens it means to hold: they have to be neighbors that begin where the last call ended, or before it,
which forgets what lies behind. A cache that the graph only reads keeps the tokens that it is given.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx

from effcompile.core.attention_call import AttentionCall
from effcompile.core.cache import CacheShape, Storage
from effcompile.core.program import Input, Program
from effcompile.core.rewrite import Editor, copy_graph
from effcompile.core.site import CacheSite
from effcompile.passes.recognize.kv_buffers import Cached, CrossCache
from effcompile.passes.recognize.kv_latents import LatentCache, path_of
from effcompile.passes.recognize.kv_writes import Write

LATENTS = (("latents", "latent_scales"), ("rotated", "rotated_scales"))
"""Codes and scales of the buffers of a cache of latents."""


@dataclass(frozen=True)
class Retyped:
    """Hold a cache's new form: its tensors are `<site>.<name>` among the inputs of the graph."""

    site: CacheSite
    storage: Storage
    spelled: str
    constants: Mapping[str, Tensor]
    cross: bool = False
    """Whether the graph only reads it."""
    ring: int = 0
    """Places of a window's tokens, 0 where all tokens have one."""

    def state(self, device: torch.device) -> dict[str, Tensor]:
        """Return the tensors of an empty cache."""
        made = {
            name: torch.zeros(size, dtype=dtype, device=device)
            for name, (size, dtype) in self.storage.tensors(self.shape(device)).items()
        }
        for name in self.storage.counters:
            made[name] = torch.zeros((), dtype=torch.int64, device=device)
        for name, tensor in self.constants.items():
            made[name].copy_(tensor)
        if self.ring:
            made["positions"] = torch.full((1, 1, self.shape(device).capacity), -1, dtype=torch.int32, device=device)
            made["seen"] = torch.zeros((), dtype=torch.int64, device=device)
        return made

    def clear(self, state: Mapping[str, Tensor]) -> None:
        """Forget all tokens."""
        self.storage.clear(state)
        if self.ring:
            state["seen"].zero_()
        if self.site.layout == "mla":  # whose places are all read
            for tensor in state.values():
                tensor.zero_()

    def shape(self, device: torch.device) -> CacheShape:
        """Return the shape of the tokens, for the places that the storage has for them."""
        site = self.site
        assert isinstance(site.capacity, int)
        capacity, dtype = self.storage.capacity(self.ring or site.capacity), getattr(torch, site.dtype)
        return CacheShape(int(site.batch), int(site.kv_heads), capacity, site.head_dim, site.value_dim, dtype, device)


def retype(program: Program, caches: Mapping[str, Retyped], found: tuple[Cached, ...]) -> Program:
    """Return the program with the caches that `caches` names by their sites in their new form."""
    for entry in program.entries:
        copy = copy_graph(entry.graph)
        twin = dict(zip(entry.graph.graph.nodes, copy.graph.nodes))
        edit, inputs = Editor(copy), list(entry.inputs)
        for cache in found:
            if cache.site.entry != entry.name or cache.site.id not in caches:
                continue
            new = caches[cache.site.id]
            attention = twin[cache.attention]
            call = AttentionCall.of(attention)
            state = _add_inputs(edit, inputs, new, call.q.meta["val"])
            if isinstance(cache, LatentCache):
                for number, write in enumerate(cache.writes):
                    _unpack(edit, _twin(twin, write), [state[name] for name in LATENTS[number]])
                continue
            if isinstance(cache, CrossCache):
                with edit.before(attention):
                    result = _read(edit, new, call, state)
                edit.replace(attention, result)
                for base in (cache.keys, cache.values):
                    for user in list(twin[base].users):
                        _erase_view(copy.graph, user, twin[base])
                continue
            keys, values = (_twin(twin, write) for write in (cache.keys, cache.values))
            with edit.before(attention):
                result = _attend(edit, new, call, keys, values, state)
            edit.replace(attention, result)
            for write in (keys, values):
                _erase(write)
        program = _with(program, entry.name, edit.finish(), tuple(inputs))
    return program


def _twin(twin: Mapping[fx.Node, fx.Node], write: Write) -> Write:
    place = write.place
    return Write(
        twin[write.node], twin[write.base], twin[place] if isinstance(place, fx.Node) else place, twin[write.tokens]
    )


def _add_inputs(edit: Editor, inputs: list[Input], new: Retyped, like: Tensor) -> dict[str, fx.Node]:
    """Add a placeholder for each tensor of a cache."""
    mode, made = getattr(like, "fake_mode", None), dict[str, fx.Node]()
    assert mode is not None
    first = next(node for node in edit.graph.nodes if node.op != "placeholder")
    for name, tensor in new.state(torch.device("cpu")).items():
        with edit.graph.inserting_before(first):
            node = edit.graph.placeholder(f"{new.site.id}_{name}".replace(".", "_"))
        with mode:
            node.meta["val"] = torch.empty(tensor.shape, dtype=tensor.dtype, device=like.device)
        inputs.append(Input(node.name, "packed", f"{new.site.id}.{name}"))
        made[name] = node
    return made


def _attend(
    edit: Editor, new: Retyped, call: AttentionCall, keys: Write, values: Write, state: Mapping[str, fx.Node]
) -> fx.Node:
    """Insert the append and the attention over what it wrote, and return the node of its result."""
    names, storage, site = list(state), new.storage, new.site
    batch, heads = call.k.meta["val"].shape[:2]

    def run(q: Tensor, k: Tensor, v: Tensor, place: Tensor | int, *tensors: Tensor) -> Tensor:
        held = dict(zip(names, tensors))
        k, v = (
            x.expand(batch, heads, -1, -1) if x.dim() == 4 else x.reshape(batch, heads, -1, x.shape[-1]) for x in (k, v)
        )
        first = place if isinstance(place, Tensor) else torch.full((1,), place, dtype=torch.int64, device=q.device)
        if new.ring:
            return _slide(new, call, held, first, (q, k, v), _mask(tensors[len(names) :]))
        storage.seek(held, first, k.shape[2], site.capacity if isinstance(site.capacity, int) else 0)
        storage.append(held, k, v)
        given = (call.scale, call.softcap, site.window, new.spelled)
        return storage.attend(held, q, k, v, _mask(tensors[len(names) :]), False, *given)[0]

    operands = (call.q, keys.tokens, values.tokens, keys.place)
    return edit.inline(run, *operands, *state.values(), *([call.mask] if call.mask is not None else []))


def _slide(
    new: Retyped,
    call: AttentionCall,
    held: Mapping[str, Tensor],
    places: Tensor,
    operands: tuple[Tensor, Tensor, Tensor],
    mask: Tensor | None,
) -> Tensor:
    """Attend over a ring of places and the new tokens, which take the places of the oldest after that."""
    (q, k, v), storage, site, count = operands, new.storage, new.site, operands[1].shape[2]
    positions, length, seen = (held[name] for name in ("positions", "length", "seen"))
    assert mask is not None
    assert isinstance(site.capacity, int)
    first = torch.ops.eff.kv_ring_v1.default(positions, length, seen, places, count, site.window, site.capacity)
    own = torch.ops.eff.kv_window_mask_v1.default(mask, positions, length, first, count, site.capacity)
    before = {**held, "length": length + count}
    found = storage.attend(before, q, k, v, own, False, call.scale, call.softcap, site.window, new.spelled)[0]
    for number in range(count):
        token = (first + number).reshape(1)
        at = token % positions.shape[2]
        one = [x[:, :, number : number + 1] for x in (k, v)]
        storage.append(held, one[0], one[1], at.expand(k.shape[:2]).contiguous())
        positions.index_copy_(2, at, token.to(torch.int32)[None, None])
    seen.copy_(first + count)
    return found


def _read(edit: Editor, new: Retyped, call: AttentionCall, state: Mapping[str, fx.Node]) -> fx.Node:
    """Insert the attention over a cache to which nothing is added, and return the node of its result."""
    names, storage, site = list(state), new.storage, new.site
    batch, heads = call.k.meta["val"].shape[:2]

    def run(q: Tensor, *tensors: Tensor) -> Tensor:
        none = [q.new_empty((batch, heads, 0, width)) for width in (site.head_dim, site.value_dim)]
        asked = (_mask(tensors[len(names) :]), False, call.scale, call.softcap, site.window, new.spelled)
        return storage.attend(dict(zip(names, tensors)), q, none[0], none[1], *asked)[0]

    return edit.inline(run, call.q, *state.values(), *([call.mask] if call.mask is not None else []))


def _unpack(edit: Editor, write: Write, state: Sequence[fx.Node]) -> None:
    """Write the tokens of a buffer into its packed form, and give to whoever reads it what that holds."""
    shape, target = write.base.meta["val"].shape, write.node.args[0]
    assert isinstance(target, fx.Node)
    count = (write.place if isinstance(write.place, fx.Node) else target).meta["val"].shape
    count = count[0] if isinstance(write.place, fx.Node) else count[-2]

    def run(tokens: Tensor, place: Tensor | int, codes: Tensor, scales: Tensor) -> Tensor:
        places = place if isinstance(place, Tensor) else torch.arange(place, place + count, device=tokens.device)
        rows = tokens.expand(*shape[:-2], count, shape[-1])
        rows = rows if rows.dim() == 4 else rows[:, None]
        torch.ops.eff.kv_write_tokens_v1.default(codes, scales, places, rows)
        found: Tensor = torch.ops.eff.kv_read_tokens_v1.default(codes, scales, places, rows)
        return found.view(shape)

    path = path_of(write)
    with edit.before(write.node):
        result = edit.inline(run, write.tokens, write.place, *state)
    for node in (write.base, write.node):
        for user in [user for user in node.users if user not in path]:
            user.replace_input_with(node, result)
    for node in path:
        edit.graph.erase_node(node)


def _mask(given: Sequence[Tensor]) -> Tensor | None:
    """Return the mask with four dimensions, where there is one."""
    return given[0][(None,) * (4 - given[0].dim())] if given else None


def _erase(write: Write) -> None:
    """Remove a write, and the views through which it went or was read."""
    graph = write.node.graph
    for user in [*write.node.users, *write.base.users]:
        _erase_view(graph, user, write.node)
    if not write.node.users:
        target = write.node.args[0]
        graph.erase_node(write.node)
        while isinstance(target, fx.Node) and target is not write.base and not target.users:
            before = target.args[0]
            graph.erase_node(target)
            target = before


def _erase_view(graph: fx.Graph, node: fx.Node, write: fx.Node) -> None:
    if node is write or write in node.users:
        return
    for user in list(node.users):
        _erase_view(graph, user, write)
    if not node.users:
        graph.erase_node(node)


def _with(program: Program, name: str, graph: Any, inputs: tuple[Input, ...]) -> Program:
    entries = tuple(replace(e, graph=graph, inputs=inputs) if e.name == name else e for e in program.entries)
    return replace(program, entries=entries)
