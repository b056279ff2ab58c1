"""Check exported samplers: the loop over exported denoisers gives what the loop over the model gives, and files are checked."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import effcompile as eff
from effcompile.integrations.sampler_files import SCHEDULE, read_loop
from effcompile.models import zoo
from effcompile.models.dit import DiT, DiTConfig, SizedDiT
from effcompile.runtime.processes import VariancePreserving
from tests.cli.command import run

pytest.importorskip("onnxruntime")

TWO = DiTConfig(latent=8, others=(4,), width=32, layers=1, heads=2, classes=10, frequencies=16, zero_init=False)


def two_sizes() -> SizedDiT:
    torch.manual_seed(0)
    return SizedDiT(DiT(TWO).eval())


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(3)


def test_one_graph_for_all_sizes_is_the_model() -> None:
    model = two_sizes()
    for edge in (8, 4):
        latent, time, label = torch.randn(2, 4, edge, edge), torch.tensor([0.3, 0.9]), torch.tensor([1, 2])
        with torch.no_grad():
            got, meant = model(latent, time, label, **model.conditions((edge, edge))), model.model(latent, time, label)
        assert torch.allclose(got, meant, atol=1e-5)


@pytest.mark.parametrize("process", ["flow", pytest.param("vp", marks=pytest.mark.slow)])
def test_a_schedule_of_two_sizes_runs_from_files(tmp_path: Path, process: str) -> None:
    model, label = two_sizes(), torch.tensor([1, 2, 3])
    of = eff.Denoising((8, 8), least=(4, 4), patch=2, multiple=2, process=process)  # type: ignore[arg-type]
    vp = VariancePreserving.scaled_linear(prediction="v") if process == "vp" else None
    sampler = eff.sampler(
        model,
        of,
        schedule="bottleneck{steps=[2,2,3]}" if process == "vp" else "bottleneck{steps=[2,2,3],terminal=0.05}",
        cache="taylor{interval=2,warmup=1}",
        conditions=model.conditions,
        process=vp,
    )
    (manifest,) = sampler.export(tmp_path / "out", 3, 4, label)
    assert manifest.checks
    assert [isinstance(size, str) for size in manifest.inputs[0].shape[2:]] == [True, True]
    held = eff.load_sampler(tmp_path / "out")
    with torch.no_grad():
        expected = sampler((3, 4), label, generator=seeded())
    got = held((3, 4), label, generator=seeded())
    assert held.computed == sampler.computed
    assert torch.allclose(got, expected, atol=1e-3)
    assert read_loop(tmp_path / "out").schedule == sampler.schedule


def test_an_engine_has_a_profile_for_each_size(tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    model, label = two_sizes(), torch.tensor([1, 2, 3])
    of = eff.Denoising((8, 8), least=(4, 4), patch=2, multiple=2)
    schedule = "predict-x0{steps=4,scales=[0.5,1.0]}"
    sampler = eff.sampler(model, of, schedule=schedule, conditions=model.conditions)
    (manifest,) = sampler.export(tmp_path / "out", 3, 4, label, to="tensorrt-rtx", target="sm_89")
    told = dict(manifest.details)
    best = [told[f"sizes of {manifest.inputs[0].name} ({number})"].split(" to ")[1] for number in (1, 2)]
    assert [shape[-6:] for shape in best] == [" 8, 8]", " 4, 4]"]
    assert manifest.files


@pytest.mark.slow
def test_replayed_attention_runs_from_two_models(tmp_path: Path) -> None:
    model, label = zoo.load("dit-tiny").model, torch.tensor([1, 2])
    of, policy = eff.Denoising((16, 16), steps=9), "re-ttention{keep=0.3,warmup=2,period=3}"
    sampler = eff.sampler(model, of, replay=policy)
    made = sampler.export(tmp_path / "out", 2, 4, label)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["refresh-16x16", SCHEDULE, "sparse-16x16"]
    # Two layers: rho and residual of each go out of a refresh and into a sparse step, which returns rho.
    assert [(len(one.inputs), len(one.outputs)) for one in made] == [(3, 5), (7, 3)]
    held = eff.load_sampler(tmp_path / "out")
    expected, dense = (
        sampler((2, 4), label, generator=seeded()),
        eff.sampler(model, of)((2, 4), label, generator=seeded()),
    )
    for _ in range(2):  # a second run begins anew
        got = held((2, 4), label, generator=seeded())
        assert held.denoiser.phases == sampler.denoiser.phases  # type: ignore[union-attr]
        assert torch.allclose(got, expected, atol=1e-3)
    assert not torch.allclose(dense, expected, atol=1e-3), "the example tells replayed from dense"


@pytest.mark.slow
def test_eff_run_drives_the_loop(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import numpy

    model, label = two_sizes(), torch.tensor([1, 2])
    of = eff.Denoising((8, 8), least=(4, 4), patch=2, multiple=2)
    sampler = eff.sampler(model, of, schedule="predict-x0{steps=4,scales=[0.5,1.0]}", conditions=model.conditions)
    sampler.export(tmp_path / "out", 2, 4, label)
    numpy.savez(tmp_path / "in.npz", label=label.numpy())
    words = ("run", tmp_path / "out", "--seed", 3, "--json")
    done = run(capsys, *words, "--input", tmp_path / "in.npz", "-o", tmp_path / "found.npz")
    assert done.code == 0
    assert done.value["outputs"] == {"result": [2, 4, 8, 8]}
    with torch.no_grad():
        expected = sampler((2, 4), label, generator=seeded())
    assert torch.allclose(torch.from_numpy(numpy.load(tmp_path / "found.npz")["result"]), expected, atol=1e-3)
    missing = run(capsys, *words)
    assert missing.code == 2
    assert "EFF-E111" in missing.out + missing.err


@pytest.mark.slow
def test_files_that_were_changed_are_refused(tmp_path: Path) -> None:
    sampler = eff.sampler(zoo.load("dit-tiny").model, eff.Denoising((16, 16), steps=2))
    out = tmp_path / "out"
    sampler.export(out, 2, 4, torch.tensor([1, 2]))
    with pytest.raises(eff.EffError, match="EFF-E101"):
        sampler.export(out, 2, 4, torch.tensor([1, 2]))
    sampler.export(out, 2, 4, torch.tensor([1, 2]), force=True)
    manifest = out / "denoiser" / "manifest.json"
    text = manifest.read_text()
    manifest.write_text(text.replace("DiT", "dit"))
    with pytest.raises(eff.EffError, match="EFF-E105"):
        eff.load_sampler(out)
    manifest.write_text(text)
    raw = json.loads((out / SCHEDULE).read_text())
    raw["schedule"]["stages"][0]["levels"].reverse()
    (out / SCHEDULE).write_text(json.dumps(raw))
    with pytest.raises(eff.EffError, match="EFF-D105"):
        eff.load_sampler(out)
    with pytest.raises(eff.EffError, match="EFF-E102"):
        eff.load_sampler(tmp_path)


class Fixed(nn.Module):
    """Add a place to each value of 8 x 8, or of 4 x 4, which Python tells apart."""

    def forward(self, latent: Tensor, time: Tensor) -> Tensor:
        return latent + torch.linspace(0, 1, 64 if latent.shape[-1] == 8 else 16).view(*latent.shape[2:])


def test_what_has_no_form_in_files_is_said_and_leaves_nothing(tmp_path: Path) -> None:
    of = eff.Denoising((8, 8), least=(4, 4), patch=2, multiple=2)
    sampler = eff.sampler(Fixed(), of, schedule="predict-x0{steps=4,scales=[0.5,1.0]}")
    with pytest.raises(eff.EffError, match=r"EFF-E180.*fixes its latent"):
        sampler.export(tmp_path / "out", 2, 4)
    with pytest.raises(eff.EffError, match="EFF-E180"):
        eff.sampler(lambda latent, time: latent, of).export(tmp_path / "out", 2, 4)
    model = two_sizes()
    with pytest.raises(eff.EffError, match="EFF-E180"):
        eff.sampler(model, of, replay="re-ttention", conditions=model.conditions).export(
            tmp_path / "out", 2, 4, torch.tensor([1, 2])
        )
    assert list(tmp_path.iterdir()) == []
