"""Check what arms of caches share, and that an arm that is filled again is as one that was made for the new prompt."""

from __future__ import annotations

import pytest
import torch

import effcompile as eff
from bench.cache_arms import make_arm, prefill, shorten, twin
from tests.integrations.test_prepare import llama, words


def test_a_twin_shares_its_weights_and_nothing_else() -> None:
    model = llama(num_hidden_layers=3)
    shorten(model, 1)
    other = eff.prepare(twin(model), kv="int8-per-token")
    assert [x.data_ptr() for x in other.parameters()] == [x.data_ptr() for x in model.parameters()]
    assert len(other.model.layers) == other.config.num_hidden_layers == 1
    ids = words(1, 9)
    with torch.no_grad():
        assert type(model(ids).past_key_values).__name__ == "DynamicCache"
        assert type(other(ids).past_key_values).__name__ == "PackedCache"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["int8", "kivi-4", "static-eff"])
def test_an_arm_that_is_filled_again_needs_no_other_graph(name: str) -> None:
    model = llama(num_hidden_layers=1)
    prepared = eff.prepare(twin(model), kv="int8-per-token")
    first, second = words(1, 60, 1), words(1, 60, 2)
    with torch.no_grad():
        arm = make_arm(name, model, prepared, prefill(model, first), 96)
        arm.call(first[:, :1])
        assert arm.fill is not None
        arm.fill(prefill(model, second))
        with torch.compiler.set_stance("fail_on_recompile"):
            found = arm.call(second[:, :1]).clone()
            arm.rewind()
            assert torch.equal(arm.call(second[:, :1]), found)
        wanted = make_arm(name, model, prepared, prefill(model, second), 96).call(second[:, :1])
    assert float((found - wanted).abs().max()) < 1e-5 * float(wanted.abs().max())
