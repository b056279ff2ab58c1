"""Check linear layers of a few rows: exact against float64, any width and layout, and what the kernel leaves to torch."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from effcompile import ops
from effcompile.ops import native
from effcompile.ops.linear_rows import MOST

ops.register()
native.library(native.ROWS)
DTYPES = (torch.float32, torch.bfloat16)


def case(rows: int, inputs: int, outputs: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    made = torch.Generator().manual_seed(rows + inputs + outputs)
    shapes = ((rows, inputs), (outputs, inputs), (outputs,))
    x, weight, bias = (torch.randn(shape, generator=made).to(dtype) for shape in shapes)
    return x, weight, bias


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("inputs", "outputs"), [(1, 1), (7, 3), (16, 5), (33, 193), (576, 192), (1536, 66)])
@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 6, 7, MOST])
def test_it_is_as_exact_as_torch(rows: int, inputs: int, outputs: int, dtype: torch.dtype) -> None:
    x, weight, bias = case(rows, inputs, outputs, dtype)
    for added in (bias, None):
        true = F.linear(x.double(), weight.double(), None if added is None else added.double())
        found = torch.ops.eff.linear_rows_v1(x, weight, added)
        assert found.dtype == dtype
        assert found.shape == (rows, outputs)
        scale = (x.double().abs() @ weight.double().abs().T + 1) * torch.finfo(torch.float32).eps * 8
        rounding = true.abs() * torch.finfo(dtype).eps
        assert bool(((found.double() - true).abs() <= scale + rounding).all())


@pytest.mark.parametrize("dtype", DTYPES)
def test_leading_dimensions_and_rows_of_a_wider_weight(dtype: torch.dtype) -> None:
    x, wide, bias = case(4, 80, 48, dtype)
    weight = wide[:, :64]
    x = x[:, :64].reshape(2, 1, 2, 64)
    found = torch.ops.eff.linear_rows_v1(x, weight, bias)
    assert found.shape == (2, 1, 2, 48)
    torch.testing.assert_close(found, F.linear(x, weight, bias))


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_threads_change_nothing(threads: int) -> None:
    x, weight, bias = case(2, 256, 1001, torch.float32)
    before = torch.get_num_threads()
    expected = torch.ops.eff.linear_rows_v1(x, weight, bias)
    try:
        torch.set_num_threads(threads)
        assert torch.equal(torch.ops.eff.linear_rows_v1(x, weight, bias), expected)
    finally:
        torch.set_num_threads(before)


def test_what_the_kernel_does_not_take_goes_to_torch() -> None:
    x, weight, bias = case(MOST + 1, 32, 16, torch.float32)
    torch.testing.assert_close(torch.ops.eff.linear_rows_v1(x, weight, bias), F.linear(x, weight, bias))
    turned = weight.T.contiguous().T  # columns lie dense
    torch.testing.assert_close(torch.ops.eff.linear_rows_v1(x[:1], turned, bias), F.linear(x[:1], turned, bias))
    strided = x[:2].T.contiguous().T
    torch.testing.assert_close(torch.ops.eff.linear_rows_v1(strided, weight, bias), F.linear(strided, weight, bias))
    double = torch.ops.eff.linear_rows_v1(x[:1].double(), weight.double(), bias.double())
    torch.testing.assert_close(double, F.linear(x[:1].double(), weight.double(), bias.double()))
    with pytest.raises(RuntimeError):
        torch.ops.eff.linear_rows_v1(x[:1, :5].contiguous(), weight, bias)
    assert torch.ops.eff.linear_rows_v1(x[:0], weight, bias).shape == (0, 16)
