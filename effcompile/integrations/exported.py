"""Store the KV caches of an exported program in a compressed form: its own buffers are gone, packed ones take their place.

A cache is found where attention reads what the program writes into a buffer, or into an input that it changes
(`passes/recognize/kv_buffers.py`). Inputs stay the caller's, so only buffers are stored otherwise. What is left is a module that
runs as it is, and that torch.compile takes. A cache that the program only reads, of a cross attention, has the tokens that its
buffers hold, until `fill` gives it others.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from effcompile import ops
from effcompile.capture.dynamo import module_of
from effcompile.capture.export import capture_export
from effcompile.compiler import all_methods, compile_program
from effcompile.core.cache import CacheFormat, Storage
from effcompile.core.dump import Dump
from effcompile.core.errors import EffError
from effcompile.core.options import Options
from effcompile.core.plan import Choice, Decline
from effcompile.core.policy import read_policy
from effcompile.core.program import Program
from effcompile.core.site import Refusal
from effcompile.ops.kv import common
from effcompile.passes.kv.retype import LATENTS, Retyped, retype
from effcompile.passes.recognize.attention import Recognized
from effcompile.passes.recognize.kv_buffers import BufferCache, Cached, CrossCache, find_buffers
from effcompile.passes.recognize.kv_latents import LatentCache
from effcompile.passes.recognize.kv_writes import is_view
from effcompile.runtime.sliding import ROOM
from effcompile.targets.detect import detect

CODE = "EFF-K208"
Formats = str | CacheFormat | Mapping[str, str | CacheFormat]


class PreparedProgram(nn.Module):
    """Run an exported program whose caches are stored in another form.

    `plan` holds a choice of family `kv` for every cache that is, and a decline with the reason for every one that is not.
    `nbytes()` counts the tensors of the caches, `reset()` empties those that the program writes; a call that writes to place 0
    does so too.
    """

    def __init__(
        self,
        exported: torch.export.ExportedProgram,
        program: Program,
        plan: Any,
        caches: Mapping[str, Retyped],
        sources: Mapping[str, tuple[Tensor, Tensor]],
    ) -> None:
        super().__init__()
        entry = program.entries[0]
        self.plan, self.caches = plan, dict(caches)
        self._graph, self._spec = entry.graph, exported.call_spec
        state: dict[str, Tensor] = {}
        device = torch.device(program.device)
        for new in caches.values():
            state |= {f"{new.site.id}.{name}": x for name, x in new.state(device).items()}
        read = {node.name for node in entry.graph.graph.nodes if node.op == "placeholder" and node.users}
        self._names: list[str | None] = []
        for item in entry.inputs:
            if item.kind == "buffer" and item.node not in read:
                self._names.append(None)  # a cache that is stored otherwise now
                continue
            name = item.name.replace(".", "_")
            if item.kind == "packed":
                self.register_buffer(name, state[item.name])
            elif item.kind == "parameter":
                self.register_parameter(name, item.value)
            elif item.kind == "buffer":
                self.register_buffer(name, item.value)
            else:
                name = ""
            self._names.append(name)
        self._packed = [item.name.replace(".", "_") for item in entry.inputs if item.kind == "packed"]
        self._sources: dict[str, list[tuple[weakref.ref[Tensor], int]]] = {}
        for site, buffers in sources.items():
            self.fill(site, *buffers)
            self._sources[site] = [(weakref.ref(x), x._version) for x in buffers]

    def fill(self, site: str, keys: Tensor, values: Tensor) -> None:
        """Give a cache that the program only reads its tokens, keys `[B, Hkv, C, D]` and values `[B, Hkv, C, Dv]`, all C of them.

        Raises:
            EffError: EFF-K202 for another number of tokens, or another shape or dtype; EFF-K208 for a site that is no such cache.
        """
        new = self.caches.get(site)
        if new is None or not new.cross:
            known = ", ".join(name for name, x in self.caches.items() if x.cross) or "none"
            raise EffError(CODE, f"{site} is no cache that the program only reads; those are: {known}")
        capacity = new.site.capacity
        if keys.shape[2] != capacity:
            raise EffError("EFF-K202", f"{keys.shape[2]} tokens for {site}, of which attention reads {capacity}")
        state, dtype = self._state(new), getattr(torch, new.site.dtype)
        own = (int(new.site.batch), int(new.site.kv_heads), new.site.head_dim, new.site.value_dim)
        common.check_shapes(own, keys, values, dtype)
        new.storage.clear(state)
        new.storage.append(state, keys, values)
        self._sources.pop(site, None)

    def _state(self, new: Retyped) -> dict[str, Tensor]:
        return {
            name: getattr(self, f"{new.site.id}.{name}".replace(".", "_")) for name in new.state(torch.device("meta"))
        }

    def _check_sources(self) -> None:
        """Raise EFF-K208 where a buffer from which a cache was filled has been written since."""
        for site, buffers in self._sources.items():
            if any((x := of()) is not None and x._version != version for of, version in buffers):
                raise EffError(
                    CODE,
                    f"the buffers of {site} were written after they had been packed",
                    hint="fill(site, keys, values)",
                )

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the program with the arguments of the one that was exported."""
        if self._sources and not torch.compiler.is_compiling():
            self._check_sources()
        flat, spec = pytree.tree_flatten((args, kwargs))
        if spec != self._spec.in_spec:
            raise TypeError(
                f"the program was exported for arguments like {self._spec.in_spec}, and is called with {spec}"
            )
        given = iter(flat)
        values = [None if name is None else getattr(self, name) if name else next(given) for name in self._names]
        found = self._graph(*values)
        return pytree.tree_unflatten(list(found), self._spec.out_spec)

    def nbytes(self) -> int:
        """Return the bytes of all tensors of the caches."""
        held = [getattr(self, name) for name in self._packed]
        return sum(x.numel() * x.element_size() for x in held)

    def reset(self) -> None:
        """Forget all tokens that calls have written."""
        for new in self.caches.values():
            if not new.cross:
                new.clear(self._state(new))

    def hold(self, site: str, buffers: Sequence[Tensor]) -> None:
        """Give a cache of latents what buffers `[B, C, R]` or `[B, 1, C, R]` hold."""
        state = self._state(self.caches[site])
        for (codes, scales), x in zip(LATENTS, buffers):
            rows, places = (x if x.dim() == 4 else x[:, None]), torch.arange(x.shape[-2], device=x.device)
            torch.ops.eff.kv_write_tokens_v1.default(state[codes], state[scales], places, rows)


