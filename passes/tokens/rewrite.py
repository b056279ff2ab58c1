"""Shorten streams as the plan says."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import fx

from effcompile.core.attention_call import AttentionCall
from effcompile.core.expr import TRUE
from effcompile.core.expr_eval import to_json
from effcompile.core.mask import Mask
from effcompile.core.program import Program
from effcompile.core.rewrite import Editor, copy_graph
from effcompile.core.site import AttentionSite
from effcompile.core.tokens import Step, TokenReduction
from effcompile.core.verify import SHORTENED
from effcompile.passes.recognize.token_axis import Axis, Place
from effcompile.passes.recognize.tokens import Stream, streams
from effcompile.passes.tokens import masks
from effcompile.passes.tokens.around import shorten_sublayers
from effcompile.passes.tokens.epochs import Epochs
from effcompile.passes.tokens.heads import HeadCascade, one_for_all
from effcompile.passes.tokens.remake import Cut, remade

aten = torch.ops.aten
_ROWS = Axis(Place(1), Place(0))


def rewrite_tokens(
    program: Program,
    sites: Sequence[AttentionSite],
    policies: Mapping[str, TokenReduction],
    portable: bool = False,
) -> tuple[Program, tuple[AttentionSite, ...]]:
    """Return the program with streams shortened behind the sites that `policies` names, and the sites as they are then."""
    if not policies:
        return program, tuple(sites)
    by_id = {site.id: site for site in sites}
    for entry in program.entries:
        edit = Editor(copy_graph(entry.graph))
        mine = {site.id: site for site in sites if site.entry == entry.name}
        if next(iter(policies.values())).around:
            shorten_sublayers(edit, {name: policies[name] for name in policies if name in mine}, by_id, portable)
            program = program.with_graph(entry, edit.finish())
            continue
        for number in range(len(streams(edit.graph, mine))):
            stream = streams(edit.graph, mine)[number]
            if any(name in policies for name in stream.sites):
                _Shortening(edit, stream, policies, by_id, portable).run()
        program = program.with_graph(entry, edit.finish())
    return program, tuple(by_id[site.id] for site in sites)


class _Shortening:
    def __init__(
        self,
        edit: Editor,
        stream: Stream,
        policies: Mapping[str, TokenReduction],
        sites: dict[str, AttentionSite],
        portable: bool,
    ) -> None:
        self.edit, self.stream, self.policies, self.sites, self.portable = edit, stream, policies, sites, portable
        self.epochs = Epochs(edit, stream.batch, stream.tokens, portable)
        self.short: dict[fx.Node, tuple[fx.Node, int]] = {}
        self.restored: dict[fx.Node, fx.Node] = {}
        self.state: dict[str, tuple[fx.Node, int]] = {}
        self.behind = {node: name for name, node in stream.behind.items()}
        self.policy = next(policies[name] for name in stream.sites if name in policies)
        self._call: tuple[fx.Node, str, int] | None = None
        self.sources = {
            n.meta["eff.site"]: n
            for n in edit.graph.nodes
            if n in stream.axis and n.target is torch.ops.eff.attention_v1.default
        }
        self.heads = HeadCascade(edit, AttentionCall.of(self.sources[stream.sites[0]]).k, not portable)
        cutting = [n for n, name in enumerate(stream.sites) if name in policies and policies[name].heads_left]
        self.ranked = stream.sites[: cutting[-1] + 1] if cutting else []  # attentions whose heads are counted
        for name in stream.sites[cutting[0] + 1 :] if cutting else ():
            if name in stream.behind:
                self.heads.enter(self.sources[name])

    def run(self) -> None:
        """Walk along the stream."""
        stream, merges = self.stream, self.policy.merges
        for node in list(self.edit.graph.nodes):
            if node in stream.axis:
                with self.edit.before(node):
                    self._make(node)
                if node in self.behind:
                    self._shorten(node, self.behind[node])
            if node.op == "output":
                for arg in stream.returned & set(node.all_input_nodes):  # a layer's keys, of the tokens that reach it
                    node.replace_input_with(arg, self.short[arg][0])
                    self.short[arg][0].meta[SHORTENED] = True
            if node in stream.readers or (node in stream.whole and not merges):
                for arg in node.all_input_nodes:
                    if arg in self.short and (merges or arg in stream.residual) and self.short[arg][0] is not arg:
                        with self.edit.before(node):
                            node.replace_input_with(arg, self._restored(arg))

    # --- one operation ---------------------------------------------------------------------------------------------------

    def _make(self, node: fx.Node) -> None:
        mine = [arg for arg in node.all_input_nodes if arg in self.short]
        epoch = max((self.short[arg][1] for arg in mine), default=0)
        is_attention = node.target is torch.ops.eff.attention_v1.default
        if epoch == 0 and all(self.short[arg][0] is arg for arg in mine) and self.heads.part(node) is None:
            made = node
        elif is_attention:
            made = self._attention(node, epoch)
        else:
            made = self._copied(node, epoch)
        self.short[node] = (made, epoch)
        if is_attention and node.meta["eff.site"] in self.stream.sites:
            self._observe(made, node.meta["eff.site"], epoch)

    def _operand(self, node: fx.Node, arg: fx.Node, epoch: int) -> fx.Node:
        if arg in self.short:
            made, known = self.short[arg]
            axis = self.stream.axis[arg]
            return made if known == epoch or axis is None else self.epochs.bring(made, axis, known, epoch)
        axis = self.stream.sides.get(node, {}).get(arg)
        value = arg if axis is None else self.epochs.bring(arg, axis, 0, epoch)
        part = self.heads.part(node)
        place = None if part is None else part.sides.get(node, {}).get(arg)
        if place is None:
            return value
        missing = value.meta["val"].dim() - arg.meta["val"].dim()  # dimensions that the bringing put in front
        return self.heads.taken(value, place.tokens.dim + missing, place.batch.dim + missing)

    def _copied(self, node: fx.Node, epoch: int) -> fx.Node:
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda arg: self._operand(node, arg, epoch))
        cuts = Cut.of(self.stream.axis[node], self.stream.tokens, self.epochs.counts[epoch])
        part = self.heads.part(node)
        if part is None:
            return remade(self.edit, node, args, kwargs, cuts)  # type: ignore[arg-type]
        if node in part.starts:
            return self.heads.projected(node, args[0], part)  # type: ignore[arg-type, index]
        if node is part.end:
            return self.heads.joined(node, args[0], part)  # type: ignore[arg-type, index]
        cuts += Cut.of(part.axis[node], part.heads, self.heads.count)
        return remade(self.edit, node, args, kwargs, cuts)  # type: ignore[arg-type]

    # --- attention -------------------------------------------------------------------------------------------------------

    def _attention(self, node: fx.Node, epoch: int) -> fx.Node:
        edit, call = self.edit, AttentionCall.of(node)
        own = node.meta["eff.site"] in self.stream.sites  # cross attention has the keys of another sequence
        q, k, v = (self._operand(node, x, epoch) if x in self.short else x for x in (call.q, call.k, call.v))
        mask = call.mask if self.heads.part(node) is None else one_for_all(edit, call.mask)
        if epoch == 0:  # all tokens, of which some lost heads
            return edit.call(node.target, q, k, v, mask, *node.args[4:], like=node)  # type: ignore[arg-type]
        where, count = self.epochs.positions(epoch), len(call.loads)
        real = masks.real_tokens(edit, call, self.stream.batch, self.stream.tokens) if own else None
        if real is not None:
            real = self.epochs.bring(real, _ROWS, 0, epoch)
        sizes = self.epochs.sizes(epoch) if own else None
        logs = None if sizes is None else edit.call(aten.log.default, sizes)
        keep, bias = call.keep, call.bias
        if own and keep is not None:
            keep = masks.moved(keep, count, count + 1)
            bias = None if bias is None else masks.at_positions(bias, count)
            bias = masks.weighed(bias, count + 2) if logs is not None else bias
        elif keep is not None:
            keep = masks.for_queries(keep, count)
            bias = None if bias is None else masks.for_queries(bias, count)
        # A slot that nothing refers to holds the positions once more.
        loads = [*call.loads, where, where if real is None else real, where if logs is None else logs]
        mask = self._mask(mask, call, epoch, own, logs)
        made = edit.call(
            torch.ops.eff.attention_v1.default,
            q,
            k,
            v,
            mask,
            call.sinks,
            loads,
            list(call.sizes),
            to_json(keep) if keep is not None else "",
            to_json(bias) if bias is not None else "",
            to_json(TRUE) if keep is not None else "",
            call.empty_row,
            call.scale,
            call.softcap,
            like=node,
        )
        name = node.meta["eff.site"]
        site, count = self.sites[name], self.epochs.counts[epoch]
        seen = site.mask
        if isinstance(seen, Mask) and keep is not None:
            seen = replace(seen, keep=keep, bias=bias, soft=TRUE)
        self.sites[name] = replace(site, q_len=count, kv_len=count if own else site.kv_len, mask=seen)
        return made

    def _mask(
        self, mask: fx.Node | None, call: AttentionCall, epoch: int, own: bool, logs: fx.Node | None
    ) -> fx.Node | None:
        """Insert the mask as a tensor over the tokens that are left; nothing of it stays where the kernel reads none."""
        edit = self.edit
        if mask is not None:
            for dim in (2, 3) if own else (2,):
                if mask.meta["val"].dim() < 4:
                    shape = [edit.size(n) for n in mask.meta["val"].shape]
                    mask = edit.call(aten.reshape.default, mask, [1] * (4 - len(shape)) + shape)
                if mask.meta["val"].shape[dim] != 1:
                    mask = self.epochs.bring(mask, Axis(Place(dim), Place(0)), 0, epoch)
        if logs is None:
            return mask
        wide = call.q.meta["val"].dtype
        column = edit.call(
            aten.unsqueeze.default, edit.call(aten.unsqueeze.default, edit.call(aten.to.dtype, logs, wide), 1), 1
        )
        if mask is None:
            return column
        if mask.meta["val"].dtype == torch.bool:
            none = edit.call(aten.logical_not.default, mask)
            return edit.call(aten.masked_fill.Scalar, column, none, float("-inf"))
        return edit.call(aten.add.Tensor, mask, column)

    # --- policies ----------------------------------------------------------------------------------------------------------

    def _step(self, made: fx.Node, name: str, epoch: int, left: int) -> Step:
        call = AttentionCall.of(made)
        original = AttentionCall.of(self.sources[name])
        real = masks.real_tokens(self.edit, original, self.stream.batch, self.stream.tokens)
        held = self.epochs.held(epoch, self.policy.pinned, real)
        now = self._real(name, epoch)
        state = {key: self.epochs.bring(value, _ROWS, known, epoch) for key, (value, known) in self.state.items()}
        return Step(
            self.edit,
            call,
            self.sites[name],
            self.stream.sites.index(name),
            self.epochs.counts[epoch],
            left,
            self.portable,
            held,
            now,
            self.epochs.sizes(epoch),
            state,
        )

    def _real(self, name: str, epoch: int) -> fx.Node | None:
        """Insert which tokens of an epoch are no padding, None where all are."""
        original = AttentionCall.of(self.sources[name])
        real = masks.real_tokens(self.edit, original, self.stream.batch, self.stream.tokens)
        return None if real is None else self.epochs.bring(real, _ROWS, 0, epoch)

    def _observe(self, made: fx.Node, name: str, epoch: int) -> None:
        self._call = (made, name, epoch)
        if self.policy.watches:
            step = self._step(made, name, epoch, 0)
            self.policy.observe(step)
            self.state = {key: (value, epoch) for key, value in step.state.items()}
        if name in self.ranked and name in self.stream.behind:
            with self.edit.before(self.sources[name].next):
                self.heads.observe(made, self._real(name, epoch))

    def _shorten(self, node: fx.Node, name: str) -> None:
        policy = self.policies.get(name)
        if policy is None:
            return
        assert self._call is not None
        made, seen, epoch = self._call
        assert seen == name
        value, known = self.short[node]
        axis = self.stream.axis[node]
        assert axis is not None
        following = node.next
        with self.edit.before(following):
            if policy.left < self.epochs.counts[epoch]:
                value = value if known == epoch else self.epochs.bring(value, axis, known, epoch)
                step = replace(self._step(made, name, epoch, policy.left), stream=value)
                kept = policy.choose(step)
                self.short[node] = (self.epochs.begin(value, kept, policy.left), epoch + 1)
                self.state = {key: (item, epoch) for key, item in step.state.items()}
            if policy.heads_left and policy.heads_left < self.heads.count:
                self.heads.shorten(policy.heads_left)

    def _restored(self, node: fx.Node) -> fx.Node:
        if node not in self.restored:
            made, epoch = self.short[node]
            axis = self.stream.axis[node]
            assert axis is not None
            self.restored[node] = self.epochs.restore(made, axis, epoch)
        return self.restored[node]
