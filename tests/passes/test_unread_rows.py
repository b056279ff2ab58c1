"""Check that tokens which nobody reads behind the last attention are left out, and that near misses keep theirs."""

import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.utils.flop_counter import FlopCounterMode

import effcompile as eff
from effcompile import ops
from effcompile.core.plan import Plan
from effcompile.passes.canonicalize import RemoveIdentities
from effcompile.passes.unread_rows import DropUnreadRows
from tests.support.check import CPU, text, trace
from tests.support.tokens import Tower

ops.register()
TOKENS, REGISTERS = 24, 4


class Reader(nn.Module):
    """Run a tower and read some of its tokens; `fused` projects queries, keys and values at once."""

    def __init__(self, read, fused=True, **fields):
        super().__init__()
        torch.manual_seed(0)
        self.inner = Tower(depth=2, kv_heads=0 if fused else 2, **fields).double().eval()
        self.read = read

    def forward(self, x):
        for layer in self.inner.layers:
            x = layer(x, None, self.inner.causal)
        return self.read(self.inner.norm(x))


def dense(x):
    """Return the class token, and patches without registers, as dense features are made."""
    return torch.cat([x[:, 0], x[:, 1 + REGISTERS :].mean(1)], -1)


READS = {
    "class": (lambda x: x[:, 0], 1),
    "range": (lambda x: x[:, :1], 1),
    "patches": (lambda x: x[:, 1 + REGISTERS :], 19),
    "dense": (dense, 20),
    "last": (lambda x: x[:, -1].sum(-1), 1),
    "overlap": (lambda x: x[:, 2:8].sum(1) + x[:, 5:11].mean(1), 9),
}


def passed(model, x):
    names = [name for name, _ in model.named_parameters()]

    def run(*args):
        return torch.func.functional_call(model, dict(zip(names, args, strict=False)), args[len(names) :])

    args, plan = (*model.parameters(), x), Plan.single(str(CPU))
    program = RemoveIdentities().run(trace(run, args), plan).program
    before = text(program)
    result = DropUnreadRows().run(program, plan)
    assert text(program) == before, "the pass changed the program that it was given"
    assert not DropUnreadRows().run(result.program, plan).changed
    return result.program.entries[0].graph, args, result.notes, program.entries[0].graph


def flops(graph, args):
    with FlopCounterMode(display=False) as counter:
        fx.Interpreter(graph).run(*args)
    return counter.get_total_flops()


@torch.no_grad()
@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in ("class", "dense") else pytest.mark.slow) for name in READS]
)
def test_rows_that_are_read_are_the_same(name, fused):
    read, count = READS[name]
    model, x = Reader(read, fused), torch.randn(3, TOKENS, 32, dtype=torch.float64)
    graph, args, notes, whole = passed(model, x)
    assert [note.split(" behind")[0] for note in notes] == [f"{count} of {TOKENS} tokens"]
    torch.testing.assert_close(graph(*args), model(x), rtol=1e-12, atol=1e-12)
    queries = [n.args[0].meta["val"].shape[2] for n in graph.graph.nodes if "scaled_dot" in str(n.target)]
    assert queries == [TOKENS, count]
    assert flops(graph, args) < flops(whole, args)
    if not fused:  # queries of the rows alone are projected
        rows = [n.meta["val"].shape[1] for n in graph.graph.nodes if "linear" in str(n.target)]
        assert sorted(rows) == sorted([TOKENS] * 8 + [count] * 4)


@torch.no_grad()
@pytest.mark.parametrize(
    "read",
    [
        lambda x: x,
        lambda x: x.mean(1),
        lambda x: x[:, ::2],
        lambda x: x[:, 0] + x.amax(1),
        lambda x: torch.cat([x[:, :9], x[:, 9:]], 1),
        lambda x: x[torch.arange(3), torch.tensor([0, 1, 2])],
        lambda x: x.flip(1)[:, 0],
    ],
)
def test_near_misses_stay(read):
    model, x = Reader(read), torch.randn(3, TOKENS, 32, dtype=torch.float64)
    graph, args, notes, _ = passed(model, x)
    assert not notes
    assert torch.equal(graph(*args), model(x))


@torch.no_grad()
def test_masks_stay():
    _, _, notes, _ = passed(Reader(READS["class"][0], causal=True), torch.randn(3, TOKENS, 32, dtype=torch.float64))
    assert not notes


@pytest.mark.slow
def test_gradients_flow():
    model, x = Reader(READS["dense"][0]), torch.randn(2, TOKENS, 32, dtype=torch.float64)
    weights = [*model.inner.layers.parameters(), *model.inner.norm.parameters()]
    wanted = torch.autograd.grad(model(x).square().sum(), weights)
    torch._dynamo.reset()
    fast = torch.compile(model, backend="eff", options={"strict": True})
    found = torch.autograd.grad(fast(x).square().sum(), weights)
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


class DenseFeatures(nn.Module):
    """Return the class state and the patches of a DINOv2 with registers, as users of dense features do."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, pixels):
        states = self.model(pixels).last_hidden_state
        return states[:, 0], states[:, 1 + self.model.config.num_register_tokens :]


def dinov2():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.Dinov2WithRegistersConfig(
        image_size=32,
        patch_size=8,
        hidden_size=32,
        num_attention_heads=4,
        num_hidden_layers=4,
        num_register_tokens=REGISTERS,
        mlp_ratio=2,
    )
    return DenseFeatures(transformers.Dinov2WithRegistersModel(config).eval())


@torch.no_grad()
@pytest.mark.slow
def test_registers_of_dinov2_are_left_out_and_pinned():
    """Exact features without registers; a token policy keeps class and register tokens to the end."""
    model, pixels = dinov2(), torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    torch._dynamo.reset()
    options = {"strict": True, "emit": "interpreter"}
    wanted, found = model(pixels), torch.compile(model, backend="eff", options=options)(pixels)
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    assert [site["q_len"] for graph in eff.report()["graphs"] for site in graph["sites"]] == [21, 21, 21, 17]
    for policy in ("spatten{keep=0.6}", "tome{ratio=0.5}", "evit{keep=0.5,every=1}"):
        report = eff.explain(model, pixels, options={"tokens": policy}, target="cpu")
        chosen = [c.policy for c in report.plan.choices if c.family == "tokens"]
        assert chosen
        assert all("pinned=[[0, 5]" in text for text in chosen), chosen
        torch._dynamo.reset()
        short = torch.compile(model, backend="eff", options={**options, "tokens": policy})(pixels)
        assert F.cosine_similarity(short[0], wanted[0]).min() > 0.9
        lengths = [site["q_len"] for graph in eff.report()["graphs"] for site in graph["sites"]]
        assert lengths[-1] < 21


@torch.no_grad()
@pytest.mark.parametrize("reads", [lambda x: x[:, 0], lambda x: x[:, 2:]])
def test_a_policy_of_attention_gets_every_layer_with_all_its_rows(reads):
    """Beside a policy that needs a row for every key nothing is left out, so that no layer loses the policy."""
    model, x = Reader(reads, True), torch.randn(3, TOKENS, 32)
    report = eff.explain(model, x, options={"attention": "sliding-window{window=3}"}, target="cpu")
    chosen = [choice for choice in report.plan.choices if choice.family == "attention"]
    assert len(chosen) == 2, report
