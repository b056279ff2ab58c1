"""Assert once for each kind of thing: an idiom, a refusal, a pass, a kernel, a policy.

A new recognizer, pass or kernel gets its tests by being named in one of these. Graphs are traced by `make_fx` to the
form that capture gives, so that a check needs neither Dynamo nor TorchInductor; `tests/e2e` goes through both.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch.fx.experimental.proxy_tensor import make_fx

from effcompile import ops
from effcompile.core.expr_eval import evaluate, from_json
from effcompile.core.kernel import AttentionKernel, Supported
from effcompile.core.mask import Mask
from effcompile.core.plan import Choice, Plan
from effcompile.core.policy import RAISED, Estimate, Kernels, Policy
from effcompile.core.program import Entry, Input, InputKind, Program, text
from effcompile.core.rewrite import Pass, copy_graph
from effcompile.core.site import AttentionSite, Missed, Refusal
from effcompile.core.target import Target
from effcompile.core.verify import verify
from effcompile.lowering.lower import lower
from effcompile.passes.attention.rewrite import rewrite_attention
from effcompile.passes.canonicalize import RemoveIdentities
from effcompile.passes.recognize.attention import Recognized, recognize_attention
from effcompile.planning.planner import KERNEL
from effcompile.targets import devices

Function = Callable[..., Any]
CPU = Target.parse("x86-64-avx512", devices())


@dataclass(frozen=True)
class AttentionInputs:
    """Hold the real operands with which one raised attention was called."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    mask: torch.Tensor | None
    sinks: torch.Tensor | None
    loads: list[torch.Tensor]
    sizes: list[int]
    keep: str
    bias: str
    soft: str
    empty_row: str
    scale: float
    softcap: float

    @property
    def extents(self) -> tuple[int, int, int, int]:
        """Return (batch, heads, queries, keys)."""
        return (*self.q.shape[:3], self.k.shape[2])

    def grid(self, expression: str) -> torch.Tensor:
        """Return an expression's value at every (batch, head, query, key)."""
        from effcompile.ops.attention import grid

        return evaluate(from_json(expression), grid(*self.extents, self.q.device), self.loads, self.sizes).expand(
            self.extents
        )


@dataclass(frozen=True)
class Raised:
    """Hold a traced function after recognition."""

    before: Program
    found: Recognized
    symbolic: bool = False

    @property
    def program(self) -> Program:
        """Return the raised program."""
        return self.found.program

    @property
    def sites(self) -> tuple[AttentionSite, ...]:
        """Return what was raised."""
        return self.found.sites

    @property
    def missed(self) -> tuple[Missed, ...]:
        """Return what was seen and left alone."""
        return self.found.missed

    def run(self, *args: Any) -> Any:
        """Run the raised graph, in which each attention means its float32 or float64 reference."""
        return self.program.entries[0].graph(*args)

    def calls(self, *args: Any) -> list[AttentionInputs]:
        """Run the raised graph and return the real operands of every attention in it."""
        recorder = _Recorder(self.program.entries[0].graph)
        recorder.run(*args)
        return recorder.calls


class _Recorder(fx.Interpreter):
    def __init__(self, graph: fx.GraphModule) -> None:
        super().__init__(graph)
        self.calls: list[AttentionInputs] = []

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        if target is torch.ops.eff.attention_v1.default:
            q, k, v, mask, sinks, loads, sizes, *rest = args
            self.calls.append(AttentionInputs(q, k, v, mask, sinks, list(loads), [int(n) for n in sizes], *rest))
        return super().call_function(target, args, kwargs)


def trace(function: Function, args: Sequence[Any], *, symbolic: bool = False, buffers: Sequence[int] = ()) -> Program:
    """Trace a function into a program of one entry; `buffers` are the places of module buffers in `args`."""
    ops.register()
    graph = make_fx(function, tracing_mode="symbolic" if symbolic else "fake", pre_dispatch=True)(*args)
    nodes = [node for node in graph.graph.nodes if node.op == "placeholder"]
    assert len(nodes) == len(args), "tests pass tensors and numbers, not containers"
    inputs = []
    for place, (node, value) in enumerate(zip(nodes, args)):
        kind: InputKind = "buffer" if place in buffers else "user" if isinstance(value, torch.Tensor) else "size"
        kind = "parameter" if isinstance(value, torch.nn.Parameter) else kind
        inputs.append(Input(node.name, kind, node.name, value))
    return Program((Entry("forward", graph, tuple(inputs)),))


