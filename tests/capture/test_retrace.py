"""A copied layer equals a traced one: the same nodes, operands, layouts, shared storages, module paths and source lines."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from effcompile.capture import dynamo, retrace
from effcompile.core.program import Program
from effcompile.passes.recognize.aliases import Aliases


class Block(nn.Module):
    def __init__(self, width: int, number: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.number = number

    def forward(self, x: Tensor, table: Tensor, seen: list[Tensor]) -> Tensor:
        q, k, v = self.qkv(self.norm(x)).chunk(3, -1)
        q = q * table.to(x.dtype) + q.transpose(-1, -2).transpose(-1, -2)
        seen.append(k)
        y = F.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None])[:, 0]
        return x.float() + self.finish(self.out(y))

    def finish(self, y: Tensor) -> Tensor:
        return F.silu(y)


class Scaled(Block):
    def finish(self, y: Tensor) -> Tensor:
        return F.silu(y) * (self.number + 1)


class Writing(Block):
    def finish(self, y: Tensor) -> Tensor:
        return F.silu(y.mul(2)).add_(1)


class Torn(Block):
    def finish(self, y: Tensor) -> Tensor:
        with torch.enable_grad():
            return F.silu(y)


class Stack(nn.Module):
    def __init__(self, kind: type[Block], count: int = 5, width: int = 8) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(kind(width, number) for number in range(count))
        self.register_buffer("table", torch.rand(width))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        seen: list[Tensor] = []
        for block in self.blocks:
            x = block(x, self.table, seen)
        return x, *seen


Both = list[tuple[Any, Any]]


@pytest.fixture
def both(monkeypatch: pytest.MonkeyPatch) -> Both:
    """Collect the graph traced node by node, and the one that copies layers, of every capture."""
    found: Both = []
    plain = retrace.retrace

    def twice(gm: Any, fakes: Any, *, copying: bool) -> Any:
        found.append((plain(gm, fakes, copying=False), plain(gm, fakes, copying=copying)))
        return found[-1][1]

    monkeypatch.setattr(dynamo, "retrace", twice)
    return found


@pytest.fixture
def copies(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Collect the numbers of the repetitions that were copied."""
    done: list[int] = []
    copy = retrace._Copying._copy

    def counted(self: Any, number: int) -> None:
        copy(self, number)
        done.append(number)

    monkeypatch.setattr(retrace._Copying, "_copy", counted)
    return done


def capture(function: Callable[..., Any], *args: Any, **how: Any) -> list[Program]:
    programs: list[Program] = []

    def backend(gm: Any, inputs: Any) -> Any:
        programs.append(dynamo.capture_dynamo(gm, inputs))
        return gm.forward

    torch.compile(function, backend=backend, **how)(*args)
    return programs


def described(graph: torch.fx.Graph) -> list[Any]:
    aliases, place = Aliases(graph), {node: number for number, node in enumerate(graph.nodes)}
    lines = []
    for node in graph.nodes:
        operands = torch.fx.node.map_arg((node.args, node.kwargs), lambda arg: place[arg])
        meta = [node.meta.get(key) for key in ("nn_module_stack", "stack_trace")]
        value = node.meta.get("val")
        layout = torch.utils._pytree.tree_map_only(
            torch.Tensor, lambda x: (x.dtype, x.shape, x.stride(), x.storage_offset(), x.device), value
        )
        target = node.target
        if node.op == "get_attr":  # copies share a constant, traces make one each
            target = getattr(graph.owning_module, str(target)).tolist()
        lines.append((node.op, target, operands, layout, place[aliases.root(node)], meta, len(node.users)))
    return lines


def test_copied_layers_equal_traced_ones(both: Both, copies: list[int]) -> None:
    with torch.no_grad():
        capture(Stack(Block), torch.rand(2, 3, 8), dynamic=False)
    ((plain, copied),) = both
    assert copies == [1, 2, 3, 4]
    assert described(plain.graph) == described(copied.graph)


@pytest.mark.parametrize("cache", [False, True])
def test_a_transformers_model_is_copied_exactly(both: Both, copies: list[int], cache: bool) -> None:
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = transformers.LlamaConfig(vocab_size=64, num_hidden_layers=4, **sizes)
    model = transformers.LlamaForCausalLM(config).eval()
    with torch.no_grad():
        capture(lambda ids: model(ids, use_cache=cache).logits, torch.randint(0, 64, (2, 9)), dynamic=False)
    ((plain, copied),) = both
    assert copies == [1, 2, 3]
    assert described(plain.graph) == described(copied.graph)


@pytest.mark.parametrize("kind", [Scaled, Writing, Torn])
def test_layers_that_are_no_function_of_their_inputs_are_traced(
    both: Both, copies: list[int], kind: type[Block]
) -> None:
    with torch.no_grad():
        capture(Stack(kind), torch.rand(2, 3, 8), dynamic=False)
    ((plain, copied),) = both
    assert copies == []
    assert described(plain.graph) == described(copied.graph)


def test_symbolic_sizes_are_traced(both: Both, copies: list[int]) -> None:
    with torch.no_grad():
        capture(Stack(Block), torch.rand(2, 3, 8), dynamic=True)
    assert copies == []
    ((plain, copied),) = both
    assert [str(node.target) for node in plain.graph.nodes] == [str(node.target) for node in copied.graph.nodes]


def test_gradients_are_traced(copies: list[int]) -> None:
    capture(Stack(Block), torch.rand(2, 3, 8), dynamic=False)
    assert copies == []


def test_a_layer_that_reads_another_layers_value_is_copied_with_it(both: Both, copies: list[int]) -> None:
    class Crossed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.ParameterList(nn.Parameter(torch.rand(8, 8)) for _ in range(5))

        def forward(self, x: Tensor) -> Tensor:
            before = x
            for w in self.w:
                now = torch.tanh(x @ w) + torch.sigmoid(before @ w) * torch.cos(x) - before.abs().sqrt()
                before, x = x, now.contiguous().to(now.dtype) * 2
            return x

    with torch.no_grad():
        capture(Crossed(), torch.rand(3, 8), dynamic=False)
    ((plain, copied),) = both
    assert described(plain.graph) == described(copied.graph)


def _branches(count: int) -> list[Callable[[Tensor], Tensor]]:
    return [lambda x, n=n: torch.cond(x.sum() > 0, lambda y: y.sin() * n, torch.cos, (x,)) for n in range(count)]  # type: ignore[misc]


def test_what_a_layer_reads_from_between_the_layers_is_there(both: Both, copies: list[int]) -> None:
    """The graphs of its branches stand inside the run that reads them, behind its first node."""

    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.branches = _branches(5)

        def forward(self, x: Tensor) -> Tensor:
            for branch in self.branches:
                x = torch.tanh(torch.relu(x) + x.abs().sqrt()).exp().neg() * torch.sigmoid(x)
                x = branch(x) + torch.cos(x)
            return x

    with torch.no_grad():
        capture(Mixed(), torch.rand(3, 8), dynamic=False)
    assert copies == []
    ((plain, copied),) = both
    assert [str(node.target) for node in plain.graph.nodes] == [str(node.target) for node in copied.graph.nodes]
