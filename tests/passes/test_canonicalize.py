"""Remove what does nothing, and nothing else."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from effcompile.core.plan import Plan
from effcompile.passes.canonicalize import RemoveIdentities
from tests.support.check import CPU, check_pass, flat, fresh, same, trace

X = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0))

IDENTITIES: dict[str, Callable[[Tensor], Tensor]] = {
    "dropout outside training": lambda x: F.dropout(x, 0.5, False).sin(),
    "dropout of nothing": lambda x: F.dropout(x, 0.0, True).sin(),
    "cast": lambda x: x.to(torch.float32).sin(),
    "expand": lambda x: x.expand(2, 3, 4).sin(),
    "view": lambda x: x.view(2, 3, 4).sin(),
    "reshape": lambda x: x.reshape(2, -1, 4).sin(),
    "slice": lambda x: x[:, :].sin(),
    "long slice": lambda x: x[:, :, :99].sin(),
    "several": lambda x: F.dropout(x.contiguous().view(2, 3, 4), 0.1, False).sin(),
}

CHANGES: dict[str, Callable[[Tensor], Tensor]] = {
    "cast": lambda x: x.to(torch.float64).sin(),
    "short slice": lambda x: x[:, 1:].sin(),
    "strided slice": lambda x: x[:, ::2].sin(),
    "reversed shape": lambda x: x.reshape(4, 3, 2).sin(),
    "strides": lambda x: x.transpose(0, 1).contiguous().sin(),
    "copy": lambda x: x.clone().sin(),
    "returned": lambda x: x.view(2, 3, 4),
}


@pytest.mark.parametrize("name", IDENTITIES)
def test_identities_go(name: str) -> None:
    program = check_pass(RemoveIdentities(), IDENTITIES[name], [X])
    computed = [node for node in program.entries[0].graph.graph.nodes if node.op == "call_function"]
    assert [str(node.target) for node in computed] == ["aten.sin.default"]


@pytest.mark.parametrize("name", CHANGES)
def test_what_changes_something_stays(name: str) -> None:
    check_pass(RemoveIdentities(), CHANGES[name], [X], changes=False)


def written_view(x: Tensor) -> tuple[Tensor, Tensor]:
    y = x.view(2, 3, 4)
    y.add_(1)
    return x.sin(), y.cos()


def written_later(x: Tensor) -> Tensor:
    y = x.reshape(2, 3, 4)
    z = y.to(torch.float32)
    x.mul_(2)
    return z.sin() + y


def copy_before(x: Tensor) -> Tensor:
    y = x.to(torch.float32, copy=True)
    x.mul_(2)
    return y.sin()


def split_written(x: Tensor) -> Tensor:
    y = x.contiguous()
    x.split(1)[0].zero_()
    return y.sin()


@pytest.mark.parametrize("function", [written_view, written_later, copy_before, split_written])
def test_writes_are_seen_as_before(function: Callable[[Tensor], Tensor]) -> None:
    program = trace(function, fresh([X]))
    after = RemoveIdentities().run(program, Plan.single(str(CPU))).program
    mine, theirs = fresh([X]), fresh([X])
    same(flat(after.entries[0].graph(*mine)), flat(function(*theirs)))
    same(mine, theirs)


def test_active_dropout_stays() -> None:
    program = trace(lambda x: F.dropout(x, 0.5, True).sin(), [X])
    assert not RemoveIdentities().run(program, Plan.single(str(CPU))).changed


def test_symbolic_sizes_are_compared_without_a_guard() -> None:
    program = trace(lambda x: x.view(x.shape[0], x.shape[1], x.shape[2]).sin() + x[:, : x.shape[1]], [X], symbolic=True)
    after = RemoveIdentities().run(program, Plan.single(str(CPU))).program
    targets = [str(node.target) for node in after.entries[0].graph.graph.nodes if node.op == "call_function"]
    assert not [target for target in targets if "view" in target or "slice" in target]
    other = torch.randn(5, 2, 3)
    torch.testing.assert_close(after.entries[0].graph(other), other.sin() + other)
