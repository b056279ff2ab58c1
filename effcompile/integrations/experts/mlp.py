"""Read one expert that is a module of its own: which parameters its two products have, and the gate in between.

The module is traced once without data. `W2 gate(W1 x)` is read, with gate and up as one linear layer or as two, and biases; dropout
in evaluation does nothing. Experts are alike where they print alike and their plain attributes are equal.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.func import functional_call
from torch.fx.experimental.proxy_tensor import make_fx

from effcompile.core.experts import Gate
from effcompile.core.site import Refusal
from effcompile.integrations.experts.pack import Pack, Part
from effcompile.passes.recognize.elements import op_name
from effcompile.passes.recognize.gates import read_gate


@dataclass(frozen=True)
class Expert:
    """Hold the names of an expert's parameters: `first` is (gate, up), or the one that gives both or has no up."""

    gate: Gate
    first: tuple[str, ...]
    second: str
    first_bias: tuple[str, ...] = ()
    second_bias: str = ""


def read_expert(expert: nn.Module) -> Expert | Refusal:
    """Return what an expert computes of rows `[n, H]`, or why it is no pair of products that is known."""
    kind, named = type(expert).__name__, dict(expert.named_parameters())
    if any(True for _ in expert.buffers()) or any(_hooked(module) for module in expert.modules()):
        return Refusal("EFF-M302", f"{kind} has buffers or hooks")
    if expert.training:
        return Refusal("EFF-M302", f"{kind} is in training", "model.eval() before eff.prepare(model)")
    try:
        return _read(expert, kind, named)
    except Exception as error:  # a module's own code: whatever it raises, it stays as it is
        return Refusal("EFF-M302", f"{kind} cannot be traced ({type(error).__name__})")


def _read(expert: nn.Module, kind: str, named: Mapping[str, nn.Parameter]) -> Expert | Refusal:
    def run(x: Tensor, *values: Tensor) -> Tensor:
        made: Tensor = functional_call(expert, dict(zip(named, values)), (x,))
        return made

    widths = dict.fromkeys(value.shape[-1] for value in named.values() if value.dim() == 2)
    example = next(iter(named.values()))
    for width in widths:  # of its rows: that of its first layer, as a rule, and the module says whether it fits
        try:
            graph = make_fx(run, tracing_mode="fake", pre_dispatch=True)(
                torch.empty(3, width, dtype=example.dtype, device=example.device), *(p.detach() for p in named.values())
            ).graph
        except RuntimeError:
            continue
        return _products(graph, kind, tuple(named))
    return Refusal("EFF-M302", f"{kind} takes rows of no width of its weights")


def _products(graph: fx.Graph, kind: str, names: Sequence[str]) -> Expert | Refusal:
    x, *given = [node for node in graph.nodes if node.op == "placeholder"]
    name_of = dict(zip(given, names))
    (result,) = next(node for node in graph.nodes if node.op == "output").args
    second = _plain(result)
    firsts = [node for node in graph.nodes if op_name(node) == "linear" and node is not second]
    linear = op_name(second) == "linear" and all(_plain(node.args[0]) is x for node in firsts)
    weights = [node.args[1] for node in (*firsts, second)]
    if not linear or len(firsts) not in (1, 2) or not set(weights) <= set(name_of) or len(set(weights)) != len(weights):
        return Refusal("EFF-M302", f"{kind} is no pair of products with a gate in between")
    inner = _plain(second.args[0])
    why = ""
    for order in (firsts, firsts[::-1])[: len(firsts)]:
        read = read_gate(inner, {node: place for place, node in enumerate(order)} if len(order) == 2 else None)
        if isinstance(read, Refusal):
            why = why or read.reason
            continue
        if read.source not in order:
            break
        biases = [_bias(node) for node in order]
        if any(bias is None for bias in biases) and any(bias is not None for bias in biases):
            return Refusal("EFF-M302", f"{kind} has a bias in one half of its first product")
        last = _bias(second)
        return Expert(
            read.gate,
            tuple(name_of[node.args[1]] for node in order),
            name_of[second.args[1]],
            tuple(name_of[bias] for bias in biases if bias is not None),
            name_of[last] if last is not None else "",
        )
    return Refusal("EFF-M302", f"{kind}: {why or 'the gate reads something else than the first product'}")


