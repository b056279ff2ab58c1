"""Text encoders."""

from __future__ import annotations

import functools
from typing import Any

from tests.support.hf_zoo.inputs import VOCAB, padding, token_ids
from tests.support.hf_zoo.matrix import Call, Kwargs, MatrixCase
from tests.support.hf_zoo.weights import hugging_face

HIDDEN = 32


def cases() -> tuple[MatrixCase, ...]:
    """Return one case a model; none sees a cache, and a padding mask is the only mask."""
    bert: dict[str, Any] = {
        "vocab_size": VOCAB,
        "hidden_size": HIDDEN,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 48,
        "max_position_embeddings": 64,
    }
    distilbert = {"vocab_size": VOCAB, "dim": HIDDEN, "n_layers": 2, "n_heads": 4, "hidden_dim": 48}
    modernbert = {
        **bert,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "cls_token_id": 1,
        "sep_token_id": 2,
        "local_attention": 8,
        "layer_types": ["full_attention", "sliding_attention"],
    }
    calls = _calls()
    return (
        MatrixCase("bert", "encoder", hugging_face("BertConfig", "BertModel", **bert), calls),
        MatrixCase(
            "bert-eager", "encoder", hugging_face("BertConfig", "BertModel", attn_implementation="eager", **bert), calls
        ),
        MatrixCase(
            "roberta",
            "encoder",
            hugging_face("RobertaConfig", "RobertaModel", **bert),
            calls,
            "positions are the cumulative sum of tokens that are not the padding id",
            twin="bert",
        ),
        MatrixCase(
            "distilbert",
            "encoder",
            hugging_face("DistilBertConfig", "DistilBertModel", **distilbert),
            calls,
            twin="bert",
        ),
        MatrixCase(
            "modernbert",
            "encoder",
            hugging_face("ModernBertConfig", "ModernBertModel", **modernbert),
            calls,
            "full and two-sided sliding layers; two rotary bases; one linear for q, k, v",
        ),
    )


def _calls() -> tuple[Call, ...]:
    return (
        Call("plain", _plain, _shapes),
        Call("left_pad", functools.partial(_padded, "left"), _shapes),
        Call("right_pad", functools.partial(_padded, "right"), _shapes, batch=3),
    )


def _shapes(batch: int, length: int) -> dict[str, tuple[int, ...]]:
    return {"last_hidden_state": (batch, length, HIDDEN)}


def _plain(batch: int, length: int, seed: int) -> Kwargs:
    return {"input_ids": token_ids(batch, length, seed)}


def _padded(side: str, batch: int, length: int, seed: int) -> Kwargs:
    return {"input_ids": token_ids(batch, length, seed), "attention_mask": padding(batch, length, seed, side)}
