"""Dense decoder-only language models."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from torch import nn

from tests.support.hf_zoo.flex import flex
from tests.support.hf_zoo.inputs import STEPS, VOCAB, dynamic_cache, grown, padding, static_cache, token_ids
from tests.support.hf_zoo.matrix import Call, Decode, Kwargs, MatrixCase
from tests.support.hf_zoo.weights import hugging_face

WINDOW = 8  # smaller than the 24 positions of a call, so that a sliding layer forgets within it


def cases() -> tuple[MatrixCase, ...]:
    """Return one case a model, grouped by how it marks positions."""
    return _rotary() + _sliding() + _learned_positions() + _linear_bias()


def decoder_calls(*more: Call) -> tuple[Call, ...]:
    """Return the calls that every decoder gets, then `more`."""
    return (
        Call("plain", _plain, logits),
        Call("nocache", _nocache, logits),
        Call("left_pad", functools.partial(_padded, "left"), logits),
        Call("right_pad", functools.partial(_padded, "right"), logits, batch=3),
        Call("decode", _plain, logits, decode=Decode(dynamic_cache, _steps)),
        *more,
    )


def static_decode() -> Call:
    """Return prefill and steps through a cache of fixed size."""
    return Call("decode_static", _plain, logits, decode=Decode(static_cache, _steps))


def padded_decode() -> Call:
    """Return prefill and steps of a left-padded batch, whose mask grows with every token."""
    steps = functools.partial(_padded_steps, "left")
    first = functools.partial(_padded, "left")
    # Short, so that pads are still within a sliding window when the steps come.
    return Call("decode_left_pad", first, logits, length=10, decode=Decode(dynamic_cache, steps))


def logits(batch: int, length: int) -> dict[str, tuple[int, ...]]:
    """Return the shape of a language model's output."""
    return {"logits": (batch, length, VOCAB)}


