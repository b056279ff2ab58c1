"""Train through the backend: gradients are eager's, and what could lose one is refused by name."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import effcompile as eff
from effcompile.capture.dynamo import DIFFERENTIABLE_HIGHER_ORDER

CHEAP = {"emit": "interpreter", "strict": True}


@pytest.fixture(autouse=True)
def _clean() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def leaves(*shapes: tuple[int, ...]) -> list[Tensor]:
    draw = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=draw).requires_grad_() for shape in shapes]


def qkv(kv_heads: int = 4) -> list[Tensor]:
    return leaves((2, 4, 7, 8), (2, kv_heads, 7, 8), (2, kv_heads, 7, 8))


def gradients(function: Callable[..., Any], args: list[Any]) -> list[Tensor]:
    """Return the result and the gradients of a loss that weighs every element differently."""
    given = [x.detach().clone().requires_grad_(x.requires_grad) if isinstance(x, Tensor) else x for x in args]
    result = function(*given)
    weight = torch.linspace(-1, 2, result.numel()).reshape(result.shape)
    (result.float() * weight).sum().backward()
    missing = torch.zeros(())
    return [result.detach()] + [x.grad if x.grad is not None else missing for x in given if isinstance(x, Tensor)]


def check(function: Callable[..., Any], args: list[Any], tolerance: float = 1e-5, **options: Any) -> dict[str, Any]:
    expected = gradients(function, args)
    run = torch.compile(function, backend="eff", options={**CHEAP, **options})
    for found, wanted in zip(gradients(run, args), expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=tolerance, atol=tolerance)
    return eff.report()


def sites(report: dict[str, Any]) -> list[tuple[str, str]]:
    return [(site["mask"], site["kernel"]) for graph in report["graphs"] for site in graph["sites"]]


# --- attention ---


def causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1])


def windowed(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    rows, columns = torch.arange(q.shape[2])[:, None], torch.arange(k.shape[2])[None]
    mask = torch.where((columns <= rows) & (rows - columns < 3), 0.0, torch.finfo(q.dtype).min)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=q.shape[1] != k.shape[1])


def chained(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    rows, columns = torch.arange(q.shape[2])[:, None], torch.arange(k.shape[2])[None]
    scores = torch.matmul(q, k.transpose(-1, -2)) * 0.3
    return torch.matmul(scores.masked_fill(columns > rows, float("-inf")).softmax(-1), v)


@pytest.mark.parametrize("function", [causal, windowed, chained])
def test_gradients_of_attention(function: Callable[..., Tensor]) -> None:
    kernel = {"causal": "sdpa-causal", "chained": "sdpa-causal", "windowed": "dense"}[function.__name__]
    assert [name for _, name in sites(check(function, qkv()))] == [kernel]


@pytest.mark.parametrize("function", [causal, windowed])
def test_gradients_of_grouped_heads(function: Callable[..., Tensor]) -> None:
    assert sites(check(function, qkv(2)))


@pytest.mark.parametrize("lengths", [(3, 7), (7, 3), (1, 7)])
def test_gradients_of_unequal_lengths(lengths: tuple[int, int]) -> None:
    q, k, v = leaves((2, 4, lengths[0], 8), (2, 4, lengths[1], 8), (2, 4, lengths[1], 8))
    assert sites(check(causal, [q, k, v])) == [("causal", "dense")]


def test_gradients_of_repeated_keys() -> None:
    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        wide = [x[:, :, None].expand(2, 2, 2, 7, 8).reshape(2, 4, 7, 8) for x in (k, v)]
        return causal(q, *wide)

    report = check(attention, qkv(2))
    assert report["graphs"][0]["sites"][0]["kv_heads"] == 2


def test_gradients_of_a_learned_bias() -> None:
    def attention(q: Tensor, k: Tensor, v: Tensor, table: Tensor) -> Tensor:
        distance = torch.arange(7)[None] - torch.arange(7)[:, None] + 6
        return F.scaled_dot_product_attention(q, k, v, attn_mask=table[:, distance])

    check(attention, [*qkv(), *leaves((4, 13))])


def test_gradients_of_softcap_and_sinks() -> None:
    def attention(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor) -> Tensor:
        scores = torch.tanh(torch.matmul(q, k.transpose(-1, -2)) / 5.0) * 5.0
        scores = torch.cat([scores, sinks.reshape(1, -1, 1, 1).expand(2, 4, 7, 1)], -1)
        return torch.matmul(scores.softmax(-1)[..., :-1], v)

    check(attention, [*qkv(), *leaves((4,))])


def test_gradients_of_sinks_keep_the_chain() -> None:
    """Torch's flash kernel takes no gradient of its LSE, so that the kernels that scale rows by it step aside."""

    def attention(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor) -> Tensor:
        rows, columns = torch.arange(7)[:, None], torch.arange(7)[None]
        scores = (torch.matmul(q, k.transpose(-1, -2)) * 0.3).masked_fill(columns > rows, float("-inf"))
        scores = torch.cat([scores, sinks.reshape(1, -1, 1, 1).expand(2, 4, 7, 1)], -1)
        return torch.matmul(scores.softmax(-1)[..., :-1], v)

    args = [*qkv(), *leaves((4,))]
    assert sites(check(attention, args)) == [("causal", "math")]
    torch._dynamo.reset()
    with torch.no_grad():
        run = torch.compile(attention, backend="eff", options=CHEAP)
        torch.testing.assert_close(run(*args), attention(*args))
    assert sites(eff.report())[-1] == ("causal", "sdpa-causal")


