"""Prepare blocks that loop over a list of experts: what they compute, what later happens to their weights, and what is refused."""

from __future__ import annotations

import copy
import sys
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import effcompile as eff
from effcompile.integrations.experts import listed
from effcompile.integrations.experts.attach import ExpertsWarning
from effcompile.integrations.transformers_experts import prepare_experts
from tests.support import experts as support


class Gated(nn.Module):
    def __init__(self, hidden: int, inner: int, bias: bool = False) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = (nn.Linear(hidden, inner, bias=bias) for _ in range(2))
        self.down_proj = nn.Linear(inner, hidden, bias=bias)
        self.act_fn = nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class Plain(nn.Module):
    def __init__(self, hidden: int, inner: int) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(hidden, inner), nn.GELU(), nn.Dropout(0.1), nn.Linear(inner, hidden))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class Block(nn.Module):
    """Loops over the experts that are hit, as Mixtral's block before transformers 5."""

    def __init__(self, expert: Any = Gated, experts: int = 5, top_k: int = 2) -> None:
        super().__init__()
        self.num_experts, self.top_k = experts, top_k
        self.gate = nn.Linear(16, experts, bias=False)
        self.experts = nn.ModuleList(expert(16, 24) for _ in range(experts))

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        weights, ids = torch.topk(F.softmax(self.gate(x), dim=1, dtype=torch.float), self.top_k, dim=-1)
        return (weights / weights.sum(dim=-1, keepdim=True)).to(x.dtype), ids

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Route and run."""
        batch_size, sequence_length, hidden_dim = hidden_states.shape
        hidden_states = hidden_states.view(-1, hidden_dim)
        routing_weights, selected_experts = self.route(hidden_states)
        final = torch.zeros((batch_size * sequence_length, hidden_dim), dtype=hidden_states.dtype)
        expert_mask = torch.nn.functional.one_hot(selected_experts, num_classes=self.num_experts).permute(2, 1, 0)
        expert_hit = torch.greater(expert_mask.sum(dim=(-1, -2)), 0).nonzero()
        for expert_idx in expert_hit:
            expert_layer = self.experts[expert_idx]
            idx, top_x = torch.where(expert_mask[expert_idx].squeeze(0))
            current_state = hidden_states[None, top_x].reshape(-1, hidden_dim)
            current_hidden_states = expert_layer(current_state) * routing_weights[top_x, idx, None]
            final.index_add_(0, top_x, current_hidden_states.to(hidden_states.dtype))
        return final.reshape(batch_size, sequence_length, hidden_dim)


class Static(Block):
    """Loops over all experts in a method of its own, as DeepSeek-V3's block before transformers 5."""

    def forward(self, x: Tensor) -> Tensor:
        rows = x.view(-1, x.shape[-1])
        weights, ids = self.route(rows)
        return self.moe(rows, ids, weights).view(*x.shape)

    def moe(self, hidden_states: Tensor, topk_indices: Tensor, topk_weights: Tensor) -> Tensor:
        final_hidden_states = torch.zeros_like(hidden_states, dtype=topk_weights.dtype)
        expert_mask = torch.nn.functional.one_hot(topk_indices, num_classes=len(self.experts))
        expert_mask = expert_mask.permute(2, 0, 1)
        for expert_idx in range(len(self.experts)):
            expert = self.experts[expert_idx]
            token_indices, weight_indices = torch.where(expert_mask[expert_idx])
            if token_indices.numel() > 0:
                expert_weights = topk_weights[token_indices, weight_indices]
                expert_output = expert(hidden_states[token_indices])
                weighted_output = expert_output * expert_weights.unsqueeze(-1)
                final_hidden_states.index_add_(0, token_indices, weighted_output)
        return final_hidden_states.type(hidden_states.dtype)


