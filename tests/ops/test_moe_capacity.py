"""Compare the ops of experts with capacity with loops, at places outside, and refuse what does not fit."""

from __future__ import annotations

import pytest
import torch

from effcompile import ops
from effcompile.core.errors import EffError

ops.register()


def test_both_halves_are_loops_over_slots() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(9, 5, generator=generator)
    ids, places = torch.randint(-1, 4, (2, 9, 2), generator=generator)
    scale = torch.rand(9, 2, generator=generator) * (torch.rand(9, 2, generator=generator) > 0.3)
    y, back = torch.zeros(3, 3, 5, dtype=torch.float64), torch.zeros(9, 5, dtype=torch.float64)
    slots = [(s, j) for s in range(9) for j in range(2) if 0 <= ids[s, j] < 3 and 0 <= places[s, j] < 3]
    assert 0 < len(slots) < 18
    for s, j in slots:
        y[ids[s, j], places[s, j]] += scale[s, j].double() * x[s].double()
    made = torch.ops.eff.moe_encode_v1(x, ids, places, scale, 3, 3)
    torch.testing.assert_close(made.double(), y, rtol=1e-5, atol=1e-6)
    for s, j in slots:
        back[s] += scale[s, j].double() * y[ids[s, j], places[s, j]]
    torch.testing.assert_close(
        torch.ops.eff.moe_decode_v1(made, ids, places, scale).double(), back, rtol=1e-5, atol=1e-6
    )


def test_what_is_dropped_is_not_multiplied() -> None:
    x = torch.full((2, 3), float("nan"))
    x[1] = 1.0
    ids, places = torch.tensor([[0], [0]]), torch.tensor([[0], [1]])
    made = torch.ops.eff.moe_encode_v1(x, ids, places, torch.tensor([[0.0], [1.0]]), 1, 2)
    assert torch.equal(made, torch.tensor([[[0.0] * 3, [1.0] * 3]]))
    made[0, 0] = float("nan")
    assert torch.equal(torch.ops.eff.moe_decode_v1(made, ids, places, torch.tensor([[0.0], [2.0]]))[0], torch.zeros(3))


@pytest.mark.parametrize("capacity", [0, -1])
def test_a_capacity_of_nothing_is_refused(capacity: int) -> None:
    with pytest.raises(EffError, match=r"EFF-M201.*capacity of"):
        torch.ops.eff.moe_encode_v1(
            torch.ones(2, 3), *[torch.zeros(2, 1, dtype=torch.long)] * 2, torch.ones(2, 1), 1, capacity
        )


def test_operands_of_other_tokens_are_refused() -> None:
    with pytest.raises(EffError, match="EFF-M201"):
        torch.ops.eff.moe_encode_v1(
            torch.ones(3, 3), *[torch.zeros(2, 1, dtype=torch.long)] * 2, torch.ones(2, 1), 1, 1
        )
