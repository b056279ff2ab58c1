"""Define `eff::codebook_v1`: each token becomes the mean of the codes that it is most like (codebook features).

Of x `[..., G, D]` every group has a book of N codes `[G, N, D]`. A code's score is its inner product with the token over the code's
own norm; the `top_k` codes of the highest scores are averaged. `written` makes all scores, `[..., G, N]`, and sorts them: 40 KB a
token and group at 10,000 codes, more than anything else in the model. The op goes over the book once and holds scores of a few
tokens and codes at a time: on CPU a C++ kernel (`cpp/codebook.cpp`), elsewhere pieces of the book by torch operations.

Scores are sums in float32, as the source's own are; codes whose scores are closer than rounding may rank either way, as they do
from one BLAS to another. Paper: arXiv:2310.17230.
"""

from __future__ import annotations

import torch
from torch import Tensor

from effcompile.core.errors import EffError
from effcompile.ops import native
from effcompile.ops.attention import define

NAME = "eff::codebook_v1"
_PIECE = 1024  # codes whose scores exist at a time
_TOKENS = 4096  # tokens times groups whose scores exist at a time


def written(x: Tensor, codes: Tensor, top_k: int) -> Tensor:
    """Make all scores: how models are written."""
    scores = torch.einsum("...gd,gnd->...gn", x, codes) / codes.norm(dim=-1)
    ids = scores.topk(top_k, dim=-1).indices
    group = torch.arange(codes.shape[0], device=codes.device)[:, None]
    return codes[group, ids].mean(-2)


def codebook(x: Tensor, codes: Tensor, top_k: int) -> Tensor:
    """Return the mean of the `top_k` codes of each token and group, `[..., G, D]` in x's dtype.

    Raises:
        EffError: EFF-R120 for shapes that do not fit, or for more codes than there are.
    """
    check(x, codes, top_k)
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    scale = 1 / codes.norm(dim=-1, dtype=wide)
    if native.runs(native.CODEBOOK, x, codes):
        return _native(x, codes, scale, top_k)
    return streamed(x, codes, scale, top_k)


def _native(x: Tensor, codes: Tensor, scale: Tensor, top_k: int) -> Tensor:
    flat, book = native.dense_rows(x.reshape(-1, *x.shape[-2:])), native.dense_rows(codes)
    out = x.new_empty(flat.shape)
    sizes = [
        *flat.shape[:2],
        book.shape[1],
        book.shape[2],
        top_k,
        torch.get_num_threads(),
        *flat.stride()[:2],
        *book.stride()[:2],
    ]
    native.call(native.CODEBOOK, "eff_codebook", x.dtype, sizes, [flat, book, scale.contiguous(), out])
    return out.reshape(x.shape)


def streamed(x: Tensor, codes: Tensor, scale: Tensor, top_k: int) -> Tensor:
    """Do the same by torch operations: the best codes of each piece of the book are kept beside those of the pieces before."""
    flat = x.reshape(-1, *x.shape[-2:])
    return torch.cat([_of(part, codes, scale, top_k) for part in flat.split(max(1, _TOKENS // x.shape[-2]))]).reshape(
        x.shape
    )


def _of(x: Tensor, codes: Tensor, scale: Tensor, top_k: int) -> Tensor:
    wide, book = x.to(scale.dtype).transpose(0, 1), codes.to(scale.dtype)  # [G, T, D]
    best = ids = None
    for begin in range(0, codes.shape[1], _PIECE):
        part = slice(begin, begin + _PIECE)
        scores = wide @ (book[:, part] * scale[:, part, None]).transpose(1, 2)
        here = scores.topk(min(top_k, scores.shape[-1]), dim=-1)
        if best is None or ids is None:
            best, ids = here.values, here.indices
            continue
        both = torch.cat([best, here.values], -1)
        best, places = both.topk(min(top_k, both.shape[-1]), dim=-1)
        ids = torch.cat([ids, here.indices + begin], -1).gather(-1, places)
    assert ids is not None
    group = torch.arange(len(codes), device=codes.device)[:, None, None]
    return book[group, ids].mean(-2).transpose(0, 1).to(x.dtype)


def check(x: Tensor, codes: Tensor, top_k: int) -> None:
    """Raise EFF-R120 unless the operands fit."""
    if codes.dim() != 3 or x.dim() < 2 or (x.shape[-2], x.shape[-1]) != (codes.shape[0], codes.shape[2]):
        raise EffError(
            "EFF-R120", f"tokens {list(x.shape)} and codes {list(codes.shape)}; [..., G, D] and [G, N, D] fit"
        )
    if not 1 <= top_k <= codes.shape[1]:
        raise EffError("EFF-R120", f"{top_k} of {codes.shape[1]} codes")


def _fake(x: Tensor, codes: Tensor, top_k: int) -> Tensor:
    check(x, codes, top_k)
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def register() -> None:
    """Register the op, once."""
    define(NAME, "(Tensor x, Tensor codes, int top_k) -> Tensor", codebook, _fake)