class All(Block):
    """Loops over all experts and skips those without tokens, as OLMoE's and PhiMoE's blocks before transformers 5."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        batch_size, sequence_length, hidden_dim = hidden_states.shape
        hidden_states = hidden_states.view(-1, hidden_dim)
        routing_weights, selected_experts = self.route(hidden_states)
        final = torch.zeros((batch_size * sequence_length, hidden_dim), dtype=hidden_states.dtype)
        expert_mask = torch.nn.functional.one_hot(selected_experts, num_classes=self.num_experts).permute(2, 1, 0)
        for expert_idx in range(self.num_experts):
            expert_layer = self.experts[expert_idx]
            idx, top_x = torch.where(expert_mask[expert_idx])
            if top_x.shape[0] == 0:
                continue
            current_state = hidden_states[None, top_x].reshape(-1, hidden_dim)
            current_hidden_states = expert_layer(current_state) * routing_weights[top_x, idx, None]
            final.index_add_(0, top_x, current_hidden_states.to(hidden_states.dtype))
        return final.reshape(batch_size, sequence_length, hidden_dim)


class Listed(Block):
    """Makes the mask without gradients, loops over numbers, and weights in place."""

    def forward(self, x: Tensor) -> Tensor:
        rows = x.view(-1, x.shape[-1])
        weights, ids = self.route(rows)
        out = torch.zeros_like(rows)
        with torch.no_grad():
            mask = F.one_hot(ids, self.num_experts)
            mask = mask.permute(2, 1, 0)
            hit = (mask.sum(dim=(-1, -2)) > 0).nonzero().flatten().tolist()
        for e in hit:
            idx, tokens = torch.where(mask[e])
            y = self.experts[e](rows[tokens])
            y *= weights[tokens, idx].unsqueeze(-1)
            out.index_add_(0, tokens, y)
        return out.view(*x.shape)


class Squared(Block):
    """Weights enter squared."""

    def forward(self, x: Tensor) -> Tensor:
        rows = x.view(-1, x.shape[-1])
        weights, ids = self.route(rows)
        out = torch.zeros_like(rows)
        mask = F.one_hot(ids, num_classes=self.num_experts).permute(2, 1, 0)
        for e in range(self.num_experts):
            idx, top_x = torch.where(mask[e])
            y = self.experts[e](rows[top_x]) * weights[top_x, idx, None]
            y *= weights[top_x, idx, None]
            out.index_add_(0, top_x, y)
        return out.view(*x.shape)


class Swapped(Block):
    """Tokens and slots are the other way round than the mask has them."""

    def forward(self, x: Tensor) -> Tensor:
        rows = x.view(-1, x.shape[-1])
        weights, ids = self.route(rows)
        out = torch.zeros_like(rows)
        mask = F.one_hot(ids, num_classes=self.num_experts).permute(2, 1, 0)
        for e in range(self.num_experts):
            top_x, idx = torch.where(mask[e])
            out.index_add_(0, top_x, self.experts[e](rows[top_x]) * weights[top_x, idx, None])
        return out.view(*x.shape)


class Fed(Block):
    """Experts read what others have added."""

    def forward(self, x: Tensor) -> Tensor:
        rows = x.view(-1, x.shape[-1]).clone()
        weights, ids = self.route(rows)
        out = rows
        mask = F.one_hot(ids, num_classes=self.num_experts).permute(2, 1, 0)
        for e in range(self.num_experts):
            idx, top_x = torch.where(mask[e])
            out.index_add_(0, top_x, self.experts[e](rows[top_x]) * weights[top_x, idx, None])
        return out.view(*x.shape)


class Counted(Block):
    """Something else reads the mask."""

    def forward(self, x: Tensor) -> Any:
        rows = x.view(-1, x.shape[-1])
        weights, ids = self.route(rows)
        out = torch.zeros_like(rows)
        mask = F.one_hot(ids, num_classes=self.num_experts).permute(2, 1, 0)
        for e in range(self.num_experts):
            idx, top_x = torch.where(mask[e])
            out.index_add_(0, top_x, self.experts[e](rows[top_x]) * weights[top_x, idx, None])
        return out.view(*x.shape), mask.sum()


def made(kind: Any = Block, expert: Any = Gated, seed: int = 0) -> Any:
    torch.manual_seed(seed)
    return kind(expert).eval()


X = torch.randn(2, 9, 16, generator=torch.Generator().manual_seed(1))


def exact(block: nn.Module, x: Tensor = X) -> Tensor:
    with torch.no_grad():
        return type(block).forward(copy.deepcopy(block).double(), x.double())  # type: ignore[no-any-return]


@pytest.mark.parametrize("expert", [Gated, Plain, lambda h, i: Gated(h, i, bias=True)], ids=["gated", "plain", "bias"])
@pytest.mark.parametrize("kind", [Block, Static])
def test_a_prepared_block_computes_the_same_in_one_graph(kind: Any, expert: Any) -> None:
    block = made(kind, expert)
    wanted = exact(block)
    assert eff.prepare(block) is block
    options = {"strict": True, "require": {"moe": "all"}, "emit": "interpreter"}
    torch._dynamo.reset()
    fast = torch.compile(block, backend="eff", fullgraph=True, options=options)
    with torch.no_grad():
        for x in (X, X[:1, :1], X[:, :0]):
            assert support.error(block(x), exact(block, x)) < 1e-5
        assert support.error(fast(X), wanted) < 1e-5
    (site,) = [site for graph in eff.report()["graphs"] for site in graph["experts"]][-1:]
    assert (site["idiom"], site["experts"], site["router"]) == ("eff.prepare", 5, "softmax, top 2, renormalized")
    assert not eff.explain(block, X, target="cpu").experts_kept


@pytest.mark.parametrize("kind", [All, Listed])
def test_other_ways_to_loop_are_read(kind: Any) -> None:
    block = made(kind)
    assert prepare_experts(block) == ()
    assert "forward" in vars(block)
    with torch.no_grad():
        assert support.error(block(X), exact(block)) < 1e-5


def test_weights_have_one_place_and_the_same_names() -> None:
    block, plain = made(), made()
    prepare_experts(block)
    assert list(block.state_dict()) == list(plain.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(block.state_dict().values(), plain.state_dict().values()))
    storage = block.experts[0].gate_proj.weight.untyped_storage()
    assert storage.data_ptr() == block.experts[4].up_proj.weight.untyped_storage().data_ptr()
    assert block.experts[0].gate_proj.weight.is_contiguous()
    prepare_experts(block)  # again: nothing changes
    with torch.no_grad():
        assert support.error(block(X), exact(plain)) < 1e-5


@pytest.mark.parametrize("change", ["load", "assign", "step", "double", "replace", "layer", "expert"])
def test_later_changes_of_weights_are_seen(change: str) -> None:
    block, other = made(), made(seed=3)
    prepare_experts(block)
    torch._dynamo.reset()
    fast = torch.compile(block, backend="eff", options={"emit": "interpreter"})
    x = X
    with torch.no_grad():
        fast(X)
    if change in ("load", "assign"):
        block.load_state_dict(copy.deepcopy(other.state_dict()), assign=change == "assign")
    elif change == "step":
        optimizer = torch.optim.SGD(block.parameters(), lr=1.0)
        block(X).square().sum().backward()
        optimizer.step()
    elif change == "double":
        block, x = block.double(), X.double()
    elif change == "replace":
        block.experts[3].up_proj.weight = nn.Parameter(torch.randn(24, 16))
    elif change == "layer":
        block.experts[3].up_proj = nn.Linear(16, 24, bias=False)
    else:
        block.experts[2] = Gated(16, 24).eval()
    with torch.no_grad():
        wanted = exact(block, x)
        assert support.error(fast(x), wanted) < 1e-5
        assert support.error(block(x), wanted) < 1e-5
        assert block._eff_pack.fresh(), "made again by the eager call"


def test_data_that_is_put_elsewhere_is_seen_by_an_eager_call() -> None:
    block = made()
    prepare_experts(block)
    block.experts[1].down_proj.weight.data = torch.randn(16, 24)
    with torch.no_grad():
        assert support.error(block(X), exact(block)) < 1e-5


def test_an_adapter_in_the_place_of_a_layer_undoes_the_replacement() -> None:
    block = made()
    prepare_experts(block)

    class Adapter(nn.Module):
        def __init__(self, base: nn.Linear) -> None:
            super().__init__()
            self.base, self.a, self.b = base, nn.Linear(16, 2, bias=False), nn.Linear(2, 24, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            return self.base(x) + self.b(self.a(x))

    for expert in block.experts:
        expert.gate_proj = Adapter(expert.gate_proj)
    with torch.no_grad(), pytest.warns(ExpertsWarning, match="as they were written again"):
        found = block(X)
    assert support.error(found, exact(block)) < 1e-5
    assert "forward" not in vars(block)


def test_a_copy_has_weights_of_its_own() -> None:
    block = made()
    prepare_experts(block)
    other = copy.deepcopy(block)
    assert other._eff_pack.ready
    with torch.no_grad():
        before = block(X)
        other.experts[0].gate_proj.weight.mul_(3)
        assert torch.equal(block(X), before)
        assert other._eff_pack.fresh()
        assert support.error(other(X), exact(other)) < 1e-5


def test_training_runs_the_source() -> None:
    block, plain = made(), made()
    prepare_experts(block)
    for each in (block, plain):
        each.train()(X).square().sum().backward()
    for a, b in zip(block.parameters(), plain.parameters()):
        assert a.grad is not None
        torch.testing.assert_close(a.grad, b.grad)


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        (Squared, "results and weights"),
        (Swapped, "`rows\\[top_x\\]`"),
        (Fed, "not seen to be new zeros"),
        (Counted, "reads `mask` behind the loop"),
    ],
)
def test_a_loop_that_means_something_else_is_refused(kind: Any, words: str) -> None:
    block = made(kind)
    with torch.no_grad():
        wanted = block(X) if kind is not Swapped else None  # whose loop reads beyond the slots
        with pytest.warns(ExpertsWarning, match=f"EFF-M302.*{words}"):
            ((path, why),) = prepare_experts(block)
        assert (path, why.code) == ("", "EFF-M302")
        assert "forward" not in vars(block)
        if wanted is not None:
            torch.testing.assert_close(block(X), wanted)


def test_experts_that_differ_are_refused() -> None:
    block = made()
    block.experts[2].act_fn = nn.GELU()
    with pytest.warns(ExpertsWarning, match="not alike"):
        prepare_experts(block)
    tied = made()
    tied.experts[1].gate_proj.weight = tied.experts[0].gate_proj.weight
    why = listed.prepare(tied)
    assert why is not None
    assert "share a parameter" in why.reason


def test_weights_of_two_places_and_forwards_of_others_are_refused() -> None:
    one, two = made(), made(seed=1)
    two.experts[3].down_proj.weight = one.experts[3].down_proj.weight
    model = nn.ModuleDict({"a": one, "b": two})
    with pytest.warns(ExpertsWarning, match="shares a weight with another place"):
        kept = prepare_experts(model)
    assert [path for path, _ in kept] == ["a", "b"]
    hooked = made()
    hooked.experts[1].forward = hooked.experts[1].forward
    with pytest.warns(ExpertsWarning, match="Gated was replaced by something else"):
        prepare_experts(hooked)


def test_a_model_of_its_own_needs_no_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    block = made()
    wanted = exact(block)
    monkeypatch.setitem(sys.modules, "transformers", None)
    eff.prepare(block)
    with torch.no_grad():
        assert support.error(block(X), wanted) < 1e-5
    assert "forward" in vars(block)
    with pytest.raises(eff.EffError, match="EFF-U104"):
        eff.prepare(block, kv="plain")