def test_a_detached_step_keeps_its_gradients_apart() -> None:
    def scores_detached(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch.matmul(torch.matmul(q, k.transpose(-1, -2)).detach().softmax(-1), v)

    def probabilities_detached(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch.matmul(torch.matmul(q, k.transpose(-1, -2)).softmax(-1).detach(), v)

    def keys_detached(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k.detach(), v)

    for function in (scores_detached, probabilities_detached, keys_detached):
        torch._dynamo.reset()
        check(function, qkv())


def test_a_region_without_gradients_keeps_them_out() -> None:
    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with torch.no_grad():
            probs = torch.matmul(q, k.transpose(-1, -2)).softmax(-1)
        return torch.matmul(probs, v)

    check(attention, qkv())


def test_gradients_inside_no_grad() -> None:
    """Gradients that are turned on inside a graph count as training."""

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with torch.enable_grad():
            return windowed(q, k, v)

    args = qkv()
    expected = gradients(attention, args)
    run = torch.compile(attention, backend="eff", options=CHEAP)

    def outer(*given: Tensor) -> Tensor:
        with torch.no_grad():
            return run(*given)

    for found, wanted in zip(gradients(outer, args), expected, strict=True):
        torch.testing.assert_close(found, wanted)


# --- whole models ---


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.qkv, self.out, self.norm = nn.Linear(32, 96), nn.Linear(32, 32), nn.LayerNorm(32)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (4, 8)).transpose(1, 2) for t in self.qkv(self.norm(x)).chunk(3, -1))
        return x + self.out(windowed(q, k, v).transpose(1, 2).flatten(2))


def model() -> nn.Sequential:
    return nn.Sequential(Block(), Block(), Block(), Block())


def batch(seed: int = 1) -> Tensor:
    return torch.randn(2, 70, 32, generator=torch.Generator().manual_seed(seed))


def steps(run: Callable[[Tensor], Tensor], net: nn.Module, count: int = 3) -> list[float]:
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    losses = []
    for number in range(count):
        optimizer.zero_grad()
        loss = run(batch(number)).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


@pytest.mark.parametrize("emit", ["interpreter", "inductor"])
def test_training_a_model(emit: str) -> None:
    expected = steps((one := model()), one)
    other = model()
    found = steps(torch.compile(other, backend="eff", options={"emit": emit, "strict": True}), other)
    assert found == pytest.approx(expected, rel=1e-4)
    for a, b in zip(one.parameters(), other.parameters()):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)
    assert [kernel for _, kernel in sites(eff.report())] == ["dense"] * 4


