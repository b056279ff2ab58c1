"""Store the latents (MLA) that exported programs keep in their own buffers in 8 bits, and refuse what cannot be, by name."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import effcompile as eff
from effcompile.core.errors import EffError

H, D, DV, R, DR, C, W = 4, 16, 12, 40, 8, 96, 64


class Latents(nn.Module):
    """Attend over latents and rotated keys in buffers, in one of the ways in which people write that."""

    def __init__(self, how: str = "expanded", dims: int = 3) -> None:
        super().__init__()
        self.how = how
        self.query = nn.Linear(W, H * (D + DR), bias=False)
        self.down = nn.Linear(W, R + DR, bias=False)
        self.up = nn.Linear(R, H * (D + DV), bias=False)
        lead = (1,) if dims == 3 else (1, 1)
        self.register_buffer("latents", torch.zeros(*lead, C, R))
        self.register_buffer("rotated", torch.zeros(*lead, C, DR))

    def forward(self, x: Tensor, places: Tensor) -> Tensor:
        """Return the attention `[1, S, H * Dv]` of x `[1, S, W]` at places `[S]`."""
        q = self.query(x).unflatten(2, (H, D + DR)).transpose(1, 2)
        early = self.latents.sum() if self.how == "early" else 0.0
        for held, new in zip((self.latents, self.rotated), self.down(x).split([R, DR], 2)):
            rows = new if held.dim() == 3 else new[:, None]
            if self.how == "slice":
                held[..., : x.shape[1], :] = rows
            elif self.how == "put":
                held[:, places] = rows
            elif self.how == "roll":
                held.copy_(torch.cat([held[:, 1:], rows], 1))
            else:
                held.index_copy_(held.dim() - 2, places, rows)
        latents, rotated = (x if x.dim() == 4 else x[:, None] for x in (self.latents, self.rotated))
        mask = torch.arange(C)[None] <= places[:, None]
        if self.how == "absorbed":
            rows = self.up.weight.view(H, D + DV, R)
            q = torch.cat([q[..., :D] @ rows[:, :D], q[..., D:]], 3)
            keys = torch.cat([latents, rotated], 3).expand(-1, H, -1, -1)
            out = F.scaled_dot_product_attention(q, keys, latents.expand(-1, H, -1, -1), mask, scale=0.2)
            return (out @ rows[:, D:].mT).transpose(1, 2).flatten(2)
        both = self.up(latents).unflatten(3, (H, D + DV)).squeeze(1).transpose(1, 2)
        keys = torch.cat([both[..., :D], rotated.expand(-1, H, -1, -1)], 3)
        out = F.scaled_dot_product_attention(q, keys, both[..., D:], mask, scale=0.2)
        return out.transpose(1, 2).flatten(2) + early


def exported(model: nn.Module, count: int = 1) -> Any:
    torch.manual_seed(0)
    return torch.export.export(model.eval().requires_grad_(False), inputs(count, 0))


def inputs(count: int, first: int) -> tuple[Tensor, Tensor]:
    x = torch.randn(1, count, W, generator=torch.Generator().manual_seed(first))
    return x, torch.arange(first, first + count)


@pytest.mark.parametrize(("how", "dims"), [("expanded", 3), ("expanded", 4), ("put", 3), ("absorbed", 3)])
@pytest.mark.parametrize(("kv", "off"), [("plain", 1e-5), ("int8-per-token", 0.03), ("fp8", 0.2)])
def test_steps_say_what_the_model_says(how: str, dims: int, kv: str, off: float) -> None:
    torch.manual_seed(0)
    model = Latents(how, dims)
    packed = eff.prepare(exported(model), kv=kv)
    assert not [name for name, _ in packed.named_buffers() if name in ("latents", "rotated")]
    with torch.no_grad():
        for n in (*range(50), *range(10, 30)):  # a cut, and another continuation
            found, wanted = packed(*inputs(1, n)), model(*inputs(1, n))
            assert float((found - wanted).abs().max()) < off * float(wanted.abs().max())
    (site,) = (new.site for new in packed.caches.values())
    assert (site.layout, site.head_dim, site.value_dim, site.capacity) == ("mla", R, DR, C)
    (choice,) = [c for c in packed.plan.choices if c.family == "kv"]
    assert choice.policy == kv
    if kv != "plain":
        assert packed.nbytes() == C * (R + DR + 2 * 2) + 8
    packed.reset()
    assert not any(bool(x.any()) for name, x in packed.named_buffers() if "latent" in name or "rotated" in name)


def test_what_the_buffers_held_is_packed_and_a_slice_is_a_prompt() -> None:
    torch.manual_seed(0)
    model = Latents("slice")
    with torch.no_grad():
        model(*inputs(20, 0))
        packed = eff.prepare(exported(model, 7), kv="int8-per-token")
        x = inputs(7, 3)[0], torch.arange(13, 20)  # seven places are written, and the others read as they were
        found, wanted = packed(*x), model(*x)
    assert 0 < float((found - wanted).abs().max()) < 0.03 * float(wanted.abs().max())


@pytest.mark.parametrize("emit", ["interpreter", pytest.param("inductor", marks=pytest.mark.slow)])
def test_the_program_lists_its_latents_and_goes_through_torch_compile(emit: str) -> None:
    torch.manual_seed(0)
    program = exported(Latents())
    told = eff.explain(program)
    (row,) = told.to_json()["caches"]
    assert f"latents of {R}+{DR}" in str(told)
    assert (row["layout"], row["capacity"], row["head_dim"]) == ("mla", C, R)
    packed = eff.prepare(program, kv={row["id"]: "int8-per-token"})
    other = eff.prepare(program, kv={row["id"]: "int8-per-token"})
    fast = torch.compile(other, backend="eff", dynamic=False, options={"strict": True, "emit": emit})
    with torch.no_grad():
        for n in range(6):
            assert float((fast(*inputs(1, n)) - packed(*inputs(1, n))).abs().max()) < 1e-5


@pytest.mark.parametrize(
    ("how", "kv", "reason"),
    [
        ("early", "int8-per-token", "EFF-K208.*before its tokens are written"),
        ("roll", "int8-per-token", "EFF-K208.*moved at every call"),
        ("expanded", "kivi", "EFF-K208.*latents"),
        ("expanded", "zipvl-mixed", "EFF-K208.*prompt"),
    ],
)
def test_what_cannot_be_stored_is_refused_by_name(how: str, kv: str, reason: str) -> None:
    with pytest.raises(EffError, match=f"(?s){reason}"):
        eff.prepare(exported(Latents(how)), kv=kv)
