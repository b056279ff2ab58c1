"""Train whole transformers models, and models whose parts are frozen: every gradient is eager's."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import effcompile as eff
from tests.support.hf_zoo import case

CHEAP = {"emit": "interpreter", "strict": True}


@pytest.fixture(autouse=True)
def _clean() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def causal(x: Tensor) -> Tensor:
    places = torch.arange(x.shape[-2])
    mask = torch.where(places[None] <= places[:, None], 0.0, torch.finfo(x.dtype).min)
    return F.scaled_dot_product_attention(x, x * 2, x * 3, attn_mask=mask)


def same_gradients(found: nn.Module, expected: nn.Module) -> None:
    """Assert equal gradients, relative to the largest of each; one that eager lacks is absent here too."""
    for x, y in zip(found.parameters(), expected.parameters(), strict=True):
        assert (x.grad is None) == (y.grad is None)
        if x.grad is not None and y.grad is not None:
            assert float((x.grad - y.grad).abs().max()) <= 1e-4 * (1e-2 + float(y.grad.abs().max()))


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("name", ["llama", "llama-eager"])
def test_gradients_of_a_language_model(name: str, padded: bool) -> None:
    model = case(name).build().train()
    twin = copy.deepcopy(model)
    ids = torch.randint(4, 90, (2, 12), generator=torch.Generator().manual_seed(0))
    inputs = {"input_ids": ids, "labels": ids, "use_cache": False}
    if padded:
        keep = torch.ones(2, 12, dtype=torch.long)
        keep[0, :3] = 0
        inputs |= {"attention_mask": keep, "labels": ids.masked_fill(keep == 0, -100)}
    model(**inputs).loss.backward()
    torch.compile(twin, backend="eff", options=CHEAP)(**inputs).loss.backward()
    counters = eff.report()["counters"]
    assert counters == {"graphs": 1, "sites": len(model.model.layers), "missed": 0}, eff.report()
    assert all(p.grad is not None for p in model.parameters())
    same_gradients(twin, model)


def test_a_few_steps_of_an_optimizer() -> None:
    model = case("llama").build().train()
    twin = copy.deepcopy(model)
    ids = torch.randint(4, 90, (2, 10), generator=torch.Generator().manual_seed(1))
    losses: list[list[float]] = []
    for run, weights in ((model, model), (torch.compile(twin, backend="eff", options=CHEAP), twin)):
        optimizer, seen = torch.optim.SGD(weights.parameters(), lr=0.1), []
        for _ in range(4):
            optimizer.zero_grad()
            loss = run(input_ids=ids, labels=ids, use_cache=False).loss
            loss.backward()
            optimizer.step()
            seen.append(loss.item())
        losses.append(seen)
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    assert losses[0][-1] < losses[0][0]
    assert eff.report()["counters"]["graphs"] == 1


@pytest.mark.parametrize("emit", ["interpreter", "inductor"])
def test_a_frozen_layer_in_a_no_grad_block(emit: str) -> None:
    """The node that turns gradients off has no result that anybody reads, and must stay all the same."""

    class Probe(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.frozen, self.head = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            with torch.no_grad():
                features = self.frozen(x)
            return causal(self.head(features) + x)

    model = Probe()
    twin, x, y = copy.deepcopy(model), draw(2, 2, 6, 8).requires_grad_(), draw(2, 2, 6, 8).requires_grad_()
    model(x).square().sum().backward()
    torch.compile(twin, backend="eff", options={"strict": True, "emit": emit})(y).square().sum().backward()
    assert model.frozen.weight.grad is None
    same_gradients(twin, model)
    torch.testing.assert_close(y.grad, x.grad, rtol=1e-4, atol=1e-4)
    assert [site["kernel"] for site in eff.report()["graphs"][0]["sites"]] == ["sdpa-causal"]


@pytest.mark.parametrize("freeze", [lambda m: m[0], lambda m: m[1]], ids=["first", "last"])
def test_frozen_weights(freeze: Callable[[nn.Sequential], nn.Module]) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    freeze(model).requires_grad_(False)
    twin, x = copy.deepcopy(model), draw(2, 2, 6, 8)
    causal(model(x)).square().sum().backward()
    torch.compile(lambda x: causal(twin(x)), backend="eff", options=CHEAP)(x).square().sum().backward()
    same_gradients(twin, model)
    assert eff.report()["counters"]["sites"] == 1