def test_autocast() -> None:
    net = model()

    def run(module: Callable[[Tensor], Tensor]) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return module(batch())

    fast = torch.compile(net, backend="eff", options=CHEAP)
    with torch.no_grad():
        exact = net(batch())
        limit = 2 * float((run(net) - exact).abs().max())
        assert float((run(fast) - exact).abs().max()) <= limit
    expected, found = ([], [])
    for module, kept in ((net, expected), (fast, found)):
        net.zero_grad()
        run(module).square().mean().backward()
        kept += [p.grad.clone() for p in net.parameters() if p.grad is not None]
    for a, b in zip(expected, found, strict=True):
        torch.testing.assert_close(a, b, rtol=0.1, atol=0.01 * float(a.abs().max()))


def test_autocast_inside_the_model_is_refused_by_name() -> None:
    """A retrace would record float32 where bfloat16 is computed, and drop the cast back as an identity."""

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            y = causal(q, k, v).float()
        return y * 3

    assert check(attention, qkv())["counters"] == {"refused EFF-G305": 1}


def test_autocast_turned_off_inside_a_model_without_autocast_is_nothing() -> None:
    """As transformers computes rotary positions."""

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            q = q * q.float().cos()
        return causal(q, k, v)

    assert sites(check(attention, qkv())) == [("causal", "sdpa-causal")]


def test_checkpointing() -> None:
    from torch.utils.checkpoint import checkpoint

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return checkpoint(causal, q, k, v, use_reentrant=False) * 2

    report = check(attention, qkv(), strict=False)
    assert report["graphs"] or any("EFF-G303" in name for name in report["counters"])


def test_a_custom_function_is_refused_and_its_gradient_is_right() -> None:
    """A retraced autograd.Function has the right forward and a wrong gradient: such a graph is not retraced."""

    class Straight(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.round()

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            return grad * 18

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return causal(Straight.apply(q), k, v)

    report = check(attention, qkv(), strict=True)
    assert report["counters"] == {"refused EFF-G303": 1}
    assert "autograd_function_apply" in report["notices"][0]
    with torch.no_grad():
        torch._dynamo.reset()
        args = qkv()
        run = torch.compile(attention, backend="eff", options=CHEAP)
        torch.testing.assert_close(run(*args), attention(*args))
        assert sites(eff.report()) == [("causal", "sdpa-causal")]


# --- higher-order ops that capture retraces while training: one gradient test each ---


def _cond(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    y = causal(q, k, v)
    return torch.cond(y.sum() > -1e9, lambda x: x.sin(), lambda x: x.cos(), (y,))


HIGHER_ORDER = {"cond": _cond}


def test_every_allowed_higher_order_op_has_a_test() -> None:
    assert set(HIGHER_ORDER) == DIFFERENTIABLE_HIGHER_ORDER


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.parametrize("name", sorted(DIFFERENTIABLE_HIGHER_ORDER))
def test_gradients_through_a_higher_order_op(name: str) -> None:
    report = check(HIGHER_ORDER[name], qkv())
    assert "fallbacks" not in report["counters"]
    assert not [key for key in report["counters"] if key.startswith("refused")]


# --- in-place writes ---


def test_in_place_writes() -> None:
    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k = k.clone()
        k[:, :, 0] = 0
        y = causal(q, k, v) * 1.5
        y.mul_(2)
        return y

    assert sites(check(attention, qkv())) == [("causal", "sdpa-causal")]


@torch.no_grad()
def test_writes_to_an_input_reach_the_caller() -> None:
    def step(cache: Tensor, q: Tensor, k: Tensor, place: Tensor) -> Tensor:
        cache.index_copy_(2, place, k)
        mask = torch.arange(cache.shape[2])[None] <= place[:, None]
        return F.scaled_dot_product_attention(q, cache, cache, attn_mask=mask)

    cache = torch.zeros(2, 4, 9, 8)
    ours, theirs = cache.clone(), cache.clone()
    run = torch.compile(step, backend="eff", options=CHEAP)
    for number in range(3):
        q, k, _ = (x.detach()[:, :, :1] for x in qkv())
        place = torch.tensor([number])
        torch.testing.assert_close(run(ours, q, k, place), step(theirs, q, k, place))
        torch.testing.assert_close(ours, theirs)
