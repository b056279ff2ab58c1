"""Dispatch Duo-LLM layers: the op against masked execution, the pass on graphs, near misses, and the sweep over patterns."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import effcompile as eff
from effcompile import ops
from effcompile.core.errors import EffError
from effcompile.core.plan import Plan
from effcompile.models.duo import LARGE, SKIP, SMALL, Duo, DuoConfig, DuoFFN, oracle_sweep, patterns
from effcompile.ops import native_moe
from effcompile.ops import unequal_experts as op
from effcompile.passes.canonicalize import RemoveIdentities
from effcompile.passes.unequal_experts import DispatchUnequal
from tests.support.check import CPU, text, trace

ops.register()
CONFIG = DuoConfig.tiny()


def layer() -> DuoFFN:
    torch.manual_seed(0)
    return DuoFFN(CONFIG).eval()


def weights_of(made: DuoFFN) -> list[Tensor]:
    both = (made.large, made.small)
    return [p.weight.detach() for part in both for p in (part.gate_proj, part.up_proj, part.down_proj)]


X = torch.randn(2, 9, CONFIG.llama.width, generator=torch.Generator().manual_seed(1))
CHOICES = {
    "mixed": torch.randint(0, 3, (2, 9), generator=torch.Generator().manual_seed(2)),
    **{name: torch.full((2, 9), value) for name, value in (("large", LARGE), ("small", SMALL), ("skip", SKIP))},
    "two": torch.arange(18).reshape(2, 9) % 2 * 2,
}


@pytest.mark.parametrize("few", [0, 128])
@pytest.mark.parametrize("name", CHOICES)
def test_the_op_is_masked_execution(name: str, few: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """By products of the BLAS, and by the kernel of experts."""
    monkeypatch.setattr(native_moe, "FEW_ROWS", few)
    made, choice = layer(), CHOICES[name]
    exact = op.written(X.double(), choice, *(w.double() for w in weights_of(made)))
    found = torch.ops.eff.unequal_experts_v1(X, choice, *weights_of(made))
    assert float((found.double() - exact).abs().max()) < 1e-5 * (1 + float(exact.abs().max()))
    with torch.no_grad():
        if name in ("large", "small"):
            dense = getattr(made, name)(X.reshape(-1, X.shape[-1])).reshape(X.shape)
            assert torch.equal(found, dense), "not bit for bit the layer alone"
    assert name != "skip" or not found.any()


def test_what_a_token_skips_is_never_computed() -> None:
    made, x = layer(), X.clone()
    x[CHOICES["mixed"] == SKIP] = torch.nan
    assert torch.isfinite(torch.ops.eff.unequal_experts_v1(x, CHOICES["mixed"], *weights_of(made))).all()


def dispatched(run: Callable[..., Tensor], args: list[Tensor]) -> tuple[torch.fx.GraphModule, int]:
    """Run the pass twice; return its graph, and how many layers it found."""
    plan = Plan.single(str(CPU))
    program = RemoveIdentities().run(trace(run, args), plan).program
    before = text(program)
    result = DispatchUnequal().run(program, plan)
    assert text(program) == before, "the pass changed the program that it was given"
    assert not DispatchUnequal().run(result.program, plan).changed
    graph = result.program.entries[0].graph
    count = sum(node.target is torch.ops.eff.unequal_experts_v1.default for node in graph.graph.nodes)
    assert result.changed == (count > 0)
    return graph, count


def test_a_compiled_model_dispatches_in_every_layer_for_any_number_of_tokens() -> None:
    torch.manual_seed(0)
    model = Duo(CONFIG).eval()
    fast = torch.compile(model, backend="eff", dynamic=True, options={"emit": "interpreter", "strict": True})
    ids = torch.randint(0, 256, (3, 12), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for given in (ids, ids[:2, :5].contiguous()):
            torch.testing.assert_close(fast(given), model(given), rtol=1e-4, atol=1e-4)
    graphs = eff.report()["graphs"]
    assert len(graphs) == 1
    assert "dispatch-unequal-experts: 2 pairs of unequal experts dispatched" in graphs[0]["notes"]


def test_a_layer_dispatches() -> None:
    weights = weights_of(layer())
    graph, count = dispatched(lambda x, c, *w: op.written(x, c, *w), [X, CHOICES["mixed"], *weights])
    assert count == 1
    wanted = op.written(X, CHOICES["mixed"], *weights)
    torch.testing.assert_close(graph(X, CHOICES["mixed"], *weights), wanted, rtol=1e-5, atol=1e-6)


NEAR_MISSES: dict[str, Callable[..., Tensor]] = {
    "another value behind the mask": lambda x, c, *w: torch.where(
        c[..., None] == 0, op.swiglu(x, *w[:3]), torch.where(c[..., None] == 1, op.swiglu(x, *w[3:]), 1.0)
    ),
    "another number": lambda x, c, *w: torch.where(
        c[..., None] == 0, op.swiglu(x, *w[:3]), torch.where(c[..., None] == 2, op.swiglu(x, *w[3:]), 0.0)
    ),
    "another operand": lambda x, c, *w: torch.where(
        c[..., None] == 0, op.swiglu(x, *w[:3]), torch.where(c[..., None] == 1, op.swiglu(x + 1, *w[3:]), 0.0)
    ),
    "another choice": lambda x, c, *w: torch.where(
        c[..., None] == 0, op.swiglu(x, *w[:3]), torch.where((c + 1)[..., None] == 1, op.swiglu(x, *w[3:]), 0.0)
    ),
    "another activation": lambda x, c, *w: torch.where(
        c[..., None] == 0, F.linear(F.gelu(F.linear(x, w[0])) * F.linear(x, w[1]), w[2]),
        torch.where(c[..., None] == 1, op.swiglu(x, *w[3:]), 0.0),
    ),
    "a write": lambda x, c, *w: op.written(x, c, *w) + x.clone().add_(1),
}  # fmt: skip


@pytest.mark.parametrize("name", NEAR_MISSES)
def test_near_misses_stay(name: str) -> None:
    assert dispatched(NEAR_MISSES[name], [X, CHOICES["mixed"], *weights_of(layer())])[1] == 0


def test_a_sweep_tries_every_pattern_and_its_oracle_is_no_worse_than_any() -> None:
    torch.manual_seed(0)
    model = Duo(CONFIG).eval()
    ids = torch.randint(0, 256, (2, 10), generator=torch.Generator().manual_seed(0))
    found = oracle_sweep(model, ids, at_once=4)
    assert found.patterns.tolist() == patterns(2).tolist()
    assert found.patterns[0].tolist() == [LARGE, LARGE]
    assert found.losses.shape == (9, 2, 9)
    with torch.no_grad():
        for pattern, losses in zip(found.patterns, found.losses):
            choices = pattern[:, None, None].expand(-1, *ids.shape)
            logits = model(ids, choices)[:, :-1]
            wanted = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none").view(2, 9)
            torch.testing.assert_close(losses, wanted, rtol=1e-5, atol=1e-5)
        # Nothing but attention where all is skipped.
        attention = ids.new_full((2, 2, 10), SKIP)
        for block in model.layers:
            for p in (*block.ffn.large.parameters(), *block.ffn.small.parameters()):
                p.data.fill_(torch.nan)
        assert torch.isfinite(model(ids, attention)).all()
    assert found.oracle <= float(found.fixed.min()) + 1e-6
    assert torch.equal(found.losses.gather(0, found.best[None])[0], found.losses.min(0).values)


def test_shapes_that_do_not_fit_are_an_error() -> None:
    weights = weights_of(layer())
    with pytest.raises(EffError, match="EFF-M210"):
        torch.ops.eff.unequal_experts_v1(X, CHOICES["mixed"], *weights[:5], weights[2])
