"""Give transformers models a compressed KV cache, in plain calls, in `generate` and in compiled code, without changing them.

`prepare` sets the model's attention to the interface `eff`, which is SDPA except where keys come from a cache of ours, and lets
the model build that cache wherever it would build one of its own. The cache's layers hand out a `Held` in place of keys, because
unpacked ones never exist. The mask stays the model's: `eff` has SDPA's mask function, without which transformers passes no mask.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from effcompile import ops
from effcompile.compiler import all_methods
from effcompile.core.cache import CacheFormat
from effcompile.core.errors import EffError
from effcompile.core.eviction import CacheEviction, Rotation
from effcompile.core.policy import Policy, read_policy
from effcompile.integrations.transformers_experts import prepare_experts
from effcompile.integrations.transformers_held import Held
from effcompile.integrations.transformers_latent import attend_latents, find_latents, keep_latents
from effcompile.integrations.transformers_sites import Latents
from effcompile.ops import native
from effcompile.runtime.paged import PAGE, Reading
from effcompile.runtime.sliding import ROOM

INTERFACE = "eff"
OWN_BUFFERS = "where the cache is the model's own buffers: eff.prepare(torch.export.export(model, inputs), kv=...)"
OWN = (None, "dynamic", "static", "hybrid", "sliding_window")
"""Values of `cache_implementation` in whose place a prepared model builds its own cache."""


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor | Held,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Attend as transformers' interface says: query `[B, Hq, Q, D]`, returns `[B, Q, Hq, Dv]` and no probabilities.

    Raises:
        EffError: EFF-K205 for dropout, probabilities or a bias per position, which attention over a packed cache does not have.
    """
    if not isinstance(key, Held):
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        found: tuple[Tensor, None] = sdpa_attention_forward(
            module,
            query,
            key,
            value,
            attention_mask,
            dropout=dropout,
            scaling=scaling,
            is_causal=is_causal,
            **kwargs,
        )
        return found
    asked = {"dropout": bool(dropout), "output_attentions": kwargs.get("output_attentions")}
    asked["position_bias"] = kwargs.get("position_bias") is not None
    if any(asked.values()):
        words = ", ".join(name for name, given in asked.items() if given)
        raise EffError(
            "EFF-K205", f"attention over a compressed cache has no {words}", hint="model.eval(), or another cache"
        )
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    # One query sees every token that there is, so without a mask only several queries need their order.
    causal = bool(causal) and attention_mask is None and query.shape[2] > 1
    scale = query.shape[3] ** -0.5 if scaling is None else float(scaling)
    softcap = float(kwargs.get("softcap") or 0.0)
    if key.layer.site.layout == "mla":
        return attend_latents(module, query, key, value, attention_mask, causal, scale, softcap), None
    out, lse = key.layer.attend(query.to(key.dtype), key.keys, value, attention_mask, causal, scale, softcap)
    sinks = kwargs.get("s_aux")
    if sinks is not None:  # one more score in each row, whose column is dropped again
        out = (out * torch.sigmoid(lse - sinks.to(lse.dtype)[:, None])[..., None]).to(out.dtype)
    return out.transpose(1, 2).contiguous(), None


@dataclass(frozen=True)
class Preparation:
    """Say what a prepared model builds in place of its own cache."""

    format: CacheFormat
    evict: CacheEviction | None
    rotation: Rotation | None
    """How the model turns queries, where `evict` needs it."""
    reading: Reading | None
    capacity: int | None
    places: int
    """Positional arguments before `past_key_values` in a call of the model."""
    classes: tuple[Any, Any]
    """What a cache is made of, found once: a compiled call that builds its cache cannot ask for it."""
    latents: Latents
    """Which layers keep latents, and of how many channels."""


