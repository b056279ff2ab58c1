"""Store the caches of exported programs in compressed forms, and refuse what cannot be, by name."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import effcompile as eff
from effcompile.core.errors import EffError
from effcompile.models.llama import Llama, LlamaConfig, LlamaDecoder

H, HKV, D, C = 4, 2, 32, 96


class Layer(nn.Module):
    """Attend over a cache of its own, in one of the spellings that people write."""

    def __init__(self, write: str = "index_copy", read: str = "whole", register: bool = True) -> None:
        super().__init__()
        self.write, self.read = write, read
        self.qkv = nn.Linear(H * D, (H + 2 * HKV) * D, bias=False)
        for name in ("keys", "values"):
            empty = torch.zeros(1, HKV, C, D)
            if register:
                self.register_buffer(name, empty)
            else:
                setattr(self, name, empty)

    def forward(self, x: Tensor, places: Tensor) -> Tensor:
        """Return the attention `[B, H, S, D]` of x `[B, S, H * D]` at places `[S]`."""
        heads = self.qkv(x).unflatten(2, (-1, D)).transpose(1, 2)
        q, k, v = heads.split([H, HKV, HKV], 1)
        for held, new in ((self.keys, k), (self.values, v)):
            if self.write == "index_copy":
                held.index_copy_(2, places, new)
            elif self.write == "index_put":
                held[:, :, places] = new
            elif self.write == "slice":
                held[:, :, : x.shape[1]] = new
            else:
                held.masked_fill_(places[0] > 3, 1.0)
        mask = torch.arange(C)[None] <= places[:, None]
        keys, values = self.keys, self.values
        if self.read == "part":
            keys, values, mask = keys[:, :, 8:], values[:, :, 8:], mask[:, 8:]
        if self.read == "more":
            q = q + self.keys.mean()
        out = F.scaled_dot_product_attention(q, keys, values, None if self.read == "all" else mask, enable_gqa=True)
        return out.transpose(1, 2).flatten(2)


def exported(model: nn.Module, count: int) -> Any:
    return torch.export.export(model.eval().requires_grad_(False), (torch.randn(1, count, H * D), torch.arange(count)))


def inputs(count: int, first: int) -> tuple[Tensor, Tensor]:
    x = torch.randn(1, count, H * D, generator=torch.Generator().manual_seed(first))
    return x, torch.arange(first, first + count)


@pytest.mark.parametrize("write", ["index_copy", "index_put"])
@pytest.mark.parametrize(("kv", "off"), [("plain", 1e-5), ("int8-per-token", 0.02), ("kivi{residual=32}", 0.2)])
def test_steps_say_what_the_model_says(write: str, kv: str, off: float) -> None:
    """One token at a time, over a context that begins again in the middle; the buffers are gone and the packed ones smaller."""
    torch.manual_seed(0)
    model = Layer(write)
    packed = eff.prepare(exported(model, 1), kv=kv)
    assert not [name for name, _ in packed.named_buffers() if name in ("keys", "values")]
    with torch.no_grad():
        for length in (70, 20):
            for n in range(length):
                found, wanted = packed(*inputs(1, n)), model(*inputs(1, n))
                assert float((found - wanted).abs().max()) < off * float(wanted.abs().max())
    (choice,) = [c for c in packed.plan.choices if c.family == "kv"]
    assert choice.policy == kv
    assert packed.nbytes() == sum(x.numel() * x.element_size() for _, x in packed.named_buffers())
    if kv == "int8-per-token":
        assert packed.nbytes() < 0.4 * 2 * HKV * C * D * 4
    packed.reset()
    with torch.no_grad():
        assert float((packed(*inputs(1, 0)) - model(*inputs(1, 0))).abs().max()) < 1e-5


def test_a_prompt_that_is_assigned_to_a_slice() -> None:
    model = Layer("slice")
    packed = eff.prepare(exported(model, 7), kv="int8-per-token")
    with torch.no_grad():
        for seed in (0, 1):
            x = inputs(7, seed)[0], torch.arange(7)
            assert float((packed(*x) - model(*x)).abs().max()) < 1e-5  # tokens of the same call are read as they are


def test_what_is_written_must_follow_what_is_held() -> None:
    packed = eff.prepare(exported(Layer(), 1), kv="int8-per-token")
    with torch.no_grad():
        for n in range(5):
            packed(*inputs(1, n))
        before = {name: x.clone() for name, x in packed.named_buffers()}
        with pytest.raises(EffError, match="EFF-K203"):
            packed(*inputs(1, 9))
        assert all(torch.equal(x, before[name]) for name, x in packed.named_buffers())
        packed(*inputs(1, 2))  # forgets what lies behind
        with pytest.raises(EffError, match="EFF-K203"):
            packed(*inputs(1, 4))
        for n in range(3, C):
            packed(*inputs(1, n))
        with pytest.raises(EffError, match="EFF-K201"):
            packed(*inputs(1, C))
    two = eff.prepare(exported(Layer(), 2), kv="int8-per-token")
    with pytest.raises(EffError, match=r"EFF-K203.*neighbors"), torch.no_grad():
        two(inputs(2, 0)[0], torch.tensor([0, 5]))


@pytest.mark.parametrize(
    ("layer", "reason"),
    [
        ({"read": "part"}, "no attention reads|more than the cache"),
        ({"read": "more"}, "reads the cache too"),
        ({"read": "all"}, "without a mask"),
        ({"write": "fill"}, "masked_fill"),
    ],
)
def test_what_cannot_be_stored_is_refused_by_name(layer: dict[str, str], reason: str) -> None:
    with pytest.raises(EffError, match=f"(?s)EFF-K208.*({reason})"):
        eff.prepare(exported(Layer(**layer), 1), kv="int8-per-token")


def test_a_cache_that_is_no_buffer_is_an_error_with_its_line() -> None:
    with pytest.raises(EffError, match=r"(?s)EFF-K208.*test_exported.py:\d+.*register_buffer"):
        eff.prepare(exported(Layer(register=False), 1), kv="int8-per-token")


def test_a_decoder_of_the_zoo_in_compiled_code() -> None:
    """Every layer by its own format, one left as it is; the module goes through torch.compile like any other."""
    torch.manual_seed(0)
    config = LlamaConfig(vocab=64, width=64, layers=3, heads=2, kv_heads=1, head_dim=32, hidden=64)
    model = LlamaDecoder(Llama(config), 1, 64).eval()
    program = torch.export.export(model, (torch.tensor([[3]]), torch.tensor([0])))
    told = eff.explain(program)
    names = [row["id"] for row in told.to_json()["caches"]]
    assert len(names) == 3
    packed = eff.prepare(program, kv={names[0]: "int8-per-token", names[2]: "two-plane{stale=True}"})
    assert sorted(packed.caches) == [names[0], names[2]]
    fast = torch.compile(packed, backend="eff", dynamic=False, options={"strict": True})
    with torch.no_grad():
        for n in range(20):
            ids = torch.tensor([[n * 7 % 64]])
            wanted = model(ids, torch.tensor([n]))
            found = fast(ids, torch.tensor([n]))
            assert float((found - wanted).abs().max()) < 0.05 * float(wanted.abs().max())
    with pytest.raises(EffError, match="EFF-K205"):
        eff.prepare(program, kv="int8-per-token", evict="sink-window")
