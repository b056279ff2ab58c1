"""Forms of ONNX: each operator gives the numbers of what it stands for, and near misses are left alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from effcompile import ops
from effcompile.codegen.onnx.probe import Probe
from effcompile.core.export_form import Dialect, OnnxForm, Placement
from effcompile.core.rewrite import VALUE, Editor, copy_graph
from effcompile.core.site import AttentionSite
from effcompile.lowering.onnx.gqa import GroupQuery
from effcompile.lowering.onnx.moe import Experts
from effcompile.lowering.onnx.moe_ort import OrtExperts
from effcompile.lowering.onnx.rms_norm import RmsNorm
from effcompile.lowering.onnx.rope import Rope

pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")
PORTABLE, FUSED, ORT = Dialect(20), Dialect(23), Dialect(20, "ort")


class Called(nn.Module):
    """Make a module of a function."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *operands: Tensor) -> Any:
        return self.function(*operands)


def places(
    form: OnnxForm, dialect: Dialect, function: Callable[..., Any], *operands: Tensor, known: tuple[int, ...] = ()
) -> list[Placement]:
    """Return what a form takes in the graph of a function; operands in the places `known` are weights."""
    ops.register()
    with torch.no_grad():
        exported = torch.export.export(Called(function), operands, strict=False)
    edit = Editor(copy_graph(exported.graph_module))
    given = edit.graph.find_nodes(op="placeholder")
    for place in known:
        given[place].meta[VALUE] = operands[place]
    sites = {}
    for node in edit.graph.nodes:
        if node.target == torch.ops.aten.scaled_dot_product_attention.default:
            node.meta["eff.site"] = "attn"
            width = int(node.args[0].meta["val"].shape[3])
            sites["attn"] = AttentionSite("attn", "sdpa", "forward", "", head_dim=width, value_dim=width, scale=0.25)
    return list(form.places(edit, dialect, sites))


def experts(
    act: str, layout: str, transposed: bool, side: str, alpha: float, beta: float, limit: float, bias: bool
) -> Any:
    """Return a function and operands of one mixture of experts."""
    draw = torch.Generator().manual_seed(3)
    tokens, count, hidden, inner = 6, 4, 8, 16
    wide = inner if layout == "none" else 2 * inner
    x, w1, w2 = (
        torch.randn(*n, generator=draw) for n in ((tokens, hidden), (count, wide, hidden), (count, hidden, inner))
    )
    if transposed:
        w1, w2 = w1.mT.contiguous(), w2.mT.contiguous()
    ids = torch.stack([torch.randperm(count, generator=draw)[:2] for _ in range(tokens)])
    share = torch.rand(tokens, 2, generator=draw)
    biases = (torch.randn(count, wide, generator=draw), torch.randn(count, hidden, generator=draw)) if bias else ()

    def function(x: Tensor, ids: Tensor, share: Tensor, w1: Tensor, w2: Tensor, *b: Tensor) -> Tensor:
        b1, b2 = b or (None, None)
        return torch.ops.eff.moe_v1(x, ids, share, w1, b1, w2, b2, act, layout, transposed, side, alpha, beta, limit)

    return function, (x, ids, share, w1, w2, *biases)


GATES = [
    ("silu", "concat", False, "out", 1.0, 0.0, 0.0, False),
    ("silu", "interleaved", True, "out", 1.702, 1.0, 7.0, True),
    ("gelu_tanh", "concat", False, "in", 1.0, 0.0, 0.0, True),
    ("relu2", "none", False, "out", 1.0, 0.0, 0.0, False),
    ("gelu", "none", True, "out", 1.0, 0.0, 0.0, True),
]


@pytest.mark.parametrize("gate", GATES)
def test_a_loop_over_experts(gate: Any) -> None:
    (found,) = places(Experts(), PORTABLE, *_flat(experts(*gate)))
    assert Probe(PORTABLE)(found) is None


def _flat(pair: Any) -> Any:
    function, operands = pair
    return function, *operands


def test_the_probe_sees_another_gate() -> None:
    (found,) = places(Experts(), PORTABLE, *_flat(experts(*GATES[0])))
    wrong = replace(found, body=found.body.replace("Sigmoid", "Tanh"))
    refused = Probe(PORTABLE)(wrong)
    assert refused is not None
    assert refused.code == "EFF-E116"