def decoder_fields(**fields: Any) -> dict[str, Any]:
    """Return the sizes that most decoder configurations spell alike, with `fields` added or replaced."""
    sizes = {
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    return {**sizes, **fields}


def _case(
    name: str, build: Callable[[], nn.Module], *more: Call, notes: str = "", twin: str | None = None
) -> MatrixCase:
    return MatrixCase(name, "decoder", build, decoder_calls(*more), notes, twin)


def _rotary() -> tuple[MatrixCase, ...]:
    both = (static_decode(), padded_decode())
    llama = decoder_fields()
    return (
        _case("llama", hugging_face("LlamaConfig", "LlamaForCausalLM", **llama), *both),
        _case(
            "llama-eager",
            hugging_face("LlamaConfig", "LlamaForCausalLM", attn_implementation="eager", **llama),
            static_decode(),
            notes="matmul, mask add, softmax in float32, dropout, matmul; repeated keys and values",
        ),
        MatrixCase(
            "llama-flex",
            "decoder",
            flex("LlamaConfig", "LlamaForCausalLM", **llama),
            (Call("nocache", _nocache, logits), Call("left_pad", functools.partial(_padded_nocache, "left"), logits)),
            notes="flex_attention whose BlockMask is made in the same graph, which Dynamo breaks at a dynamic cache",
        ),
        _case(
            "qwen2", hugging_face("Qwen2Config", "Qwen2ForCausalLM", **llama), notes="biases on q, k, v", twin="llama"
        ),
        _case(
            "qwen3",
            hugging_face("Qwen3Config", "Qwen3ForCausalLM", head_dim=16, **llama),
            notes="RMSNorm on q and k; heads wider than hidden_size / heads",
            twin="llama",
        ),
        _case(
            "phi3",
            hugging_face("Phi3Config", "Phi3ForCausalLM", **llama),
            notes="one linear for q, k, v, split by slices",
            twin="llama",
        ),
        _case(
            "gpt-neox",
            hugging_face("GPTNeoXConfig", "GPTNeoXForCausalLM", **_without(llama, "num_key_value_heads")),
            notes="q, k, v interleaved per head; rotary on a quarter of each head; parallel residual",
            twin="llama",
        ),
        _case(
            "olmo2",
            hugging_face("Olmo2Config", "Olmo2ForCausalLM", **llama),
            notes="RMSNorm over the whole q and k before the split into heads",
            twin="llama",
        ),
    )


def _sliding() -> tuple[MatrixCase, ...]:
    both = (static_decode(), padded_decode())
    mixed = decoder_fields(sliding_window=WINDOW, layer_types=["sliding_attention", "full_attention"])
    return (
        _case(
            "mistral",
            hugging_face("MistralConfig", "MistralForCausalLM", **decoder_fields(sliding_window=WINDOW)),
            *both,
            notes="every layer slides",
        ),
        _case(
            "gemma2",
            hugging_face("Gemma2Config", "Gemma2ForCausalLM", head_dim=8, query_pre_attn_scalar=8, **mixed),
            notes="soft caps on attention and final logits; eager attention by default, as SDPA has no soft cap",
        ),
        _case(
            "gemma3",
            hugging_face("Gemma3TextConfig", "Gemma3ForCausalLM", head_dim=8, query_pre_attn_scalar=8, **mixed),
            *both,
            notes="two rotary bases, one a layer type; RMSNorm on q and k",
        ),
        _case(
            "cohere2",
            hugging_face("Cohere2Config", "Cohere2ForCausalLM", **mixed),
            notes="rotary only on sliding layers; interleaved rotary; parallel residual",
            twin="gemma3",
        ),
    )


def _learned_positions() -> tuple[MatrixCase, ...]:
    gpt2 = {
        "vocab_size": VOCAB,
        "n_embd": 32,
        "n_layer": 2,
        "n_head": 4,
        "n_positions": 128,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    opt = _without(decoder_fields(ffn_dim=48, word_embed_proj_dim=32), "intermediate_size", "num_key_value_heads")
    return (
        _case(
            "gpt2", hugging_face("GPT2Config", "GPT2LMHeadModel", **gpt2), padded_decode(), notes="addmm, not linear"
        ),
        _case(
            "gpt2-eager",
            hugging_face("GPT2Config", "GPT2LMHeadModel", attn_implementation="eager", **gpt2),
            notes="softmax in the scores' own dtype",
        ),
        _case(
            "opt",
            hugging_face("OPTConfig", "OPTForCausalLM", **opt),
            notes="positions are the cumulative sum of the attention mask; q scaled before attention",
        ),
    )


def _linear_bias() -> tuple[MatrixCase, ...]:
    bloom = {"vocab_size": VOCAB, "hidden_size": 32, "n_layer": 2, "n_head": 4, "pad_token_id": 3}
    mpt = {"vocab_size": VOCAB, "d_model": 32, "n_heads": 4, "n_layers": 2, "expansion_ratio": 2, "max_seq_len": 64}
    return (
        _case("bloom", hugging_face("BloomConfig", "BloomForCausalLM", **bloom), notes="ALiBi through baddbmm"),
        _case("mpt", hugging_face("MptConfig", "MptForCausalLM", **mpt), notes="ALiBi added to the scores"),
    )


def _without(fields: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if name not in names}


def _plain(batch: int, length: int, seed: int) -> Kwargs:
    return {"input_ids": token_ids(batch, length, seed)}


def _nocache(batch: int, length: int, seed: int) -> Kwargs:
    return {"input_ids": token_ids(batch, length, seed), "use_cache": False}


def _padded(side: str, batch: int, length: int, seed: int) -> Kwargs:
    return {
        "input_ids": token_ids(batch, length, seed),
        "attention_mask": padding(batch, length, seed, side),
    }


def _padded_nocache(side: str, batch: int, length: int, seed: int) -> Kwargs:
    return {**_padded(side, batch, length, seed), "use_cache": False}


def _steps(batch: int, length: int, seed: int) -> tuple[Kwargs, ...]:
    tokens = token_ids(batch, STEPS, seed + 1)
    return tuple({"input_ids": tokens[:, step : step + 1]} for step in range(STEPS))


def _padded_steps(side: str, batch: int, length: int, seed: int) -> tuple[Kwargs, ...]:
    mask = padding(batch, length, seed, side)
    return tuple(
        {**step, "attention_mask": grown(mask, index + 1)} for index, step in enumerate(_steps(batch, length, seed))
    )
