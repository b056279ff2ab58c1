"""Use `torch.compile(model, backend="eff")` as a user does: options, contracts, plans, failures, caches, shapes."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.exc import BackendCompilerFailed

import effcompile as eff
from effcompile.core.errors import EffError
from effcompile.report import log
from tests.support.small import CHEAP, AddOne, Decoder, Fail, close, compiled, heads, kernels, text


@pytest.fixture(autouse=True)
def _clean() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


# --- options ---


@pytest.mark.parametrize(
    ("options", "code", "near"),
    [
        ({"stritc": True}, "EFF-U001", "strict"),
        ({"emit": "interpeter"}, "EFF-U001", "interpreter"),
        ({"require": {"atention": "all"}}, "EFF-U001", "attention"),
        ({"require": {"attention": "some"}}, "EFF-U001", "all"),
        ({"require": "all"}, "EFF-U001", "mapping"),
        ({"disable": "remove-identites"}, "EFF-U011", "remove-identities"),
        ({"kv": "int8-per-token"}, "EFF-U013", "eff.prepare"),
        ({"schedule": "bottleneck"}, "EFF-U013", "eff.diffusers"),
        ({"target": "sm_9"}, "EFF-T101", "sm_90"),
        ({"plan": "no-such-plan.json"}, "EFF-P503", "eff plan"),
    ],
)
def test_a_wrong_option_is_an_error_with_the_near_matches(options: dict[str, Any], code: str, near: str) -> None:
    with pytest.raises(BackendCompilerFailed) as caught:
        torch.compile(Decoder(), backend="eff", options={"emit": "interpreter", **options})(text())
    assert code in str(caught.value)
    assert near in str(caught.value)


def test_options_given_twice_are_an_error() -> None:
    bound = eff.backend(emit="interpreter")
    with pytest.raises(BackendCompilerFailed, match="EFF-U012"):
        torch.compile(Decoder(), backend=bound, options={"strict": True})(text())


def test_options_are_checked_when_they_are_bound() -> None:
    with pytest.raises(EffError, match="strict"):
        eff.backend(stritc=True)


@torch.no_grad()
def test_a_bound_backend_equals_one_with_the_same_decisions() -> None:
    one, other = eff.backend(emit="interpreter"), eff.backend(emit="interpreter")
    assert one == other
    assert hash(one) == hash(other)
    assert one != eff.backend(emit="interpreter", disable=("remove-identities",))
    model = Decoder()
    close(torch.compile(model, backend=one)(text()), model(text()))
    torch.compile(model, backend=other)(text())
    assert len(log().graphs) == 1


@pytest.mark.parametrize("mode", ["default", "reduce-overhead", "max-autotune-no-cudagraphs"])
@torch.no_grad()
def test_modes_are_torchs_own(mode: str) -> None:
    """The mode reaches the options; TorchInductor's settings for it are tested where TorchInductor runs."""
    model = Decoder()
    close(torch.compile(model, backend=eff.backend(mode=mode, emit="interpreter"))(text()), model(text()))
    assert eff.backend(mode=mode).options.mode == (None if mode == "default" else mode)


@torch.no_grad()
def test_changed_options_compile_again_and_both_stay_right() -> None:
    """pytorch#131150: a second set of options must not get the first one's code."""
    model = Decoder()
    plain = torch.compile(model, backend="eff", options={**CHEAP})
    marked = torch.compile(model, backend="eff", options={**CHEAP, "passes": (AddOne(),)})
    for _ in range(2):
        close(plain(text()), model(text()))
        close(marked(text()), model(text()) + 1)
    assert len(log().graphs) == 2


# --- what was done ---


def test_the_mask_is_gone_and_every_layer_is_reported() -> None:
    compiled(Decoder(), text())
    (graph,) = eff.report()["graphs"]
    assert [(site["id"], site["mask"], site["kernel"]) for site in graph["sites"]] == [
        (f"layers.{number}", "causal", "sdpa-causal") for number in range(2)
    ]
    assert all("tests/" in site["source"] for site in graph["sites"])
    assert {"capture", "recognize", "plan", "rewrite", "lower", "emit"} <= set(graph["seconds"])
    lowered = log().graphs[0].compiled.program.entries[0].graph.graph
    assert not [node for node in lowered.nodes if "where" in str(node.target) or "arange" in str(node.target)]


@torch.no_grad()
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_inference_modes(mode: Callable[[], Any]) -> None:
    model = Decoder()
    with mode():
        close(torch.compile(model, backend="eff", options=CHEAP)(text()), model(text()))
    assert kernels() == ["sdpa-causal"] * 2


