"""Models and passes that command lines in the tests name as `tests.cli.samples:NAME`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from effcompile.core.plan import Plan
from effcompile.core.program import Program
from effcompile.core.rewrite import Editor, Pass, PassResult, copy_graph


class Attention(nn.Module):
    """Attend causally over 4 heads; `kind` says how the code leaves the graph, if it does."""

    def __init__(self, kind: str = "plain", width: int = 64) -> None:
        super().__init__()
        self.kind = kind
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Attend within `[B, S, C]`."""
        batch, seq, width = x.shape
        q, k, v = self.qkv(x).view(batch, seq, 3, 4, width // 4).permute(2, 0, 3, 1, 4)
        if self.kind == "item" and x.sum() > 0:
            x = x + 1
        attend = outside if self.kind == "disabled" else inside
        return self.out(attend(q, k, v).transpose(1, 2).reshape(batch, seq, width))


def inside(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attend where Dynamo sees it."""
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


@torch.compiler.disable
def outside(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attend where Dynamo does not see it."""
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


class Stack(nn.Module):
    """Run attentions in sequence; `spare` is never called."""

    def __init__(self, *kinds: str) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Attention(kind) for kind in kinds)
        self.spare = Attention()

    def forward(self, x: Tensor) -> Tensor:
        """Map `[B, S, C]` to the same shape."""
        for layer in self.layers:
            x = x + F.silu(layer(x))
        return x


def _with_inputs(batch: int, seq: int, *kinds: str) -> tuple[nn.Module, tuple[Tensor, ...]]:
    torch.manual_seed(0)
    return Stack(*kinds).eval(), (torch.randn(batch, seq, 64),)


def plain(batch: int = 2, seq: int = 32) -> tuple[nn.Module, tuple[Tensor, ...]]:
    """Return two ordinary layers."""
    return _with_inputs(batch, seq, "plain", "plain")


def broken_graph(batch: int = 2, seq: int = 32) -> tuple[nn.Module, tuple[Tensor, ...]]:
    """Return a layer that leaves the graph between two that do not."""
    return _with_inputs(batch, seq, "plain", "disabled", "plain")


def asks_for_values(batch: int = 2, seq: int = 32) -> tuple[nn.Module, tuple[Tensor, ...]]:
    """Return a model whose control flow depends on a value."""
    return _with_inputs(batch, seq, "plain", "item")


def fixed() -> tuple[nn.Module, tuple[Tensor, ...]]:
    """Return a model whose sizes the command line cannot change."""
    return plain()


def no_inputs() -> nn.Module:
    """Return a module alone."""
    return Stack("plain")


@dataclass(frozen=True)
class WrongActivation(Pass):
    """Replace SiLU by ReLU: a deliberate miscompile."""

    name: ClassVar[str] = "wrong-activation"
    phase: ClassVar[str] = "lowered"

    def run(self, program: Program, plan: Plan) -> PassResult:
        """Return the program with every SiLU replaced."""
        count = 0
        for entry in program.entries:
            edit = Editor(copy_graph(entry.graph))
            for node in list(edit.graph.nodes):
                if node.target is torch.ops.aten.silu.default:
                    with edit.before(node):
                        call: Any = edit.call(torch.ops.aten.relu.default, node.args[0], like=node)
                    edit.replace(node, call)
                    count += 1
            program = program.with_graph(entry, edit.finish())
        return PassResult(program, count > 0, (f"{count} replaced",))


def small_llama(batch: int = 1, seq: int = 64) -> tuple[nn.Module, tuple[()], dict[str, Tensor]]:
    """Return a transformers model of one layer and a prompt."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"vocab_size": 97, "hidden_size": 128, "intermediate_size": 64, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32}
    return LlamaForCausalLM(LlamaConfig(**sizes, **heads)), (), {"input_ids": torch.ones(batch, seq, dtype=torch.int64)}
