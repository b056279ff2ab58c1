"""List what is exported to ONNX: the model matrix, and more architectures of transformers and diffusers from small configurations.

Decoders are exported with their cache; everything else with one call of the matrix.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

from tests.support.hf_zoo import case
from tests.support.hf_zoo.decoders import decoder_fields
from tests.support.hf_zoo.weights import hugging_face


@dataclass(frozen=True)
class ExportCase:
    """Name a model, its family, how to build it, and the call of it; without a call it is a decoder with a cache."""

    name: str
    family: str
    build: Callable[[], nn.Module]
    call: Callable[[], dict[str, Any]] | None = None


CALLS = {"bert": "right_pad", "roberta": "right_pad", "distilbert": "right_pad", "modernbert": "right_pad"}
LEFT_OUT = {"llama-eager", "llama-flex", "gpt2-eager", "bert-eager"}
"""Other spellings of a model that is there already."""


def export_cases() -> tuple[ExportCase, ...]:
    """Return every case, decoders first."""
    from tests.support.hf_zoo import cases

    found = []
    for item in cases():
        if item.name in LEFT_OUT:
            continue
        if item.family in ("decoder", "moe"):
            found.append(ExportCase(item.name, item.family, item.build))
        else:
            name = CALLS.get(item.name, item.calls[0].name)
            found.append(ExportCase(item.name, item.family, item.build, _call(item.name, name)))
    return tuple(sorted([*found, *_more()], key=lambda item: _FAMILIES.index(item.family)))


_FAMILIES = ("decoder", "moe", "encoder", "vision", "seq2seq", "speech", "diffusion")


def _call(name: str, call: str) -> Callable[[], dict[str, Any]]:
    def make() -> dict[str, Any]:
        found = case(name).call(call)
        kwargs = found.make(found.batch, found.length, 0)
        return {**kwargs, "use_cache": False} if case(name).family in ("seq2seq", "speech") else kwargs

    return make


def _more() -> tuple[ExportCase, ...]:
    plain = decoder_fields()
    equal = {**plain, "num_key_value_heads": 4}
    experts = decoder_fields(num_experts=8, num_experts_per_tok=2, intermediate_size=16)
    decoders = (
        ("gemma", "GemmaConfig", "GemmaForCausalLM", {**plain, "head_dim": 8}),
        ("smollm3", "SmolLM3Config", "SmolLM3ForCausalLM", plain),
        ("granite", "GraniteConfig", "GraniteForCausalLM", plain),
        ("olmo", "OlmoConfig", "OlmoForCausalLM", plain),
        ("stablelm", "StableLmConfig", "StableLmForCausalLM", plain),
        ("starcoder2", "Starcoder2Config", "Starcoder2ForCausalLM", plain),
        ("phi", "PhiConfig", "PhiForCausalLM", plain),
        ("cohere", "CohereConfig", "CohereForCausalLM", plain),
        ("glm", "GlmConfig", "GlmForCausalLM", {**plain, "head_dim": 8}),
        ("helium", "HeliumConfig", "HeliumForCausalLM", {**plain, "head_dim": 8}),
        ("nemotron", "NemotronConfig", "NemotronForCausalLM", plain),
        ("ministral", "MinistralConfig", "MinistralForCausalLM", {**plain, "head_dim": 8, "sliding_window": 8}),
        ("gptj", "GPTJConfig", "GPTJForCausalLM", {"vocab_size": 96, "n_embd": 32, "n_layer": 2, "n_head": 4,
            "n_positions": 128, "rotary_dim": 4, "bos_token_id": 1, "eos_token_id": 2}),
        ("gpt-bigcode", "GPTBigCodeConfig", "GPTBigCodeForCausalLM", {"vocab_size": 96, "n_embd": 32, "n_layer": 2,
            "n_head": 4, "n_positions": 128, "bos_token_id": 1, "eos_token_id": 2}),
        ("falcon", "FalconConfig", "FalconForCausalLM", {"vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 2,
            "num_attention_heads": 4, "bos_token_id": 1, "eos_token_id": 2}),
    )  # fmt: skip
    moes = (
        ("olmoe", "OlmoeConfig", "OlmoeForCausalLM", experts),
        ("qwen2-moe", "Qwen2MoeConfig", "Qwen2MoeForCausalLM", {**experts, "moe_intermediate_size": 16,
            "shared_expert_intermediate_size": 24}),
        ("granite-moe", "GraniteMoeConfig", "GraniteMoeForCausalLM", {**plain, "num_local_experts": 4,
            "num_experts_per_tok": 2, "intermediate_size": 24}),
        ("deepseek-v2", "DeepseekV2Config", "DeepseekV2ForCausalLM", {**equal, "moe_intermediate_size": 16,
            "n_routed_experts": 8, "n_group": 2, "topk_group": 1, "num_experts_per_tok": 2, "first_k_dense_replace": 1,
            "q_lora_rank": 16, "kv_lora_rank": 12, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 6}),
    )  # fmt: skip
    made = [ExportCase(n, "decoder", hugging_face(c, m, **f)) for n, c, m, f in decoders]
    return (*made, *(ExportCase(n, "moe", hugging_face(c, m, **f)) for n, c, m, f in moes))
