"""Check on the CPU what the case gpu-decode does beside timing: every arm agrees with float64 over what its cache holds."""

from __future__ import annotations

from bench.cases.gpu_decode import ARMS, GpuDecode
from effcompile import ops


def test_every_arm_is_attention_over_its_cache() -> None:
    ops.register()
    case = GpuDecode(heads=4, kv_heads=2, head_dim=64, sequences=2)
    names = [name for name in ARMS if name != "cudnn"]
    problem = case.problem(700, "cpu", names)
    assert list(problem.arms) == names
    for name, arm in problem.arms.items():
        told, agrees = arm.check(problem.sets[0])
        assert agrees, (name, told)
