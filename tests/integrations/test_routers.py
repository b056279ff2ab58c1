"""Prepare and compile models whose routers differ: the same tokens to the same experts, so that logits are those of the source."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import effcompile as eff
from tests.support import experts as support

pytest.importorskip("transformers.integrations.moe")

SIZES: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 24,
    "moe_intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "num_experts_per_tok": 2,
    "num_local_experts": 4,
}
LATENT = {"q_lora_rank": 16, "kv_lora_rank": 12, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 6}
GROUPS = {"n_routed_experts": 8, "n_group": 2, "topk_group": 1, "first_k_dense_replace": 0}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "softmax-renormalized": ("Mixtral", {}),
    "softmax": ("Olmoe", {"num_experts": 8, "norm_topk_prob": False}),
    "shared-expert-behind-a-sigmoid": (
        "Qwen2Moe",
        {"num_experts": 8, "shared_expert_intermediate_size": 24, "decoder_sparse_step": 1},
    ),
    "softmax-over-the-chosen": ("GraniteMoe", {}),
    "groups-by-their-best": ("DeepseekV2", {**LATENT, **GROUPS, "topk_method": "group_limited_greedy"}),
    "groups-by-their-best-two": ("DeepseekV3", {**LATENT, **GROUPS, "head_dim": 4}),
    "groups-and-scale": ("Glm4Moe", {**GROUPS, "routed_scaling_factor": 1.5}),
    "sigmoid-and-bias": ("Dots1", {**GROUPS, "n_shared_experts": 1}),
    "softmax-bias-and-a-least-sum": ("Ernie4_5_Moe", {"moe_num_experts": 4, "moe_k": 2, "moe_layer_start_index": 0}),
    "sparse-mixer": ("Phimoe", {"router_jitter_noise": 0.01}),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_a_router_sends_tokens_where_the_source_sends_them(name: str) -> None:
    import transformers

    family, fields = MODELS[name]
    config = getattr(transformers, f"{family}Config")(**{**SIZES, **fields})
    torch.manual_seed(0)
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    for key, buffer in model.named_buffers():
        if "bias" in key:  # a correction that decides who is chosen
            buffer.copy_(torch.randn(buffer.shape, generator=torch.Generator().manual_seed(1)))
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
    ids = torch.randint(1, 97, (2, 17), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        model.set_experts_implementation("eager")
        wanted = model(ids, use_cache=False).logits
        eff.prepare(model)
        torch._dynamo.reset()
        options = {"strict": True, "emit": "interpreter", "require": {"moe": "all"}}
        found = torch.compile(model, backend="eff", fullgraph=True, options=options)(ids, use_cache=False).logits
    assert support.error(found, wanted.double()) < 1e-5
    sites = eff.report()["graphs"][-1]["experts"]
    assert sites
    assert {site["dispatch"] for site in sites} == {"fused"}
