"""Check Re-ttention: a refresh is dense, a step that changed nothing is dense, the residual is what the band left out."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import effcompile as eff
from effcompile.integrations.replay import replayed
from effcompile.models import zoo
from effcompile.passes.attention.re_ttention import ReTtention
from effcompile.passes.attention.video import place_major
from tests.support.denoisers import facts


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class Attend(nn.Module):
    """Attend over tokens `[B, N, C]` in two heads; what is not attention is linear."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.qkv = nn.Linear(width, 3 * width)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        q, k, v = (part.unflatten(-1, (2, -1)).transpose(1, 2) for part in (self.qkv(x) * 2).chunk(3, -1))
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)

    def parts(self, x: Tensor, kept: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return (mass of the kept keys `[B, H, N]`, attention over them, attention over the others) in float64."""
        q, k, v = (part.unflatten(-1, (2, -1)).transpose(1, 2).double() for part in (self.qkv(x) * 2).chunk(3, -1))
        scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
        mass = (scores.softmax(-1) * kept).sum(-1)
        inside, outside = (scores.masked_fill(~part, -math.inf).softmax(-1) @ v for part in (kept, ~kept))
        return mass, inside, outside.nan_to_num()  # text rows keep every key


def band(policy: ReTtention, tokens: int) -> Tensor:
    """Return the kept pairs `[N, N]`, in the order of the model's tokens."""
    half, places = policy.half(tokens), torch.arange(tokens)
    if not policy.frames:
        return (places[:, None] - places).abs() <= half
    inside = (places - policy.text) % ((tokens - policy.text) // policy.frames)
    text = places < policy.text
    return ((inside[:, None] - inside).abs() <= half) | text[:, None] | text


POLICIES = {
    "image": (ReTtention(keep=0.2, warmup=1, period=3), 100),
    "video": (ReTtention(keep=0.3, warmup=1, period=3, text=6, frames=4), 6 + 4 * 20),
    "frozen": (ReTtention(keep=0.2, warmup=0, period=4, growth=0.0), 70),
}


@pytest.mark.parametrize("name", POLICIES)
def test_steps_are_what_the_formulas_say(name: str) -> None:
    policy, tokens = POLICIES[name]
    model, kept = Attend(), band(policy, tokens)
    denoiser = replayed(model, policy, emit="interpreter")
    time = torch.zeros(2)
    rho = residual = torch.empty(0)
    for number in range(policy.warmup + 2 * policy.period + 1):
        x = normal(2, tokens, 32, seed=number)
        with torch.no_grad():
            exact = model(x, time)
            got = denoiser(x, time).double()
            mass, inside, outside = model.parts(x, kept)
        phase = policy.phase(number)
        if phase != "sparse":
            assert torch.allclose(got, exact.double(), atol=2e-5), (number, phase)
        if phase == "refresh":
            rho, residual = mass, (1 - mass)[..., None] * outside  # what the dropped keys give, times their mass
        if phase == "sparse":
            rho = (rho + policy.growth).clamp(max=1)
            expected = (rho[..., None] * inside + residual).transpose(1, 2).flatten(2)
            assert torch.allclose(got, expected, atol=2e-5), (number, phase)
            assert not torch.allclose(got, exact.double(), atol=1e-2)
    assert denoiser.phases == [policy.phase(number) for number in range(policy.warmup + 2 * policy.period + 1)]
    assert denoiser.nbytes == 2 * 2 * tokens * (4 + 16 * 4)


@pytest.mark.parametrize("name", ["frozen", "video"])
def test_what_does_not_change_stays_dense(name: str) -> None:
    policy, tokens = POLICIES[name]
    policy = ReTtention(**{**policy.__dict__, "growth": 0.0})
    model, x = Attend(), normal(2, tokens, 32)
    denoiser = replayed(model, policy, emit="interpreter")
    with torch.no_grad():
        exact = model(x, torch.zeros(2))
        for _ in range(6):
            assert torch.allclose(denoiser(x, torch.zeros(2)), exact, atol=2e-5)
    assert "sparse" in denoiser.phases


def test_keeping_everything_is_dense_bit_for_bit() -> None:
    model = zoo.load("digits-dit-8").model
    sampler = eff.sampler(model, facts(8), replay="re-ttention{keep=1.0}")
    labels = torch.arange(2)
    plain = eff.sampler(model, facts(8))((2, 1), labels, generator=torch.Generator().manual_seed(0))
    assert torch.equal(sampler((2, 1), labels, generator=torch.Generator().manual_seed(0)), plain)


def test_runs_and_shapes_begin_anew() -> None:
    policy = ReTtention(keep=0.2, warmup=1, period=3)
    denoiser = replayed(Attend(), policy, emit="interpreter")
    for number in range(4):
        denoiser(normal(1, 40, 32, seed=number), torch.zeros(1))
    first = [denoiser(normal(1, 60, 32, seed=number), torch.zeros(1)) for number in range(4)]
    assert denoiser.phases == ["dense", "refresh", "sparse", "sparse"] * 2
    denoiser.reset()
    again = [denoiser(normal(1, 60, 32, seed=number), torch.zeros(1)) for number in range(4)]
    assert all(torch.equal(a, b) for a, b in zip(first, again))


def test_a_sampler_resets_at_every_stage_and_stays_near_dense() -> None:
    model = zoo.load("dit-tiny").model
    of = eff.Denoising((16, 16), steps=12)
    label = torch.tensor([1])

    def run(**more: object) -> tuple[object, Tensor]:
        sampler = eff.sampler(model, of, **more)  # type: ignore[arg-type]
        return sampler, sampler((1, 4), label, generator=torch.Generator().manual_seed(0))

    _, dense = run()
    sampler, near = run(replay="re-ttention{keep=0.3,warmup=2,period=3}")
    assert sampler.denoiser.phases == ["dense"] * 2 + ["refresh", "sparse", "sparse"] * 3 + ["refresh"]  # type: ignore[attr-defined]
    _, far = run(options={"attention": "sliding-window{window=10}"}, compiled=False)
    assert torch.equal(far, dense), "options are for compiled denoisers"
    error = float((near - dense).norm() / dense.norm())
    assert 0 < error < 0.05


def test_tokens_go_place_by_place() -> None:
    order = place_major(2 + 3 * 4, 2, 3, torch.device("cpu"))
    assert order.tolist() == [0, 1, 2, 6, 10, 3, 7, 11, 4, 8, 12, 5, 9, 13]


def test_what_cannot_be_replayed_is_said() -> None:
    with pytest.raises(eff.EffError, match="EFF-D112"):
        replayed(lambda x, t: x, "re-ttention")
    with pytest.raises(eff.EffError, match="EFF-D112"):
        replayed(Attend(), "sliding-window")
    short = replayed(Attend(), "re-ttention{keep=0.99}", emit="interpreter")
    with pytest.raises(eff.EffError, match="EFF-A502"):
        short(normal(1, 5, 32), torch.zeros(1))
    for wrong in ("re-ttention{keep=0}", "re-ttention{period=0}", "re-ttention{growth=2}"):
        with pytest.raises(eff.EffError, match="EFF-U004"):
            replayed(Attend(), wrong)
    compiled = torch.compile(
        Attend(), backend="eff", options={"attention": "re-ttention", "require": {"attention": "all"}}
    )
    with pytest.raises(torch._dynamo.exc.BackendCompilerFailed, match="EFF-D112"), torch.no_grad():
        compiled(normal(1, 40, 32), torch.zeros(1))


def test_state_that_does_not_fit_is_refused_before_it_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    needed = 2 * 40 * (4 + 16 * 4)  # rho and residual of one layer with two heads of 16
    monkeypatch.setattr("effcompile.integrations.replay.free_memory", lambda device: needed - 1)
    with pytest.raises(eff.EffError, match=r"EFF-D115.*1 layers"):
        replayed(Attend(), POLICIES["image"][0], emit="interpreter")(normal(1, 40, 32), torch.zeros(1))
    monkeypatch.setattr("effcompile.integrations.replay.free_memory", lambda device: needed)
    denoiser = replayed(Attend(), POLICIES["image"][0], emit="interpreter")
    denoiser(normal(1, 40, 32), torch.zeros(1))
    assert denoiser.nbytes == needed
    monkeypatch.undo()
    from effcompile.targets.detect import free_memory

    assert (free_memory("cpu") or 0) > 2**20
    assert free_memory("xpu") is None


@pytest.mark.slow
def test_compiled_graphs_take_a_time_that_is_expanded() -> None:
    """A sampler passes one level for all rows of a batch, with stride 0; graphs have the strides of their example."""
    model = zoo.load("dit-tiny").model
    of = eff.Denoising((16, 16), steps=8)
    labels = torch.arange(3)
    found = []
    for compiled in (False, True):
        asked = {"replay": "re-ttention{keep=0.3,warmup=2,period=3}", "compiled": compiled}
        sampler = eff.sampler(model, of, **asked)  # type: ignore[arg-type]
        found.append(sampler((3, 4), labels, generator=torch.Generator().manual_seed(0)))
    assert torch.allclose(found[0], found[1], atol=1e-3)