def raise_attention(
    function: Function, args: Sequence[Any], *, symbolic: bool = False, buffers: Sequence[int] = ()
) -> Raised:
    """Trace, remove identities and recognize, as `compiler.py` does."""
    before = trace(function, args, symbolic=symbolic, buffers=buffers)
    plain = RemoveIdentities().run(before, Plan.single(str(CPU))).program
    return Raised(before, recognize(plain), symbolic)


def recognize(program: Program) -> Recognized:
    """Recognize and verify."""
    found = recognize_attention(program, lambda node: ("", ""))
    verify(program, found.program, "recognize")
    return found


def fresh(args: Sequence[Any]) -> list[Any]:
    """Return copies of the tensors, with their strides, so that in-place writes stay in one run."""
    return [x.detach().clone(memory_format=torch.preserve_format) if isinstance(x, torch.Tensor) else x for x in args]


def doubled(args: Sequence[Any]) -> list[Any]:
    """Return the arguments with floating-point tensors in float64."""
    return [x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x for x in fresh(args)]


# --- idioms ---


def check_idiom(
    function: Function,
    args: Sequence[Any],
    *,
    mask: str | None = None,
    idiom: str | None = None,
    symbolic: bool = False,
    buffers: Sequence[int] = (),
    more: Sequence[Sequence[Any]] = (),
    sites: int = 1,
) -> Raised:
    """Assert that a spelling is raised, once, the same way twice, and that every kernel for it gives eager's numbers.

    `more` are further arguments (other lengths with `symbolic`, other data always) that the graph must be right for.
    """
    raised = raise_attention(function, fresh(args), symbolic=symbolic, buffers=buffers)
    assert len(raised.sites) == sites, f"{len(raised.sites)} sites, missed {[str(m.refusal) for m in raised.missed]}"
    if mask is not None:
        assert {str(site.mask) for site in raised.sites} == {mask}
    if idiom is not None:
        assert {site.idiom for site in raised.sites} == {idiom}
    again = recognize(raised.program)
    assert not again.sites, "recognizing twice raises twice"
    assert not again.missed or again.missed == raised.missed
    assert text(again.program) == text(raised.program), "recognizing twice is not recognizing once"
    other = raise_attention(function, fresh(args), symbolic=symbolic, buffers=buffers)
    assert text(other.program) == text(raised.program), "the order of recognition is not stable"
    for given in (args, *more):
        check_sites(function, raised, given)
    return raised


def check_sites(function: Function, raised: Raised, args: Sequence[Any]) -> None:
    """Assert that the raised graph, and every kernel that supports all of its sites, gives what eager gives."""
    expected = flat(function(*fresh(args)))
    exact = flat(function(*doubled(args)))
    near(flat(raised.run(*fresh(args))), expected, exact, "reference")
    for kernel in kernels_of(raised.sites):
        near(flat(lowered(raised, kernel)(*fresh(args))), expected, exact, kernel.name)


def check_kept(function: Function, args: Sequence[Any], code: str | None = None, reason: str = "") -> Raised:
    """Assert that a near miss stays as it is, with the right refusal (`code` None: not seen), and equal to eager."""
    raised = raise_attention(function, fresh(args))
    assert not raised.sites, f"raised with mask {[str(site.mask) for site in raised.sites]}"
    assert [m.refusal.code for m in raised.missed] == ([] if code is None else [code]), [
        str(m.refusal) for m in raised.missed
    ]
    assert all(reason in str(m.refusal) for m in raised.missed)
    assert text(raised.program) == text(RemoveIdentities().run(raised.before, Plan.single(str(CPU))).program), (
        "a foreign graph was changed"
    )
    same(flat(raised.run(*fresh(args))), flat(function(*fresh(args))))
    return raised


