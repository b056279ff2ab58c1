"""Encoder-decoder models of text and of speech."""

from __future__ import annotations

from typing import Any

from tests.support.hf_zoo.inputs import STEPS, VOCAB, padding, pair_cache, token_ids, values
from tests.support.hf_zoo.matrix import Call, Decode, Kwargs, MatrixCase
from tests.support.hf_zoo.weights import hugging_face

HIDDEN = 32
MEL = 16
PROMPT = 6  # positions of the decoder's prompt


def cases() -> tuple[MatrixCase, ...]:
    """Return one case a model; `length` counts what the encoder sees, the decoder starts from `PROMPT` tokens."""
    return _text() + _speech()


def _text() -> tuple[MatrixCase, ...]:
    t5 = {"vocab_size": VOCAB, "d_model": HIDDEN, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
    bart = {"vocab_size": VOCAB, "max_position_embeddings": 64, **_layers()}
    calls = (
        Call("plain", _text_inputs, _logits),
        Call("nocache", _text_without_cache, _logits),
        Call("right_pad", _padded_text, _logits, batch=3),
        Call("decoder_pad", _padded_twice, _logits, batch=3),
        Call("decode", _text_inputs, _logits, decode=Decode(pair_cache, _steps, _encoded)),
        Call("decode_right_pad", _padded_text, _logits, decode=Decode(pair_cache, _padded_steps, _encoded)),
    )
    return (
        MatrixCase(
            "t5",
            "seq2seq",
            hugging_face("T5Config", "T5ForConditionalGeneration", decoder_start_token_id=0, **t5),
            calls,
            "a learned bias by bucketed relative position, shared by the layers; scores are not scaled",
        ),
        MatrixCase("bart", "seq2seq", hugging_face("BartConfig", "BartForConditionalGeneration", **bart), calls),
    )


def _speech() -> tuple[MatrixCase, ...]:
    tokens = {"vocab_size": VOCAB, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
    whisper = {"num_mel_bins": MEL, "max_source_positions": 24, "max_target_positions": 32, **tokens, **_layers()}
    speech2text = {
        "input_feat_per_channel": MEL,
        "conv_channels": 24,
        "max_source_positions": 64,
        "max_target_positions": 32,
        **tokens,
        **_layers(),
    }
    return (
        MatrixCase(
            "whisper",
            "speech",
            hugging_face("WhisperConfig", "WhisperForConditionalGeneration", **whisper),
            (
                Call("plain", _whisper_inputs, _logits),
                Call("nocache", _whisper_without_cache, _logits),
                Call("decoder_pad", _whisper_padded, _logits, batch=3),
                Call("decode", _whisper_inputs, _logits, decode=Decode(pair_cache, _steps, _encoded)),
            ),
            "the encoder takes exactly two frames a position, without mask; k has no bias",
        ),
        MatrixCase(
            "speech2text",
            "speech",
            hugging_face("Speech2TextConfig", "Speech2TextForConditionalGeneration", **speech2text),
            (
                Call("plain", _frames, _logits),
                Call("right_pad", _padded_frames, _logits, batch=3),
                Call("decode", _frames, _logits, decode=Decode(pair_cache, _steps, _encoded)),
            ),
            "eager attention only; the mask of the frames is shortened as the convolutions shorten them",
        ),
    )


def _layers() -> dict[str, int]:
    return {
        "d_model": HIDDEN,
        "encoder_layers": 2,
        "decoder_layers": 2,
        "encoder_attention_heads": 4,
        "decoder_attention_heads": 4,
        "encoder_ffn_dim": 48,
        "decoder_ffn_dim": 48,
    }


def _logits(batch: int, length: int) -> dict[str, tuple[int, ...]]:
    return {"logits": (batch, PROMPT, VOCAB)}


def _encoded(result: Any) -> Kwargs:
    from transformers.modeling_outputs import BaseModelOutput

    return {"encoder_outputs": BaseModelOutput(last_hidden_state=result.encoder_last_hidden_state)}


def _steps(batch: int, length: int, seed: int) -> tuple[Kwargs, ...]:
    tokens = token_ids(batch, STEPS, seed + 1)
    return tuple({"decoder_input_ids": tokens[:, step : step + 1]} for step in range(STEPS))


def _padded_steps(batch: int, length: int, seed: int) -> tuple[Kwargs, ...]:
    mask = padding(batch, length, seed, "right")
    return tuple({**step, "attention_mask": mask} for step in _steps(batch, length, seed))


def _prompt(batch: int, seed: int) -> Kwargs:
    return {"decoder_input_ids": token_ids(batch, PROMPT, seed + 2)}


def _text_inputs(batch: int, length: int, seed: int) -> Kwargs:
    return {"input_ids": token_ids(batch, length, seed), **_prompt(batch, seed)}


def _text_without_cache(batch: int, length: int, seed: int) -> Kwargs:
    return {**_text_inputs(batch, length, seed), "use_cache": False}


def _padded_text(batch: int, length: int, seed: int) -> Kwargs:
    return {**_text_inputs(batch, length, seed), "attention_mask": padding(batch, length, seed, "right")}


def _padded_twice(batch: int, length: int, seed: int) -> Kwargs:
    mask = padding(batch, PROMPT, seed + 1, "right")
    return {**_padded_text(batch, length, seed), "decoder_attention_mask": mask}


def _whisper_inputs(batch: int, length: int, seed: int) -> Kwargs:
    return {"input_features": values(batch, MEL, 2 * length, seed=seed), **_prompt(batch, seed)}


def _whisper_without_cache(batch: int, length: int, seed: int) -> Kwargs:
    return {**_whisper_inputs(batch, length, seed), "use_cache": False}


def _whisper_padded(batch: int, length: int, seed: int) -> Kwargs:
    mask = padding(batch, PROMPT, seed, "right")
    return {**_whisper_inputs(batch, length, seed), "decoder_attention_mask": mask}


def _frames(batch: int, length: int, seed: int) -> Kwargs:
    return {"input_features": values(batch, 4 * length, MEL, seed=seed), **_prompt(batch, seed)}


def _padded_frames(batch: int, length: int, seed: int) -> Kwargs:
    frames = padding(batch, length, seed, "right").repeat_interleave(4, dim=1)
    return {**_frames(batch, length, seed), "attention_mask": frames}
