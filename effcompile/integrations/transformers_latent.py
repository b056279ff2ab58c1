"""Let attention over the latents of MLA (DeepSeek-V2, arXiv:2405.04434) read a compressed cache, without expanding what it holds.

transformers caches latents and rotated keys, which a method of the layer, `expand_kv`, turns into keys and values of all heads
before the attention interface sees them. A prepared layer hands them on as they are. Key and value of a head are linear functions
of the latent, the rows of `kv_b_proj`, so the interface multiplies the first into the queries and the second into the output.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from effcompile.core.errors import EffError
from effcompile.integrations.transformers_held import Held
from effcompile.integrations.transformers_sites import Latents

_METHOD = "expand_kv"
_SIZES = ("kv_lora_rank", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim", "layer_idx")


def find_latents(model: nn.Module) -> Latents:
    """Return the layers whose cache holds latents, with the channels of those and of the rotated keys.

    Raises:
        EffError: EFF-K205 where a layer does not expand its latents as the rows of its `kv_b_proj` say.
    """
    found: dict[int, tuple[int, int]] = {}
    for name, layer in model.named_modules():
        if not hasattr(layer, _METHOD):
            continue
        missing = next((size for size in _SIZES if not isinstance(getattr(layer, size, None), int)), None)
        if missing is not None:
            raise _refusal(f"{name} ({type(layer).__name__}) has no `{missing}`")
        _check(layer, name)
        found[layer.layer_idx] = (layer.kv_lora_rank, layer.qk_rope_head_dim)
    return found


def keep_latents(model: nn.Module) -> None:
    """Let every layer of a model that expands latents hand those of a compressed cache on as they are."""
    for layer in model.modules():
        if hasattr(layer, _METHOD):
            layer.__dict__[_METHOD] = functools.partial(_expand, _own(layer))


def attend_latents(
    module: Any,
    query: Tensor,
    key: Held,
    rotated: Tensor,
    mask: Tensor | None,
    causal: bool,
    scale: float,
    softcap: float,
) -> Tensor:
    """Attend over a cache of latents: query `[B, Hq, Q, Dn + Dr]`, new rotated keys `[B, 1, S, Dr]`, returns `[B, Q, Hq, Dv]`.

    A prompt into an empty cache is read as the model reads it, by its own keys and values.
    """
    fresh, latent = query.shape[2], key.keys
    eager = not torch.compiler.is_compiling() and not softcap
    if eager and 1 < fresh == latent.shape[2] == key.layer.length:
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        keys, values = _own(module)(latent, rotated)
        seen = None if mask is None else mask[..., :fresh]
        found: Tensor = sdpa_attention_forward(module, query, keys, values, seen, scaling=scale, is_causal=causal)[0]
        return found
    first, second = _rows(module)
    plain, turned = query.to(key.dtype).split([module.qk_nope_head_dim, module.qk_rope_head_dim], 3)
    inside = torch.cat([plain @ first, turned], 3)
    out, _ = key.layer.attend(inside, latent, rotated, mask, causal, scale, softcap)
    return (out @ second).transpose(1, 2).contiguous()


def _expand(own: Callable[..., tuple[Tensor, Tensor]], latent: Tensor | Held, rotated: Tensor) -> tuple[Any, Tensor]:
    return (latent, rotated) if isinstance(latent, Held) else own(latent, rotated)


def _own(layer: Any) -> Callable[..., tuple[Tensor, Tensor]]:
    found: Callable[..., tuple[Tensor, Tensor]] = getattr(layer, _METHOD)
    ours = isinstance(found, functools.partial) and found.func is _expand
    return found.args[0] if ours else found  # type: ignore[attr-defined, no-any-return]


def _rows(layer: Any) -> tuple[Tensor, Tensor]:
    """Return what makes keys `[H, Dn, R]` of a latent, and values `[H, R, Dv]`, as views of the layer's weight.

    Raises:
        EffError: EFF-K205 where a layer was put in place of the linear one.
    """
    linear = layer.kv_b_proj
    if type(linear) is not nn.Linear or linear.bias is not None:
        raise _refusal(f"`kv_b_proj` of {type(layer).__name__} is a {type(linear).__name__}")
    heads = linear.weight.unflatten(0, (-1, layer.qk_nope_head_dim + layer.v_head_dim))
    first, second = heads.split([layer.qk_nope_head_dim, layer.v_head_dim], 1)
    return first, second.transpose(1, 2)


def _check(layer: Any, name: str) -> None:
    """Refuse a layer whose keys and values are not what `_rows` says, by two tokens of noise."""
    first, second = _rows(layer)
    if first.device.type == "meta":
        return
    draw = torch.Generator().manual_seed(0)
    rank, turned = layer.kv_lora_rank, layer.qk_rope_head_dim
    latent, rotated = (torch.randn(1, 1, 2, n, generator=draw).to(first) for n in (rank, turned))
    with torch.no_grad():
        keys, values = _own(layer)(latent, rotated)
        heads = first.shape[0]
        wanted = (torch.cat([latent @ first.mT, rotated.expand(-1, heads, -1, -1)], 3), latent @ second)
    for found, other in zip((keys, values), wanted):
        off = found.shape != other.shape or not torch.allclose(found.float(), other.float(), rtol=0.02, atol=1e-3)
        if off:
            raise _refusal(f"{name} ({type(layer).__name__}) expands its latents by more than `kv_b_proj`")


def _refusal(what: str) -> EffError:
    return EffError(
        "EFF-K205",
        f"{what}, and a compressed cache of latents (MLA) is read through the rows of that linear layer",
        hint="the model's own cache, whose latents are few numbers a token",
    )
