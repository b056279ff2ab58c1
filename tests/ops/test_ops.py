"""Check that every `eff::` op is a well-behaved torch op: schema, fake, no hidden aliasing (torch.library.opcheck)."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from effcompile import ops
from effcompile.core.expr import BATCH, BOOL, KEY, QUERY, apply, axis, load
from effcompile.core.expr_eval import to_json

CAUSAL = to_json(apply("le", axis(KEY), axis(QUERY)))
PADDED = to_json(load(0, (axis(BATCH), axis(KEY)), BOOL))


def qkv(dtype: torch.dtype = torch.float32, requires_grad: bool = False) -> list[torch.Tensor]:
    draw = torch.Generator().manual_seed(0)
    shapes = ((2, 4, 5, 8), (2, 2, 7, 8), (2, 2, 7, 6))
    return [torch.randn(shape, generator=draw).to(dtype).requires_grad_(requires_grad) for shape in shapes]


def cases() -> dict[str, tuple[Any, tuple[Any, ...]]]:
    ops.register()
    eff = torch.ops.eff
    kept = torch.ones(2, 7, dtype=torch.bool)
    kept[0, :3] = False
    mask = torch.ones(2, 1, 5, 7, dtype=torch.bool).tril()
    plain = (0.3, 0.0)
    return {
        "attention full": (eff.attention_v1.default, (*qkv(), None, None, [], [], "", "", "", "zero", *plain)),
        "attention opaque": (eff.attention_v1.default, (*qkv(), mask, None, [], [], "", "", "", "zero", *plain)),
        "attention causal": (eff.attention_v1.default, (*qkv(), mask, None, [], [], CAUSAL, "", "", "never", *plain)),
        "attention padded": (
            eff.attention_v1.default,
            (*qkv(), None, torch.zeros(4), [kept], [], PADDED, "", "", "zero", 0.3, 5.0),
        ),
        "padded": (eff.attention_padded_v2.default, (*qkv(), None, kept, False, "uniform", 0.3)),
        "padded with sinks": (eff.attention_padded_v2.default, (*qkv(), torch.zeros(4), kept, False, "zero", 0.3)),
        "blocked": (eff.attention_blocked_v2.default, (*qkv(), None, [kept], [], PADDED, "zero", 0.3)),
        "blocked with sinks": (
            eff.attention_blocked_v2.default,
            (*qkv(), torch.zeros(4), [kept], [], PADDED, "nan", 0.3),
        ),
        "block map": (eff.block_map_v1.default, ([kept], [], PADDED, 2, 4, 5, 7, 4, torch.device("cpu"))),
        "linear": (eff.linear_v1.default, (torch.randn(3, 70, 8), torch.randn(6, 8), torch.randn(6))),
        "linear without bias": (eff.linear_v1.default, (torch.randn(70, 8), torch.randn(6, 8), None)),
    }


@pytest.mark.parametrize("name", list(cases()))
def test_opcheck(name: str) -> None:
    op, args = cases()[name]
    torch.library.opcheck(op, args, test_utils=("test_schema", "test_faketensor"))


def test_registering_twice_is_registering_once() -> None:
    ops.register()
    before = {name: getattr(torch.ops.eff, name) for name in ("attention_v1", "attention_blocked_v2")}
    ops.register()
    assert all(getattr(torch.ops.eff, name) is op for name, op in before.items())


def test_every_op_carries_its_version() -> None:
    """Torch's caches know an op by its name only."""
    ops.register()
    names = {schema.name for schema in torch._C._jit_get_all_schemas() if schema.name.startswith("eff::")}
    assert names
    assert all(name.rpartition("_v")[2].isdigit() for name in names), names


@pytest.mark.parametrize("name", list(cases()))
def test_no_op_writes_or_aliases(name: str) -> None:
    op, args = cases()[name]
    assert not op._schema.is_mutable
    results = op(*args)
    given = [x for x in torch.utils._pytree.tree_leaves(args) if isinstance(x, torch.Tensor)]
    for result in results if isinstance(results, tuple) else (results,):
        assert all(result.untyped_storage()._cdata != x.untyped_storage()._cdata for x in given)


def test_the_reference_is_differentiable() -> None:
    """The meaning of an attention is plain PyTorch, so it is its own oracle for gradients."""
    from effcompile.ops.attention import reference

    args = [x.double().requires_grad_() for x in qkv()]
    mask = torch.ones(5, 7, dtype=torch.bool).tril()
    assert torch.autograd.gradcheck(
        lambda q, k, v: reference(q, k, v, mask, None, [], [], "", "", "", "zero", 0.3, 0.0), args
    )


@pytest.mark.parametrize("rule", ["zero", "nan", "uniform"])
def test_rows_without_keys(rule: str) -> None:
    """A row without keys gives zeros, NaN, or the mean of V over the keys that the mask filled with a finite number."""
    op = torch.ops.eff.attention_v1.default
    q, k, v = qkv()
    kept = torch.ones(2, 7, dtype=torch.bool)
    kept[0] = False
    soft = to_json(apply("le", axis(KEY), apply("add", axis(QUERY), axis(QUERY))))
    result = op(q, k, v, None, None, [kept], [], PADDED, "", soft if rule == "uniform" else "", rule, 0.3, 0.0)
    assert not result[1].isnan().any()
    values = v.repeat_interleave(2, 1)[0]
    for row in range(5):
        if rule == "uniform":
            torch.testing.assert_close(result[0, :, row], values[:, : min(7, 2 * row + 1)].mean(1))
        else:
            expected = torch.full_like(result[0, :, row], 0.0 if rule == "zero" else float("nan"))
            torch.testing.assert_close(result[0, :, row], expected, equal_nan=True)


def test_soft_keys_may_miss_a_row() -> None:
    """A row that is -inf everywhere gives 0 although other rows average over finite fills."""
    op = torch.ops.eff.attention_v1.default
    q, k, v = qkv()
    gone = to_json(apply("lt", axis(KEY), axis(QUERY)))
    nothing = to_json(apply("lt", axis(KEY), apply("sub", axis(QUERY), axis(QUERY))))
    result = op(q, k, v, None, None, [], [], nothing, "", gone, "uniform", 0.3, 0.0)
    assert torch.equal(result[:, :, 0], torch.zeros_like(result[:, :, 0]))
    assert result.isfinite().all()
