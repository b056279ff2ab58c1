"""Train through `backend="eff"`: every gradient is eager's, or the graph is refused by name and still right."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._higher_order_ops.wrap import wrap_with_autocast, wrap_with_set_grad_enabled
from torch.utils.checkpoint import checkpoint

import effcompile as eff
from effcompile.capture.dynamo import DIFFERENTIABLE_HIGHER_ORDER
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
    """Attend under a mask that is materialized as transformers does it."""
    places = torch.arange(x.shape[2])
    mask = torch.where(places[None] <= places[:, None], 0.0, torch.finfo(x.dtype).min)
    return F.scaled_dot_product_attention(x, x * 2, x * 3, attn_mask=mask)


def step(function: Callable[..., Any], args: tuple[Tensor, ...]) -> list[Tensor | None]:
    """Return the result and the gradient of every floating-point argument."""
    leaves = [x.detach().clone().requires_grad_(x.is_floating_point()) for x in args]
    result = function(*leaves)
    result.square().sum().backward()
    return [result.detach(), *(x.grad for x in leaves)]


def same(found: list[Tensor | None], expected: list[Tensor | None], tolerance: float = 2e-5) -> None:
    """Assert equal gradients, relative to the largest; what eager leaves without one has none here either."""
    assert len(found) == len(expected)
    for x, y in zip(found, expected):
        assert (x is None) == (y is None)
        if x is not None and y is not None:
            assert x.dtype == y.dtype
            assert float((x - y).abs().max()) <= tolerance * (1 + float(y.abs().max()))


def check(function: Callable[..., Any], *args: Tensor, **options: Any) -> list[tuple[str, str]]:
    """Assert eager's gradients, and return the mask and kernel of every site."""
    expected = step(function, args)
    assert any(x is not None and bool(x.abs().max() > 0) for x in expected[1:])
    same(step(torch.compile(function, backend="eff", options={**CHEAP, **options}), args), expected)
    graphs = eff.report()["graphs"]
    return [(site["mask"], site["kernel"]) for graph in graphs for site in graph["sites"]]


def refused(function: Callable[..., Any], *args: Tensor, emit: str = "interpreter") -> str:
    """Assert that the one graph is refused and right, and return the notice."""
    assert check(function, *args, emit=emit) == []
    report = eff.report()
    assert report["counters"] == {"refused EFF-G303": 1}
    (notice,) = report["notices"]
    assert "test_training.py" in notice
    return str(notice)


# --- attention ---


@pytest.mark.parametrize("emit", ["interpreter", "inductor"])
def test_materialized_causal_mask(emit: str) -> None:
    assert check(causal, draw(2, 2, 6, 8), emit=emit) == [("causal", "sdpa-causal")]


