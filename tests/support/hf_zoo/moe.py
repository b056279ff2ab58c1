"""Decoder-only language models with a mixture of experts."""

from __future__ import annotations

from tests.support.hf_zoo.decoders import WINDOW, decoder_calls, decoder_fields
from tests.support.hf_zoo.matrix import MatrixCase
from tests.support.hf_zoo.weights import hugging_face


def cases() -> tuple[MatrixCase, ...]:
    """Return one case a model. All use transformers' default experts, grouped matrix multiplication."""
    deepseek = decoder_fields(
        num_key_value_heads=4,
        moe_intermediate_size=16,
        n_routed_experts=8,
        n_group=2,
        topk_group=1,
        num_experts_per_tok=2,
        first_k_dense_replace=1,
        q_lora_rank=16,
        kv_lora_rank=12,
        qk_nope_head_dim=8,
        qk_rope_head_dim=4,
        v_head_dim=6,
    )
    gpt_oss = decoder_fields(
        head_dim=8,
        max_position_embeddings=131072,  # what its default YaRN rotary is scaled for; no table has that size
        num_local_experts=4,
        num_experts_per_tok=2,
        sliding_window=WINDOW,
        layer_types=["sliding_attention", "full_attention"],
    )
    mixtral = decoder_fields(num_local_experts=4, num_experts_per_tok=2, intermediate_size=24)
    qwen3 = decoder_fields(num_experts=8, num_experts_per_tok=2, moe_intermediate_size=16, norm_topk_prob=True)
    return (
        MatrixCase(
            "deepseek-v3",
            "moe",
            hugging_face("DeepseekV3Config", "DeepseekV3ForCausalLM", **deepseek),
            decoder_calls(),
            "latent attention: keys 12 wide, values 6; first layer dense; sigmoid scores pick experts within groups",
        ),
        MatrixCase(
            "gpt-oss",
            "moe",
            hugging_face("GptOssConfig", "GptOssForCausalLM", **gpt_oss),
            decoder_calls(),
            "a learned sink logit a head; sliding and full layers; eager attention by default; biased, clamped experts",
        ),
        MatrixCase(
            "mixtral",
            "moe",
            hugging_face("MixtralConfig", "MixtralForCausalLM", **mixtral),
            decoder_calls(),
            "softmax over all experts, then the best two",
        ),
        MatrixCase(
            "qwen3-moe",
            "moe",
            hugging_face("Qwen3MoeConfig", "Qwen3MoeForCausalLM", head_dim=16, **qwen3),
            decoder_calls(),
            "RMSNorm on q and k; normalized weights of the best experts",
            twin="mixtral",
        ),
    )
