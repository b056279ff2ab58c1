"""Compare `eff::attention_tiled_v1`, compiled and composed, with attention in float64 under the same predicate."""

from __future__ import annotations

import functools
import time

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from effcompile import ops
from effcompile.core.expr import TRUE, Expr, apply, const
from effcompile.core.expr_eval import to_json
from effcompile.core.mask import CAUSAL, K, Q
from effcompile.ops import native, tiled
from effcompile.ops.attention import reference
from tests.ops.test_attention_blocks import PREDICATES, qkv
from tests.support.check import near

Shape = tuple[int, tuple[int, int], tuple[int, int], tuple[int, int]]


def operands(rows: int, keys: int, batch: int, seed: int) -> list[Tensor]:
    """Return what the predicates load: padding `[B, K]` with an empty row of the batch, documents, positions."""
    draw = torch.Generator().manual_seed(seed)
    longest = max(rows, keys)
    padding = torch.rand(batch, longest, generator=draw) > 0.4
    padding[0, : longest // 2] = False
    documents = (torch.arange(longest) * 3 // longest).expand(batch, -1).contiguous()
    return [padding, documents, torch.randint(0, keys, (rows,), generator=draw)]


def check(
    keep: Expr, shape: Shape, dtype: torch.dtype, rule: str, sinks: Tensor | None, seed: int, compiled: bool
) -> None:
    q, k, v = qkv(*shape, dtype, seed)
    loads = operands(q.shape[2], k.shape[2], q.shape[0], seed)
    text, scale = to_json(keep), q.shape[3] ** -0.5

    def meaning(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None) -> Tensor:
        found: Tensor = reference(q, k, v, None, sinks, loads, [], text, "", "", rule, scale, 0.0)
        return found

    arguments = (q, k, v, sinks, loads, [], text, rule, scale)
    found = tiled.attention_tiled(*arguments) if compiled else tiled._composed(*arguments)
    exact = meaning(q.double(), k.double(), v.double(), None if sinks is None else sinks.double())
    assert not compiled or found.stride() == tiled._fake(q, k, v).stride()
    near([found], [meaning(q, k, v, sinks)], [exact], "tiled")


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(sorted(PREDICATES)),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    st.sampled_from([(1, 1), (2, 1), (4, 2), (6, 2)]),
    st.tuples(st.integers(1, 300), st.integers(1, 300)),
    st.sampled_from([(8, 8), (64, 64), (72, 40), (20, 33)]),
    st.sampled_from(["zero", "uniform"]),
    st.booleans(),
    st.booleans(),
    st.integers(0, 99),
)
def test_it_is_attention_under_the_predicate(
    name: str,
    dtype: torch.dtype,
    heads: tuple[int, int],
    lengths: tuple[int, int],
    widths: tuple[int, int],
    rule: str,
    sunk: bool,
    compiled: bool,
    seed: int,
) -> None:
    if dtype == torch.float16 and not compiled:
        dtype = torch.float32
    if sunk and not compiled and widths[0] != widths[1]:
        widths = (widths[0], widths[0])
    sinks = torch.randn(heads[0], generator=torch.Generator().manual_seed(seed)) if sunk else None
    if sinks is not None:
        sinks = sinks.to(dtype)
    check(PREDICATES[name], (2, heads, lengths, widths), dtype, rule, sinks, seed, compiled)


@pytest.mark.parametrize("length", [1, 63, 64, 65, 127, 128, 129, 300])
def test_lengths_around_the_blocks(length: int) -> None:
    for keep in (TRUE, CAUSAL.keep):
        check(keep, (1, (2, 1), (length, length), (32, 32)), torch.float32, "zero", None, length, True)


def test_no_keys_and_no_rows() -> None:
    q, k, v = qkv(1, (2, 1), (3, 0), (8, 8), torch.float32)
    assert torch.equal(
        tiled.attention_tiled(q, k, v, None, [], [], to_json(CAUSAL.keep), "zero", 1.0), torch.zeros_like(q)
    )
    q, k, v = qkv(1, (2, 1), (0, 4), (8, 8), torch.float32)
    assert tiled.attention_tiled(q, k, v, None, [], [], to_json(TRUE), "zero", 1.0).shape == (1, 2, 0, 8)


def test_it_shares_matrix_registers_with_products_of_torch() -> None:
    """Whoever sets the registers of AMX must leave them as the next one expects, on every thread."""
    q, k, v = qkv(2, (4, 2), (160, 160), (64, 64), torch.bfloat16)
    weight = torch.randn(64, 64, generator=torch.Generator().manual_seed(5)).bfloat16()
    ours = lambda: tiled.attention_tiled(q, k, v, None, [], [], to_json(CAUSAL.keep), "zero", 0.125)  # noqa: E731
    others = [
        lambda: F.linear(q, weight),
        lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True),
        lambda: torch.bmm(q.flatten(0, 1), q.flatten(0, 1).mT),
    ]
    first, expected = ours(), [other() for other in others]
    for _ in range(3):
        for other, value in zip(others, expected, strict=True):
            assert torch.equal(other(), value)
            assert torch.equal(ours(), first)


def test_a_later_key_does_not_change_an_earlier_row() -> None:
    q, k, v = qkv(1, (2, 1), (200, 200), (32, 32), torch.bfloat16)
    run = lambda k, v: tiled.attention_tiled(q, k, v, None, [], [], to_json(CAUSAL.keep), "zero", 0.2)  # noqa: E731
    before = run(k, v)
    k, v = k.clone(), v.clone()
    k[:, :, 150:], v[:, :, 150:] = 9.0, -7.0
    assert torch.equal(run(k, v)[:, :, :150], before[:, :, :150])


def test_without_a_compiler_it_is_composed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "library", lambda source: None)
    window = apply("and", CAUSAL.keep, apply("le", apply("sub", Q, const(20)), K))
    for keep in (TRUE, window):
        check(keep, (2, (4, 2), (90, 90), (16, 16)), torch.float32, "zero", None, 1, True)


def test_the_op_is_what_the_function_is() -> None:
    ops.register()
    q, k, v = qkv(1, (2, 1), (70, 70), (16, 16), torch.float32)
    arguments = (q, k, v, None, [], [], to_json(CAUSAL.keep), "zero", 0.25)
    assert torch.equal(torch.ops.eff.attention_tiled_v1(*arguments), tiled.attention_tiled(*arguments))
    torch.library.opcheck(
        torch.ops.eff.attention_tiled_v1.default, arguments, test_utils=("test_schema", "test_faketensor")
    )


def test_the_kernels_are_built_beside_other_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """One thread builds, whoever asks waits for it, and nobody builds a second time."""
    built: list[int] = []

    @functools.cache
    def slow(source: str) -> None:
        time.sleep(0.2)
        built.append(1)

    monkeypatch.setattr(native, "_built", slow)
    native.prefetch()
    native.prefetch()
    assert not built
    assert native.library() is None
    native.prefetch()
    assert built == [1]


def test_no_scalar_kernels_are_built(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._inductor import cpu_vec_isa

    monkeypatch.setattr(cpu_vec_isa, "pick_vec_isa", lambda: False)
    assert native._built.__wrapped__(native.BLOCKS) is None
