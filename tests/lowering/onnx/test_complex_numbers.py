"""Complex numbers as pairs of real ones: the same numbers, and graphs with anything else left alone."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from effcompile.core.rewrite import Editor, copy_graph
from effcompile.lowering.onnx.complex_numbers import open_complex
from tests.lowering.onnx.test_forms import Called

X, ANGLES = torch.randn(2, 3, 5, 8, dtype=torch.float64), torch.randn(5, 4, dtype=torch.float64)


def turned(x: Tensor, angles: Tensor) -> Tensor:
    """Spell rotary embedding as DeepSeek-V2 does."""
    turns = (torch.polar(torch.ones_like(angles), angles) * 0.7).unsqueeze(0).to(x.device)
    pairs = torch.view_as_complex(x.reshape(*x.shape[:-1], -1, 2))
    return torch.view_as_real(pairs * turns).flatten(3)


def more(x: Tensor, angles: Tensor) -> Tensor:
    """Do the other operations too."""
    one, other = torch.complex(x, x.cos()), torch.view_as_complex(x.unsqueeze(-1).expand(-1, -1, -1, -1, 2).clone())
    found = (one - other) + (2.0 - one.transpose(1, 2).transpose(1, 2)) - 0.5 + angles[0, 0] * other[:, :1]
    return torch.view_as_real(found[..., 2:])


def opened(function: Callable[[Tensor, Tensor], Tensor]) -> tuple[Tensor, bool]:
    """Return what the written out graph gives, and whether complex numbers are left in it."""
    exported = torch.export.export(Called(function), (X, ANGLES), strict=False)
    edit = Editor(copy_graph(exported.graph_module))
    open_complex(edit)
    module = edit.finish()
    left = any(isinstance(v := n.meta.get("val"), Tensor) and v.is_complex() for n in edit.graph.nodes)
    return module(X, ANGLES)[0], left


@pytest.mark.parametrize("function", [turned, more])
def test_the_same_numbers(function: Callable[[Tensor, Tensor], Tensor]) -> None:
    found, left = opened(function)
    assert not left
    torch.testing.assert_close(found, function(X, ANGLES), rtol=1e-13, atol=1e-13)


def test_what_is_left_alone() -> None:
    for function in (
        lambda x, a: torch.view_as_real(torch.fft.fft(x)),
        lambda x, a: torch.view_as_real(torch.complex(x, x) * 1j),
        lambda x, a: torch.complex(x, x).abs(),
    ):
        found, left = opened(function)
        assert left
        assert torch.equal(found, function(X, ANGLES))
    assert opened(lambda x, a: x + 1)[0].equal(X + 1)
