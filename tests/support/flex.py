"""Build calls of `flex_attention`, capture them through Dynamo, and compare every kernel for them with the call itself."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.attention import flex_attention as source
from torch.nn.attention.flex_attention import BlockMask

from effcompile import ops
from effcompile.capture.dynamo import capture_dynamo
from effcompile.core.plan import Plan
from effcompile.core.program import Program, text
from effcompile.passes.canonicalize import RemoveIdentities
from effcompile.passes.recognize.element_rules import rules
from effcompile.passes.recognize.elements import Reader
from tests.support.check import CPU, Raised, doubled, flat, fresh, kernels_of, lowered, near, recognize, same

flex_attention, create_block_mask = source.flex_attention, source.create_block_mask
Mod = Callable[..., Any]
B, H, S, D = 2, 4, 150, 16
INF = float("inf")


@contextmanager
def debugging() -> Iterator[None]:
    """Let an eager call of the op run without compiling it, and without the warning that it does not."""
    name = "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG"
    before = getattr(source, name)
    setattr(source, name, True)
    try:
        yield
    finally:
        setattr(source, name, before)


def capture(
    function: Callable[..., Any], args: Sequence[Any], dynamic: bool | None = None
) -> tuple[Program, list[Any]]:
    """Return the program of a function's one graph, and what that graph is called with."""
    ops.register()
    found: list[tuple[Program, list[Any]]] = []

    def backend(graph: fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        found.append((capture_dynamo(graph, inputs), []))

        def run(*given: Any) -> Any:
            found[-1][1].extend(given)
            return graph.forward(*given)

        return run

    torch._dynamo.reset()
    with torch.no_grad(), debugging():
        torch.compile(function, backend=backend, dynamic=dynamic, fullgraph=True)(*args)
    assert len(found) == 1, f"{len(found)} graphs"
    return found[0]


def raise_call(
    function: Callable[..., Any], args: Sequence[Any], dynamic: bool | None = None
) -> tuple[Raised, list[Any]]:
    """Capture, remove identities and recognize."""
    before, inputs = capture(function, args, dynamic)
    plain = RemoveIdentities().run(before, Plan(str(CPU))).program
    return Raised(before, recognize(plain), bool(dynamic)), inputs


def check_raised(
    function: Callable[..., Any],
    args: Sequence[Any],
    mask: str | None = None,
    *,
    dynamic: bool | None = None,
    **fields: Any,
) -> Raised:
    """Assert that a call is raised, that nothing of it is left, and that every kernel gives what the call gives.

    `fields` are values of the site. The call itself runs in float64 as the oracle.
    """
    raised, inputs = raise_call(function, args, dynamic)
    assert len(raised.sites) == 1, [str(m.refusal) for m in raised.missed]
    (site,) = raised.sites
    assert mask is None or str(site.mask) == mask, str(site.mask)
    for name, value in fields.items():
        assert getattr(site, name) == value, f"{name}: {getattr(site, name)}"
    graph = raised.program.entries[0].graph.graph
    assert not [n for n in graph.nodes if isinstance(n.target, torch._ops.HigherOrderOperator)], (
        "the call is still there"
    )
    again = recognize(raised.program)
    assert text(again.program) == text(raised.program), "recognizing twice is not recognizing once"
    call = raised.before.entries[0].graph
    with debugging():
        eager, exact = flat(call(*fresh(inputs))), flat(call(*doubled(inputs)))
    near(flat(raised.run(*fresh(inputs))), eager, exact, "reference")
    names = kernels_of(raised.sites)
    assert names
    for kernel in names:
        near(flat(lowered(raised, kernel)(*fresh(inputs))), eager, exact, kernel.name)
    return raised


def check_kept_call(function: Callable[..., Any], args: Sequence[Any], code: str, reason: str = "") -> Raised:
    """Assert that a call stays as it is, with the right refusal, and that its graph is not touched."""
    raised, inputs = raise_call(function, args)
    assert not raised.sites, f"raised with mask {[str(site.mask) for site in raised.sites]}"
    assert [m.refusal.code for m in raised.missed] == [code], [str(m.refusal) for m in raised.missed]
    assert reason in str(raised.missed[0].refusal), str(raised.missed[0].refusal)
    plain = RemoveIdentities().run(raised.before, Plan(str(CPU))).program
    assert text(raised.program) == text(plain), "a foreign graph was changed"
    with debugging():
        same(flat(raised.run(*fresh(inputs))), flat(raised.before.entries[0].graph(*fresh(inputs))))
    return raised


# --- calls ---


def qkv(rows: int = S, columns: int = S, heads: int = H, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    draw = torch.Generator().manual_seed(rows + columns)
    shapes = ((B, rows, H, D), (B, columns, heads, D), (B, columns, heads, D))
    return tuple(torch.randn(shape, generator=draw).to(dtype).transpose(1, 2) for shape in shapes)


def documents(length: int = S) -> Tensor:
    return torch.randint(0, 4, (B, length), generator=torch.Generator().manual_seed(1)).sort(-1).values


def masked(mod: Mod, *, batch: Any = None, heads: Any = None, score: Mod | None = None, **fields: Any) -> Mod:
    """Return a call whose BlockMask is made in the same graph; `mod` and `score` get further arguments first."""

    def call(q: Tensor, k: Tensor, v: Tensor, *more: Any) -> Tensor:
        def keep(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            return mod(*more, b, h, i, j)

        def change(s: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            return s if score is None else score(*more, s, b, h, i, j)

        blocks = create_block_mask(keep, batch, heads, q.shape[2], k.shape[2], device="cpu", **fields)
        return flex_attention(q, k, v, change, blocks, enable_gqa=k.shape[1] != q.shape[1])

    return call


def scored(score: Mod, **fields: Any) -> Mod:
    """Return a call without a BlockMask."""

    def call(q: Tensor, k: Tensor, v: Tensor, *more: Any) -> Tensor:
        return flex_attention(q, k, v, lambda *at: score(*more, *at), enable_gqa=k.shape[1] != q.shape[1], **fields)

    return call


def causal(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
    return i >= j


MASKS = {
    "causal": causal,
    "window(19) & causal": lambda b, h, i, j: (i - j < 20) & (j <= i),
    "window(+-7)": lambda b, h, i, j: (i - j).abs() <= 7,
    "chunk(32) & causal": lambda b, h, i, j: (i // 32 == j // 32) & (i >= j),
    "prefix": lambda b, h, i, j: (j <= i) | (j < 20),
    "full": lambda b, h, i, j: b.new_ones((), dtype=torch.bool),
}


def lists(blocks: BlockMask) -> dict[str, Any]:
    names = ("kv_num_blocks", "kv_indices", "full_kv_num_blocks", "full_kv_indices", "BLOCK_SIZE", "seq_lengths")
    return {name: getattr(blocks, name) for name in names}


def mods() -> st.SearchStrategy[Mod]:
    """Return random mask functions over scalars and a table of document ids."""
    numbers = st.integers(-4, 9)
    leaf = st.one_of(
        st.builds(lambda n: lambda t, b, h, i, j: i + n >= j, numbers),
        st.builds(lambda n: lambda t, b, h, i, j: i - j < n, numbers),
        st.builds(lambda n: lambda t, b, h, i, j: (i - j).abs() <= n, numbers),
        st.builds(lambda n: lambda t, b, h, i, j: i // (n + 5) == j // (n + 5), numbers),
        st.builds(lambda n: lambda t, b, h, i, j: (i + 2 * j) % (n + 6) > 1, numbers),
        st.builds(lambda n: lambda t, b, h, i, j: (j < n) | (h == n), numbers),
        st.builds(lambda n: lambda t, b, h, i, j: t[b, i] == t[b, j] + n // 4, numbers),
        st.builds(
            lambda n: lambda t, b, h, i, j: j < t[b, j - abs(n)] * 4, numbers
        ),  # a negative place counts from the end
        st.just(lambda t, b, h, i, j: b.new_ones((), dtype=torch.bool)),
    )

    def joined(inner: st.SearchStrategy[Mod]) -> st.SearchStrategy[Mod]:
        return st.one_of(
            st.builds(lambda x, y: lambda *a: x(*a) & y(*a), inner, inner),
            st.builds(lambda x, y: lambda *a: x(*a) | y(*a), inner, inner),
            st.builds(lambda x: lambda *a: ~x(*a), inner),
            st.builds(lambda x, y, z: lambda *a: torch.where(x(*a), y(*a), z(*a)), inner, inner, inner),
        )

    return st.recursive(leaf, joined, max_leaves=4)


def traced(mod: Mod, table: Tensor) -> tuple[fx.GraphModule, Reader, list[fx.Node]]:
    """Return a mask function as FlexAttention traces it, and a reader of a graph whose one input is the table."""
    from torch._dynamo._trace_wrapped_higher_order_op import TransformGetItemToIndex

    with TransformGetItemToIndex():
        scalars = [torch.zeros((), dtype=torch.int32) for _ in range(4)]
        graph = make_fx(lambda b, h, i, j, t: mod(t, b, h, i, j), tracing_mode="fake")(*scalars, table)
    outer = make_fx(lambda t: t + 1, tracing_mode="fake")(table)
    return graph, Reader(outer.graph, rules()), [next(iter(outer.graph.nodes))]