def check_opaque(function: Function, args: Sequence[Any], reason: str = "", *, buffers: Sequence[int] = ()) -> Raised:
    """Assert that the attention is raised, its mask is not guessed, and every kernel for it honours the tensor."""
    raised = raise_attention(function, fresh(args), buffers=buffers)
    assert raised.sites
    opaque = [site.mask for site in raised.sites if not isinstance(site.mask, Mask)]
    assert opaque, f"proved: {[str(site.mask) for site in raised.sites]}"
    assert all(reason in str(mask) for mask in opaque), [str(mask) for mask in opaque]
    check_sites(function, raised, args)
    return raised


def flat(result: Any) -> list[torch.Tensor]:
    """Return the tensors of a result."""
    return [result] if isinstance(result, torch.Tensor) else [x for x in result if isinstance(x, torch.Tensor)]


def same(found: Sequence[torch.Tensor], expected: Sequence[torch.Tensor]) -> None:
    """Assert bit equality."""
    assert len(found) == len(expected)
    for x, y in zip(found, expected):
        torch.testing.assert_close(x, y, rtol=0, atol=0, equal_nan=True)


def near(
    found: Sequence[torch.Tensor], eager: Sequence[torch.Tensor], exact: Sequence[torch.Tensor], name: str
) -> None:
    """Assert that the error against float64 is at most twice eager's own, plus one rounding of the largest value."""
    assert len(found) == len(eager) == len(exact)
    for x, y, z in zip(found, eager, exact):
        assert x.shape == y.shape, f"{name}: {tuple(x.shape)} for {tuple(y.shape)}"
        assert x.dtype == y.dtype, f"{name}: {x.dtype} for {y.dtype}"
        if not x.is_floating_point():
            assert torch.equal(x, y), name
            continue
        assert torch.equal(x.isnan(), y.isnan()), f"{name}: NaN in other places"
        limit = 2 * _error(y, z) + 8 * torch.finfo(y.dtype).eps * (1 + _largest(z))
        assert _error(x, z) <= limit, f"{name}: error {_error(x, z):.3g}, eager's own {_error(y, z):.3g}"


def _error(a: torch.Tensor, exact: torch.Tensor) -> float:
    return float((a.double() - exact.double()).nan_to_num().abs().max()) if a.numel() else 0.0


def _largest(a: torch.Tensor) -> float:
    return float(a.double().nan_to_num().abs().max()) if a.numel() else 0.0


# --- kernels ---


def all_kernels() -> tuple[AttentionKernel, ...]:
    """Return one instance of every attention kernel."""
    from effcompile.compiler import all_kernels as found

    return found()


def kernels_of(sites: Sequence[AttentionSite], target: Target = CPU) -> list[AttentionKernel]:
    """Return the kernels that support every one of the sites."""
    return [k for k in all_kernels() if all(isinstance(k.supports(site, target), Supported) for site in sites)]


def lowered(raised: Raised, kernel: AttentionKernel) -> fx.GraphModule:
    """Lower every site with one kernel and return the graph, which runs op by op."""
    plan = Plan.single(str(CPU), tuple(Choice(site.id, KERNEL, kernel.name) for site in raised.sites))
    program = raised.program
    result = lower(program, plan, raised.sites, Kernels(all_kernels())).program
    verify(program, result, kernel.name)
    return result.entries[0].graph


def check_kernel(name: str, function: Function, args: Sequence[Any], *, symbolic: bool = False) -> None:
    """Assert that one kernel supports the attention in a function and runs it as exactly as eager does."""
    raised = raise_attention(function, fresh(args), symbolic=symbolic)
    assert raised.sites, [str(m.refusal) for m in raised.missed]
    kernel = next(k for k in all_kernels() if k.name == name)
    for site in raised.sites:
        answer = kernel.supports(site, CPU)
        assert isinstance(answer, Supported), f"{name} declines {site.mask}: {answer}"
    near(
        flat(lowered(raised, kernel)(*fresh(args))), flat(function(*fresh(args))), flat(function(*doubled(args))), name
    )


