"""The router of DeepSeek-V3 becomes one operator, with the weights that it had; another router stays what it is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import effcompile as eff
from effcompile.codegen.onnx.probe import Probe
from effcompile.core.rewrite import Editor, copy_graph
from effcompile.lowering.onnx.group_router import _place, choice_of
from effcompile.lowering.onnx.moe_ort import Routed
from tests.lowering.onnx.test_forms import ORT, Called

pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")
EXPERTS, GROUPS = 16, 4


def route(
    logits: Tensor, bias: Tensor, *, fill: float = -torch.inf, normed: bool = True, scale: float = 2.5, top: int = 2,
    share: str = "score",
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Choose 3 experts of the best two groups."""
    scores = logits.sigmoid()
    choice = scores + bias
    by_group = choice.view(-1, GROUPS, EXPERTS // GROUPS).topk(top, dim=-1)[0].sum(-1)
    best = by_group.topk(2, dim=-1, sorted=False)[1]
    mask = torch.zeros_like(by_group).scatter(1, best, 1.0)
    mask = mask.unsqueeze(-1).expand(-1, GROUPS, EXPERTS // GROUPS).reshape(-1, EXPERTS)
    ids = choice.masked_fill(~mask.bool(), fill).topk(3, dim=-1, sorted=False)[1]
    weights = (scores if share == "score" else choice if share == "choice" else scores.square()).gather(1, ids)
    weights = weights / (weights.sum(-1, keepdim=True) + 1e-20) if normed else weights
    return ids, weights * scale


def found(**more: Any) -> Any:
    """Return the router that is found, and what was made of it."""
    given = (torch.randn(32, EXPERTS), torch.randn(EXPERTS))
    with torch.no_grad():
        exported = torch.export.export(Called(lambda *x: route(*x, **more)), given, strict=False)
    edit = Editor(copy_graph(exported.graph_module))
    ids, weights = edit.graph.output_node().args[0]
    routed = Routed(ids, weights, weights, weights)
    return choice_of(routed), routed


@pytest.mark.parametrize(("normed", "scale", "top"), [(True, 2.5, 2), (False, 1.0, 2), (False, 1.8, 1)])
def test_the_operator_chooses_the_same(normed: bool, scale: float, top: int) -> None:
    choice, routed = found(normed=normed, scale=scale, top=top)
    assert (choice.normed, choice.scale, choice.group_top, choice.top_k) == (normed, pytest.approx(scale), top, 3)
    place = _place(routed, choice)
    assert Probe(ORT)(place) is None
    attributes = {**place.attributes, "topk_group": 1}
    assert Probe(ORT)(type(place)(**{**vars(place), "attributes": attributes})) is not None


def test_other_weights_are_no_scores() -> None:
    assert found(share="choice")[0] is None
    assert found(share="square")[0] is None


def test_groups_that_are_left_out_by_zero_are_seen() -> None:
    choice, routed = found(fill=0.0)  # a score below 0 in a group that was chosen loses against it
    assert Probe(ORT)(_place(routed, choice)) is not None


class Layer(nn.Module):
    """Hold one layer of experts of DeepSeek-V3."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        """Return `[B, S, H]`."""
        return self.inner(x)


@pytest.mark.slow
@pytest.mark.parametrize("normed", [True, False])
def test_a_layer_of_transformers(normed: bool, tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    from transformers import DeepseekV3Config
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3MoE

    config = DeepseekV3Config(
        hidden_size=32, moe_intermediate_size=24, n_routed_experts=16, n_group=4, topk_group=2, num_experts_per_tok=3,
        norm_topk_prob=normed, routed_scaling_factor=2.5,
    )  # fmt: skip
    config._experts_implementation = "grouped_mm"
    torch.manual_seed(0)
    layer = DeepseekV3MoE(config).eval()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_(std=0.3)
        layer.gate.e_score_correction_bias.normal_(std=0.2)
    made = eff.export(Layer(layer).eval(), (torch.randn(2, 9, 32),), to="onnx", out=tmp_path / "a", flavor="ort")
    assert dict(made.details)["forms"] == "1 x group-router, 1 x moe", dict(made.details)
    assert max(check.error for check in made.checks) < 1e-5
