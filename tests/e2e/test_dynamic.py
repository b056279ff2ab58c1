"""Call a transformers Llama at many lengths: two compilations at most, and right at each one."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import effcompile as eff
from tests.support.hf_zoo import case

LENGTHS = [9, 12, 7, 16, 5, 31, 8, 20, 13, 10, 17, 6, 24, 11, 33, 14, 22, 19, 40, 15]
CALLS = ("default", "no-cache", "left-padded")


@pytest.fixture(autouse=True)
def _clean() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def inputs(call: str, length: int, batch: int = 2) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(length)
    given: dict[str, Any] = {"input_ids": torch.randint(4, 90, (batch, length), generator=generator)}
    if call == "no-cache":
        given["use_cache"] = False
    if call == "left-padded":
        keep = torch.ones(batch, length, dtype=torch.long)
        for row in range(batch):
            keep[row, : 1 + (row + length) % 3] = 0
        given["attention_mask"] = keep
    return given


def assert_right(run: Any, model: nn.Module, given: dict[str, Any]) -> None:
    found, expected = run(**given).logits, model(**given).logits
    kept: Tensor = given.get("attention_mask", torch.ones(given["input_ids"].shape)).bool()
    error = float((found - expected)[kept].abs().max())
    assert error <= 1e-4 * float(expected.abs().max()), given["input_ids"].shape
    assert torch.equal(found.isnan(), expected.isnan())


@torch.no_grad()
@pytest.mark.parametrize("call", CALLS)
def test_twenty_lengths(call: str) -> None:
    assert len(set(LENGTHS)) == 20
    model = case("llama").build()
    run = torch.compile(model, backend="eff", options={"emit": "interpreter", "strict": True})
    for length in LENGTHS:
        assert_right(run, model, inputs(call, length))
    graphs = eff.report()["graphs"]
    assert 1 <= len(graphs) <= 2
    assert eff.report()["counters"]["missed"] == 0
    assert {site["mask"].split(" & ")[0] for graph in graphs for site in graph["sites"]} == {"causal"}


@torch.no_grad()
@pytest.mark.parametrize("call", ["no-cache", "left-padded"])
def test_sink_logits_at_many_lengths(call: str) -> None:
    model = case("gpt-oss").build()
    run = torch.compile(model, backend="eff", options={"emit": "interpreter", "strict": True})
    for length in (9, 12, 16, 31, 13):  # all beyond the window: transformers' own code branches on that
        assert_right(run, model, inputs(call, length))
    graphs = eff.report()["graphs"]
    assert 1 <= len(graphs) <= 2
    assert {site["kernel"] for graph in graphs for site in graph["sites"]} != {"math"}


@torch.no_grad()
def test_batches_and_lengths_together() -> None:
    model = case("llama").build()
    run = torch.compile(model, backend="eff", options={"emit": "interpreter", "strict": True}, dynamic=True)
    for batch, length in ((2, 9), (3, 12), (5, 7), (4, 20)):
        assert_right(run, model, inputs("left-padded", length, batch))
    assert len(eff.report()["graphs"]) == 1


@torch.no_grad()
def test_lengths_through_inductor() -> None:
    model = case("llama").build()
    run = torch.compile(model, backend="eff", options={"strict": True}, dynamic=True)
    for length in LENGTHS[:4]:
        assert_right(run, model, inputs("no-cache", length))
    assert len(eff.report()["graphs"]) == 1
