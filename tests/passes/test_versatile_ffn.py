"""Fold VersatileFFN layers: the op against the block as it is written, the pass on graphs, and near misses that stay."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, fx, nn

import effcompile as eff
from effcompile import ops
from effcompile.core.errors import EffError
from effcompile.core.plan import Plan
from effcompile.models.llama import LlamaConfig
from effcompile.models.versatile import Versatile, VersatileConfig, VersatileFFN
from effcompile.ops import native_moe
from effcompile.ops import versatile_ffn as op
from effcompile.passes.canonicalize import RemoveIdentities
from effcompile.passes.versatile_ffn import FoldVirtualExperts
from tests.support.check import CPU, text, trace

ops.register()
SMALL = VersatileConfig(LlamaConfig(width=32, hidden=48), experts=4, depth=3)


def layer(config: VersatileConfig = SMALL, seed: int = 0) -> VersatileFFN:
    torch.manual_seed(seed)
    made = VersatileFFN(config).eval()
    nn.init.normal_(made.norm.weight)
    return made


def tokens(*shape: int) -> Tensor:
    return torch.randn(*shape, 32, generator=torch.Generator().manual_seed(1))


def function(made: VersatileFFN) -> tuple[Callable[..., Tensor], list[Tensor]]:
    """Return the layer as a function of its input and its weights, and the weights."""
    names = [name for name, _ in made.named_parameters()]

    def run(x: Tensor, *weights: Tensor) -> Tensor:
        return torch.func.functional_call(made, dict(zip(names, weights)), (x,))

    return run, [p.detach() for p in made.parameters()]


def folded(run: Callable[..., Tensor], args: list[Tensor]) -> tuple[fx.GraphModule, int]:
    """Run the pass twice; return its graph, and how many layers it found."""
    plan = Plan.single(str(CPU))
    program = RemoveIdentities().run(trace(run, args), plan).program
    before = text(program)
    result = FoldVirtualExperts().run(program, plan)
    assert text(program) == before, "the pass changed the program that it was given"
    assert not FoldVirtualExperts().run(result.program, plan).changed
    graph = result.program.entries[0].graph
    count = sum(node.target is torch.ops.eff.versatile_ffn_v1.default for node in graph.graph.nodes)
    assert result.changed == (count > 0)
    return graph, count


def error(found: Tensor, exact: Tensor) -> float:
    return float((found.double() - exact).abs().max() / exact.abs().max())


@pytest.mark.parametrize("shape", [(1, 1), (2, 7), (1, 0)])
def test_the_pass_keeps_what_the_layer_computes(shape: tuple[int, int]) -> None:
    made, x = layer(), tokens(*shape)
    run, weights = function(made)
    graph, count = folded(run, [x, *weights])
    assert count == 1
    with torch.no_grad():
        found = graph(x, *weights)
        exact = made.double()(x.double())
    assert found.shape == x.shape
    if x.numel():
        assert error(found, exact) < 1e-5


def test_a_compiled_layer_takes_any_number_of_tokens() -> None:
    made = layer()
    fast = torch.compile(made, backend="eff", options={"emit": "interpreter", "strict": True})
    with torch.no_grad():
        for shape in ((2, 7), (3, 5), (4, 9)):
            x = tokens(*shape)
            for dim in (0, 1):
                torch._dynamo.mark_dynamic(x, dim)
            torch.testing.assert_close(fast(x), made(x), rtol=1e-4, atol=1e-5)
    graphs = eff.report()["graphs"]
    assert len(graphs) == 1
    assert "fold-virtual-experts: 1 VersatileFFN layers folded" in graphs[0]["notes"]


@pytest.mark.parametrize("emit", ["interpreter", pytest.param("inductor", marks=pytest.mark.slow)])
def test_a_layer_is_found_where_its_epsilon_is_an_input_of_the_graph(emit: str) -> None:
    """Under `dynamic=True` Dynamo makes a number of the module an input; another number compiles nothing anew and is read."""
    made = layer()
    torch._dynamo.reset()
    fast = torch.compile(made, backend="eff", dynamic=True, options={"emit": emit, "strict": True})
    with torch.no_grad():
        for shape in ((2, 7), (3, 5)):
            torch.testing.assert_close(fast(tokens(*shape)), made(tokens(*shape)), rtol=1e-4, atol=1e-5)
        assert "fold-virtual-experts: 1 VersatileFFN layers folded" in eff.report()["graphs"][-1]["notes"]
        made.norm.eps = 0.5
        torch.testing.assert_close(fast(tokens(2, 7)), made(tokens(2, 7)), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("depth", [1, 2, 4])
@pytest.mark.parametrize("loops", ["few", "all", "mixed"])
@pytest.mark.parametrize("few", [0, 128])
def test_spellings_and_the_op_agree(depth: int, loops: str, few: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """With no token deep, with all of them, and with some of each: the wide path is skipped where lam is 0.

    By products of the BLAS, and by the kernel of experts.
    """
    monkeypatch.setattr(native_moe, "FEW_ROWS", few)
    made = layer(replace(SMALL, depth=depth))
    x = tokens(3, 11)
    if loops != "mixed":
        place = 0 if loops == "few" else depth - 1
        x = x + 20  # a router that reads the mean
        made.depth_router.weight.data.zero_()
        made.depth_router.weight.data[place] = 1.0
    args = [p.detach() for p in (made.depth_router.weight, made.width_router.weight, made.norm.weight)]
    args += [p.weight.detach() for p in (made.ffn.gate_proj, made.ffn.up_proj, made.ffn.down_proj)]
    with torch.no_grad():
        exact, last, shares = op.written(x.double(), *(a.double() for a in args), 2, 1e-5)
        assert loops == "mixed" or set(last.flatten().tolist()) == {0 if loops == "few" else depth - 1}
        found = torch.ops.eff.versatile_ffn_v1(x, last, shares.float(), *args[2:], depth, 1e-5)
        made.config = replace(made.config, form="gathered")
        gathered = made(x)
        made.config = replace(made.config, form="static")
        static = made(x)
    for result in (found, gathered, static):
        assert error(result, exact) < 1e-5


def test_all_experts_without_gates_are_the_dense_layer_and_one_loop_is_the_dense_block() -> None:
    made = layer(replace(SMALL, depth=1))
    x = tokens(2, 5)
    with torch.no_grad():
        n = made.norm(x)
        parts = [made._expert(n, expert) for expert in range(4)]
        torch.testing.assert_close(torch.stack(parts).sum(0), made.ffn(n), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(made(x), x + made.ffn(n), rtol=0, atol=0)


def test_a_model_runs_the_op_in_every_layer_and_training_takes_one_loop_count() -> None:
    torch.manual_seed(0)
    model = Versatile(VersatileConfig.tiny()).eval()
    ids = torch.randint(0, 256, (2, 12), generator=torch.Generator().manual_seed(0))
    names = [name for name, _ in model.named_parameters()]

    def run(ids: Tensor, *weights: Tensor) -> Tensor:
        return torch.func.functional_call(model, dict(zip(names, weights)), (ids,))

    weights = [p.detach() for p in model.parameters()]
    graph, count = folded(run, [ids, *weights])
    assert count == 2
    with torch.no_grad():
        torch.testing.assert_close(graph(ids, *weights), model(ids), rtol=1e-4, atol=1e-4)
    model.train()
    model(ids).sum().backward()
    assert all(layer.ffn.depth_router.weight.grad is not None for layer in model.layers)


NEAR_MISSES: dict[str, Callable[[VersatileFFN], None]] = {}


def near_miss(change: Callable[[VersatileFFN], None]) -> Callable[[VersatileFFN], None]:
    NEAR_MISSES[change.__name__] = change
    return change


@near_miss
def an_activation_that_is_not_silu(made: VersatileFFN) -> None:
    made.ffn.forward = lambda x: made.ffn.down_proj(made.ffn.gate_proj(x).relu() * made.ffn.up_proj(x))  # type: ignore[method-assign]


@near_miss
def slices_in_another_order(made: VersatileFFN) -> None:
    expert = made._expert
    made._expert = lambda n, number: expert(n, 3 - number)  # type: ignore[method-assign]


@near_miss
def another_loop_count(made: VersatileFFN) -> None:
    made.config = replace(made.config, depth=2)


@near_miss
def other_weights_for_the_experts(made: VersatileFFN) -> None:
    expert, down = made._expert, made.ffn.down_proj
    made._expert = lambda n, number: expert(n, number) + down.weight.sum() * 0  # type: ignore[method-assign]


@near_miss
def dropout(made: VersatileFFN) -> None:
    plain = made.ffn.forward
    made.ffn.forward = lambda x: nn.functional.dropout(plain(x), 0.5, True)  # type: ignore[method-assign]


@near_miss
def a_bias(made: VersatileFFN) -> None:
    plain = made.ffn.forward
    made.ffn.forward = lambda x: plain(x) + made.norm.weight  # type: ignore[method-assign]


@pytest.mark.parametrize("name", sorted(NEAR_MISSES))
def test_near_misses_stay(name: str) -> None:
    made = layer()
    NEAR_MISSES[name](made)
    run, weights = function(made)
    _, count = folded(run, [tokens(2, 7), *weights])
    assert count == 0


def test_shapes_that_do_not_fit_are_an_error() -> None:
    x = tokens(2, 3)
    args = (torch.zeros(2, 3, dtype=torch.int64), torch.ones(2, 3, 5), torch.ones(32), *(torch.ones(48, 32),) * 2)
    with pytest.raises(EffError, match="EFF-M210"):
        torch.ops.eff.versatile_ffn_v1(x, *args, torch.ones(32, 48), 3, 1e-5)