def test_grouped_heads() -> None:
    def grouped(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

    ((mask, _),) = check(grouped, draw(2, 4, 6, 8), draw(2, 2, 6, 8, seed=1), draw(2, 2, 6, 8, seed=2))
    assert mask == "causal"


def test_repeated_heads() -> None:
    def repeated(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k, v = (x[:, :, None].expand(-1, -1, 2, -1, -1).reshape(q.shape) for x in (k, v))
        return F.scaled_dot_product_attention(q, k, v)

    assert check(repeated, draw(2, 4, 6, 8), draw(2, 2, 6, 8, seed=1), draw(2, 2, 6, 8, seed=2))


def test_padding_mask() -> None:
    def padded(x: Tensor, keep: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(x, x * 2, x * 3, attn_mask=keep[:, None, None].bool())

    keep = torch.ones(2, 6, dtype=torch.long)
    keep[1, 4:] = 0
    assert len(check(padded, draw(2, 2, 6, 8), keep)) == 1


def test_a_learned_bias_gets_its_gradient() -> None:
    def biased(x: Tensor, bias: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(x, x * 2, x * 3, attn_mask=bias)

    assert len(check(biased, draw(2, 2, 6, 8), draw(2, 6, 6, seed=1))) == 1


def test_softmax_chain() -> None:
    def chain(x: Tensor, w: Tensor) -> Tensor:
        places = torch.arange(x.shape[2])
        scores = (x @ w) @ x.transpose(-1, -2) * 8**-0.5
        scores = scores.masked_fill(places[None] > places[:, None], float("-inf"))
        return scores.softmax(-1) @ x

    assert check(chain, draw(2, 2, 6, 8), draw(8, 8, seed=1)) == [("causal", "sdpa-causal")]


def test_softcap() -> None:
    def capped(x: Tensor) -> Tensor:
        return (torch.tanh(x @ x.transpose(-1, -2) / 5.0) * 5.0).softmax(-1) @ x

    assert len(check(capped, draw(2, 2, 6, 8))) == 1


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("name", ["llama", "llama-eager"])
def test_transformers(name: str, padded: bool) -> None:
    model = case(name).build().train()
    twin = copy.deepcopy(model)
    ids = torch.randint(4, 90, (2, 12), generator=torch.Generator().manual_seed(0))
    keep = torch.ones(2, 12, dtype=torch.long)
    keep[0, :3] = 0
    inputs = {"input_ids": ids, "labels": ids, "use_cache": False, **({"attention_mask": keep} if padded else {})}
    model(**inputs).loss.backward()
    torch.compile(twin, backend="eff", options=CHEAP)(**inputs).loss.backward()
    report = eff.report()
    assert report["counters"]["sites"] >= 2, report
    assert "fallbacks" not in report["counters"]
    pairs = list(zip(model.parameters(), twin.parameters(), strict=True))
    same([b.grad for _, b in pairs], [a.grad for a, _ in pairs])
    assert all(a.grad is not None for a, _ in pairs)


# --- regions and writes ---


@pytest.mark.parametrize("emit", ["interpreter", "inductor"])
def test_no_gradient_flows_through_a_no_grad_block(emit: str) -> None:
    def stopped(x: Tensor, w: Tensor) -> Tensor:
        with torch.no_grad():
            y = x @ w
        return causal(x + y) + w.sum()

    assert check(stopped, draw(2, 2, 6, 8), draw(8, 8, seed=1), emit=emit) == [("causal", "sdpa-causal")]


@pytest.mark.parametrize("where", ["scores", "probabilities"])
@pytest.mark.parametrize("how", ["no_grad", "detach"])
def test_a_chain_that_stops_gradients_half_way_stays(how: str, where: str) -> None:
    def stopped(x: Tensor, w: Tensor) -> Tensor:
        with torch.no_grad() if how == "no_grad" else nullcontext():
            y = (x @ w) @ x.transpose(-1, -2)
            if where == "probabilities":
                y = y.softmax(-1)
        y = y.detach() if how == "detach" else y
        return (y.softmax(-1) if where == "scores" else y) @ x + w.sum()

    assert check(stopped, draw(2, 2, 6, 8), draw(8, 8, seed=1)) == []


def test_autocast() -> None:
    def mixed(x: Tensor, w: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return causal(x @ w).float()

    assert check(mixed, draw(2, 2, 6, 8), draw(8, 8, seed=1)) == [("causal", "sdpa-causal")]


def test_a_softmax_chain_under_autocast_is_as_exact_as_eager() -> None:
    """Eager rounds the probabilities to bfloat16 and the fused kernel does not: both are compared with float64."""

    def chain(x: Tensor, w: Tensor) -> Tensor:
        return ((x @ w) @ x.transpose(-1, -2)).softmax(-1) @ x

    def mixed(x: Tensor, w: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return chain(x, w).float()

    args = draw(2, 2, 6, 8), draw(8, 8, seed=1) / 8
    exact = step(chain, tuple(x.double() for x in args))
    eager = step(mixed, args)
    found = step(torch.compile(mixed, backend="eff", options=CHEAP), args)
    for x, y, z in zip(found, eager, exact):
        assert x is not None
        assert y is not None
        assert z is not None
        rounding = 8 * torch.finfo(torch.bfloat16).eps * float(z.abs().max())
        assert float((x - z).abs().max()) <= 2 * float((y - z).abs().max()) + rounding


def test_writes_in_place() -> None:
    def writes(x: Tensor) -> Tensor:
        y = x * 2
        y[:, 0] = 1
        y.mul_(x)
        y = causal(y) * 1.5
        y[:, :, 0] += x[:, :, 1]
        return y.add_(x)

    assert check(writes, draw(2, 2, 6, 8)) == [("causal", "sdpa-causal")]


def test_a_few_steps_of_an_optimizer() -> None:
    torch.manual_seed(0)
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


# --- higher-order ops ---


class Cube(torch.autograd.Function):
    """Give a gradient that autograd would not find, so that losing the function shows."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return grad * 7 * x


def product(x: Tensor, w: Tensor) -> Tensor:
    return x @ w


def through_autocast(x: Tensor, w: Tensor) -> Tensor:
    return causal(wrap_with_autocast("cpu", torch.bfloat16, True, True, product, x, w).float())


def through_grad_mode(x: Tensor, w: Tensor) -> Tensor:
    kept = wrap_with_set_grad_enabled(True, product, x, w)
    return causal(kept + wrap_with_set_grad_enabled(False, product, x, w))


def through_cond(x: Tensor, w: Tensor) -> Tensor:
    y = torch.cond(x.sum() > 0, lambda a, b: (a @ b).sin(), lambda a, b: (a @ b).cos(), (x, w))
    return causal(y)


COVERED: dict[str, Callable[..., Tensor]] = {
    "wrap_with_autocast": through_autocast,
    "wrap_with_set_grad_enabled": through_grad_mode,
    "cond": through_cond,
}


@pytest.mark.parametrize("name", sorted(COVERED))
def test_gradients_through_a_higher_order_op(name: str) -> None:
    """Both signs of the input: `cond` takes both branches."""
    seen = []

    def look(gm: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        seen.extend(str(node.target) for node in gm.graph.nodes)
        return gm.forward

    x, w = draw(2, 2, 6, 8).abs(), draw(8, 8, seed=1)
    torch.compile(COVERED[name], backend=look)(x.clone().requires_grad_(), w)
    assert name in seen, "the test does not reach the op"
    for sign in (1, -1):
        torch._dynamo.reset()
        assert check(COVERED[name], sign * x, w) == [("causal", "sdpa-causal")]


def test_every_op_that_is_let_through_has_a_test() -> None:
    assert sorted(COVERED) == sorted(DIFFERENTIABLE_HIGHER_ORDER)


@pytest.mark.parametrize("emit", ["interpreter", "inductor"])
def test_a_custom_autograd_function_is_refused(emit: str) -> None:
    notice = refused(lambda x: causal(Cube.apply(x)), draw(2, 2, 6, 8), emit=emit)
    assert "autograd_function_apply" in notice


def test_checkpointing_is_refused() -> None:
    def saved(x: Tensor, w: Tensor) -> Tensor:
        result = checkpoint(lambda a, b: causal(a @ b), x, w, use_reentrant=False)
        assert isinstance(result, Tensor)
        return result + x

    assert "tag_activation_checkpoint" in refused(saved, draw(2, 2, 6, 8), draw(8, 8, seed=1))


def test_without_gradients_a_custom_function_is_no_obstacle() -> None:
    x = draw(2, 2, 6, 8)
    with torch.no_grad():
        run = torch.compile(lambda x: causal(Cube.apply(x)), backend="eff", options=CHEAP)
        torch.testing.assert_close(run(x), causal(x * x))
    assert [site["kernel"] for site in eff.report()["graphs"][0]["sites"]] == ["sdpa-causal"]


def test_a_layer_that_is_frozen_trains_the_rest() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    model[0].requires_grad_(False)
    twin, x = copy.deepcopy(model), draw(2, 2, 6, 8)
    causal(model(x)).square().sum().backward()
    torch.compile(lambda x: causal(twin(x)), backend="eff", options=CHEAP)(x).square().sum().backward()
    same([p.grad for p in twin.parameters()], [p.grad for p in model.parameters()])
    assert twin[0].weight.grad is None