# --- passes ---


def check_pass(item: Pass, function: Function, args: Sequence[Any], *, changes: bool = True) -> Program:
    """Assert that a pass does its work once, the same way twice, leaves its input alone, and changes no number."""
    program, plan = trace(function, fresh(args)), Plan.single(str(CPU))
    untouched = text(program)
    first = item.run(program, plan)
    assert text(program) == untouched, "the pass changed the program that it was given"
    assert first.changed == changes, first.notes
    verify(program, first.program, item.name)
    assert text(item.run(program, plan).program) == text(first.program), "the order of the pass is not stable"
    second = item.run(first.program, plan)
    assert not second.changed, f"running twice is not running once: {second.notes}"
    assert text(second.program) == text(first.program)
    if not changes:
        assert text(first.program) == untouched, "a foreign graph was changed"
    same(flat(copy_graph(first.program.entries[0].graph)(*fresh(args))), flat(function(*fresh(args))))
    return first.program


# --- policies ---


def rewritten(raised: Raised, policy: Policy) -> tuple[Program, tuple[AttentionSite, ...]]:
    """Apply a policy to every site, all of which it must accept, and return the program and the sites as kernels see them."""
    catalog = all_catalog()
    for site in raised.sites:
        answer = policy.propose(site, CPU, catalog)
        assert isinstance(answer, Estimate), f"{policy.spelled} refuses {site.mask}: {answer}"
        assert 0 < answer.density <= 1
        assert answer.seconds > 0
    before = text(raised.program)
    program, sites = rewrite_attention(raised.program, raised.sites, {site.id: (policy,) for site in raised.sites})
    verify(raised.program, program, policy.name)
    assert text(raised.program) == before, "the policy changed the program that it was given"
    return program, sites


def policy_graphs(raised: Raised, policy: Policy) -> dict[str, fx.GraphModule]:
    """Return one graph for every kernel that can run what the policy leaves, and `raised`, in which ops mean themselves."""
    program, sites = rewritten(raised, policy)
    graphs = {"raised": program.entries[0].graph}
    catalog = all_catalog()
    if policy.op == RAISED:
        names = [kernel.name for kernel in kernels_of(sites)]
    else:
        names = [k.name for k in catalog.of(policy.op) if isinstance(k.supports(sites[0], CPU, 0.5), Supported)]
    assert names, f"no kernel runs what {policy.spelled} leaves"
    for name in names:
        plan = Plan.single(str(CPU), tuple(Choice(site.id, KERNEL, name) for site in sites))
        result = lower(program, plan, sites, catalog).program
        verify(program, result, name)
        graphs[name] = result.entries[0].graph
    return graphs


def check_policy(
    policy: Policy, function: Function, args: Sequence[Any], oracle: Function, *, symbolic: bool = False
) -> None:
    """Assert that what a policy makes of a function gives the oracle's numbers, whichever kernel runs it.

    `oracle` takes the same arguments; in float64 it is the truth, in the arguments' dtype it is the error to compare with.
    """
    raised = raise_attention(function, fresh(args), symbolic=symbolic)
    expected, exact = flat(oracle(*fresh(args))), flat(oracle(*doubled(args)))
    for name, graph in policy_graphs(raised, policy).items():
        near(flat(graph(*fresh(args))), expected, exact, f"{policy.spelled} on {name}")


def check_refusal(policy: Policy, function: Function, args: Sequence[Any], code: str, target: Target = CPU) -> Refusal:
    """Assert that a policy refuses every site of a function with a code, and return the first refusal."""
    raised = raise_attention(function, fresh(args))
    answers = [policy.propose(site, target, all_catalog()) for site in raised.sites]
    assert answers
    assert {getattr(answer, "code", None) for answer in answers} == {code}, [str(answer) for answer in answers]
    assert isinstance(answers[0], Refusal)
    return answers[0]


def all_catalog() -> Kernels:
    """Return every kernel."""
    from effcompile.compiler import catalog

    return catalog()
