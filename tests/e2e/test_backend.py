"""Use `torch.compile(model, backend="eff")` as a user does: options, contracts, plans, failures, caches, shapes."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.exc import BackendCompilerFailed

import effcompile as eff
from effcompile.core.errors import EffError
from effcompile.core.plan import Plan
from effcompile.core.program import Program
from effcompile.core.rewrite import Editor, Pass, PassResult, copy_graph
from effcompile.report import log

CHEAP = {"emit": "interpreter", "strict": True}


@pytest.fixture(autouse=True)
def _clean() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Layer(nn.Module):
    def __init__(self, width: int = 32, heads: int = 4) -> None:
        super().__init__()
        self.qkv, self.out, self.heads = nn.Linear(width, 3 * width), nn.Linear(width, width), heads

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return x + self.out(y.transpose(1, 2).flatten(2))


class Decoder(nn.Module):
    """Build its mask itself, as transformers does."""

    def __init__(self, layers: int = 2) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(Layer() for _ in range(layers))

    def forward(self, x: Tensor) -> Tensor:
        places = torch.arange(x.shape[1])
        mask = torch.where(places[None] <= places[:, None], 0.0, torch.finfo(x.dtype).min)
        for layer in self.layers:
            x = layer(x, mask)
        return x


class Eager(nn.Module):
    """Hold one attention that is raised and one that cannot be: its probabilities are returned."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        probs = (x @ x.transpose(-1, -2)).softmax(-1)
        return F.scaled_dot_product_attention(x, x, x) + probs @ x, probs


def text(length: int = 6, batch: int = 2) -> Tensor:
    return torch.randn(batch, length, 32, generator=torch.Generator().manual_seed(length))


def heads() -> Tensor:
    return torch.randn(2, 2, 5, 8, generator=torch.Generator().manual_seed(0))


def close(found: Any, expected: Any) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def kernels() -> list[str]:
    return [site["kernel"] for graph in eff.report()["graphs"] for site in graph["sites"]]


@torch.no_grad()
def compiled(model: Callable[..., Any], *args: Any, **options: Any) -> Callable[..., Any]:
    run = torch.compile(model, backend="eff", options={**CHEAP, **options})
    close(run(*args), model(*args))
    return run


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
    assert all("test_backend.py" in site["source"] for site in graph["sites"])
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


# --- contracts and plans ---


@torch.no_grad()
def test_require() -> None:
    compiled(Decoder(), text(), require={"attention": "all"})
    torch._dynamo.reset()
    for wanted in ("all", 2):
        with pytest.raises(BackendCompilerFailed) as caught:
            torch.compile(Eager(), backend="eff", options={"require": {"attention": wanted}})(heads())
        assert "EFF-P502" in str(caught.value)
        assert "EFF-A101" in str(caught.value)
        assert "1 of 2 sites" in str(caught.value)
    compiled(Eager(), heads(), require={"attention": 1})


@torch.no_grad()
def test_a_plan_replays(tmp_path: Path) -> None:
    model = Decoder()
    compiled(model, text())
    plan = log().graphs[0].compiled.plan
    file = tmp_path / "plan.json"
    file.write_text(plan.to_json())
    assert Plan.read(file) == plan
    torch._dynamo.reset()
    compiled(model, text(), plan=str(file))
    again = log().graphs[0].compiled.plan
    assert again.hash == plan.hash


@torch.no_grad()
def test_an_edited_plan_is_followed(tmp_path: Path) -> None:
    model = Decoder()
    compiled(model, text())
    file = tmp_path / "plan.json"
    given = log().graphs[0].compiled.plan.to_json().replace('"sdpa-causal"', '"blocked"', 1)
    file.write_text(given)
    with pytest.raises(BackendCompilerFailed, match="EFF-P503"):
        torch.compile(model, backend="eff", options={**CHEAP, "plan": str(file)})(text())
    import json

    file.write_text(json.dumps({**json.loads(given), "hash": ""}))
    torch._dynamo.reset()
    compiled(model, text(), plan=str(file))
    assert sorted(kernels()) == ["blocked", "sdpa-causal"]


@torch.no_grad()
def test_a_plan_for_another_model_applies_nothing(tmp_path: Path) -> None:
    compiled(Decoder(3), text())
    file = tmp_path / "plan.json"
    file.write_text(log().graphs[0].compiled.plan.to_json())
    torch._dynamo.reset()
    with pytest.raises(BackendCompilerFailed, match="EFF-P501"):
        torch.compile(Decoder(2), backend="eff", options={**CHEAP, "plan": str(file)})(text())


# --- passes, failures ---


@dataclass(frozen=True)
class AddOne(Pass):
    """Add one to the first output: a user's own pass, and a wrong one."""

    name: ClassVar[str] = "add-one"
    phase: ClassVar[str] = "lowered"
    differentiable: ClassVar[bool] = True

    def run(self, program: Program, plan: Plan) -> PassResult:
        (entry,) = program.entries
        edit = Editor(copy_graph(entry.graph))
        output = next(node for node in edit.graph.nodes if node.op == "output")
        (first, *rest) = output.args[0]  # type: ignore[misc]
        with edit.before(output):
            more = edit.call(torch.ops.aten.add.Tensor, first, 1)
        output.args = ((more, *rest),)  # type: ignore[assignment]
        return PassResult(program.with_graph(entry, edit.finish()), True, ("one added",))


