"""Check every token policy against what holds whatever it ranks by: ratio 0, nested sets, order in a batch, work."""

import importlib
import itertools

import pytest
import torch
from torch import fx, nn
from torch.utils.flop_counter import FlopCounterMode

from effcompile.compiler import all_tokens
from effcompile.core.policy import read_policy
from effcompile.core.rewrite import fake_mode_of
from effcompile.core.tokens import FAMILY
from tests.passes.tokens.test_drop import DEPTH, LENGTH, compiled, tokens_of, tower

NOTHING = {
    "tome": "tome{ratio=0}",
    "tomesd": "tomesd{ratio=0,grid=[4,6]}",
    "spatten": "spatten{keep=1.0}",
    "evit": "evit{every=9}",
    "fastv": "fastv{ratio=0}",
    "pyramid-drop": "pyramid-drop{keep=[1.0]}",
}
"""Each policy where it is asked for nothing."""
RISING = {
    "tome": ("tome{ratio=0.2}", "tome{ratio=0.4}", "tome{ratio=0.7}"),
    "tomesd": ("tomesd{ratio=0.2,grid=[4,6]}", "tomesd{ratio=0.5,grid=[4,6]}", "tomesd{ratio=0.75,grid=[4,6]}"),
    "spatten": ("spatten{keep=0.9}", "spatten{keep=0.6}", "spatten{keep=0.3}"),
    "evit": ("evit{keep=0.9,every=1}", "evit{keep=0.7,every=1}", "evit{keep=0.4,every=1}"),
    "fastv": ("fastv{ratio=0.2}", "fastv{ratio=0.5}", "fastv{ratio=0.8}"),
    "pyramid-drop": ("pyramid-drop{keep=[0.9]}", "pyramid-drop{keep=[0.5]}", "pyramid-drop{keep=[0.5,0.2]}"),
}
"""Each policy where it is asked for more and more."""
DROPPING = ("spatten", "fastv", "pyramid-drop")


def test_the_tables_name_every_policy():
    names = {policy.name for policy in all_tokens()}
    assert set(NOTHING) == set(RISING) == names
    assert {policy.name for policy in all_tokens() if not policy.merges} == {*DROPPING, "evit"}


class Layers(nn.Module):
    """Return the state of every token behind the embedding and behind each layer."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, ids):
        states = [self.inner.start(ids)]
        for layer in self.inner.layers:
            states.append(layer(states[-1]))
        return torch.stack(states)


@torch.no_grad()
@pytest.mark.slow
@pytest.mark.parametrize("name", NOTHING)
def test_nothing_asked_for_is_bit_identical(name):
    model, ids = tower(), tokens_of()
    torch._dynamo.reset()
    plain = torch.compile(model, backend="eff", options={"strict": True, "emit": "interpreter"})(ids)
    assert torch.equal(compiled(model, NOTHING[name])(ids), plain)


@torch.no_grad()
@pytest.mark.slow
@pytest.mark.parametrize("text", [texts[1] for texts in RISING.values()])
def test_a_batch_is_its_sequences_in_any_order(text):
    model, ids, order = tower(), tokens_of(4), torch.tensor([2, 0, 3, 1])
    fast = compiled(model, text)
    torch.testing.assert_close(fast(ids)[order], fast(ids[order]), rtol=1e-12, atol=1e-12)


@torch.no_grad()
@pytest.mark.slow
@pytest.mark.parametrize("name", RISING)
def test_work_falls_with_the_ratio(name, monkeypatch):
    """Counted over the products of the graph that runs, and not derived from the schedule."""
    module = importlib.import_module("effcompile.backend")  # the package gives a function of that name
    made, counts, real = [], [], module.compile_program

    def noted(*args):
        compiled = real(*args)
        made.append(compiled.program.entries[0].graph)
        return compiled

    monkeypatch.setattr(module, "compile_program", noted)
    model, ids = tower(), tokens_of()
    for text in (NOTHING[name], *RISING[name]):
        compiled(model, text, disable="outline-layers")(ids)
    for graph in made:
        values = [node.meta["val"] for node in graph.graph.nodes if node.op == "placeholder"]
        with fake_mode_of(graph.graph), FlopCounterMode(display=False) as counter:
            fx.Interpreter(graph).run(*values)
        counts.append(counter.get_total_flops())
    assert len(counts) == 4
    assert all(0 < after < before for before, after in itertools.pairwise(counts)), counts


def alive(states):
    """Return which tokens each layer changed, `[L, B, N]` bool: one that was dropped before keeps its value bit by bit."""
    return (states[1:] != states[:-1]).any(-1)


@torch.no_grad()
@pytest.mark.parametrize("name", DROPPING)
def test_sets_are_nested_and_of_the_planned_size(name):
    model, ids = Layers(tower()), tokens_of()
    policy = read_policy(FAMILY, RISING[name][2], all_tokens())
    sets = alive(compiled(model, RISING[name][2])(ids))
    lefts = policy.counts(LENGTH, DEPTH)
    assert [sorted(set(row.sum(-1).tolist())) for row in sets] == [[n] for n in (LENGTH, *lefts[:-1])]
    assert all((before | ~after).all() for before, after in itertools.pairwise(sets)), "a dropped token came back"


@torch.no_grad()
@pytest.mark.parametrize("name", DROPPING)
def test_permuting_dropped_tokens_changes_nothing(name):
    """Without positions a sequence is a set: tokens that go may stand anywhere among the places of those that go."""
    model, ids = Layers(tower()), tokens_of()
    model.inner.place.zero_()
    ids[:, 0], ids[:, -1] = 1, 2  # which are pinned and ranked by
    fast = compiled(model, RISING[name][2])
    states = fast(ids)
    left = alive(states)[-1]
    moved = ids.clone()
    for row, kept in zip(moved, left, strict=True):
        gone = (~kept).nonzero()[:, 0]
        row[gone] = row[gone.roll(1)]
    assert not torch.equal(moved, ids)
    found = fast(moved)
    torch.testing.assert_close(found[:, left], states[:, left], rtol=1e-9, atol=1e-9)
    for number, (row, kept) in enumerate(zip(ids, left, strict=True)):
        gone = (~kept).nonzero()[:, 0]
        assert len(row[gone]) > 3
        torch.testing.assert_close(found[:, number, gone], states[:, number, gone.roll(1)], rtol=1e-9, atol=1e-9)
