"""Check which sites the kernel for run-time block maps takes, on GPUs that are not here."""

from __future__ import annotations

from dataclasses import replace

import pytest

from effcompile.compiler import catalog
from effcompile.core.expr import apply, axis, const
from effcompile.core.kernel import Supported
from effcompile.core.mask import CAUSAL, H, K, Mask, Opaque, Q
from effcompile.core.site import AttentionSite, Refusal
from effcompile.core.target import Target
from effcompile.lowering.attention.triton_blocks import TritonBlocks
from effcompile.targets import devices

SITE = AttentionSite(
    "layers.0.attn", "attention", "graph", "model.py:1", batch=1, heads=8, kv_heads=2, head_dim=128, value_dim=128, q_len=4096,
    kv_len=4096, dtype="bfloat16", mask=CAUSAL, scale=0.1,
)  # fmt: skip


def target(word: str) -> Target:
    return Target.parse(word, devices())


def test_it_is_found_and_runs_on_every_tuned_gpu() -> None:
    assert TritonBlocks() in catalog().of("eff::attention_blocks_v1")
    for word in ("sm_80", "sm_89", "sm_90", "sm_100", "sm_120", "gfx942", "gfx950"):
        answer = TritonBlocks().supports(SITE, target(word), 0.1)
        assert isinstance(answer, Supported), (word, answer)
        assert answer.tag == "modelled"


def test_fewer_blocks_cost_less() -> None:
    seconds = [TritonBlocks().supports(SITE, target("sm_90"), density) for density in (1.0, 0.5, 0.1)]
    assert all(isinstance(one, Supported) for one in seconds)
    assert sorted((one.seconds for one in seconds), reverse=True) == [one.seconds for one in seconds]


@pytest.mark.parametrize(
    ("code", "word", "change"),
    [
        ("EFF-A209", "cpu", {}),
        ("EFF-A209", "t4", {}),
        ("EFF-A209", "sm_90", {"dtype": "float64"}),
        ("EFF-A210", "sm_90", {"head_dim": 320}),
        ("EFF-A201", "sm_90", {"softcap": 30.0}),
        ("EFF-A202", "sm_90", {"sinks": True}),
        ("EFF-A103", "sm_90", {"mask": Opaque("a tensor")}),
        ("EFF-A207", "sm_90", {"mask": Mask(bias=axis(3))}),
        ("EFF-A203", "sm_90", {"mask": Mask(keep=apply("or", CAUSAL.keep, apply("eq", H, const(1))))}),
        ("EFF-A203", "sm_90", {"mask": Mask(keep=apply("eq", apply("mod", apply("sub", Q, K), const(3)), const(0)))}),
    ],
)
def test_what_it_does_not_run_is_refused(code: str, word: str, change: dict) -> None:
    answer = TritonBlocks().supports(replace(SITE, **change), target(word), 0.1)
    assert isinstance(answer, Refusal)
    assert answer.code == code
