"""Check the two ends of the arms of kvpress without it: what is asked of the other interpreter, and how its absence is told."""

from __future__ import annotations

import sys

import pytest
import torch
from torch import Tensor

from bench import kvpress_arms, kvpress_peer
from bench.quality import Hunt
from tests.integrations.test_prepare import llama, words


def test_arms_say_why_they_did_not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    model, keys = llama(num_hidden_layers=1), [Hunt(words(1, 12, n), 2, 0.0) for n in range(2)]
    asked = (model, ["kvpress-snapkv"], words(1, 20), 15, keys, 4, 1)
    monkeypatch.delenv(kvpress_arms.VARIABLE, raising=False)
    assert kvpress_arms.VARIABLE in kvpress_arms.measure(*asked)["kvpress-snapkv"]["skipped"]
    monkeypatch.setenv(kvpress_arms.VARIABLE, sys.executable)  # an interpreter without kvpress
    skipped = kvpress_arms.measure(*asked)["kvpress-snapkv"]["skipped"]
    assert "No module named 'kvpress'" in skipped
    assert kvpress_arms.told({"skipped": skipped}, 1, 1) == {"skipped": skipped}


def test_the_peer_continues_a_prompt_as_the_model_does_and_counts_bytes() -> None:
    """With a press that drops nothing its logits are the model's own, so KL is 0; one that drops half holds half of the bytes."""
    model, ids = llama(num_hidden_layers=2), words(2, 20)
    with torch.no_grad():
        logits, held = kvpress_peer.read(model, None, ids, 15)
        torch.testing.assert_close(logits, model(ids).logits[:, 15:], rtol=1e-4, atol=1e-5)
        whole = held
        logits, held = kvpress_peer.read(model, Halved(), ids, 16)
    assert logits.shape[1] == 4
    assert held / whole == pytest.approx((8 + 4) / 20)


class Halved:
    """Stand for a press: within it a prompt leaves the later half of its keys and values."""

    def __call__(self, model: torch.nn.Module) -> Halved:
        self.model = model
        return self

    def __enter__(self) -> None:
        self.hooks = [
            layer.self_attn.register_forward_hook(self._halve, with_kwargs=True) for layer in self.model.model.layers
        ]

    def __exit__(self, *unused: object) -> None:
        for hook in self.hooks:
            hook.remove()

    def _halve(self, module: torch.nn.Module, args: object, kwargs: dict[str, object], out: Tensor) -> None:
        layer = kwargs["past_key_values"].layers[module.layer_idx]  # type: ignore[attr-defined]
        half = layer.keys.shape[2] // 2
        layer.keys, layer.values = layer.keys[:, :, half:], layer.values[:, :, half:]