@pytest.mark.parametrize(("gate", "there"), [(GATES[0], True), (GATES[1], True), (GATES[2], False), (GATES[3], False)])
def test_the_operator_for_experts(gate: Any, there: bool) -> None:
    found = places(OrtExperts(), ORT, *_flat(experts(*gate)))
    assert bool(found) == there
    if there:
        assert Probe(ORT)(found[0]) is None
    assert places(OrtExperts(), PORTABLE, *_flat(experts(*gate))) == []


X, SCALE = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(0)), torch.linspace(0.5, 2, 16)


def norm(x: Tensor, scale: Tensor, dim: int = -1, power: int = 2, eps: float = 1e-5) -> Tensor:
    """Spell RMSNorm as transformers does."""
    wide = x.to(torch.float32)
    return scale * (wide * torch.rsqrt(wide.pow(power).mean(dim, keepdim=True) + eps)).to(x.dtype)


def test_rms_norm() -> None:
    (found,) = places(RmsNorm(), FUSED, norm, X, SCALE)
    assert Probe(FUSED)(found) is None
    assert found.attributes["epsilon"] == 1e-5
    assert places(RmsNorm(), PORTABLE, norm, X, SCALE) == []
    for wrong in (
        lambda x, s: norm(x, s, dim=-2),
        lambda x, s: norm(x, s, power=4),
        lambda x, s: s * (x * torch.rsqrt((x - 1).pow(2).mean(-1, keepdim=True) + 1e-5)),
    ):
        assert places(RmsNorm(), FUSED, wrong, X, SCALE) == []


def turn(q: Tensor, angles: Tensor, sign: float = -1.0, other: float = 1.0) -> Tensor:
    """Spell rotary embedding as transformers does."""
    both = torch.cat((angles, other * angles if other != 1 else angles), -1)
    cos, sin = both.cos().unsqueeze(1), both.sin().unsqueeze(1)
    a, b = q[..., :8], q[..., 8:]
    rotated = torch.cat((-b, a), -1) if sign < 0 else torch.cat((b, a), -1)
    return q * cos + rotated * sin


@pytest.mark.parametrize("batch", [1, 3])
def test_rope(batch: int) -> None:
    draw = torch.Generator().manual_seed(1)
    q, angles = torch.randn(3, 4, 5, 16, generator=draw), torch.randn(batch, 5, 8, generator=draw)
    (found,) = places(Rope(), FUSED, turn, q, angles)
    assert Probe(FUSED)(found) is None
    assert found.inputs[1] is not None
    assert found.inputs[1].meta["val"].shape == (3, 5, 8)
    assert places(Rope(), FUSED, lambda q, a: turn(q, a, sign=1.0), q, angles) == []
    assert places(Rope(), FUSED, lambda q, a: turn(q, a, other=2.0), q, angles) == []


def cached(q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor, mask: Tensor) -> Any:
    """Attend over a cache that grows."""
    keys, values = torch.cat([keys, k], 2), torch.cat([values, v], 2)
    out = nn.functional.scaled_dot_product_attention(q, keys, values, mask, scale=0.25, enable_gqa=True)
    return out, keys, values


def test_group_query_attention() -> None:
    draw = torch.Generator().manual_seed(2)
    q, *kv = (torch.randn(1, h, n, 16, generator=draw) for h, n in ((4, 3), (2, 3), (2, 3), (2, 5), (2, 5)))
    mask = torch.ones(1, 1, 3, 8, dtype=torch.bool).tril(5)
    (found,) = places(GroupQuery(), ORT, cached, q, *kv, mask)
    assert Probe(ORT)(found) is None
    assert found.attributes["causal"] == 0
    wrong = replace(found, attributes={**found.attributes, "scale": 0.5})
    assert Probe(ORT)(wrong) is not None
    square = lambda q, k, v: nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.25)  # noqa: E731
    (found,) = places(GroupQuery(), ORT, square, q, q.clone(), q.clone())
    assert Probe(ORT)(found) is None
    assert found.attributes["causal"] == 1
