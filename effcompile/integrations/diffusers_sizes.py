"""Know what in a pipeline of diffusers depends on the size: how latents lie, and which arguments of the denoiser follow a stage."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from effcompile.core.schedule import Size

Unpack = Callable[[Tensor, Size], Tensor]
Pack = Callable[[Tensor], Tensor]


def layout(pipe: Any, packed: bool) -> tuple[Unpack, Pack]:
    """Return how latents of a pipeline become `[B, C, *size]`, and how they go back."""
    if packed:
        return _unpacked, _packed
    if type(pipe).__name__.startswith("CogVideoX"):
        return (lambda x, size: x.transpose(1, 2)), (lambda x: x.transpose(1, 2))  # frames come before channels
    return (lambda x, size: x), (lambda x: x)


def _unpacked(x: Tensor, size: Size) -> Tensor:
    """Take latents of FLUX out of their tokens `[B, T, 4 C]` of 2 x 2 values."""
    height, width = size
    cells = x.view(x.shape[0], height // 2, width // 2, x.shape[2] // 4, 2, 2)
    return cells.permute(0, 3, 1, 4, 2, 5).reshape(x.shape[0], x.shape[2] // 4, height, width)


def _packed(x: Tensor) -> Tensor:
    batch, channels, height, width = x.shape
    cells = x.view(batch, channels, height // 2, 2, width // 2, 2)
    return cells.permute(0, 2, 4, 1, 3, 5).reshape(batch, (height // 2) * (width // 2), channels * 4)


def latent_size(pipe: Any, height: int, width: int, frames: int | None, packed: bool) -> Size:
    """Return the size of latents for so many pixels, frames first where there are any."""
    factor = spatial_factor(pipe)
    if packed:  # FLUX rounds to whole tokens, as its own prepare_latents does
        return 2 * (height // (2 * factor)), 2 * (width // (2 * factor))
    size = (height // factor, width // factor)
    return size if frames is None else ((frames - 1) // pipe.vae_scale_factor_temporal + 1, *size)


def spatial_factor(pipe: Any) -> int:
    """Return how many pixels an edge of a latent value stands for."""
    return int(getattr(pipe, "vae_scale_factor_spatial", None) or pipe.vae_scale_factor)


def sizes_of(inner: nn.Module, packed: bool) -> dict[str, int]:
    """Return what `Denoising` must know of a denoiser's sizes: edge of a token, what edges are a multiple of, width."""
    config: Any = getattr(inner, "config", None)
    halvings = len(getattr(config, "down_block_types", ()) or ()) - 1
    if halvings >= 0:  # a UNet goes down and up again, and has no width of its own
        return {"patch": 1, "multiple": 2**halvings, "width": 0}
    patch = 2 if packed else getattr(config, "patch_size", 1) or 1
    patch = int(patch[-1] if isinstance(patch, list | tuple) else patch)
    heads, size = (int(getattr(config, name, 0) or 0) for name in ("num_attention_heads", "attention_head_dim"))
    return {"patch": patch, "multiple": patch, "width": heads * size}


def sized(pipe: Any, kwargs: dict[str, Any], size: Size, whole: Size, packed: bool) -> dict[str, Any]:
    """Return the keyword arguments of a denoiser with positions, rotations and resolutions of a stage's size.

    The pipeline made them for the `whole` size, except positions of FLUX, which are of its first latents.
    """
    if size == whole and not packed:
        return kwargs
    found = dict(kwargs)
    ids, rotations, more = (found.get(name) for name in ("img_ids", "image_rotary_emb", "added_cond_kwargs"))
    if packed and ids is not None:
        height, width = size
        if ids.shape[0] != (height // 2) * (width // 2):
            found["img_ids"] = pipe._prepare_latent_image_ids(1, height // 2, width // 2, ids.device, ids.dtype)
    if rotations is not None:
        frames, *edges = size
        pixels = [edge * spatial_factor(pipe) for edge in edges]
        made = pipe._prepare_rotary_positional_embeddings(*pixels, frames, rotations[0].device)
        found["image_rotary_emb"] = made
    if more:
        share = [stage / edge for stage, edge in zip(size[-2:], whole[-2:])]
        found["added_cond_kwargs"] = {**more, **_resolutions(more, share)}
    return found


def _resolutions(more: dict[str, Any], share: list[float]) -> dict[str, Tensor]:
    """Return PixArt's resolution, and the target size of SDXL's time ids, for a share of the edges."""
    found = {}
    resolution, ids = more.get("resolution"), more.get("time_ids")
    if resolution is not None:
        found["resolution"] = (resolution * torch.tensor(share, device=resolution.device)).to(resolution.dtype)
    if ids is not None and ids.shape[-1] == 6:  # original size, corner of the crop, target size
        found["time_ids"] = (ids * torch.tensor([1.0] * 4 + share, device=ids.device)).to(ids.dtype)
    return found
