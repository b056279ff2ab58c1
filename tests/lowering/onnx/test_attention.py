"""Attention before opset 23: what is written out gives the numbers of the operator, and a mask is made once."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from effcompile.core.rewrite import Editor, copy_graph
from effcompile.lowering.onnx.attention import open_attention

SDPA = torch.ops.aten.scaled_dot_product_attention.default


class Two(nn.Module):
    """Attend twice with the same options."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.options = options

    def forward(self, q: Tensor, k: Tensor, v: Tensor, *mask: Tensor) -> Tensor:
        """Return attention over q, and over what that gave."""
        given = {**self.options, "attn_mask": mask[0]} if mask else self.options
        first = nn.functional.scaled_dot_product_attention(q, k, v, **given)
        return nn.functional.scaled_dot_product_attention(first, k, v, **given)


def operands(heads: int, groups: int, rows: int, keys: int) -> list[Tensor]:
    draw = torch.Generator().manual_seed(0)
    sizes = ((heads, rows), (groups, keys), (groups, keys))
    return [torch.randn(2, n, s, 8, generator=draw, dtype=torch.float64) for n, s in sizes]


def opened(module: nn.Module, given: list[Tensor]) -> tuple[Tensor, list[str]]:
    """Return what the written out graph gives, and its operators."""
    batch = {0: torch.export.Dim.AUTO}
    shapes = (batch, batch, batch) if len(given) == 3 else None
    exported = torch.export.export(module, tuple(given), strict=False, dynamic_shapes=shapes)
    edit = Editor(copy_graph(exported.graph_module))
    open_attention(edit)
    module = edit.finish()
    with torch.no_grad():
        found = module(*given)
    return found[0], [str(node.target) for node in edit.graph.nodes if node.op == "call_function"]


@pytest.mark.parametrize(("heads", "options"), [((4, 2), {"is_causal": True}), ((4, 4), {"scale": 0.3}), ((6, 1), {})])
def test_heads_and_scales(heads: tuple[int, int], options: dict[str, Any]) -> None:
    given = operands(*heads, 5, 7)
    module = Two(**options, enable_gqa=heads[0] != heads[1])
    found, names = opened(module, given)
    torch.testing.assert_close(found, module(*given), rtol=1e-12, atol=1e-12)
    assert str(SDPA) not in names
    assert names.count("aten.triu.default") == int("is_causal" in options)
    assert "aten.expand.default" not in names


@pytest.mark.parametrize(
    ("kind", "shape"), [(torch.bool, (5, 7)), (torch.float64, (1, 1, 5, 7)), (torch.bool, (2, 4, 1, 7))]
)
def test_masks(kind: torch.dtype, shape: tuple[int, ...]) -> None:
    draw = torch.Generator().manual_seed(1)
    mask = torch.randn(*shape, generator=draw, dtype=torch.float64)
    mask = mask if kind != torch.bool else (mask > 0) | (torch.arange(7) == 3)
    given, module = [*operands(4, 2, 5, 7), mask], Two(enable_gqa=True)
    found, names = opened(module, given)
    torch.testing.assert_close(found, module(*given), rtol=1e-12, atol=1e-12)
    assert names.count("aten.where.self") + names.count("aten.where.Scalar") <= 1


def test_what_is_left_alone() -> None:
    given = operands(4, 4, 5, 7)
    for odd in (Two(dropout_p=0.5), lambda q, k, v: Two()(q[0], k[0], v[0])):
        module = odd if isinstance(odd, nn.Module) else _Called(odd)
        assert str(SDPA) in opened(module, given)[1]


class _Called(nn.Module):
    def __init__(self, function: Any) -> None:
        super().__init__()
        self.function = function

    def forward(self, q: Tensor, k: Tensor, v: Tensor, *mask: Tensor) -> Any:
        return self.function(q, k, v)
