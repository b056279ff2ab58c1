"""Store a buffer of tokens in 8 bits where a graph reads it as it likes: write tokens at any places, read all of them.

What a cache of a prepared model is asked for is attention. A graph that keeps latents (MLA) multiplies them first, and all of its
operations read the buffer: what they get is the unpacked buffer, with the tokens of the same call as they are.
"""

from __future__ import annotations

import torch
from torch import Tensor

from effcompile.ops.attention import define
from effcompile.ops.kv.latent import unpack
from effcompile.ops.kv.per_token import quantize

WRITE = "eff::kv_write_tokens_v1"
READ = "eff::kv_read_tokens_v1"


def write(codes: Tensor, scales: Tensor, places: Tensor, tokens: Tensor) -> None:
    """Write tokens `[B, H, S, D]` to `places`, int64 `[S]`, of codes `[B, H, C, D]` with scales `[B, H, C]`.

    Codes are int8, or the bits of 8-bit floats as uint8; of another dtype they are the tokens, and there are no scales.
    """
    if codes.dtype not in (torch.int8, torch.uint8):
        codes[:, :, places] = tokens
        return
    code, scale = quantize(tokens, codes.dtype == torch.uint8)
    codes[:, :, places] = code
    scales[:, :, places] = scale


def read(codes: Tensor, scales: Tensor, places: Tensor, tokens: Tensor) -> Tensor:
    """Return all tokens `[B, H, C, D]`, those at `places` as they are given."""
    found = unpack(codes, scales).to(tokens.dtype)
    found[:, :, places] = tokens
    return found


def _fake_read(codes: Tensor, scales: Tensor, places: Tensor, tokens: Tensor) -> Tensor:
    return tokens.new_empty(codes.shape)


def register() -> None:
    """Register the ops, once."""
    given = "Tensor places, Tensor tokens"
    define(WRITE, f"(Tensor(a!) codes, Tensor(b!) scales, {given}) -> ()", write, lambda *operands: None)
    define(READ, f"(Tensor codes, Tensor scales, {given}) -> Tensor", read, _fake_read)