def prepare(
    model: nn.Module,
    *,
    kv: str | CacheFormat | None = None,
    evict: str | CacheEviction | None = None,
    attention: str | Policy | None = None,
    capacity: int | None = None,
) -> Any:
    """Let a transformers model run its experts through `eff::moe_v1` and keep its KV cache in a compressed form, and return it.

    Experts are prepared always (integrations/transformers_experts.py), the cache where `kv` or `evict` asks for it.

    Args:
        model: a transformers model, for `kv` and `evict` one that generates text, or any model with loops over a list of experts,
            changed in place; or an ExportedProgram whose caches are its own buffers, of which a module with packed buffers is made
            (`integrations/exported.py`).
        kv: a cache format as `eff passes` spells it, such as `kivi{bits=4}`; None stores tokens as they are.
        evict: which tokens stay, such as `snapkv{budget=1024}`; None keeps all. Without both the model gets its own cache back.
        attention: `quest{page=64}` or `block-topk{page=64}`: a step reads the pages of the cache that it chooses; None reads all.
        capacity: tokens that a context may have; None lets `generate` choose what it needs, and caches of plain calls grow.

    Raises:
        EffError: EFF-U014, EFF-U003 or EFF-U004 for a misspelled format or eviction, EFF-K204 for a format that cannot store this
            model, EFF-K205 for a model whose attention cannot read such a cache, EFF-K206 for an eviction that needs to know
            how the model turns queries, and cannot, EFF-U104 without transformers.
    """
    if isinstance(model, torch.export.ExportedProgram):
        return _exported(model, kv, evict)
    prepare_experts(model)  # of any model: loops over a list of experts are not transformers' alone
    if kv is None and evict is None and attention is None:
        model.__dict__.pop("_eff_kv", None)
        return model
    _require()
    from effcompile.integrations.transformers_cache import build, classes

    form = read_format("plain" if kv is None else kv)
    policy = None if evict is None else read_eviction(evict)
    reading = None if attention is None else read_pages(attention)
    _switch(model)
    turned = _rotation(model, policy)
    model.__dict__.pop("_eff_kv", None)
    latents = find_latents(model)
    # What is refused is known here, before anything runs.
    build(classes(), model.config, form, capacity, policy, turned, reading, latents)
    keep_latents(model)
    if model.device.type == "cpu":
        native.prefetch((native.CACHES,))
    model.__dict__["_eff_kv"] = Preparation(
        form, policy, turned, reading, capacity, _places(type(model).forward), classes(), latents
    )
    if "_eff_own_cache" not in model.__dict__:
        model.register_forward_pre_hook(_give_cache, with_kwargs=True)
        own = model.__dict__["_eff_own_cache"] = model._prepare_cache_for_generation
        model.__dict__["_prepare_cache_for_generation"] = functools.partial(_prepare_for_generation, model, own)
    return model


def _exported(program: torch.export.ExportedProgram, kv: Any, evict: Any) -> Any:
    from effcompile.integrations.exported import prepare_exported

    if evict is not None or kv is None:
        raise EffError(
            "EFF-K205",
            "an exported program keeps all tokens of its caches",
            hint="eff.prepare(program, kv=...), without evict",
        )
    return prepare_exported(program, kv)


def read_format(kv: str | CacheFormat) -> CacheFormat:
    """Return a cache format from its spelling."""
    if isinstance(kv, CacheFormat):
        return kv
    found = read_policy("kv", kv, all_methods())
    assert isinstance(found, CacheFormat)
    return found


def read_eviction(evict: str | CacheEviction) -> CacheEviction:
    """Return an eviction from its spelling."""
    if isinstance(evict, CacheEviction):
        return evict
    found = read_policy("evict", evict, all_methods())
    assert isinstance(found, CacheEviction)
    return found


def read_pages(attention: str | Policy) -> Reading:
    """Return how steps read a cache, from the spelling of a policy that chooses pages.

    Raises:
        EffError: EFF-K206 for a policy that chooses no pages, or pages that are no multiples of what the kernels skip.
    """
    policy = attention if isinstance(attention, Policy) else read_policy("attention", attention, all_methods())
    if policy.name not in ("quest", "block-topk"):
        raise EffError(
            "EFF-K206", f"`{policy.name}` chooses no pages of a cache", hint="quest{page=64}, block-topk{page=64}"
        )
    budget, page, dense = (int(getattr(policy, name)) for name in ("budget", "page", "dense_layers"))
    if page % PAGE:
        raise EffError(
            "EFF-K206",
            f"pages of {page} tokens of `{policy.name}`: a cache is read in multiples of {PAGE}",
            hint=f"{policy.name}{{page={PAGE}}}",
        )
    return Reading(budget, page, policy.name == "quest", policy.spelled, dense)


def _rotation(model: nn.Module, policy: CacheEviction | None) -> Rotation | None:
    if policy is None or not policy.turns:
        return None
    from effcompile.integrations.transformers_rope import needed

    return needed(model, model.config)