def _bias(linear: fx.Node) -> Any:
    return linear.args[2] if len(linear.args) > 2 else linear.kwargs.get("bias")


def _plain(node: Any) -> Any:
    """Follow dropout that drops nothing and casts to the same dtype back."""
    while isinstance(node, fx.Node):
        name = op_name(node)
        idle = name == "dropout" and node.args[2] is False
        same = name in ("to", "_to_copy", "contiguous") and node.meta["val"].dtype == node.args[0].meta["val"].dtype  # type: ignore[union-attr]
        if not idle and not same:
            return node
        node = node.args[0]
    return node


def _hooked(module: nn.Module) -> bool:
    own = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return any(getattr(module, name) for name in own) or "forward" in vars(module)


def activation(function: Callable[[Tensor], Tensor]) -> str | Refusal:
    """Return the name of an activation as `eff::moe_v1` has it, or why it is none of them."""
    try:
        graph = make_fx(function, tracing_mode="fake", pre_dispatch=True)(torch.empty(2, 8)).graph
    except Exception as error:  # anybody's code
        return Refusal("EFF-M302", f"the activation cannot be traced ({type(error).__name__})")
    (result,) = next(node for node in graph.nodes if node.op == "output").args
    read = read_gate(result)
    if isinstance(read, Refusal):
        return Refusal("EFF-M302", read.reason)
    plain = read.gate == Gate(read.gate.act, "none") and read.source.op == "placeholder"
    return read.gate.act if plain else Refusal("EFF-M302", f"a gate ({read.gate}) where an activation is expected")


def alike(experts: Sequence[nn.Module]) -> Refusal | None:
    """Return why experts are not all of one form, None where they are."""
    first = experts[0]
    for expert in experts[1:]:
        if type(expert) is not type(first) or repr(expert) != repr(first) or not _equal(expert, first):
            return Refusal("EFF-M302", f"the experts are not alike: {type(first).__name__} and {type(expert).__name__}")
        if any(True for _ in expert.buffers()) or any(_hooked(module) for module in expert.modules()):
            return Refusal("EFF-M302", f"one {type(expert).__name__} has buffers or hooks")
    return None


def _equal(one: nn.Module, other: nn.Module) -> bool:
    for a, b in zip(one.modules(), other.modules()):
        # A new linear layer is in training mode until somebody says otherwise, which changes nothing.
        idle = {"training"} if type(a) is nn.Linear else set()
        plain, others = ({k: v for k, v in vars(m).items() if k[0] != "_" and k not in idle} for m in (a, b))
        if type(a) is not type(b) or plain.keys() != others.keys():
            return False
        for key, value in plain.items():
            if value is not others[key] and not (isinstance(value, int | float | str | tuple) and value == others[key]):
                return False
    return True


def pack_experts(experts: Sequence[nn.Module], read: Expert) -> Pack:
    """Return the pack, not filled yet, of experts that are alike: w1 `[E, 2 I, H]`, w2 `[E, H, I]` and their biases."""
    parts: list[Part] = []
    count = len(experts)
    halves = len(read.first)
    heights = [experts[0].get_parameter(name).shape[0] for name in read.first]
    hidden, inner = experts[0].get_parameter(read.second).shape
    shapes: dict[str, tuple[int, ...]] = {
        "w1": (count, sum(heights), experts[0].get_parameter(read.first[0]).shape[1]),
        "w2": (count, hidden, inner),
    }
    if read.first_bias:
        shapes["b1"] = shapes["w1"][:2]
    if read.second_bias:
        shapes["b2"] = (count, hidden)
    for number, expert in enumerate(experts):
        for operand, names in (("w1", read.first), ("b1", read.first_bias)):
            for half, name in enumerate(names):
                low = heights[0] * half
                parts.append(_part(expert, name, operand, number, low, low + heights[half]))
        for operand, name in (("w2", read.second), ("b2", read.second_bias)):
            if name:
                parts.append(_part(expert, name, operand, number, 0, hidden))
    assert halves in (1, 2)
    return Pack(parts, shapes)


def _part(expert: nn.Module, path: str, operand: str, number: int, low: int, high: int) -> Part:
    owner, _, name = path.rpartition(".")
    holder = expert.get_submodule(owner)
    return Part(holder, name, holder._parameters[name], operand, lambda whole: whole[number, low:high])  # type: ignore[arg-type]