@dataclass(frozen=True)
class Fail(Pass):
    """Raise, or leave a broken graph."""

    name: ClassVar[str] = "fail"
    differentiable: ClassVar[bool] = True
    phase: ClassVar[str] = "raised"
    way: str = "raise"

    def run(self, program: Program, plan: Plan) -> PassResult:
        if self.way == "raise":
            raise ZeroDivisionError("on purpose")
        (entry,) = program.entries
        graph = copy_graph(entry.graph)
        output = next(node for node in graph.graph.nodes if node.op == "output")
        if self.way == "outputs":
            output.args = ((),)
        elif self.way == "order":
            with graph.graph.inserting_before(next(iter(graph.graph.nodes))):
                first = graph.graph.call_function(torch.ops.aten.relu.default, (output.args[0][0],))  # type: ignore[index]
            output.args = ((first,),)
        else:
            wide = output.args[0][0]  # type: ignore[index]
            with graph.graph.inserting_before(output):
                flat = graph.graph.call_function(torch.ops.aten.flatten.using_ints, (wide,))
            flat.meta["val"] = wide.meta["val"].flatten()  # type: ignore[union-attr]
            output.args = ((flat,),)
        return PassResult(program.with_graph(entry, graph), True)


@torch.no_grad()
def test_a_users_own_pass_runs_last_in_its_phase() -> None:
    model = Decoder()
    run = torch.compile(model, backend="eff", options={**CHEAP, "passes": (AddOne(),)})
    close(run(text()), model(text()) + 1)
    result = log().graphs[0].compiled
    assert result.ran[-1] == "add-one"
    assert "add-one: one added" in result.plan.notes


@pytest.mark.parametrize("way", ["raise", "outputs", "order", "shape"])
@torch.no_grad()
def test_a_pass_that_fails_costs_nothing_but_speed(way: str) -> None:
    model = Decoder()
    run = torch.compile(model, backend="eff", options={"emit": "interpreter", "passes": (Fail(way),)})
    with pytest.warns(eff.FallbackWarning) as caught:
        found = run(text())
    assert len(caught) == 1
    close(found, model(text()))
    assert eff.report()["counters"] == {"fallbacks": 1}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        close(run(text()), model(text()))


@pytest.mark.parametrize("way", ["raise", "outputs", "order", "shape"])
def test_strict_raises(way: str) -> None:
    with pytest.raises(BackendCompilerFailed, match="on purpose" if way == "raise" else "EFF-X901"):
        torch.compile(Decoder(), backend="eff", options={**CHEAP, "passes": (Fail(way),)})(text())


def test_fuel_stops_after_so_many_rewrites(monkeypatch: pytest.MonkeyPatch) -> None:
    ran = []
    for fuel in (0, 1, 100):
        monkeypatch.setenv("EFF_FUEL", str(fuel))
        torch._dynamo.reset()
        model = Decoder()
        run = torch.compile(model, backend="eff", options={**CHEAP, "passes": (AddOne(),)})
        with torch.no_grad():
            found = run(text())
        names = log().graphs[0].compiled.ran
        close(found - float("add-one" in names), model(text()))
        ran.append(names)
    assert [len(names) for names in ran[:2]] == [0, 1]
    assert ran[2][:1] == ran[1]
    assert ran[2][-1] == "add-one"


def test_dump_writes_every_stage(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("EFF_DUMP", str(tmp_path))
    compiled(Decoder(), text())
    names = [path.name for path in sorted((tmp_path / "graph00").iterdir())]
    assert [name.split("_", 1)[0] for name in names] == [f"{number:02d}" for number in range(len(names))]
    stages = [name.split("_", 1)[1] for name in names]
    assert {"captured.txt", "recognized.txt", "plan.json", "lowered.txt"} <= set(stages)
    assert "eff.attention_v1" in (tmp_path / "graph00" / next(n for n in names if "recognized" in n)).read_text()


def test_disable_keeps_a_pass_out() -> None:
    compiled(Decoder(), text(), disable=("remove-identities", "select-linear"))
    assert not {"remove-identities", "select-linear"} & set(log().graphs[0].compiled.ran)


# --- stale buffers ---


class Triangle(nn.Module):
    """Mask with a buffer, as GPT-2 does."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("bias", torch.ones(16, 16, dtype=torch.bool).tril()[None, None])

    def forward(self, x: Tensor) -> Tensor:
        n = x.shape[2]
        scores = torch.where(self.bias[:, :, :n, :n], x @ x.transpose(-1, -2), torch.finfo(x.dtype).min)
        return scores.softmax(-1) @ x


@torch.no_grad()
@pytest.mark.parametrize("change", ["in place", "load_state_dict", "assigned"])
def test_a_changed_mask_buffer_is_seen(change: str) -> None:
    """The proof relied on the buffer's content: after a change the graph runs as the model wrote it."""
    model = Triangle()
    run = compiled(model, heads())
    assert kernels() == ["sdpa-causal"]
    wrong = model.bias.clone()
    wrong[..., 3, 0] = False
    if change == "in place":
        model.bias[..., 3, 0] = False
    elif change == "load_state_dict":
        model.load_state_dict({"bias": wrong})
    else:
        model.bias = wrong
    close(run(heads()), model(heads()))
    assert change == "assigned" or eff.report()["counters"]["stale"] == 1


@torch.no_grad()
def test_a_changed_mask_buffer_is_seen_at_other_lengths() -> None:
    model = Triangle()
    run = torch.compile(model, backend="eff", options=CHEAP, dynamic=True)
    for length in (5, 6, 7):
        if length == 6:
            model.bias[..., 3, 0] = False
        x = torch.randn(2, 2, length, 8)
        close(run(x), model(x))


# --- shapes ---


@torch.no_grad()
def test_twenty_lengths_compile_at_most_twice() -> None:
    model = Decoder()
    run = torch.compile(model, backend="eff", options=CHEAP)
    for length in range(3, 23):
        close(run(text(length)), model(text(length)))
    assert len(log().graphs) <= 2
    assert kernels() == ["sdpa-causal"] * 2 * len(log().graphs)


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
from tests.e2e.test_backend import AddOne
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
