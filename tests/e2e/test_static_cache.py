"""Decode unmodified transformers models with a StaticCache: the mask is proved, the filled part is read, policies apply."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import effcompile as eff
from effcompile.report import log
from tests.support.small import CHEAP, kernels

pytest.importorskip("transformers")
ALL = {"require": {"attention": "all"}, "strict": True}


@pytest.fixture(autouse=True)
def _clean() -> Iterator[None]:
    torch._dynamo.reset()
    log().graphs.clear()
    yield
    torch._dynamo.reset()


def llama(**fields: Any) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
    return LlamaForCausalLM(
        LlamaConfig(vocab_size=97, num_hidden_layers=2, max_position_embeddings=4096, **sizes, **fields)
    ).eval()


def static(model: Any, capacity: int) -> Any:
    from transformers import StaticCache

    return StaticCache(config=model.config, max_cache_len=capacity)


def steps(
    model: Any, run: Any, cache: Any, length: int, count: int, mask: Tensor | None = None
) -> tuple[list[Tensor], list[int]]:
    """Return the logits of `count` steps after an eager prefill, and what the counters of all layers hold at the end.

    A cache is used again, as `generate` does: torch.compile compiles anew for the tensors of another one.
    """
    cache.reset()
    rows, capacity = 1 if mask is None else mask.shape[0], cache.layers[0].max_cache_len
    ids = torch.randint(0, 97, (rows, length + count), generator=torch.Generator().manual_seed(length))
    found = []
    with torch.no_grad():
        model(ids[:, :length], past_key_values=cache, attention_mask=mask)
        for at in range(length, length + count):
            given = None if mask is None else torch.cat([mask, mask.new_ones(rows, at + 1 - length)], 1)
            given = None if given is None else torch.nn.functional.pad(given, (0, capacity - at - 1))
            found.append(run(ids[:, [at]], past_key_values=cache, attention_mask=given).logits)
    return found, [int(layer.cumulative_length) for layer in cache.layers]


def masks() -> list[str]:
    return [str(site.mask) for record in log().graphs for site in record.compiled.sites]


def test_a_step_reads_the_filled_part_of_the_cache() -> None:
    """One graph for all steps. The counter is written in the graph: TorchInductor must not move the copy past that."""
    model = llama()
    run = torch.compile(model, backend="eff", options={"strict": True})
    mine, other = static(model, 16384), static(model, 16384)  # from a capacity on that pays for the call
    for length in (5, 70):
        expected, counted = steps(model, model, other, length, 3)
        found, also = steps(model, run, mine, length, 3)
        assert counted == also == [length + 3] * 2
        for x, y in zip(found, expected):
            torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5)
    assert len(log().graphs) == 1
    assert masks() == ["causal(offset=t0)"] * 2
    assert kernels() == ["span"] * 2


def test_padding_on_the_left_is_honored_beside_the_counter() -> None:
    model = llama()
    run = torch.compile(model, backend="eff", options=CHEAP)
    real = (torch.arange(12)[None] >= torch.tensor([[0], [5]])).long()
    expected, _ = steps(model, model, static(model, 4096), 12, 2, real)
    found, _ = steps(model, run, static(model, 4096), 12, 2, real)
    for x, y in zip(found, expected):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5)
    assert masks() == ["causal(offset=t0) & key-padding"] * 2
    assert kernels() == ["span"] * 2


@pytest.mark.parametrize(
    "policy",
    ["quest{budget=64,dense_layers=0}", pytest.param("block-topk{budget=64,dense_layers=0}", marks=pytest.mark.slow)],
)
def test_a_policy_narrows_a_step_once_the_cache_holds_more_than_its_budget(policy: str) -> None:
    model = llama()
    run = torch.compile(model, backend="eff", options={**CHEAP, **ALL, "attention": policy})
    mine, other = static(model, 256), static(model, 256)
    for length, exact in ((59, True), (200, False)):
        expected, _ = steps(model, model, other, length, 2)
        found, _ = steps(model, run, mine, length, 2)
        for x, y in zip(found, expected):
            assert x.isfinite().all()
            assert torch.allclose(x, y, rtol=1e-4, atol=1e-5) == exact, length
    assert len(log().graphs) == 1
    assert all(site["policy"] for graph in eff.report()["graphs"] for site in graph["sites"])
