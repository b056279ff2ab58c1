"""Hold small models, a user's own pass, and a failing one, for the tests that compile."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import effcompile as eff
from effcompile.core.plan import Plan
from effcompile.core.program import Program
from effcompile.core.rewrite import Editor, Pass, PassResult, copy_graph

CHEAP = {"emit": "interpreter", "strict": True}


class Layer(nn.Module):
    def __init__(self, width: int = 32, heads: int = 4) -> None:
        super().__init__()
        self.qkv, self.out, self.heads = nn.Linear(width, 3 * width), nn.Linear(width, width), heads

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return x + self.out(y.transpose(1, 2).flatten(2))


class Decoder(nn.Module):
    """Build its mask itself, as transformers does."""

    def __init__(self, layers: int = 2) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(Layer() for _ in range(layers))

    def forward(self, x: Tensor) -> Tensor:
        places = torch.arange(x.shape[1])
        mask = torch.where(places[None] <= places[:, None], 0.0, torch.finfo(x.dtype).min)
        for layer in self.layers:
            x = layer(x, mask)
        return x


class Eager(nn.Module):
    """Hold one attention that is raised and one that cannot be: its probabilities are returned."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        probs = (x @ x.transpose(-1, -2)).softmax(-1)
        return F.scaled_dot_product_attention(x, x, x) + probs @ x, probs


def text(length: int = 6, batch: int = 2) -> Tensor:
    return torch.randn(batch, length, 32, generator=torch.Generator().manual_seed(length))


def heads() -> Tensor:
    return torch.randn(2, 2, 5, 8, generator=torch.Generator().manual_seed(0))


def close(found: Any, expected: Any) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def kernels() -> list[str]:
    return [site["kernel"] for graph in eff.report()["graphs"] for site in graph["sites"]]


@torch.no_grad()
def compiled(model: Callable[..., Any], *args: Any, **options: Any) -> Callable[..., Any]:
    run = torch.compile(model, backend="eff", options={**CHEAP, **options})
    close(run(*args), model(*args))
    return run


@dataclass(frozen=True)
class AddOne(Pass):
    """Add one to the first output: a user's own pass, and a wrong one."""

    name: ClassVar[str] = "add-one"
    phase: ClassVar[str] = "lowered"
    differentiable: ClassVar[bool] = True

    def run(self, program: Program, plan: Plan) -> PassResult:
        (entry,) = program.entries
        edit = Editor(copy_graph(entry.graph))
        output = next(node for node in edit.graph.nodes if node.op == "output")
        (first, *rest) = output.args[0]  # type: ignore[misc]
        with edit.before(output):
            more = edit.call(torch.ops.aten.add.Tensor, first, 1)
        output.args = ((more, *rest),)  # type: ignore[assignment]
        return PassResult(program.with_graph(entry, edit.finish()), True, ("one added",))


@dataclass(frozen=True)
class Fail(Pass):
    """Raise, or leave a broken graph."""

    name: ClassVar[str] = "fail"
    differentiable: ClassVar[bool] = True
    phase: ClassVar[str] = "raised"
    way: str = "raise"

    def run(self, program: Program, plan: Plan) -> PassResult:
        if self.way == "raise":
            raise ZeroDivisionError("on purpose")
        (entry,) = program.entries
        graph = copy_graph(entry.graph)
        output = next(node for node in graph.graph.nodes if node.op == "output")
        if self.way == "outputs":
            output.args = ((),)
        elif self.way == "order":
            with graph.graph.inserting_before(next(iter(graph.graph.nodes))):
                first = graph.graph.call_function(torch.ops.aten.relu.default, (output.args[0][0],))  # type: ignore[index]
            output.args = ((first,),)
        else:
            wide = output.args[0][0]  # type: ignore[index]
            with graph.graph.inserting_before(output):
                flat = graph.graph.call_function(torch.ops.aten.flatten.using_ints, (wide,))
            flat.meta["val"] = wide.meta["val"].flatten()  # type: ignore[union-attr]
            output.args = ((flat,),)
        return PassResult(program.with_graph(entry, graph), True)
