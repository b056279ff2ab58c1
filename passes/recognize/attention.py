"""Raise every recognized attention to `eff::attention_v1` and a Site; say why the rest was left alone."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from effcompile.core.expr import BATCH, BOOL, FLOAT, HEAD, KEY, QUERY, TRUE, Expr, apply, axes_of, axis, const, walk
from effcompile.core.expr_eval import evaluate, to_json
from effcompile.core.mask import CAUSAL, EmptyRow, Mask, Opaque
from effcompile.core.program import Entry, Program
from effcompile.core.rewrite import Editor, copy_graph
from effcompile.core.site import AttentionSite, Missed, Refusal, Site
from effcompile.passes.recognize.aliases import Aliases
from effcompile.passes.recognize.element_rules import rules
from effcompile.passes.recognize.elements import Reader, Unreadable
from effcompile.passes.recognize.flex import erase, is_flex, match_flex
from effcompile.passes.recognize.layouts import laid_out, tells_layout
from effcompile.passes.recognize.mask import ReadMask, split
from effcompile.passes.recognize.match import Match, NoMatch, Term, same_size
from effcompile.passes.recognize.origins import Origins
from effcompile.passes.recognize.sdpa import match_sdpa
from effcompile.passes.recognize.softmax_chain import match_chain

Naming = Callable[[fx.Node], tuple[str, str]]  # node -> (module path, source line)


@dataclass(frozen=True)
class Recognized:
    """Hold the raised program, its sites, what was missed, and the buffers whose content a proof relied on."""

    program: Program
    sites: tuple[AttentionSite, ...] = ()
    missed: tuple[Missed, ...] = ()
    pinned: tuple[str, ...] = ()


def recognize_attention(program: Program, name_of: Naming) -> Recognized:
    """Return the program with each attention as one `eff::attention_v1` node that carries `meta["eff.site"]`."""
    sites: list[AttentionSite] = []
    missed: list[Missed] = []
    pinned: list[str] = []
    for entry in program.entries:
        edit = Editor(copy_graph(entry.graph))
        raiser = _Raiser(entry, edit, name_of, program.requires_grad)
        for node in list(edit.graph.nodes):
            found = raiser.match(node)
            if isinstance(found, Match):
                sites.append(raiser.raise_match(found))
                if is_flex(node):
                    erase(node)
            elif isinstance(found, NoMatch):
                missed.append(Missed(raiser.plain_site(found.anchor, found.idiom), found.refusal))
        pinned.extend(raiser.pinned)
        program = program.with_graph(entry, edit.finish())
    return Recognized(program, tuple(sites), tuple(missed), tuple(dict.fromkeys(pinned)))


class _Raiser:
    def __init__(self, entry: Entry, edit: Editor, name_of: Naming, training: bool) -> None:
        self.entry, self.edit, self.name_of, self.training = entry, edit, name_of, training
        self.pinned: list[str] = []
        self._names: set[str] = set()
        self._masks: dict[Any, ReadMask] = {}
        self._rules = rules()
        values = {item.node: item.value for item in entry.inputs if item.kind == "buffer"}
        self._buffers = lambda node: values.get(node.name) if node.op == "placeholder" else None
        self._aliases = Aliases(edit.graph)
        self._origins = Origins(entry, edit.graph)

    def match(self, node: fx.Node) -> Match | NoMatch | None:
        """Return the attention that ends at a node, if it can be computed in one piece; else why not."""
        found = match_sdpa(node) or match_chain(node) or self._flex(node)
        if isinstance(found, Match) and (refusal := self.moved(found)) is not None:
            kept = NoMatch(found.anchor if is_flex(node) else node, found.idiom, refusal)
            found = match_sdpa(node, grouped=False) or self._flex(node, grouped=False)
            if not isinstance(found, Match) or self.moved(found) is not None:
                found = kept
        if isinstance(found, Match) and not found.scale:
            return NoMatch(
                found.anchor, found.idiom, Refusal("EFF-A106", "the scale is 0, and SDPA scales its -inf too")
            )
        return found

    def _flex(self, node: fx.Node, grouped: bool = True) -> Match | NoMatch | None:
        if not is_flex(node):
            return None
        q, k = node.args[0].meta["val"].shape, node.args[1].meta["val"].shape  # type: ignore[union-attr]
        reader = Reader(self.edit.graph, self._rules, self._buffers, extents=(*q[:3], k[2]))
        return match_flex(node, reader, self.training, grouped)

    def moved(self, match: Match) -> Refusal | None:
        """Say why the attention cannot be computed in one piece, at the place of its last step."""
        seen = self._aliases
        if any(
            node not in seen.order for node in (match.anchor, *match.path, *(n for pair in match.reads for n in pair))
        ):
            seen = self._aliases = Aliases(self.edit.graph)
        end = seen.order[match.anchor]
        begin = min((seen.order[node] for node in match.path), default=end)
        reads = [(value, seen.order[reader]) for value, reader in match.reads]
        for value, at in reads + [(step, begin) for step in match.path]:
            writer = seen.written_between(value, at, end, match.path)
            if writer is not None:
                return Refusal("EFF-A107", f"`{writer.name}` writes in place to what the attention reads")
        if (fence := seen.fence_between(begin, end)) is not None:
            return Refusal("EFF-A107", f"`{fence.name}` changes gradients or autocast within the attention")
        return None

    def plain_site(self, node: fx.Node, idiom: str) -> Site:
        path, source = self.name_of(node)
        name, number = path or "graph", 0
        found = name if path else f"{name}.0"
        while found in self._names:
            number += 1
            found = f"{name}.{number}"
        self._names.add(found)
        return Site(found, "attention", self.entry.name, source, idiom)

    def raise_match(self, match: Match) -> AttentionSite:
        plain = self.plain_site(match.anchor, match.idiom)
        edit, anchor = self.edit, match.anchor
        with edit.before(anchor):
            q, k, v = match.q(edit), match.k(edit), match.v(edit)
            scale = match.scale
            if (
                scale < 0 and not match.causal
            ):  # SDPA scales its -inf too: below zero, causal rows become NaN (torch 2.13)
                q, scale = edit.call(torch.ops.aten.neg.default, q), -scale
            shape, keys = q.meta["val"].shape, k.meta["val"].shape
            read = match.read or self._read(match, shape, keys[2])
            mask = read.mask
            if isinstance(mask, Mask) and match.causal:
                mask = CAUSAL if mask.is_full else mask
            known = isinstance(mask, Mask)
            loads = [self._held(node, read) for node in read.loads] if known else []
            sizes = [edit.symbolic(expr) for expr in read.sizes] if known else []
            if read.element is None:
                given = self._tensor(match, shape, keys)
            else:
                given = self._written_out(read.element, loads, sizes, (*shape[:3], keys[2]), q.meta["val"].device)
            call = edit.call(
                torch.ops.eff.attention_v1.default,
                q,
                k,
                v,
                given,
                match.sinks,
                loads,
                sizes,
                to_json(mask.keep) if isinstance(mask, Mask) else "",
                to_json(mask.bias) if isinstance(mask, Mask) and mask.bias is not None else "",
                to_json(mask.soft) if isinstance(mask, Mask) else "",
                mask.empty_row if isinstance(mask, Mask) else ("zero" if match.idiom.startswith("sdpa") else "nan"),
                scale,
                match.softcap,
                like=anchor,
            )
            site = AttentionSite(
                plain.id,
                "attention",
                plain.entry,
                plain.source,
                match.idiom,
                batch=_extent(shape[0]),
                heads=_extent(shape[1]),
                kv_heads=_extent(keys[1]),
                head_dim=int(shape[3]),
                value_dim=int(v.meta["val"].shape[3]),
                q_len=_extent(shape[2]),
                kv_len=_extent(keys[2]),
                mask=mask,
                scale=scale,
                softcap=match.softcap,
                sinks=match.sinks is not None,
                cross=self._origins.cross(q, k, same_size(shape[2], keys[2])),
                dtype=str(q.meta["val"].dtype).removeprefix("torch."),
                tensors=tuple(self._named(node) for node in read.loads) if known else (),
            )
            call.meta["eff.site"] = site.id
            result = self._shaped(call, match)
            if match.read is not None and tells_layout(anchor):
                result = laid_out(edit, result, anchor.meta["val"])
        edit.replace(anchor, result)
        self.pinned.extend(node.name for node in read.pinned)
        return site

    def _shaped(self, call: fx.Node, match: Match) -> fx.Node:
        value = match.anchor.meta["val"]
        result = call
        if result.meta["val"].dtype != value.dtype:
            result = self.edit.call(torch.ops.aten.to.dtype, result, value.dtype)
        if match.rank3 is not None:
            return self.edit.call(torch.ops.aten.reshape.default, result, [self.edit.size(n) for n in value.shape])
        if match.out_dims != (0, 1, 2, 3):
            return self.edit.call(torch.ops.aten.permute.default, result, list(match.out_dims))
        return result

    # --- masks ---------------------------------------------------------------------------------------------------------

    def _read(self, match: Match, shape: Any, k_len: Any) -> ReadMask:
        """Combine the terms into one predicate; equal terms are read once for all layers."""
        if match.causal:
            if match.terms:
                return ReadMask(Opaque("is_causal together with a mask"))
            return ReadMask(CAUSAL)
        if not match.terms:
            return ReadMask(Mask())
        rule: EmptyRow = "zero" if match.idiom.startswith("sdpa") else "nan"
        states = tuple(self._aliases.last_write(term.node, self._place(term, match)) for term in match.terms)
        key = (match.terms, states, str(shape[:3]), str(k_len), rule, str(match.rank3))
        if key not in self._masks:
            self._masks[key] = self._combine(match, shape, k_len, rule)
        return self._masks[key]

    def _place(self, term: Term, match: Match) -> int:
        """Return where the source reads a mask: what is written in place later is not seen."""
        return self._aliases.order[term.reader or match.anchor]

    def _combine(self, match: Match, shape: Any, k_len: Any, rule: EmptyRow) -> ReadMask:
        q_len = shape[2]
        reader = Reader(self.edit.graph, self._rules, self._buffers, extents=(*shape[:3], k_len))
        try:
            value: Expr | None = None
            for term in match.terms:
                at = reader.order[term.reader or match.anchor]
                value = _apply_term(value, term, self._term(reader, term, match, at))
            assert value is not None
            added = any(term.kind == "add" for term in match.terms)
            scores = match.anchor.meta["val"].dtype
            mask = split(value, reader.number(q_len), reader.number(k_len), rule, scores, added)
            if mask.bias is not None and mask.empty_row == "never" and self._may_be_infinite(reader, mask.bias):
                mask = replace(mask, empty_row=rule)
        except Unreadable as refusal:
            return ReadMask(Opaque(str(refusal), str(match.terms[-1].node.meta["val"].dtype).removeprefix("torch.")))
        slots = (tuple(reader.loads), tuple(reader.sizes), tuple(reader.pinned))
        return ReadMask(mask, *slots, snapshots=tuple(reader.snapshots))

    def _held(self, node: fx.Node, read: ReadMask) -> fx.Node:
        """Return the value that a load reads: the node, or a copy made right after it where the node is written later."""
        if node not in read.snapshots:
            return node
        edit = self.edit
        return edit.shared(("snapshot", node), (node,), lambda: edit.call(torch.ops.aten.clone.default, node))

    def _named(self, node: fx.Node) -> str:
        """Name what a mask reads: the user's name where it is an input, else what computes it; with its dtype and shape."""
        item, value = self.entry.input_of(node), node.meta["val"]
        dims = ", ".join(str(n) for n in value.shape)
        return f"{item.name if item else node.name}: {str(value.dtype).removeprefix('torch.')}[{dims}]"

    def _may_be_infinite(self, reader: Reader, bias: Expr) -> bool:
        """Tell whether an addend reads floating-point data, which may hold -inf for a whole row; weights do not."""
        slots = {int(node.value or 0) for node in walk(bias) if node.op == "load" and node.dtype.is_floating_point}
        inputs = (self.entry.input_of(reader.loads[slot]) for slot in slots)
        return any(item is None or item.kind != "parameter" for item in inputs)

    def _term(self, reader: Reader, term: Term, match: Match, at: int) -> Expr:
        rank = term.node.meta["val"].dim()
        if rank > 4:
            raise Unreadable(f"a mask of rank {rank}")
        if not term.rank3 or rank < 3:
            return reader.element(term.node, tuple(map(axis, (BATCH, HEAD, QUERY, KEY)))[4 - rank :], at)
        if match.rank3 is None:
            raise Unreadable("a mask over joined batch and heads")
        joined = apply("add", apply("mul", axis(BATCH), reader.number(match.rank3[1])), axis(HEAD))
        return reader.element(term.node, (joined, axis(QUERY), axis(KEY)), at)

    def _written_out(
        self, element: Expr, loads: list[fx.Node], sizes: list[Any], extents: Any, device: torch.device
    ) -> fx.Node | None:
        """Return a mask function as the tensor that a kernel may read; it is dropped again where none does."""
        if element == TRUE:
            return None
        edit, used = self.edit, axes_of(element)
        counts = [edit.size(n) if number in used else 1 for number, n in enumerate(extents)]

        def values(*operands: Any) -> torch.Tensor:
            axes = [
                torch.arange(n, device=device).reshape([n if d == place else 1 for d in range(4)])
                for place, n in enumerate(operands[:4])
            ]
            found = evaluate(element, axes, operands[4 : 4 + len(loads)], operands[4 + len(loads) :])
            return found.reshape([1] * (4 - found.dim()) + list(found.shape)) if found.dim() < 4 else found

        operands = (*counts, *loads, *sizes)
        key = ("mask-tensor", to_json(element), *operands)
        return edit.shared(key, operands, lambda: edit.inline(values, *operands))

    def _tensor(self, match: Match, shape: Any, keys: Any) -> fx.Node | None:
        """Return the mask as the tensor the model built (bool keeps, float adds); combined where there are several terms."""
        if match.causal and not same_size(shape[2], keys[2]):
            aten, edit, device = torch.ops.aten, self.edit, match.anchor.meta["val"].device
            rows, columns = (edit.call(aten.arange.default, edit.size(n), device=device) for n in (shape[2], keys[2]))
            return edit.call(aten.le.Tensor, columns, edit.call(aten.unsqueeze.default, rows, 1))
        if not match.terms:
            return None
        if match.idiom.startswith("sdpa"):
            return match.terms[0].node
        aten, edit = torch.ops.aten, self.edit
        total: fx.Node | None = None
        for term in match.terms:
            node = term.node
            if (
                term.rank3
                and match.rank3 is not None
                and node.meta["val"].dim() == 3
                and node.meta["val"].shape[0] != 1
            ):
                _, *rest = node.meta["val"].shape
                node = edit.call(aten.reshape.default, node, [*map(edit.size, match.rank3), *map(edit.size, rest)])
            if term.kind == "add":
                total = node if total is None else edit.call(aten.add.Tensor, total, node)
                continue
            if node.meta["val"].dtype != BOOL:
                node = edit.call(aten.to.dtype, node, BOOL)
            if term.kind == "keep":
                node = edit.call(aten.logical_not.default, node)
            # A finite fill replaces the score; the least number added to it does the same.
            fill = -math.inf if term.fill == -math.inf else torch.finfo(FLOAT).min
            zeros = edit.call(aten.zeros_like.default, node, dtype=FLOAT)
            wide = zeros if total is None else edit.call(aten.add.Tensor, total, zeros)
            total = edit.call(aten.masked_fill.Scalar, wide, node, fill)
        return total


def _apply_term(value: Expr | None, term: Term, item: Expr) -> Expr:
    if term.kind == "add":
        if item.dtype == BOOL:
            raise Unreadable("a boolean is added to the scores")
        return item if value is None else apply("add", value, item)
    if item.dtype != BOOL:
        item = apply("to", item, dtype=BOOL)
    if value is None and term.kind == "keep" and term.fill == -math.inf:
        return item
    before = const(0.0, FLOAT) if value is None else value
    if before.dtype == BOOL:
        before = apply("where", before, const(0.0), const(-math.inf))
    fill = const(term.fill, before.dtype)
    return apply("where", item, fill, before) if term.kind == "fill" else apply("where", item, before, fill)


def _extent(value: Any) -> int | str:
    return value if isinstance(value, int) else str(value)


def sites_of(graph: fx.Graph) -> Iterable[fx.Node]:
    """Yield the raised attention nodes of a graph."""
    for node in graph.nodes:
        if node.op == "call_function" and node.target is torch.ops.eff.attention_v1.default:
            yield node
