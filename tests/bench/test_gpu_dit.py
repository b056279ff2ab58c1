"""Check on the CPU what the case gpu-dit does beside timing: its denoisers, its arms, its check and its time limit."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from bench.case import Settings, Watch
from bench.cases.gpu_dit import ARMS, GpuDit
from bench.gpu_transformers import SHAPES, Shape, ShapedTransformer, sampler, ways

CPU = Settings(device="cpu", rounds=2, warmup=0, threads=1)
VIDEO = Shape((4, 16, 16), 32, 2, 6, 1, 30, 12, 2, "keep=0.2,warmup=2,period=3", 4)
PICTURE = Shape((32, 32), 32, 2, 0, 1, 28, 12, 1, "keep=0.1,warmup=2,period=3", 4)


def test_tokens_are_those_of_the_models() -> None:
    assert {name: shape.tokens for name, shape in SHAPES.items()} == {
        "cogvideox-2b": 226 + 13 * 30 * 45,
        "flux": 512 + 4096,
        "pixart-1024": 4096,
    }
    assert {name: shape.width // shape.heads for name, shape in SHAPES.items()} == {
        "cogvideox-2b": 64,
        "flux": 128,
        "pixart-1024": 72,
    }


@pytest.mark.parametrize("shape", [VIDEO, PICTURE], ids=["video", "picture"])
def test_patches_come_back_to_their_places(shape: Shape) -> None:
    """With an identity in place of blocks and projections the denoiser returns its latent."""
    model = ShapedTransformer(shape).eval()
    model.blocks = torch.nn.ModuleList()
    inside = 4 * shape.channels
    with torch.no_grad():
        model.patches.weight.zero_()[:inside] = torch.eye(inside)
        model.out.weight.zero_()[:, :inside] = torch.eye(inside)
        model.patches.bias.zero_()
        model.out.bias.zero_()
        latent = torch.randn(1, shape.channels, *shape.size)
        got = model(latent, torch.zeros(1), torch.zeros(1, shape.text, shape.width))
    # The norm of a token scales and shifts its values alike, so what is left is their order within a token.
    corner = latent[..., :2, :2].flatten()[: inside * max(1, shape.frames)]
    found = got[..., :2, :2].flatten()[: len(corner)]
    if not shape.frames:
        assert torch.equal(corner.argsort(), found.argsort())
    assert got.shape == latent.shape


def test_every_arm_of_every_shape_is_spelled_right() -> None:
    for shape in (*SHAPES.values(), VIDEO, PICTURE):
        model = torch.nn.Identity()
        for way in ways(shape).values():
            made = sampler(model, shape, replace(way, replay=""), compiled=False)
            assert made.schedule.stages[-1].size == shape.size
    assert set(ARMS) == set(ways(VIDEO))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("shape", [VIDEO, PICTURE], ids=["video", "picture"])
def test_a_row_is_measured(shape: Shape) -> None:
    case = GpuDit(shapes={"tiny": shape})
    few = ("dense", "block-topk", "re-ttention", "taylor-3", "low-high") + (("svg",) if shape.frames else ())
    (row,) = case.rows(CPU)
    (found,) = case.measure(row, replace(CPU, arms=few), Watch())
    arms = found["arms"]
    assert set(arms) == set(few)
    assert not [arm for arm in arms.values() if "error" in arm], arms
    assert arms["dense"]["numerics"]["within"]
    assert arms["dense"]["apart"] == 0
    assert arms["re-ttention"]["state_bytes"] > 0
    assert arms["taylor-3"]["computed"] < arms["taylor-3"]["steps"] == 12
    assert all(arm["seconds"]["median"] > 0 for arm in arms.values())
    assert {item["to"] for item in found["ratios"]} == {"dense"}


def test_the_time_of_the_case_ends() -> None:
    case = GpuDit(shapes={"tiny": PICTURE}, seconds=1e-9)
    (row,) = case.rows(CPU)
    case.begun.append(0.0)
    (found,) = case.measure(row, CPU, Watch())
    assert all("skipped" in arm for arm in found["arms"].values())
