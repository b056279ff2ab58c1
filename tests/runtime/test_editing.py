"""Check editing: the same question gives the data back bit for bit, another one moves it by what the denoiser says."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import effcompile as eff
from effcompile.runtime.processes import DiffusionProcess, FlowMatching, VariancePreserving
from tests.support.denoisers import SmallDenoiser, facts


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def data() -> Tensor:
    return torch.randn(2, 2, 16, 16, generator=seeded(7))


@pytest.mark.parametrize("name", ["flow", "vp"])
def test_the_same_question_gives_the_data_back(name: str) -> None:
    network = SmallDenoiser()

    def denoiser(x: Tensor, t: Tensor, label: Tensor) -> Tensor:
        rows.append(x.shape[0])
        return network(x, t / (1 if name == "flow" else 1000)) * label[:, None, None, None]

    rows: list[int] = []
    process: DiffusionProcess | None = None if name == "flow" else VariancePreserving.scaled_linear()
    sampler = eff.sampler(denoiser, facts(process=name), schedule="plain{steps=10}", process=process)
    same, other = torch.tensor([0.5, 1.0]), torch.tensor([1.5, 0.2])
    assert torch.equal(sampler.edit(data(), (same,), (same,), generator=seeded()), data())
    assert rows == [6] * 10, "source, layout and target go together"
    moved = sampler.edit(data(), (same,), (other,), generator=seeded())
    assert not torch.allclose(moved, data(), atol=0.05)
    assert torch.equal(moved, sampler.edit(data(), (same,), (other,), generator=seeded()))


def test_an_edit_moves_gaussian_data_from_one_mean_to_the_other() -> None:
    def denoiser(x: Tensor, t: Tensor, mean: Tensor) -> Tensor:
        """Answer for data N(mean, 0.2^2)."""
        level, mean = t[:, None, None, None], mean[:, None, None, None]
        spread = (1 - level) ** 2 * 0.2**2 + level**2
        apart = x - (1 - level) * mean
        return level / spread * apart - (mean + (1 - level) * 0.2**2 / spread * apart)

    sampler = eff.sampler(denoiser, facts(), schedule="plain{steps=40}")
    before = 0.5 + 0.2 * torch.randn(2, 2, 16, 16, generator=seeded(3))
    one, two = torch.tensor([0.5, 0.5]), torch.tensor([-1.0, 2.0])
    after = sampler.edit(before, (one,), (two,), generator=seeded())
    assert torch.allclose(after.mean((1, 2, 3)), two, atol=0.05)
    # What the two share, the place of each value within its Gaussian, stays.
    kept = torch.corrcoef(torch.stack((before[0].flatten(), after[0].flatten())))[0, 1]
    assert kept > 0.9


def test_editing_needs_one_stage() -> None:
    network = SmallDenoiser()
    with pytest.raises(eff.EffError, match="EFF-D113"):
        eff.sampler(network, facts(), schedule="bottleneck{terminal=0.02}").edit(data(), (), ())
    with pytest.raises(eff.EffError, match="EFF-D113"):
        eff.sampler(network, facts(), cache="reuse").edit(data(), (), ())
    with pytest.raises(eff.EffError, match="EFF-D107"):
        eff.sampler(network, facts()).edit(data()[..., :8], (), ())
    assert isinstance(eff.sampler(network, facts()).trajectory.process, FlowMatching)