def kv_cache(
    model: nn.Module,
    kv: str | CacheFormat | None = None,
    *,
    evict: str | CacheEviction | None = None,
    attention: str | Policy | None = None,
    capacity: int | None = None,
    batch: int | None = None,
) -> Any:
    """Return an empty compressed cache for `past_key_values=` of a prepared model: a transformers `Cache`.

    Args:
        model: the model, prepared or not yet.
        kv: the format; None takes what the model was prepared with, or stores tokens as they are where only `evict` is given.
        evict: which tokens stay; None takes what the model was prepared with, where `kv` is None too.
        attention: which pages a step reads; None takes what the model was prepared with, where the other two are None too.
        capacity: tokens; None takes what the model was prepared with, and where that says nothing either the cache grows as tokens
            arrive, in eager calls only.
        batch: make the tensors at once, for so many sequences; else they are made when the first tokens arrive.
    """
    _require()
    prepared: Preparation | None = model.__dict__.get("_eff_kv")
    turned = reading = None
    if kv is None and evict is None and attention is None:
        if prepared is None:
            raise EffError(
                "EFF-K205", "the model was not prepared and no format is named", hint='eff.prepare(model, kv="...")'
            )
        form, policy, turned, reading = prepared.format, prepared.evict, prepared.rotation, prepared.reading
    else:
        own = "plain" if prepared is None else prepared.format
        form = read_format(own if kv is None else kv)
        policy = None if evict is None else read_eviction(evict)
        reading = None if attention is None else read_pages(attention)
        turned = _rotation(model, policy)
    if capacity is None and prepared is not None:
        capacity = prepared.capacity
    from effcompile.integrations.transformers_cache import build, classes

    made = classes() if prepared is None else prepared.classes
    latents = find_latents(model) if prepared is None else prepared.latents
    cache = build(made, model.config, form, capacity, policy, turned, reading, latents)
    if batch is not None:
        cache.early_initialization(batch, *cache.dimensions, model.dtype, model.device)
    return cache


def _switch(model: nn.Module) -> None:
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    if not hasattr(model, "_prepare_cache_for_generation") or getattr(model.config, "is_encoder_decoder", False):
        raise EffError(
            "EFF-K205",
            f"{type(model).__name__} is no decoder of transformers that generates text",
            hint=f"prepare the model that has generate(); {OWN_BUFFERS}",
        )
    if model.config._attn_implementation == INTERFACE:
        return
    ops.register()
    AttentionInterface.register(INTERFACE, attention)
    AttentionMaskInterface.register(INTERFACE, sdpa_mask)
    if model._can_set_attn_implementation():
        model.set_attn_implementation(INTERFACE)
    if model.config._attn_implementation != INTERFACE:
        raise EffError(
            "EFF-K205",
            f"the attention of {type(model).__name__} does not go through transformers' AttentionInterface",
            hint="a model of transformers 5, whose attention is set by set_attn_implementation()",
        )


def _give_cache(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Let a plain call that would make a cache of its own make ours."""
    prepared: Preparation | None = model.__dict__.get("_eff_kv")
    if prepared is None or kwargs.get("past_key_values") is not None or prepared.places < len(args):
        return None
    wanted = kwargs.get("use_cache")
    if not (model.config.use_cache if wanted is None else wanted) or model.training:
        return None
    return args, {**kwargs, "past_key_values": kv_cache(model)}


def _places(forward: Callable[..., Any]) -> int:
    """Return how many positional arguments come before `past_key_values`."""
    names = [name for name in inspect.signature(forward).parameters if name != "self"]
    return names.index("past_key_values") if "past_key_values" in names else len(names)


def _prepare_for_generation(model: nn.Module, own: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Put our cache in the place of the one that `generate` is about to make."""
    prepared: Preparation | None = model.__dict__.get("_eff_kv")
    given: Mapping[str, Any] = inspect.signature(own).bind(*args, **kwargs).arguments
    config, inputs = given["generation_config"], given["model_kwargs"]
    wanted = config.use_cache is not False and config.cache_implementation in OWN
    if prepared is not None and wanted and inputs.get("past_key_values") is None:
        mode = given["generation_mode"]
        # Candidates of a draft model may go beyond the last token, and are taken back.
        needed = given["max_cache_length"] + (ROOM if "assisted" in str(getattr(mode, "value", mode)) else 0)
        if prepared.capacity is not None and prepared.capacity < needed:
            raise EffError(
                "EFF-K201",
                f"generate may need {needed} tokens, and the model was prepared for {prepared.capacity}; nothing has run",
                hint=f"capacity={needed} or more, or none at all",
            )
        inputs["past_key_values"] = kv_cache(
            model, capacity=prepared.capacity or max(needed, getattr(config, "max_cache_len", None) or 0)
        )
        return None
    return own(*args, **kwargs)


def _require() -> None:
    try:
        import transformers  # noqa: F401
    except ImportError as error:
        raise EffError("EFF-U104", "transformers is not installed", hint="pip install 'effcompile[hf]'") from error