@torch.no_grad()
def test_a_graph_break_gives_two_graphs() -> None:
    def model(x: Tensor) -> Tensor:
        y = F.scaled_dot_product_attention(x, x, x)
        torch._dynamo.graph_break()
        return F.scaled_dot_product_attention(y, x, x, is_causal=True)

    compiled(model, heads())
    assert kernels() == ["sdpa", "sdpa-causal"]


@torch.no_grad()
def test_what_is_no_attention_passes_through() -> None:
    def model(x: Tensor, n: int) -> list[Tensor]:
        x = x.clone()
        x[:, 0] = n
        return [x.relu() * n, torch.einsum("bhqd,bhkd->bhqk", x, x), x.sort(-1).values]

    compiled(model, heads(), 3)
    assert kernels() == []


@torch.no_grad()
def test_sites_of_a_parent_and_of_a_numbered_child_are_told_apart() -> None:
    class Child(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return F.scaled_dot_product_attention(x, x, x, is_causal=True)

    class Parent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.add_module("1", Child())

        def forward(self, x: Tensor) -> Tensor:
            few = torch.arange(x.shape[2])[None].expand(x.shape[2], -1) < 2
            first = F.scaled_dot_product_attention(x, x, x)
            return first + F.scaled_dot_product_attention(x, x, x, attn_mask=few) + self.get_submodule("1")(x)

    compiled(nn.Sequential(Parent()), heads())
    ids = [site["id"] for graph in eff.report()["graphs"] for site in graph["sites"]]
    assert len(set(ids)) == 3


# --- shapes ---


@torch.no_grad()
def test_twenty_lengths_compile_at_most_twice() -> None:
    model = Decoder()
    run = torch.compile(model, backend="eff", options=CHEAP)
    for length in range(3, 23):
        close(run(text(length)), model(text(length)))
    assert len(log().graphs) <= 2
    assert {name.partition(" ")[0] for name in kernels()} == {
        "sdpa-causal"
    }  # beyond the lengths here another may follow


# --- through TorchInductor ---


@torch.no_grad()
def test_through_inductor() -> None:
    model = Decoder()
    run = torch.compile(model, backend="eff", options={"strict": True}, dynamic=True)
    for length in (6, 9, 20):
        close(run(text(length)), model(text(length)))
    assert len(log().graphs) == 1


@torch.no_grad()
def test_fallback_through_inductor() -> None:
    model = Decoder(1)
    run = torch.compile(model, backend="eff", options={"passes": (Fail("raise"),)})
    with pytest.warns(eff.FallbackWarning, match="on purpose"):
        close(run(text()), model(text()))


POISON = """
import sys, torch
import torch.nn.functional as F

def model(x):
    places = torch.arange(x.shape[2])
    mask = torch.where(places[None] <= places[:, None], 0.0, torch.finfo(x.dtype).min)
    return F.scaled_dot_product_attention(x * 3.0, x, x, attn_mask=mask)

import effcompile as eff
from tests.support.small import AddOne
x = torch.randn(2, 2, 6, 8, generator=torch.Generator().manual_seed(0))
for name in sys.argv[1:]:
    torch._dynamo.reset()
    options = {"eff": {"strict": True}, "marked": {"strict": True, "passes": (AddOne(),)}, "inductor": None}[name]
    run = torch.compile(model, backend="inductor" if name == "inductor" else "eff", options=options)
    with torch.no_grad():
        error = float((run(x) - model(x) - float(name == "marked")).abs().max())
    assert error < 1e-5, (name, error)
    print(name, "hits", torch._dynamo.utils.counters["aot_autograd"]["autograd_cache_hit"])
"""


@pytest.mark.parametrize(
    "order", [("eff", "marked", "inductor"), pytest.param(("inductor", "marked", "eff"), marks=pytest.mark.slow)]
)
def test_no_order_poisons_the_caches(order: tuple[str, ...], tmp_path: Path) -> None:
    """One cache folder, three programs of one function: each gets its own code, also in a second process."""
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path), "OMP_NUM_THREADS": "1"}
    root = Path(__file__).parents[2]
    for names in (order, tuple(reversed(order))):
        done = subprocess.run(
            [sys.executable, "-c", POISON, *names],
            cwd=root,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr[-2000:]
    assert "eff hits 1" in done.stdout or "eff hits 2" in done.stdout or "eff hits 3" in done.stdout, done.stdout
