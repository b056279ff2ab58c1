"""Hold the windows of exported programs in rings, and refuse what has left them."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import effcompile as eff
from effcompile.core.errors import EffError
from tests.integrations.test_exported import HKV, C, D, H, Layer, exported, inputs


class Windowed(Layer):
    """See the last `window` tokens."""

    def __init__(self, window: int = 12, spell: str = "bool") -> None:
        super().__init__()
        self.window, self.spell = window, spell

    def forward(self, x: Tensor, places: Tensor) -> Tensor:
        """Return the attention `[1, S, H * D]` of x `[1, S, H * D]` at places `[S]`."""
        heads = self.qkv(x).unflatten(2, (-1, D)).transpose(1, 2)
        q, k, v = heads.split([H, HKV, HKV], 1)
        self.keys.index_copy_(2, places, k)
        self.values.index_copy_(2, places, v)
        first, column = places[0], torch.arange(C)[None]
        row = first + torch.arange(x.shape[1])[:, None]
        mask = (column <= row) & (column > row - self.window)
        if self.spell == "float":
            mask = torch.where(mask, 0.0, -torch.inf)
        out = F.scaled_dot_product_attention(q, self.keys, self.values, mask, enable_gqa=True)
        return out.transpose(1, 2).flatten(2)


@pytest.mark.parametrize("spell", ["bool", "float"])
@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize(("kv", "off"), [("plain", 1e-5), ("int8-per-token", 0.02)])
def test_a_layer_with_a_window_holds_a_ring(kv: str, off: float, count: int, spell: str) -> None:
    """Steps far beyond the ring, some tokens taken back from a full one, and another context from 0 on."""
    torch.manual_seed(0)
    model = Windowed(window=12, spell=spell)
    packed = eff.prepare(exported(model, count), kv=kv)
    (new,) = packed.caches.values()
    assert (new.site.window, new.ring) == (12, {"plain": 43, "int8-per-token": 64}[kv])
    with torch.no_grad():
        for first in (*range(0, 90, count), *range(60, 81, count), *range(0, 12, count)):
            found, wanted = packed(*inputs(count, first)), model(*inputs(count, first))
            assert float((found - wanted).abs().max()) < off * float(wanted.abs().max()), first
        packed.reset()
        assert float((packed(*inputs(count, 0)) - model(*inputs(count, 0))).abs().max()) < 1e-5
    if kv == "int8-per-token":
        assert packed.nbytes() < 64 * HKV * 2 * (D + 2) + 4 * 64 + 3 * 8 + 1


def test_what_has_left_the_ring_is_an_error_before_anything_is_written() -> None:
    packed = eff.prepare(exported(Windowed(window=12), 1), kv="plain")
    with torch.no_grad():
        for n in range(90):
            packed(*inputs(1, n))
        before = {name: x.clone() for name, x in packed.named_buffers()}
        for place, code in ((91, "EFF-K203"), (40, "EFF-K203"), (57, "EFF-K203")):
            with pytest.raises(EffError, match=code):
                packed(*inputs(1, place))
        assert all(torch.equal(x, before[name]) for name, x in packed.named_buffers())
        packed(*inputs(1, 58))  # which sees tokens 47 to 57, of 47 to 89 that are held
        for n in range(59, C):
            packed(*inputs(1, n))
        with pytest.raises(EffError, match="EFF-K201"):
            packed(*inputs(1, C))


def test_a_window_as_wide_as_the_cache_and_groups_of_tokens_keep_all() -> None:
    for window, kv in ((80, "plain"), (12, "kivi{residual=32}")):
        (new,) = eff.prepare(exported(Windowed(window), 1), kv=kv).caches.values()
        assert new.ring == 0
        assert new.shape(torch.device("cpu")).capacity == C


@pytest.mark.parametrize("emit", ["interpreter", pytest.param("inductor", marks=pytest.mark.slow)])
def test_a_ring_in_compiled_code(emit: str) -> None:
    torch.manual_seed(0)
    program = exported(Windowed(window=12), 1)
    packed, other = (eff.prepare(program, kv="int8-per-token") for _ in range(2))
    fast = torch.compile(other, backend="eff", dynamic=False, options={"strict": True, "emit": emit})
    with torch.no_grad():
        for n in (*range(70), *range(60, 65)):
            assert float((fast(*inputs(1, n)) - packed(*inputs(1, n))).abs().max()) < 1e-5
