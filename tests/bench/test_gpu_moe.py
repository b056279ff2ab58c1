"""Check on the CPU what the case gpu-moe does beside timing: every arm agrees with float64, and a wrong one does not pass."""

from __future__ import annotations

import pytest
import torch

from bench.case import Settings
from bench.cases.gpu_moe import GpuMoE
from bench.gpu_experts import ARMS, LAYERS, Layer, problem
from effcompile import ops

SMALL = Layer(128, 144, 6, 2)


@pytest.mark.parametrize("tokens", [1, 33])
def test_every_arm_is_what_float64_gives(tokens: int) -> None:
    pytest.importorskip("transformers")
    ops.register()
    with torch.no_grad():
        made = problem(SMALL, tokens, "cpu", ARMS)
        assert list(made.arms) == [name for name in ARMS if name != "eff-best"]
        for name, arm in made.arms.items():
            told, agrees = arm.check(made.sets[0])
            assert agrees, (name, told)
            # The rule is tight enough to see a lost choice.
            x, ids, shares = made.sets[0]
            lost = torch.cat([shares[:, :1], torch.zeros_like(shares[:, 1:])], 1)
            assert not arm.check((x, ids, lost))[1], name


def test_rows_are_tokens_by_model() -> None:
    rows = GpuMoE().rows(Settings(device="cuda"))
    assert len(rows) == len({row.id for row in rows}) == 18
    assert {row.parameters["form"] for row in rows} == set(LAYERS)
    assert {row.parameters["length"] for row in rows} >= {1, 16384}