def prepare_exported(exported: torch.export.ExportedProgram, kv: Formats) -> PreparedProgram:
    """Return a module that runs the program with its caches in the format `kv`, or in that of each site by its id.

    Raises:
        EffError: EFF-K208 where no cache can be stored so, with the reason of each; where a tensor is changed that is neither a
            buffer nor an input, so that the change would be lost; EFF-K204 and EFF-K207 of the format.
    """
    ops.register()
    program = capture_export(exported)
    _check_writes(exported, program)
    caches: dict[str, Retyped] = {}
    sources: dict[str, tuple[Tensor, Tensor]] = {}
    held: dict[str, list[Tensor]] = {}
    kept: list[Decline] = []

    def storing(found: Recognized) -> tuple[Recognized, tuple[Choice, ...], tuple[Decline, ...]]:
        buffers, missed = find_buffers(found.program, _locate)
        kept.extend(Decline(m.site.id, "kv", "", m.refusal, m.site.source) for m in missed)
        taken: list[Cached] = []
        for item in buffers:
            form = _format(kv, item)
            if form is None:
                continue
            new = _stored(form, item)
            if isinstance(new, Refusal):
                kept.append(Decline(item.site.id, "kv", form.spelled, new, item.site.source))
                continue
            taken.append(item)
            caches[item.site.id] = new
            if isinstance(item, LatentCache):
                (entry,) = (entry for entry in found.program.entries if entry.name == item.site.entry)
                held[item.site.id] = [entry.input_of(write.base).value for write in item.writes]  # type: ignore[union-attr]
            if isinstance(item, CrossCache):
                described = [entry.input_of(x) for entry in found.program.entries[:1] for x in (item.keys, item.values)]
                sources[item.site.id] = (described[0].value, described[1].value)  # type: ignore[union-attr]
        ids = {item.attention.meta.get("eff.site") for item in taken if not isinstance(item, LatentCache)}
        left = tuple(site for site in found.sites if site.id not in ids)
        changed = replace(found, program=retype(found.program, caches, tuple(taken)), sites=left)
        chosen = tuple(Choice(site, "kv", new.spelled, "its own buffers are re-typed") for site, new in caches.items())
        return changed, chosen, tuple(kept)

    compiled = compile_program(program, detect(program.device), Options(strict=True), Dump(None), storing=storing)
    if not caches:
        why = (
            "; ".join(f"{d.site} ({d.source}): {d.refusal.reason}" for d in kept)
            or "no attention reads a buffer that is written"
        )
        raise EffError(CODE, f"no cache of the program can be stored in `{kv}`: {why}", hint="eff.explain(program)")
    made = PreparedProgram(exported, compiled.program, compiled.plan, caches, sources)
    for site, tensors in held.items():
        made.hold(site, tensors)
    return made


def _locate(node: fx.Node) -> tuple[str, str]:
    return module_of(node), node.meta.get("eff.source", "")


def _format(kv: Formats, item: Cached) -> CacheFormat | None:
    given = kv.get(item.site.id) if isinstance(kv, Mapping) else kv
    if given is None or isinstance(given, CacheFormat):
        return given
    found = read_policy("kv", given, all_methods())
    assert isinstance(found, CacheFormat)
    return found


def _stored(form: CacheFormat, item: Cached) -> Retyped | Refusal:
    site = item.site
    if site.idiom != "buffers":
        return Refusal(CODE, "the cache is an input, which stays the caller's", "register it as a buffer of the model")
    if not all(isinstance(extent, int) for extent in (site.batch, site.kv_heads, site.capacity)):
        return Refusal(CODE, "the cache has sizes that are not known", "export it with fixed sizes of its buffers")
    if form.tiers is not None:
        return Refusal(CODE, f"`{form.name}` needs to see a prompt before it makes its tensors", "another format")
    storage = form.latents(site) if site.layout == "mla" else form.storage(site)
    if isinstance(storage, Refusal):
        return storage
    cross = isinstance(item, CrossCache)
    return Retyped(site, storage, form.spelled, form.constants(site), cross, _ring(item, storage))


def _ring(item: Cached, storage: Storage) -> int:
    """Return how many places serve a cache of which attention sees a window; 0 for all, where those are no more or lie in groups.

    Beside the window there are places for `ROOM` tokens that can be taken back.
    """
    site = item.site
    assert isinstance(site.capacity, int)
    if not isinstance(item, BufferCache) or not site.window or storage.unit > 1:
        return 0
    count = item.keys.tokens.meta["val"].shape[2]
    places = storage.capacity(site.window - 1 + ROOM)
    return places if isinstance(count, int) and count <= ROOM and places < storage.capacity(site.capacity) else 0


def _check_writes(exported: torch.export.ExportedProgram, program: Program) -> None:
    """Raise EFF-K208 for a write into a tensor that is no buffer, parameter or input: nobody would see it."""
    kinds = {
        spec.arg.name: spec.kind.name for spec in exported.graph_signature.input_specs if hasattr(spec.arg, "name")
    }
    for node in program.entries[0].graph.graph.nodes:
        if not isinstance(node.target, torch._ops.OpOverload) or not node.target._schema.is_mutable or not node.args:
            continue
        base = node.args[0]
        while isinstance(base, fx.Node) and is_view(base) and base.args:
            base = base.args[0]
        if isinstance(base, fx.Node) and base.op == "placeholder" and kinds.get(base.name) == "CONSTANT_TENSOR":
            raise EffError(
                CODE,
                f"`{node.target}` writes into a tensor that is neither a buffer nor an input of the program, so the program does "
                "not return what it wrote",
                source=node.meta.get("eff.source") or None,
                hint="register the cache as a buffer: self.register_buffer(name, tensor)",
            )
